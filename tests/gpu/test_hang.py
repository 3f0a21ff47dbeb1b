"""Deadlines of kernels: what `mk.jit` takes, what a `HangError` says, and, on a GPU, that a lost hand-off of each kind ends in one."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import lost
import numpy as np
import pytest
import tiny_decoders

import mkdsl as mk
from mkdsl.gpu import Compiled, HangError, Traced, assemble, has_gpu
from mkdsl.gpu._hang import run_in_time
from mkdsl.lower import Program, Wait, Wanted, lower
from mkdsl.lower._waits import first_note, number
from mkdsl.models import SHAPES, DecoderConfig, decode_step, init_cache, random_params
from mkdsl.schedule import profile

SMALL = dataclasses.replace(profile("H200"), name="h200 with 8 SMs", workers=8)
NEEDS_GPU = pytest.mark.skipif(not has_gpu(), reason="waits are real on a GPU only")


@pytest.fixture(scope="module")
def small():
    """(trace of a small model, its program with a deadline)."""
    decoder, one = tiny_decoders.of(tiny_decoders.LLAMA), np.int32(3)
    found = mk.jit(decoder.step, target=SMALL).trace(decoder.params, decoder.cache(128), one, one)
    return found, lower(found.graph, found.schedule(), SMALL, found.tree, deadline=2.5)


@pytest.mark.parametrize(("deadline", "error", "message"), [
    ("1", TypeError, "deadline='1'; pass seconds, such as 1.0"),
    (True, TypeError, "deadline=True; pass seconds"),
    (0, ValueError, "deadline=0; pass seconds, more than 0"),
    (float("nan"), ValueError, "deadline=nan; pass seconds, more than 0"),
    (1e9, ValueError, "deadline=1000000000.0; pass seconds, more than 0 and at most 86400"),
])  # fmt: skip
def test_what_is_no_deadline(deadline, error, message):
    with pytest.raises(error, match=re.escape(f"mk.jit: {message}")):
        mk.jit(lambda *args: args, deadline=deadline)


def test_nobody_waits_in_an_interpreted_kernel():
    with pytest.raises(ValueError, match=re.escape("deadline=1.0 with interpret=True: an interpreted kernel is one launch per phase")):
        mk.jit(lambda *args: args, deadline=1.0, interpret=True)


def test_nobody_waits_in_launches_of_one_phase(small):
    found, _ = small
    with pytest.raises(ValueError, match=re.escape("deadline=1.0 in phased form, in which each launch is a phase")):
        lower(found.graph, found.schedule(), SMALL, found.tree, form="phased", deadline=1.0)


def test_a_deadline_before_the_step_can_be_done(small):
    found, _ = small
    with pytest.raises(ValueError, match=r"deadline=1e-06 seconds; the step itself is predicted to take \d+ us: allow a second"):
        lower(found.graph, found.schedule(), SMALL, found.tree, deadline=1e-6)


def run(program: Program, notes: dict[int, tuple[Wait, int, int]]):
    """A kernel's end, of whose workers some have noted (wait, iteration, detail)."""
    left = np.full((program.schedule.workers, 2), -1, np.int32)
    for worker, (wait, iteration, detail) in notes.items():
        left[worker] = number(program.graph, program.schedule, wait, iteration), detail
    counters = np.concatenate([np.zeros(first_note(program.graph), np.int32), left.reshape(-1)])
    return run_in_time(lambda *args: (args, counters), program, "results")


def test_a_kernel_that_ends_in_time(small):
    assert run(small[1], {}) == ("results",)


def test_what_an_error_says(small):
    program = small[1]
    signals = len(program.schedule.plan("attention").participants)
    wo, gate = Wait("wo", Wanted.EVENT, "attention"), Wait("wg·wu", Wanted.DATA)
    behind = dict.fromkeys((0, 1, 2, 5), (wo, 1, 2 * signals - 2))  # counters begin at -1: one signal is missing
    with pytest.raises(HangError) as caught:
        run(program, behind | {3: (gate, 1, 0b1), 7: (Wait("wd", Wanted.EVENT, "wg·wu"), 1, 0)})
    where = program.graph.phase("wo").where
    assert re.search(r"mkdsl/models/\w+\.py:\d+", where)
    first, second, third, fourth, last = str(caught.value).splitlines()
    assert first == "mk.jit: 6 of 8 workers gave up waiting for each other, 2.5 s after the kernel began (deadline=2.5)"
    assert second == (
        f"  workers 0 to 2 and 5 waited in fold 'wo', iteration 1 ({where}), for the event of 'attention': "
        f"{2 * signals - 1} of {2 * signals} signals had come"
    )
    assert (
        third.startswith("  worker 3 waited in fold 'wg·wu', iteration 1") and "for data of 'wo' or" in third
    ) or "for data of '" in third
    assert fourth.startswith("  worker 7 waited in fold 'wd', iteration 1") and "for the event of 'wg·wu': 1 of" in fourth
    assert "bug" in last
    assert [g.worker for g in caught.value.given_up] == [0, 1, 2, 5, 3, 7]


