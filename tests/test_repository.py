"""What the repository says about itself is true: code in the README and docs runs, links lead somewhere, versions agree."""

import os
import pathlib
import re
import subprocess
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def python_of(page: pathlib.Path) -> list[str]:
    return [code for language, code in FENCE.findall(page.read_text()) if language == "python"]


@pytest.mark.medium
@pytest.mark.usefixtures("race_detector")
@pytest.mark.parametrize("page", [p for p in PAGES if python_of(p)], ids=name)
def test_code_runs(page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All the python of a page, one block after the other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names: dict[str, object] = {"__name__": "__main__"}
    for code in python_of(page):
        exec(compile(code, name(page), "exec"), names)


def anchors(page: pathlib.Path) -> set[str]:
    """Headings as GitHub makes anchors of them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: pathlib.Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in anchors(there), f"{name(page)} links to {target}, a heading that is not there"


def test_every_page_is_in_the_index() -> None:
    linked = set(LINK.findall((ROOT / "docs" / "index.md").read_text()))
    assert {p.name for p in (ROOT / "docs").glob("*.md")} <= linked | {"index.md"}


def test_every_example_is_in_the_readme() -> None:
    linked = set(LINK.findall((ROOT / "README.md").read_text()))
    assert {f"examples/{p.name}" for p in (ROOT / "examples").glob("*.py")} <= linked


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_pages_name_targets_that_make_has(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"\bmake ([\w-]+)", " ".join(code for _, code in FENCE.findall((ROOT / page).read_text())))
    assert {"test", "test-fast"} <= set(named) <= targets


def test_files_are_read_and_written_as_utf_8() -> None:
    """Whatever the locale: of text each call says so."""
    calls = {path: re.findall(r"\b(?:read|write)_text\(.*", path.read_text(encoding="utf-8")) for path in (ROOT / "mkdsl").rglob("*.py")}
    own = ("read_text(path", "read_text(directory")  # mkdsl.models.read_text
    assert not [(name(path), c) for path, found in calls.items() for c in found if "utf-8" not in c and not c.startswith(own)]


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert project["version"] == released[0]
    pinned = (ROOT / ".python-version").read_text().strip()
    assert project["requires-python"] == f">={pinned}"


def test_what_is_no_code_is_installed_too() -> None:
    """All other files of the package are named as its data, or an installed mkdsl lacks them."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["mkdsl"]
    package = ROOT / "mkdsl"
    files = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert package / "engine" / "page" / "page.html" in files
    assert files == {p for pattern in patterns for p in package.glob(pattern)}


def test_ci_is_a_script_that_runs_all_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "make test" in script.read_text()
