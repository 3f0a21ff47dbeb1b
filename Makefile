# `make demo` and `make test` do all the set-up themselves: Python 3.12, git, make and gcc are all that has to be there.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
AOT := $(VENV)/aot/.installed
JOBS ?= 2
# Whichever of these is there and new enough makes the environment; `make PYTHON=/path/to/python` names another.
PYTHON ?= $(shell for p in python3.12 python3 python3.13 python3.14; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
# An NVIDIA driver that answers: then JAX's CUDA libraries are installed too.
EXTRAS = $(shell nvidia-smi >/dev/null 2>&1 && echo dev,cuda13 || echo dev)

.DEFAULT_GOAL := help
.PHONY: help demo serve-demo test test-fast lint format clean setup

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' $(MAKEFILE_LIST) | while read -r target what; do printf '  make %-11s %s\n' "$$target" "$$what"; done

demo: $(STAMP) ## the main job: SmolLM2 answers a question, and its decode step becomes one kernel
	@$(BIN)/mkdsl demo

serve-demo: $(STAMP) ## SmolLM2 behind OpenAI's interface, at http://127.0.0.1:8000/v1
	@$(BIN)/mkdsl serve "$$($(BIN)/python -c 'from mkdsl.engine import fetch_smollm2; print(fetch_smollm2())')" --name smollm2

test: lint $(AOT) ## lint, types and all tests but the slow ones
	@$(BIN)/pytest -n $(JOBS)

test-fast: lint $(AOT) ## the edit loop: lint and the quick tests, about a minute
	@$(BIN)/pytest -n $(JOBS) -m "not slow and not medium"

lint: $(STAMP) ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: $(STAMP) ## rewrite the sources as ruff wants them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

setup: $(STAMP) $(AOT) ## only the environment in .venv

clean: ## remove the environment and all caches of this directory
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip speaks only of errors (-qq). Constraints and indexes are those of the machine's own pip configuration.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "mkdsl needs Python 3.12 or newer, and found none: install it, or name it with make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version) and mkdsl[$(EXTRAS)]; this takes a minute or two, once"
	@$(PYTHON) -m venv $(VENV) || { echo "python -m venv failed: on Debian and Ubuntu, install the package python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable ".[$(EXTRAS)]"
	@touch $@

# What assembles kernels without a GPU: a folder of its own, for the reason that mkdsl/gpu/_compiler.py gives.
$(AOT): $(STAMP) mkdsl/gpu/_compiler.py
	@mkdir -p $(@D)
	@packages=$$($(BIN)/python -c 'from mkdsl.gpu._compiler import to_install; print(*to_install())') && { test -z "$$packages" || { \
	    echo "setting up $(@D) with $$packages; this fetches 233 MB, once"; \
	    $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target $(@D) $$packages; }; }
	@touch $@
