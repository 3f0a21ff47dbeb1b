"""What the engine has on the device, and the two things it does there: write a piece of a prompt, and run decode steps.

Decode steps run in one executable that loops on the device: paged step, sampling, end tokens. The host hears of it when all are done.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from mkdsl.engine._ahead import Call, side_by_side
from mkdsl.engine._paged import Step, capacity, empty_pages, gathered, paged_fill, written_back
from mkdsl.engine._sampler import NOT_FINITE, Asked, Sampled, sample
from mkdsl.engine._sampling import SamplingParams
from mkdsl.engine._slots import Slots, count, empty_slots, occupy
from mkdsl.gpu import committed, kept, record
from mkdsl.models import DecoderConfig

SMALLEST = 16  # tokens of a prompt in a piece: they are powers of two from here on, each compiled once


GREEDY = SamplingParams(temperature=0.0)
NOWHERE = -1  # the position of who has none: nothing is appended there, and nothing of a cache is read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lane:
    """One sequence's part in some decode steps.

    Attributes:
      slot: its slot.
      pages: its pages; they hold all positions that will be written.
      token: the one to feed.
      position: where it goes.
      index: how many tokens its answer has.
      params: how its tokens are chosen.
    """

    slot: int
    pages: Sequence[int]
    token: int
    position: int
    index: int
    params: SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
    """What one sequence said in some decode steps: up to its end token, if it came.

    Attributes:
      tokens: NOT_FINITE is the last of them if logits were NaN or infinite.
      sampled: as they came, where log-probabilities are asked for; arrays over tokens.
      ended: whether the last is an end token.
    """

    tokens: list[int]
    sampled: Sampled | None
    ended: bool


@record
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Lanes:
    """All of them as arrays over the batch, int32; tables [b, width]."""

    rows: Any
    tables: Any
    tokens: Any
    positions: Any
    index: Any


class Backend:
    """A model on JAX's default device. What is said of sequences (`occupy`, and which pages are theirs) is the scheduler's business."""

    def __init__(
        self, config: DecoderConfig, params: Any, *, pages: int, page_size: int, context: int, max_batch: int, max_steps: int,
        step_of: Callable[[int], Step], smallest: int = SMALLEST, asked: Asked | None = None, cache_dtype: DTypeLike = jnp.bfloat16,
    ) -> None:  # fmt: skip
        """Sets up the device.

        Args:
          config: the model's shape.
          params: its parameters, on the device.
          pages: how many there are.
          page_size: positions in each.
          context: positions a sequence has at most.
          max_batch: sequences that are admitted at the same time at most.
          max_steps: decode steps in one dispatch at most.
          smallest: tokens in a piece of a prompt at least; shorter ones are padded.
          asked: what the sampler computes whoever is there; None for what they ask for.
          cache_dtype: of the pages.
          step_of: the decode step of so many sequences, whose caches have `context` positions in whole pages.
        """
        self._step_of, self._asked = step_of, asked
        self.config, self._params = config, self._placed(params)
        self._width, self._page_size, self._max_steps, self._smallest = -(-context // page_size), page_size, max_steps, smallest
        self._empty_pages = functools.partial(empty_pages, config, count=pages, size=page_size, dtype=cache_dtype)
        self._empty_slots = functools.partial(empty_slots, max_batch, config.vocab)
        self.reset()

    def reset(self) -> None:
        """Begins anew, with empty pages and slots: after a step that failed, nothing is known of the old ones."""
        self._pages, self._slots = self._placed((self._empty_pages(), self._empty_slots()))

    def calls(self, batches: Iterable[int], piece: int) -> list[Call]:
        """Decode steps of these batches, greedy and drawn from all tokens, and prefill of pieces of up to so many tokens."""
        asked = [
            self._decoding([self._nobody(params=params)], batch, 1, False) for batch in batches for params in (GREEDY, SamplingParams())
        ]
        lengths = itertools.takewhile(lambda length: length <= piece, (self._smallest << i for i in itertools.count()))
        return [*asked, *(self._filling([0] * length, self._past, ()) for length in lengths)]

    def compile(self, batches: Iterable[int], piece: int) -> None:
        """Compiles the `calls`, side by side. What else is asked of the sampler is compiled when it is first asked for, as all is that was not compiled here."""
        side_by_side(Call.compile, self.calls(batches, piece))

    def occupy(self, slot: int, *, params: SamplingParams, seed: int, prompt: Sequence[int], ends: Iterable[int]) -> None:
        """A new sequence has this slot: see `occupy` of the slots."""
        self._slots = occupy(self._slots, slot, params=params, seed=seed, prompt=prompt, ends=ends)

    def prefill(self, tokens: Sequence[int], *, start: int, pages: Sequence[int]) -> None:
        """Writes tokens of a prompt at the positions from `start` on, all of which lie in these pages."""
        self._pages = self._filling(tokens, start, pages)()

    def decode(self, lanes: Sequence[Lane], *, batch: int, steps: int, until_one_ends: bool) -> list[Said]:
        """Runs decode steps, each sequence until its end token.

        Args:
          lanes: the sequences.
          batch: as many sequences are compiled for; what lies past the lanes does nothing.
          steps: at most max_steps.
          until_one_ends: stop as soon as one sequence has ended; else when all have.

        Returns:
          What each has said.
        """
        self._pages, self._slots, said, ended, taken = self._decoding(lanes, batch, steps, until_one_ends)()
        tokens, ended, taken = jax.device_get((said.token, ended, taken))
        said = jax.device_get(said) if any(lane.params.logprobs is not None for lane in lanes) else None

        def of(i: int, n: int) -> Said:
            sampled = jax.tree.map(lambda a: a[:n, i], said) if lanes[i].params.logprobs is not None else None
            return Said(tokens=tokens[:n, i].tolist(), sampled=sampled, ended=bool(ended[i]))

        return [of(i, int(taken[i])) for i in range(len(lanes))]

    def _placed(self, tree: Any) -> Any:
        return committed(tree)

    def _decoding(self, lanes: Sequence[Lane], batch: int, steps: int, until_one_ends: bool) -> Call:
        """A call of `_decode`."""
        args = self._params, self._pages, self._slots, self._lanes(lanes, batch), np.int32(steps), np.bool_(until_one_ends)
        asked = self._asked or Asked.of(lane.params for lane in lanes)
        return Call(_decode, args, {"step": self._step_of(batch), "max_steps": self._max_steps, "asked": asked})

    def _filling(self, tokens: Sequence[int], start: int, pages: Sequence[int]) -> Call:
        """A call of `_fill`."""
        padding = (0, max(self._smallest, 1 << (len(tokens) - 1).bit_length()) - len(tokens))
        positions = np.pad(np.arange(start, start + len(tokens), dtype=np.int32), padding, constant_values=self._past)
        args = self._params, self._pages, self._table(pages), np.pad(np.asarray(tokens, np.int32), padding), positions
        return Call(_fill, args, {"config": self.config})

    @property
    def _past(self) -> int:
        """The first position past a table: nothing is written from there on."""
        return self._width * self._page_size

    def _nobody(self, slot: int = 0, params: SamplingParams = GREEDY) -> Lane:
        return Lane(slot=slot, pages=(), token=0, position=self._past, index=0, params=params)

    def _table(self, pages: Sequence[int]) -> np.ndarray:
        return np.pad(np.asarray(pages, np.int32), (0, self._width - len(pages)))

    def _lanes(self, lanes: Sequence[Lane], batch: int) -> _Lanes:
        """Lanes that nobody has are of the first one's slot: so they ask for nothing that nobody asks for."""
        lanes = [*lanes, *[self._nobody(lanes[0].slot)] * (batch - len(lanes))]
        return _Lanes(
            rows=np.array([lane.slot for lane in lanes], np.int32),
            tables=np.stack([self._table(lane.pages) for lane in lanes]),
            tokens=np.array([lane.token for lane in lanes], np.int32),
            positions=np.array([lane.position for lane in lanes], np.int32),
            index=np.array([lane.index for lane in lanes], np.int32),
        )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="pages")
