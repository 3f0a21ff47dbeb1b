"""Frozen dataclasses out of JSON that somebody may have edited: what does not fit is refused by name."""

import dataclasses
import math
import typing
from typing import Any


def parse[T](cls: type[T], data: Any, what: str) -> T:
    """An instance of a dataclass of strings, numbers and tuples of these.

    Args:
      cls: the dataclass.
      data: as json.loads returned it: an object with a member for every field that has no default, lists for tuples.
      what: what it is, for messages.

    Raises:
      ValueError: something is missing, unknown, of another type, or a number that is negative or not finite; the message names the field.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{what}: a JSON object is needed, not {data!r:.40}")
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}  # pyright: ignore[reportArgumentType]
    types = typing.get_type_hints(cls)
    for problem, names in (("missing", required - set(data)), ("unknown", set(data) - set(types))):
        if names:
            raise ValueError(f"{what}: {problem} {', '.join(sorted(names))}")
    return cls(**{name: _value(types[name], value, f"{what}: {name}") for name, value in data.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    if typing.get_origin(kind) is tuple:
        return _tuple(typing.get_args(kind), value, where)
    accepted = (int, float) if kind is float else (kind,)
    if type(value) not in accepted:
        raise ValueError(f"{where} is {value!r:.40}, not {'a number' if kind is float else kind.__name__}")
    if kind is not str and not 0 <= value < math.inf:
        raise ValueError(f"{where} is {value!r}, negative or not finite")
    return value


def _tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} is {value!r:.40}, not a list")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        raise ValueError(f"{where} has {len(value)} items, not {len(kinds)}: {value!r:.40}")
    return tuple(_value(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True)))
