"""Schedules on disk: found again under the same key, searched again when anything that they depend on is another."""

import ast
import dataclasses
import pathlib
import shutil
from collections.abc import Callable

import pytest
from oracle.graphs import tiny

import mkdsl
from mkdsl.proof import Rule, ScheduleError
from mkdsl.schedule import PROFILES, Handoff, profile
from mkdsl.search import _cache, directory, search
from mkdsl.search import _search as search_module

H200 = profile("h200")
PACKAGE = pathlib.Path(mkdsl.__file__).parent


def test_where_things_are_kept(kept: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    assert directory() == kept
    assert directory("profiles") == tmp_path / "mkdsl" / "profiles"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert directory() == pathlib.Path.home() / ".cache" / "mkdsl" / "schedules"


def test_a_schedule_is_searched_once(kept: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    schedule = search(tiny(), batch=1, target="h200")
    assert len(list(kept.iterdir())) == 1
    monkeypatch.setattr(search_module, "find", None)
    assert search(tiny(), batch=1, target="h200") == schedule


def test_without_a_cache_nothing_is_kept(kept: pathlib.Path):
    search(tiny(), batch=1, target="h200", cache=False)
    assert not kept.exists()


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    search(tiny(), batch=1, target="h200")


# What is there may be damaged, or no schedule for this GPU.


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
    "no text": lambda b: b"\xff" + b,
    "other numbers": lambda b: b.replace(b"1", b"2", 40),
}


@pytest.mark.medium
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_searched_again(kept: pathlib.Path, damage: Callable[[bytes], bytes]):
    schedule = search(tiny(), batch=1, target="h200")
    (entry,) = kept.iterdir()
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    assert search(tiny(), batch=1, target="h200") == schedule
    assert entry.read_bytes() == good


def test_what_is_loaded_is_proven(kept: pathlib.Path):
    schedule = search(tiny(), batch=1, target="h200")
    (entry,) = kept.iterdir()
    _cache.store(entry.stem, dataclasses.replace(schedule, max_in_flight=0))
    with pytest.raises(ScheduleError) as error:
        search(tiny(), batch=1, target="h200")
    assert error.value.rule is Rule.RING


# The key.


def test_what_a_key_follows():
    """The graph, the batch, every number of the profile, the hand-off."""
    slower = dataclasses.replace(H200, mma_us=H200.mma_us * 2)
    sentinel, released = Handoff.SENTINEL, Handoff.RELEASE_ACQUIRE
    arguments = [
        (tiny(), 1, H200, sentinel), (tiny(6), 1, H200, sentinel), (tiny(), 2, H200, sentinel), (tiny(), 1, PROFILES["h100"], sentinel),
        (tiny(), 1, slower, sentinel), (tiny(), 1, H200, released),
    ]  # fmt: skip
    keys = [_cache.key(*a) for a in arguments]
    assert len(set(keys)) == len(keys)
    assert _cache.key(tiny(), 1, dataclasses.replace(H200), sentinel) == keys[0]


def key_of_a_copy(root: pathlib.Path, monkeypatch: pytest.MonkeyPatch, changed: pathlib.Path | None = None) -> str:
    """The key if the package lay under `root` and a line were added to one of its files."""
    shutil.copytree(PACKAGE, root, ignore=shutil.ignore_patterns("__pycache__"))
    if changed is not None:
        with (root / changed).open("a") as file:
            file.write("\n# another line\n")
    with monkeypatch.context() as patch:
        patch.setattr(_cache, "ROOT", root)
        return _cache.key(tiny(), 1, H200, Handoff.SENTINEL)


def files_of(*packages: str) -> list[pathlib.Path]:
    """The last file of each, with the deepest path."""
    found = [sorted((PACKAGE / p).rglob("*.py"), key=lambda path: (len(path.parts), path))[-1] for p in packages]
    return [path.relative_to(PACKAGE) for path in found]


def test_the_key_does_not_depend_on_where_the_package_lies(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    assert key_of_a_copy(tmp_path / "a", monkeypatch) == _cache.key(tiny(), 1, H200, Handoff.SENTINEL)


@pytest.mark.parametrize("file", files_of(*_cache.SOURCES), ids=str)
def test_the_key_follows_the_source_of_what_decides(file: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    assert key_of_a_copy(tmp_path / "a", monkeypatch, file) != _cache.key(tiny(), 1, H200, Handoff.SENTINEL)


@pytest.mark.parametrize("file", [*files_of("lower", "gpu", "engine", "models"), pathlib.Path("__init__.py")], ids=str)
def test_the_key_does_not_follow_what_comes_after(file: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """A kernel that is lowered otherwise is still of the same schedule."""
    assert key_of_a_copy(tmp_path / "a", monkeypatch, file) == _cache.key(tiny(), 1, H200, Handoff.SENTINEL)


def imported(package: str) -> set[str]:
    """Packages of mkdsl that a package's files import."""
    nodes = [n for path in (PACKAGE / package).rglob("*.py") for n in ast.walk(ast.parse(path.read_text()))]
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    return {name.split(".")[1] for name in names if name.startswith("mkdsl.")}


def test_all_packages_that_the_search_builds_on_are_followed():
    """All but what traces a decode step: what comes of that is the graph, which the key holds itself."""
    reached, new = set(), {"search"}
    while new:
        reached |= new
        new = {p for package in new for p in imported(package)} - reached
    assert reached - {"ops"} == set(_cache.SOURCES)
