"""For the search's tests: a cache on disk of each test's own."""

import pathlib

import pytest


@pytest.fixture(autouse=True)
def kept(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Where the schedules of a test are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mkdsl" / "schedules"
