"""Every example runs as a user would run it, without a warning or a race (which raises), and says something."""

import os
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = sorted((pathlib.Path(__file__).parent.parent / "examples").glob("*.py"))
LESSONS = [path for path in EXAMPLES if path.stem != "ray_serve"]  # that one wants a cluster: tests/serve/test_ray.py


@pytest.mark.medium
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_example_runs(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-W", "error", str(path)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_example_is_short(path: pathlib.Path) -> None:
    assert len(path.read_text().splitlines()) <= 80
