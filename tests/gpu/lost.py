"""Kernels that lose a hand-off: what a worker says in one place is left out of the code, while the schedule stays the one that was proven."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jax.experimental import pallas as pl

from mkdsl.lower import Machine, _exchange, _kernel
from mkdsl.lower.phases._attention_item import Item


@contextlib.contextmanager
def losing_event(phase: str, *, iteration: int, worker: int) -> Iterator[None]:
    """While kernels are emitted: a worker does not signal that it is done with a phase in an iteration."""
    emit, signal = _kernel._compute, _kernel.signal
    now: list[Any] = []

    def compute(m: Machine, of: Any, at: Any, i: Any) -> Any:
        now[:] = [at]
        return emit(m, of, at, i)

    def lossy(m: Machine, of: Any) -> None:
        _unless(of.name == phase, (m.worker == worker) & (now[0] == iteration), lambda: signal(m, of))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_kernel, "_compute", compute)
        patch.setattr(_kernel, "signal", lossy)
        yield


@contextlib.contextmanager
def losing_data(phase: str, *, iteration: int, worker: int) -> Iterator[None]:
    """While kernels are emitted: what a worker computes in a phase in an iteration it does not write, but signals."""
    hand_over = Machine.hand_over

    def lossy(m: Machine, tensor: str, of: Any, at: Any, *rest: Any) -> None:
        _unless(of.name == phase, (m.worker == worker) & (at == iteration), lambda: hand_over(m, tensor, of, at, *rest))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Machine, "hand_over", lossy)
        yield


@contextlib.contextmanager
def losing_shares(phase: str, *, worker: int) -> Iterator[None]:
    """While kernels are emitted: what a worker folds in a phase of its cluster's items it does not send."""
    send_sums, send = _exchange.send_sums, Item.send

    def lossy_sums(m: Machine, of: Any, *rest: Any) -> None:
        _unless(of.name == phase, m.worker == worker, lambda: send_sums(m, of, *rest))

    def lossy_send(item: Item, *rest: Any) -> None:
        _unless(item.phase.name == phase, item.m.worker == worker, lambda: send(item, *rest))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_exchange, "send_sums", lossy_sums)
        patch.setattr(Item, "send", lossy_send)
        yield


def _unless(here: bool, lost: Any, do: Callable[[], None]) -> None:
    if here:
        pl.when(~lost)(do)
    else:
        do()
