"""Files kept on disk: there whole or not at all, and believed only if they hold what was written."""

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import tempfile

log = logging.getLogger("mkdsl")


def directory(kind: str = "schedules") -> pathlib.Path:
    """Where schedules are kept, or another kind of thing: $MKDSL_CACHE/schedules, else $XDG_CACHE_HOME/mkdsl/schedules, by default under ~/.cache."""
    if own := os.environ.get("MKDSL_CACHE"):
        return pathlib.Path(own) / kind
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "mkdsl" / kind


def digest(content: bytes) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(content).hexdigest()


@functools.cache
def source_digest(root: pathlib.Path, packages: tuple[str, ...] = ("",)) -> str:
    """A hash of the source of some packages under a folder, or of all."""
    found = hashlib.sha256()
    for path in (p for package in packages for p in sorted((root / package).rglob("*.py"))):
        found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()


def read(path: pathlib.Path) -> bytes | None:
    """What was written there; None if nothing was. A file that holds anything else is removed, and the log says so."""
    try:
        said, _, content = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if said == digest(content).encode():
        return content
    discard(path, "it does not hold what was written")
    return None


def discard(path: pathlib.Path, why: str) -> None:
    """Removes a file that is of no use; it is made again."""
    log.warning("%s is removed and made again: %s", path, why)
    with contextlib.suppress(OSError):
        path.unlink()


def write(path: pathlib.Path, content: bytes) -> None:
    """Keeps something. Atomic, so that nobody reads half of it; a directory that cannot be written to only costs time."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="new-") as folder:
            new = pathlib.Path(folder) / "content"
            new.write_bytes(digest(content).encode() + b"\n" + content)
            os.replace(new, path)
    except OSError as error:
        log.info("%s is not kept: %s", path, error)
