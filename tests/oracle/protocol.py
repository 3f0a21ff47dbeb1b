"""What may be wrong with the protocol itself, in one worker of a program: no schedule can say this, so it shows what the simulator finds."""

import dataclasses
import random

from oracle.operations import SENTINEL, Enter, Fence, Free, Look, Op, Program, Receive, Send, Signal, Wait, Write

Random = random.Random


def _of(ops: list[Op], *kinds: type) -> list[int]:
    return [i for i, op in enumerate(ops) if isinstance(op, kinds)]


def _take_clear(r: Random, ops: list[Op]) -> tuple[int, Op]:
    """Takes a clear out of its step, from all blocks that overlap. Returns where the step begins, and the clear."""
    op = ops[at := r.choice([i for i, op in enumerate(ops) if isinstance(op, Write) and op.instance == SENTINEL and op.words])]
    start, end = _step(ops, at)
    ops[start:end] = [o for o in ops[start:end] if o != op]
    return start, op


def _step(ops: list[Op], at: int) -> tuple[int, int]:
    signals = _of(ops, Signal)
    return max((i + 1 for i in signals if i < at), default=0), min((i for i in signals if i >= at), default=len(ops))


def _move(ops: list[Op], start: int, end: int) -> None:
    ops.insert(end, ops.pop(start))


def early_signal(r: Random, ops: list[Op], others: list[Op]) -> None:
    """Before everything the phase does."""
    at = r.choice(_of(ops, Signal))
    _move(ops, at, _step(ops, at)[0])


def dropped_signal(r: Random, ops: list[Op], others: list[Op]) -> None:
    del ops[r.choice(_of(ops, Signal))]


def duplicated_signal(r: Random, ops: list[Op], others: list[Op]) -> None:
    at = r.choice(_of(ops, Signal))
    ops.insert(at, ops[at])


def dropped_clear(r: Random, ops: list[Op], others: list[Op]) -> None:
    _take_clear(r, ops)


def early_clear(r: Random, ops: list[Op], others: list[Op]) -> None:
    """One step before, where its readers may not be done."""
    start, op = _take_clear(r, ops)
    ops.insert(_step(ops, max(0, start - 1))[0], op)


def late_clear(r: Random, ops: list[Op], others: list[Op]) -> None:
    """One or two steps after."""
    start, op = _take_clear(r, ops)
    signals = [i for i in _of(ops, Signal) if i >= start]
    ops.insert(signals[min(len(signals) - 1, r.randint(1, 2))], op)


def clear_by_another(r: Random, ops: list[Op], others: list[Op]) -> None:
    """At the end of the same number of steps."""
    start, op = _take_clear(r, ops)
    signals = _of(others, Signal)
    others.insert(signals[min(len([i for i in _of(ops, Signal) if i < start]), len(signals) - 1)], op)


def dropped_fences(r: Random, ops: list[Op], others: list[Op]) -> None:
    ops[:] = [op for op in ops if not isinstance(op, Fence)]


def unreleased(r: Random, ops: list[Op], others: list[Op]) -> None:
    ops[:] = [dataclasses.replace(op, release=False) if isinstance(op, Signal) else op for op in ops]


def early_look(r: Random, ops: list[Op], others: list[Op]) -> None:
    """Before the waits in front of it."""
    looks = [i for i in _of(ops, Look) if i and isinstance(ops[i - 1], Wait)]
    _move(ops, at := r.choice(looks), at - 1)


def early_free(r: Random, ops: list[Op], others: list[Op]) -> None:
    """Every stage, before it has been read to its end."""
    for at in _of(ops, Free):
        _move(ops, at, at - 1)


def dropped_free(r: Random, ops: list[Op], others: list[Op]) -> None:
    del ops[r.choice(_of(ops, Free)[: len(_of(ops, Free)) // 2])]


def early_send(r: Random, ops: list[Op], others: list[Op]) -> None:
    """Sums to the cluster before the step's waits."""
    at = r.choice(_of(ops, Send))
    _move(ops, at, max(i for i in _of(ops, Enter) if i < at) + 1)


def one_set(r: Random, ops: list[Op], others: list[Op]) -> None:
    """All rounds' sums to the same buffers."""
    if not any(ops[i].set for i in _of(ops, Send)):
        raise IndexError("one round only")
    ops[:] = [dataclasses.replace(op, set=0) if isinstance(op, Send) else op for op in ops]


def dropped_send(r: Random, ops: list[Op], others: list[Op]) -> None:
    del ops[r.choice(_of(ops, Send))]


def unreceived(r: Random, ops: list[Op], others: list[Op]) -> None:
    """A round used before it is there, so that it is used never."""
    del ops[r.choice(_of(ops, Receive))]


PROTOCOL = {
    f.__name__: f
    for f in (
        early_signal, dropped_signal, duplicated_signal, dropped_clear, early_clear, late_clear, clear_by_another, dropped_fences,
        unreleased, early_look, early_free, dropped_free, early_send, one_set, dropped_send, unreceived,
    )
}  # fmt: skip


def broken(r: Random, program: Program, kind: str) -> Program | None:
    """The program with one worker's protocol broken, or None if it has nothing of that kind."""
    compute = [list(ops) for ops in program.compute]
    a, b = r.sample(range(len(compute)), 2)
    try:
        PROTOCOL[kind](r, compute[a], compute[b])
    except IndexError:  # nothing to choose from
        return None
    return dataclasses.replace(program, compute=compute) if compute != program.compute else None
