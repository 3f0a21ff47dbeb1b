"""What a schedule can violate, and the error that says so."""

import enum


class Rule(enum.StrEnum):
    """The rules of the proof. `ScheduleError.rule` says which one a schedule breaks."""

    TYPE = "a field has the type it is declared with"
    NAMES = "the schedule has the graph's phases and tensors, in one of its orders"
    BATCH = "a kernel decodes 1 to 16 sequences, padded to a power of two"
    RING = "the ring has stages to fill and to fold, and no more units in flight than stages"
    RESIDENT = "all workers are resident on the GPU at once, in clusters of one size"
    TILE = "tiles divide their phase and are ones that the kernel can compute"
    STAGE = "a unit fits a stage of the ring"
    INSTRUCTION = "the GPU has the instruction"
    COVERAGE = "every item belongs to exactly one worker"
    WAIT = "a wait is for the event of an earlier step"
    DTYPE = "a tensor crosses in a dtype that loses nothing"
    SPLITS = "only who merges splits reads them"
    INCARNATIONS = "a tensor has as many slots as its hand-off needs"
    WRITER = "each instance of a tensor is written once, whole, before it is read"
    SHARED_MEMORY = "the shared memory of a worker is as modelled, and fits"
    BEFORE = "a read happens after the write, through release events"
    CLEAR = "a slot is cleared after the reads of its old instance"
    FENCE = "a clear is fenced before others look at what comes into that slot"
    EARLY = "a clear is fenced before others look ahead of their waits"
    REUSE = "a slot is written again after its former readers and writer are done"
    EXCHANGE = "a cluster's shared memory is written when its owner is done with it"
    COUNT = "an event is complete before its next iteration is signalled"
    ROOM = "some schedule fits the GPU"


class ScheduleError(ValueError):
    """A schedule that must not run, or that cannot be found. `rule` says what it breaks; the message names the phase, worker or tensor, and
    the numbers."""

    def __init__(self, rule: Rule, message: str) -> None:
        super().__init__(message)
        self.rule = rule

    def __reduce__(self) -> tuple[type["ScheduleError"], tuple[Rule, str]]:
        """It may cross from one process to another."""
        return type(self), (self.rule, str(self))


def require(condition: bool, rule: Rule, message: str) -> None:
    """Raises ScheduleError where a condition does not hold."""
    if not condition:
        raise ScheduleError(rule, message)
