"""`mkdsl probe`, on a machine without a GPU or with one that is pretended."""

import dataclasses

import pytest
from typer.testing import CliRunner

from mkdsl.engine import _cli_probe
from mkdsl.engine._cli import app
from mkdsl.gpu._probe_fit import Gpu
from mkdsl.schedule import PROFILES, profile


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_no_gpu():
    result = run("probe")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("mkdsl: no GPU: ")


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--out", "here.txt"], "does not end in .json"), (["--name", "a/b"], "'a/b' has more")]
)
def test_arguments_that_make_no_target(arguments, message):
    result = run("probe", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_measured_gpu_can_be_explained(tmp_path, monkeypatch):
    def probe(gpu, name, report):
        report("L2")
        return dataclasses.replace(PROFILES["h200"], name=name, bandwidth=4e12, measured=("bandwidth",))

    monkeypatch.setattr(_cli_probe, "gpu_at_hand", lambda: Gpu("NVIDIA H200", (9, 0), 132))
    monkeypatch.setattr(_cli_probe, "probe", probe)
    path = tmp_path / "mine.json"
    result = run("probe", "--out", path, "--name", "mine")
    assert result.exit_code == 0, result.output
    assert "device memory, TB/s" in result.stdout and "4.00" in result.stdout and "written to" in result.stdout
    assert profile(str(path)).bandwidth == 4e12
    explained = run("explain", "smollm2-135m", "--target", path)
    assert explained.exit_code == 0 and "on mine: batch 1" in explained.stdout


def test_a_file_that_is_no_profile(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"name": "mine"}')
    result = run("explain", "smollm2-135m", "--target", path)
    assert result.exit_code == 2
    assert "missing" in result.stderr
