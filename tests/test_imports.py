"""Packages import one way, and each other's public names only."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BELOW = {  # what each package may import
    "ops": set(),
    "models": {"ops"},
    "graph": {"ops"},
    "schedule": {"graph"},
    "proof": {"graph", "schedule"},
    "simulate": {"graph", "schedule"},
    "search": {"graph", "schedule", "proof", "simulate"},
    "lower": {"ops", "graph", "schedule", "proof"},
    "gpu": {"ops", "graph", "schedule", "proof", "simulate", "search", "lower"},
    "engine": {"ops", "models", "graph", "schedule", "proof", "simulate", "search", "lower", "gpu"},
    "serve": {"models", "engine"},
}


def imported(path: pathlib.Path) -> Iterator[list[str]]:
    """All names of mkdsl that a file imports, as the parts between the dots, without the first: ["graph", "_fuse", "fused"]."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}, line {node.lineno}: name the package"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1:] for name in names if name.split(".")[0] == "mkdsl")


def files(folder: str) -> list[pathlib.Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def test_every_package_has_its_place() -> None:
    packages = {path.parent.name for path in (ROOT / "mkdsl").glob("*/__init__.py")}
    assert packages == set(BELOW)


@pytest.mark.parametrize("package", BELOW)
def test_packages_import_one_way(package: str) -> None:
    for path in files(f"mkdsl/{package}"):
        used = {".".join(name[:1]) for name in imported(path)}
        assert used <= BELOW[package] | {package}, path.relative_to(ROOT)


@pytest.mark.parametrize("package", [*BELOW, ""])
def test_packages_import_public_names_of_others(package: str) -> None:
    """Those of mkdsl itself, "", too."""
    here = [ROOT / "mkdsl" / "__init__.py"] if not package else files(f"mkdsl/{package}")
    for path in here:
        private = [name for name in imported(path) if name[:1] != [package] and any(part.startswith("_") for part in name)]
        assert not private, path.relative_to(ROOT)


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_benchmarks_and_examples_import_public_names(folder: str) -> None:
    for path in files(folder):
        private = [name for name in imported(path) if any(part.startswith("_") for part in name)]
        assert not private, path.relative_to(ROOT)


def test_the_oracle_is_independent() -> None:
    """It says a second time what a kernel does: of the rules that proof and kernel share, it imports none. Only `sources` asks the search."""
    shared = _defined(ROOT / "mkdsl" / "schedule" / "_rules.py")
    assert "read_instance" in shared
    for path in files("tests/oracle"):
        names = list(imported(path))
        assert not [name for name in names if name[-1] in shared], path
        allowed = {"ops", "graph", "schedule", *(["search"] if path.stem == "sources" else [])}
        assert {".".join(name[:1]) for name in names} <= allowed, path


def test_the_grammar_is_independent() -> None:
    """It says what a decode step means, and what a kernel does with its phases, without looking at how kernels are lowered."""
    for path in files("tests/grammar"):
        assert {".".join(name[:1]) for name in imported(path)} <= {"", "ops", "graph"}, path


def _defined(path: pathlib.Path) -> list[str]:
    """Functions and classes of a file."""
    return [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
