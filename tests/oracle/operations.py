"""What a worker's two roles do, an operation at a time, as plain data. Tests may break it: signal early, clear late, free a stage that is read."""

import dataclasses

SENTINEL = -1  # what a word holds that is cleared: no instance


class Miscompute(Exception):
    """The workers' items or a phase's tiles do not make up the phase's outputs."""


class Overflow(Exception):
    """More memory than there is."""


# Global memory and events.


@dataclasses.dataclass(frozen=True)
class Look:
    """Reads words of an instance; where they validate themselves, until they are there."""

    phase: str
    words: tuple[int, ...]
    instance: int
    waits: bool


@dataclasses.dataclass(frozen=True)
class Wait:
    phase: str
    count: int


@dataclasses.dataclass(frozen=True)
class Fence:
    """The worker's own stores become visible before any later signal."""


@dataclasses.dataclass(frozen=True)
class Write:
    words: tuple[int, ...]
    instance: int


@dataclasses.dataclass(frozen=True)
class Signal:
    phase: str
    release: bool


# The ring.


@dataclasses.dataclass(frozen=True)
class Fill:
    """The loader issues a unit into its stage."""

    unit: int


@dataclasses.dataclass(frozen=True)
class Begin:
    """Compute waits for a unit and begins to fold it."""

    unit: int


@dataclasses.dataclass(frozen=True)
class End:
    """Compute has read the last of a unit's stage."""

    unit: int


@dataclasses.dataclass(frozen=True)
class Free:
    unit: int


# Shared memory, to which a cluster's workers send each other sums.


@dataclasses.dataclass(frozen=True)
class Enter:
    """The worker's own shared memory now holds buffers of this step, by its place in the program."""

    step: int


@dataclasses.dataclass(frozen=True)
class Send:
    """Sums of one round to a peer's shared memory, into one of the step's sets of buffers."""

    to: int
    step: int
    round: int
    set: int


@dataclasses.dataclass(frozen=True)
class Receive:
    """Waits for what these peers send in a round."""

    peers: tuple[int, ...]
    step: int
    round: int


@dataclasses.dataclass(frozen=True)
class Use:
    """Reads what was received in a round for the last time."""

    step: int
    round: int


@dataclasses.dataclass(frozen=True)
class Leave:
    """Nothing in the worker's shared memory is needed any more."""


Op = Look | Wait | Fence | Write | Signal | Fill | Begin | End | Free | Enter | Send | Receive | Use | Leave


@dataclasses.dataclass
class Program:
    """What runs: for each worker the operations of its compute role, in order, and those of its loader.

    owner: of each word of global memory, its tensor. final: words with the instance they must end up with. num_stages, max_in_flight: the ring.
    """

    compute: list[list[Op]]
    loaders: list[list[Op]]
    owner: list[str]
    final: dict[int, int]
    num_stages: int
    max_in_flight: int
