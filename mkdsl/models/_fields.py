"""JSON files read field by field: what is missing, or of another kind than a decoder wants, is refused by file, field and value."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from mkdsl.models._errors import CheckpointError


def read_text(path: pathlib.Path) -> str:
    """A file's text, UTF-8 whatever the locale, with or without a byte-order mark.

    Raises:
      CheckpointError: there is no such file, or it is no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        beside = "there is no such directory" if not path.parent.is_dir() else "it is not there"
        raise CheckpointError(f"{path}: {beside}; give the directory of a Hugging Face checkpoint") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      CheckpointError: there is no such file, or it holds no JSON object.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}; it should hold a JSON object; download it again")
    return value


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of a JSON object: `path` is its file, `within` the name of the field that holds it, if one does.

    Every reader takes a field's name, returns its value, and raises CheckpointError where it is not what the reader is named for. Where
    the field is not there it returns `default`, or refuses if that is None.
    """

    path: pathlib.Path
    values: Mapping[str, Any]
    within: str = ""

    def integer(self, key: str, default: int | None = None) -> int:
        return self._read(key, default, "a positive integer below 2**31", lambda v: type(v) is int and 0 < v < 1 << 31)

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._read(key, default, "a positive number", _is_positive))

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        def accepts(value: Any) -> bool:
            return isinstance(value, list) and len(value) == count and all(_is_positive(v) for v in value)

        return tuple(map(float, self._read(key, None, f"a list of {count} positive numbers", accepts)))

    def flag(self, key: str, default: bool) -> bool:
        return self._read(key, default, "true or false", lambda v: type(v) is bool)

    def tokens(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Token ids: a number or a list of them; none where the field is null."""
        value = self.values.get(key, default)
        tokens = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
        if any(type(token) is not int for token in tokens):
            self.refuse(key, "it should be a token's number, or a list of them")
        return tokens

    def section(self, key: str) -> "Fields":
        """A field's own fields; none where it is null or not there."""
        value = {} if self.values.get(key) is None else self.values[key]
        if not isinstance(value, dict):
            self.refuse(key, "it should be an object of parameters, or null")
        return Fields(self.path, value, f"{self.within}{key}.")

    def refuse(self, key: str, remedy: str) -> NoReturn:
        """Raises CheckpointError: this field's value is the reason."""
        raise CheckpointError(f"{self.path}: {self.within}{key}={self.values.get(key)!r}; {remedy}")

    def _read(self, key: str, default: Any, accepted: str, accepts: Callable[[Any], bool]) -> Any:
        if key not in self.values and default is None:
            raise CheckpointError(f"{self.path}: has no {self.within}{key}; it should be {accepted}, as Hugging Face writes it")
        value = self.values.get(key, default)
        if not accepts(value):
            self.refuse(key, f"it should be {accepted}")
        return value


def _is_positive(value: Any) -> bool:
    """JSON as Python reads it may say NaN and Infinity."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max