def test_an_error_stays_short(small):
    program = small[1]
    with pytest.raises(HangError) as caught:
        run(program, {w: (Wait("wo", Wanted.DATA), w, 0b1) for w in range(8)})
    assert "  and 4 other waits\n" in str(caught.value) and "worker 4 " not in str(caught.value)


@pytest.mark.medium
def test_what_a_deadline_adds_to_a_kernel(small):
    """Of every wait: a look at the clock, and the note. Nothing of that without a deadline, and no spills with one."""
    found, program = small
    args = (*found.signature[:1], *jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape), a.dtype), found.signature[1:]))
    (late,) = assemble(program.watched, *args)
    (plain,) = assemble(dataclasses.replace(program, deadline=None), *args)
    assert "globaltimer" not in plain.ptx and "atom.shared" not in plain.ptx
    events = sum(len(plan.waits) for plan in program.schedule.phases)
    notes = late.ptx.count("atom.shared.cas.b64")
    assert notes >= events + len(program.schedule.phases) - 1  # and each phase but the first loads what another has written
    assert late.ptx.count("%globaltimer") == notes + 1 + (program.schedule.cluster > 1)  # when it begins, and at a cluster's end
    assert late.spill_bytes == plain.spill_bytes == 0 and late.smem_bytes == plain.smem_bytes
    assert late.code_bytes < 1.1 * plain.code_bytes


# On a GPU, where waits are real.


@dataclasses.dataclass(frozen=True)
class Real:
    """A model on the GPU at hand: random weights, a random cache, and what its kernel with a deadline computes of them."""

    traced: Traced
    args: tuple[Any, ...]
    step: Compiled
    results: Any

    def run(self, step: Compiled) -> Any:
        params, kv, token, pos = self.args
        return step(params, jax.tree.map(lambda a: a + 0, kv), token, pos)

    def __call__(self) -> Any:
        """Bits of the results of the kernel that loses nothing."""
        return jax.tree.map(np.asarray, self.run(self.step))


def made(config: DecoderConfig, context: int = 512) -> Real:
    params = jax.jit(lambda key: random_params(config, key, jnp.bfloat16))(jax.random.key(0))
    kv = jax.tree.map(lambda a: jax.random.normal(jax.random.key(1), a.shape).astype(a.dtype), init_cache(config, context))
    args = params, kv, np.int32(5), np.int32(500)
    traced = mk.jit(decode_step(config), deadline=1.0).trace(*args)
    found = Real(traced, args, traced.lower().compile(), None)
    return dataclasses.replace(found, results=found())


def hang(real: Real, losing: Any) -> HangError:
    """What is said of a kernel that loses something; and the one that does not runs as before."""
    with losing:
        lowered = real.traced.lower()
    step = lowered.compile()
    with pytest.raises(HangError) as caught:
        real.run(step)
    print(caught.value)
    jax.tree.map(np.testing.assert_array_equal, real(), real.results)
    return caught.value


@pytest.fixture(scope="module")
def real():
    return made(SHAPES["smollm2-135m"])


@pytest.fixture(scope="module")
def wide():
    """One whose residents are wide enough to be staged by `cp.async`."""
    return made(dataclasses.replace(SHAPES["llama-3.2-1b"], layers=6))


@pytest.mark.gpu
@NEEDS_GPU
def test_a_deadline_changes_no_bit(real):
    without = dataclasses.replace(real.traced, deadline=None).lower().compile()
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, real.run(without)), real.results)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("phase", ["wq+wk+wv", "attention", "wo", "wg·wu", "wd"])
def test_a_lost_signal(real, phase):
    worker = real.traced.schedule().plan(phase).participants[-2]
    first = hang(real, lost.losing_event(phase, iteration=3, worker=worker)).given_up[0]
    assert first.wait.wanted is Wanted.EVENT and first.wait.event == phase
    assert first.wanted - first.seen == 1
    assert first.iteration == 3 + (phase == "wd")


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize(("model", "phase"), [("real", "wo"), ("real", "wg·wu"), ("real", "wd"), ("wide", "attention"), ("wide", "wg·wu")])
def test_lost_data(model, phase, request):
    real = request.getfixturevalue(model)
    worker = real.traced.schedule().plan(phase).participants[-2]
    first = hang(real, lost.losing_data(phase, iteration=3, worker=worker)).given_up[0]
    assert first.wait.wanted is Wanted.DATA
    assert set(first.tensors) & set(real.traced.graph.phase(phase).writes)


@pytest.mark.gpu
@NEEDS_GPU
def test_what_a_cluster_loses(real):
    shared = [p for p in real.traced.schedule().phases if p.cluster > 1]
    if not shared:
        pytest.skip("no phase is shared by a cluster on this GPU")
    first = hang(real, lost.losing_shares(shared[0].name, worker=shared[0].participants[0])).given_up[0]
    assert first.wait == Wait(shared[0].name, Wanted.PEERS)
