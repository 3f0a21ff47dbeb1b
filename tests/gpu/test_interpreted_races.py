"""A race in an interpreted kernel raises: mk.jit's own detector knows which workers did what to which tensor."""

import dataclasses

import numpy as np
import pytest
import tiny_decoders as tiny

import mkdsl as mk
from mkdsl.gpu import RaceError
from mkdsl.lower.evaluate._frames import Rows
from mkdsl.schedule import profile

SMALL = dataclasses.replace(profile("H200"), name="h200 with 4 SMs", workers=4)
PARAMS = tiny.drawn({"embed": (192, 128)}, 2)
ARGS = PARAMS, (), np.int32(3), np.int32(0)


def step(params, kv, token, pos):
    logits = mk.linear(params["embed"], mk.embed(params["embed"], token))
    return mk.argmax(logits), logits, kv


def test_a_planted_race_raises(monkeypatch):
    """Every worker writes its rows where the first one does."""
    at = Rows.at
    monkeypatch.setattr(Rows, "at", lambda self, tensor, slot: at(dataclasses.replace(self, first=0), tensor, slot))
    found = r"races in an interpreted kernel; .* embed, embed\.out: worker 1 writes .*_machine.py:\d+.*worker 0 writes"
    with pytest.raises(RaceError, match=found):
        mk.jit(step, target=SMALL, interpret=True)(*ARGS)


@pytest.mark.usefixtures("race_detector")
def test_without_one_nothing_is_raised():
    _, logits, _ = mk.jit(step, target=SMALL, interpret=True)(*ARGS)
    np.testing.assert_allclose(logits, step(*ARGS)[1], atol=2e-2)


def test_a_race_that_the_clocks_of_two_workers_hide(monkeypatch):
    """Pallas's interpreter takes a worker that did more for a later one: it prints nothing of these, and mk.jit raises."""
    at = Rows.at
    monkeypatch.setattr(Rows, "at", lambda self, tensor, slot: at(dataclasses.replace(self, first=0), tensor, slot))
    monkeypatch.setattr("jax._src.pallas.mosaic.interpret.vector_clock.NpVectorClock.ordered", lambda self, other: True)
    with pytest.raises(RaceError, match="worker 1 writes"):
        mk.jit(step, target=SMALL, interpret=True)(*ARGS)