@kept
def _fill(params: Any, pages: Any, table: jax.Array, tokens: jax.Array, positions: jax.Array, *, config: DecoderConfig) -> Any:
    return paged_fill(config)(params, pages, table, tokens, positions)


@record
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """Decode steps under way: kv as gathered; said over steps and lanes; live and taken (tokens so far) over lanes."""

    steps: jax.Array
    kv: Any
    slots: Slots
    token: jax.Array
    live: jax.Array
    taken: jax.Array
    said: Sampled


@functools.partial(jax.jit, static_argnames=("step", "max_steps", "asked"), donate_argnames=("pages", "slots"))
@kept
def _decode(
    params: Any, pages: Any, slots: Slots, lanes: _Lanes, steps: jax.Array, until_one_ends: jax.Array,
    *, step: Step, max_steps: int, asked: Asked,
) -> tuple[Any, Slots, Sampled, jax.Array, jax.Array]:  # fmt: skip
    """Returns pages, slots, what was said, and over lanes whether each ended and how many tokens it took."""
    exists = lanes.positions < capacity(pages, lanes.tables)

    def go_on(run: _Run) -> jax.Array:
        return (run.steps < steps) & run.live.any() & ~(until_one_ends & (exists & ~run.live).any())

    def once(run: _Run) -> _Run:
        positions = jnp.where(run.live, lanes.positions + run.steps, NOWHERE)
        logits, kv = step(params, run.kv, run.token, positions)
        sampled = sample(logits, run.slots, lanes.rows, lanes.index + run.steps, asked=asked)
        ends = run.slots.ends[lanes.rows, sampled.token] | (sampled.token == NOT_FINITE)
        return _Run(
            steps=run.steps + 1,
            kv=kv,
            slots=count(run.slots, jnp.where(run.live, lanes.rows, slots.bias.shape[0]), sampled.token),
            token=sampled.token,
            live=run.live & ~ends,
            taken=run.taken + run.live,
            said=jax.tree.map(lambda all, one: all.at[run.steps].set(one), run.said, sampled),
        )

    logits = jax.ShapeDtypeStruct((exists.size, slots.bias.shape[1]), jnp.float32)
    sampled = jax.eval_shape(functools.partial(sample, asked=asked), logits, slots, lanes.rows, lanes.index)
    said = jax.tree.map(lambda a: jnp.zeros((max_steps, *a.shape), a.dtype), sampled)
    nothing, kv = jnp.zeros(exists.shape, jnp.int32), gathered(pages, lanes.tables, lanes.positions)
    run = _Run(steps=jnp.int32(0), kv=kv, slots=slots, token=lanes.tokens, live=exists, taken=nothing, said=said)
    run = lax.while_loop(go_on, once, run)
    pages = written_back(pages, lanes.tables, run.kv, lanes.positions, run.taken, most=max_steps)
    return pages, run.slots, run.said, exists & ~run.live, run.taken
