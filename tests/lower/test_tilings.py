"""Interpreted kernels of schedules with tilings that the search seldom chooses for so small a decoder, against the float32 reference."""

import dataclasses

import jax
import pytest
import tiny_decoders as tiny
from interpreted import SMALL, arguments, changed, check, check_schedule, traced, with_tiles

from mkdsl.lower import _kernel
from mkdsl.lower._machine import Machine
from mkdsl.schedule import FoldPlan

pytestmark = pytest.mark.medium

LLAMA = dataclasses.replace(tiny.LLAMA, hidden=192, intermediate=320, vocab=448, tied=True, layers=1)


@pytest.mark.usefixtures("race_detector")
@pytest.mark.parametrize(
    ("batch", "split_k"),
    [
        pytest.param(1, 2, marks=pytest.mark.slow),
        (1, 8),
        pytest.param(2, 2, marks=pytest.mark.slow),
        pytest.param(4, 4, marks=pytest.mark.slow),
    ],
)
def test_splits_of_heads_that_no_tile_divides(batch, split_k):
    """3 heads in 2, 4 or 8 pieces, and fewer than 8 rows to merge their splits in."""
    decoder = tiny.attend(heads=3, head_dim=128)
    found = traced(decoder, args := arguments(decoder, batch, context=256))
    schedule = with_tiles(found.graph, batch, attention={"splits": 4, "block": 64}, wo={"split_k": split_k})
    check_schedule(decoder, args, schedule, found)


@pytest.mark.usefixtures("race_detector")
@pytest.mark.parametrize(
    ("decoder", "batch"),
    [pytest.param(tiny.attend(), 1, id="batch 1"), pytest.param(tiny.of(LLAMA), 8, id="batch 8", marks=pytest.mark.slow)],
)
def test_what_clusters_share(decoder, batch):
    """In phased form each worker folds its own tiles, and what clusters split in space is split in time, into K stages."""
    found = traced(decoder, args := arguments(decoder, batch, context=256))
    folds = [p.name for p in found.graph.phases if p.kind == "fold"]
    schedule = with_tiles(found.graph, batch, attention={"cluster": 2, "block": 64}, **{name: {"cluster": 2} for name in folds})
    assert schedule.cluster == 2
    assert {schedule.phased().plan(name).k_stages for name in folds} == {2}
    check_schedule(decoder, args, schedule, found)


@pytest.mark.usefixtures("race_detector")
@pytest.mark.slow
@pytest.mark.parametrize("batch", [3, 8])
def test_several_epilogues(batch):
    """One tile at a time: the resident in K stages is staged anew for each, and the rows that an epilogue adds are not preloaded."""
    decoder = tiny.of(LLAMA)
    found = traced(decoder, args := arguments(decoder, batch))
    narrow = {name: {"split_k": 4, "k_stages": k_stages} for name, k_stages in (("wo", 2), ("wd", 1), ("wq+wk+wv", 1), ("wg·wu", 1))}
    once = with_tiles(found.graph, batch, **narrow)
    schedule = changed(found.graph, once, epilogue_tiles=1)
    assert all(p.several_epilogues for p in schedule.phases if isinstance(p, FoldPlan))
    check_schedule(decoder, args, schedule, found)


def test_rows_that_an_epilogue_adds_are_preloaded():
    """Where a worker finishes all its tiles of a phase together, which is what the search likes best, and what the other tests run."""
    decoder = tiny.of(LLAMA)
    found = traced(decoder, arguments(decoder, 3))
    schedule = found.schedule()
    adding = [p for p in found.graph.phases if p.kind == "fold" and p.row_reads]
    assert [p.name for p in adding] == ["wo", "wd"]
    assert all(schedule.preloads(p) and not schedule.plan(p.name).several_epilogues for p in adding)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_all_phases_in_one_launch(batch, monkeypatch, capsys):
    """A worker alone has nobody to hand over to, so that interpret mode can run mega form.

    There each phase has a view of the ring of its own, in which the race detector does not tell stages apart: while compute reads one stage through
    one phase's view and a copy fills another for the next phase, it reports a race. No other reports may come.
    """
    decoder, alone = tiny.of(dataclasses.replace(LLAMA, layers=2)), dataclasses.replace(SMALL, workers=1, clusters=())
    lowered = traced(decoder, args := arguments(decoder, batch), alone).lower()
    program = dataclasses.replace(lowered.program, form="mega")
    monkeypatch.setattr(_kernel, "Machine", lambda *a: dataclasses.replace(Machine(*a), concurrent=False))
    check(decoder, args, jax.jit(lambda *a: program(*a))(*args))
    reports = capsys.readouterr().out.split("RACE DETECTED")[1:]
    assert all("(copy)" in report and "alias group" in report for report in reports), reports
