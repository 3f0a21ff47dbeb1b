"""What the engine has on the device, and what it does there: write a piece of a prompt, and run decode steps.

Everything is only begun here, and the device does one thing after the other. So the host plans the next decode steps before it knows what the
last ones said: where each sequence stands is known on the device.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from mkdsl.engine._ahead import Call, side_by_side
from mkdsl.engine._decoder import WatchedStep
from mkdsl.engine._paged import Step, empty_pages, paged_fill
from mkdsl.engine._pieces import covering, powers, row
from mkdsl.engine._sampler import NOT_FINITE, Asked, Logprobs, Sampled, sample
from mkdsl.engine._sampling import SamplingParams
from mkdsl.engine._slots import Slots, State, count, empty_slots, occupy
from mkdsl.gpu import committed, kept, record
from mkdsl.models import DecoderConfig
from mkdsl.ops import Paged

SMALLEST = 16  # tokens of a prompt in a piece: they are powers of two from here on, each compiled once
CLEARED = 16  # pages in one go


GREEDY = SamplingParams(temperature=0.0)
NOWHERE = -1  # the position of who has none: nothing is appended there, and nothing of a cache is read
NOTHING = -2  # no token: of a sequence that had ended before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lane:
    """One sequence's part in some decode steps: its slot, its pages, which hold all positions that will be written, and how its tokens are chosen."""

    slot: int
    pages: Sequence[int]
    params: SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens of a prompt, one at least, written at the positions from `start` on, all of which lie in these pages."""

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
    """What one sequence said in some decode steps: up to its end token, if it came.

    Attributes:
      tokens: NOT_FINITE is the last of them if logits were NaN or infinite.
      logprobs: where they are asked for; arrays over tokens.
    """

    tokens: list[int]
    logprobs: Logprobs | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flight:
    """Decode steps under way: what is said in them, arrays over steps and lanes; of a step with a deadline the counters too, over steps."""

    lanes: Sequence[Lane]
    said: Sampled
    step: Step
    counters: jax.Array | None

    def land(self) -> list[Said]:
        """Waits for them. Returns what each sequence has said.

        Raises:
          HangError: the steps have a deadline, and the workers of one waited for each other past it.
        """
        if isinstance(self.step, WatchedStep):
            for counters in np.asarray(self.counters):
                self.step.check(counters)
        wanted = any(lane.params.logprobs is not None for lane in self.lanes)
        tokens, logprobs = jax.device_get((self.said.token, self.said.logprobs if wanted else None))

        def of(i: int, lane: Lane) -> Said:
            n = int((tokens[:, i] != NOTHING).sum())
            own = None if lane.params.logprobs is None else jax.tree.map(lambda a: a[:n, i], logprobs)
            return Said(tokens=tokens[:n, i].tolist(), logprobs=own)

        return [of(i, lane) for i, lane in enumerate(self.lanes)]


class Backend:
    """A model on JAX's default device. What is said of sequences (`occupy`, and which pages are theirs) is the scheduler's business."""

    def __init__(
        self, config: DecoderConfig, params: Any, *, pages: int, page_size: int, context: int, max_batch: int, steps: int,
        step_of: Callable[[int], Step], smallest: int = SMALLEST, packed: int = 0, asked: Asked | None = None, cache_dtype: DTypeLike = jnp.bfloat16,
    ) -> None:  # fmt: skip
        """Sets up the device.

        Args:
          config: the model's shape.
          params: its parameters, on the device.
          pages: how many there are.
          page_size: positions in each.
          context: positions a sequence has at most.
          max_batch: sequences that are admitted at the same time at most.
          steps: decode steps in one dispatch.
          step_of: the decode step of so many sequences, whose caches have `context` positions in whole pages.
          smallest: tokens in a piece of a prompt at least; shorter ones are padded.
          packed: tokens in several short prompts that are written at once, pads and all.
          asked: what the sampler computes whoever is there; None for what they ask for.
          cache_dtype: of the pages.
        """
        self._step_of, self._asked = step_of, asked
        self.config, self._params = config, self._placed(params)
        self._width, self._page_size, self._steps, self._smallest = -(-context // page_size), page_size, steps, smallest
        self._count, self._max_batch, self._packed = pages, max_batch, packed
        self._empty_pages = functools.partial(empty_pages, config, count=pages, size=page_size, dtype=cache_dtype)
        self._empty_slots = functools.partial(empty_slots, max_batch, config.vocab)
        self.reset()

    def reset(self) -> None:
        """Begins anew, with empty pages and slots: after a step that failed, nothing is known of the old ones."""
        self._pages, self._slots = self._placed((self._empty_pages(), self._empty_slots()))

    def calls(self, batches: Iterable[int], piece: int) -> list[Call]:
        """Decode steps of these batches, greedy and drawn from all tokens; and if `piece` is more than 0 prefill of pieces of up to so many tokens."""
        nobody = [Lane(slot=self._max_batch, pages=(), params=params) for params in (GREEDY, SamplingParams())]
        calls = [self._decoding([lane], batch) for batch in batches for lane in nobody]
        for length in powers(self._smallest, piece):
            least = covering(-(-length // self._page_size), self._width)
            for width in sorted({covering(pages, self._width) for pages in range(least, self._width + 1)}):
                calls.append(self._writing([], rows=1, length=length, width=width))
        for length in powers(row(1, self._packed, self._max_batch), self._packed // 2) if piece else ():
            width = covering(-(-length // self._page_size), self._width)
            calls.append(self._writing([], rows=self._packed // length, length=length, width=width))
        return [*calls, self._clearing([])]

    def compile(self, batches: Iterable[int], piece: int) -> None:
        """Compiles the `calls`, side by side. What else is asked of the sampler is compiled when it is first asked for, as all is that was not compiled here."""
        side_by_side(Call.compile, self.calls(batches, piece))

    def occupy(self, slot: int, *, params: SamplingParams, seed: int, prompt: Sequence[int], ends: Iterable[int], max_tokens: int) -> None:
        """A new sequence has this slot: see `occupy` of the slots."""
        self._slots = occupy(self._slots, slot, params=params, seed=seed, prompt=prompt, ends=ends, max_tokens=max_tokens)

    def clear(self, pages: Sequence[int]) -> None:
        """Pages that have a new holder: what they held was another's, and nothing times NaN is NaN."""
        for first in range(0, len(pages), CLEARED):
            self._pages = self._clearing(pages[first : first + CLEARED])()

    def prefill(self, pieces: Sequence[Piece]) -> jax.Array:
        """Writes a piece of a prompt, or several short prompts. Returns something that is ready when they are written."""
        longest, stop = max(len(piece.tokens) for piece in pieces), max(piece.start + len(piece.tokens) for piece in pieces)
        width = covering(-(-stop // self._page_size), self._width)
        if len(pieces) == 1:
            call = self._writing(pieces, rows=1, length=max(row(longest), self._smallest), width=width)
        else:
            length = row(longest, self._packed, self._max_batch)
            call = self._writing(pieces, rows=self._packed // length, length=length, width=width)
        self._pages, done = call()
        return done

    def _writing(self, pieces: Sequence[Piece], *, rows: int, length: int, width: int) -> Call:
        """Pads are tokens past the table."""
        tokens, positions = np.zeros((rows, length), np.int32), np.full((rows, length), self._width * self._page_size, np.int32)
        tables = np.zeros((rows, width), np.int32)
        for i, piece in enumerate(pieces):
            count = len(piece.tokens)
            tokens[i, :count], positions[i, :count] = piece.tokens, np.arange(piece.start, piece.start + count)
            tables[i] = self._table(piece.pages)[:width]
        return Call(_fill, (self._params, self._pages, tables, tokens, positions), {"config": self.config})

    def _clearing(self, pages: Sequence[int]) -> Call:
        which = np.pad(np.asarray(pages, np.int32), (0, CLEARED - len(pages)), constant_values=self._count)
        return Call(_clear, (self._pages, which), {})

    def decode(self, lanes: Sequence[Lane], *, batch: int) -> Flight:
        """Begins decode steps, each sequence until it ends.

        Args:
          lanes: the sequences.
          batch: as many sequences are compiled for; what lies past the lanes does nothing.
        """
        call = self._decoding(lanes, batch)
        self._pages, self._slots, said, counters = call()
        for array in jax.tree.leaves((said.token, counters)):
            array.copy_to_host_async()
        return Flight(lanes=lanes, said=said, step=call.static["step"], counters=counters)

    def _decoding(self, lanes: Sequence[Lane], batch: int) -> Call:
        nobody = [self._lane(self._max_batch, ())] * (batch - len(lanes))
        rows = np.stack([*(self._lane(lane.slot, lane.pages) for lane in lanes), *nobody])
        asked = self._asked or Asked.of(lane.params for lane in lanes)
        args = self._params, self._pages, self._slots, rows
        return Call(_decode, args, {"step": self._step_of(batch), "steps": self._steps, "asked": asked})

    def _placed(self, tree: Any) -> Any:
        return committed(tree)

    def _lane(self, slot: int, pages: Sequence[int]) -> np.ndarray:
        """Its slot and its table in one: each array that goes to the device takes its time."""
        return np.concatenate([np.array([slot], np.int32), self._table(pages)])

    def _table(self, pages: Sequence[int]) -> np.ndarray:
        """The pages there are, and then again the last of them: what lies behind is read in part, and must be numbers."""
        return np.pad(np.asarray(pages or [0], np.int32), (0, self._width - max(len(pages), 1)), mode="edge")


@functools.partial(jax.jit, donate_argnums=0)
@kept
def _clear(pages: Any, which: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf.at[:, which].set(0, mode="drop"), pages)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="pages")
@functools.partial(kept, local=True)
def _fill(params: Any, pages: Any, tables: jax.Array, tokens: jax.Array, positions: jax.Array, *, config: DecoderConfig) -> Any:
    return paged_fill(config)(params, Paged(pages, tables), tokens, positions).pages, tokens[0, 0]


@record
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """Decode steps under way: where each lane stands, how often it has said each token [slots, vocab], what was said [steps, b], and the counters
    of a step with a deadline [steps, n]."""

    pages: Any
    state: State
    generated: jax.Array
    kept: tuple[Sampled, jax.Array | None]


@functools.partial(jax.jit, static_argnames=("step", "steps", "asked"), donate_argnames=("pages", "slots"))
@kept
def _decode(
    params: Any, pages: Any, slots: Slots, lanes: jax.Array, *, step: Step, steps: int, asked: Asked
) -> tuple[Any, Slots, Sampled, jax.Array | None]:
    """Lanes are int32 [b, 1 + width]: slots, and tables. Returns pages, slots, what was said, arrays over steps and lanes, and counters over steps,
    None of a step without a deadline.

    The number of steps is known to the compiler: else the device would ask the host after each whether to go on.
    """
    rows, tables = lanes[:, 0], lanes[:, 1:]
    one_step = functools.partial(_one_step, params, slots, rows, tables, step=step, asked=asked)
    state = jax.tree.map(lambda a: a.at[rows].get(mode="fill", fill_value=0), slots.state)
    *_, new = jax.eval_shape(one_step, pages, state, slots.generated)
    kept = jax.tree.map(lambda a: jnp.zeros((steps, *a.shape), a.dtype), new)

    def once(i: jax.Array, run: _Run) -> _Run:
        pages, state, generated, new = one_step(run.pages, run.state, run.generated)
        return _Run(pages=pages, state=state, generated=generated, kept=jax.tree.map(lambda all, one: all.at[i].set(one), run.kept, new))

    run = lax.fori_loop(0, steps, once, _Run(pages=pages, state=state, generated=slots.generated, kept=kept))
    state = jax.tree.map(lambda a, new: a.at[rows].set(new, mode="drop"), slots.state, run.state)
    return run.pages, dataclasses.replace(slots, state=state, generated=run.generated), *run.kept


def _one_step(
    params: Any, slots: Slots, rows: jax.Array, tables: jax.Array, pages: Any, now: State, generated: jax.Array, *, step: Step, asked: Asked
) -> tuple[Any, State, jax.Array, tuple[Sampled, jax.Array | None]]:
    """A decode step of all lanes. Who has ended is at no position, and says nothing."""
    live = now.left > 0
    args = params, Paged(pages, tables), now.token, jnp.where(live, now.position, NOWHERE)
    logits, cache, counters = step.watched(*args) if isinstance(step, WatchedStep) else (*step(*args), None)
    sampled = sample(logits, dataclasses.replace(slots, generated=generated), rows, now.index, asked=asked)
    ends = slots.ends[rows, sampled.token] | (sampled.token == NOT_FINITE)
    left = jnp.where(live & ~ends, now.left - 1, 0)
    after = State(token=sampled.token, position=now.position + 1, index=now.index + 1, left=left)
    if asked.changes:  # nobody else looks at what was said
        generated = count(generated, jnp.where(live, rows, generated.shape[0]), sampled.token)
    said = dataclasses.replace(sampled, token=jnp.where(live, sampled.token, NOTHING))
    return cache.pages, after, generated, (said, counters)
