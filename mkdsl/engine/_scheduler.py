"""What the device does next: a piece of somebody's prompt, or some decode steps of all who run. It is told what came of it.

Nothing here knows of a device or a clock, so all of it is tested without either. The rules, and why they are so, are in docs/engine.md.
"""

import collections
import dataclasses
from collections.abc import Sequence as Many

from mkdsl.engine._pages import PagePool
from mkdsl.engine._sequence import Sequence, State, pages_at_most

BATCHES = (1, 2, 4, 8, 16)  # a decode step is compiled for each


class PagesError(ValueError):
    """A request needs more pages than there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill:
    """Write positions start to stop - 1 of a sequence's prompt."""

    sequence: Sequence
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Run decode steps.

    Attributes:
      sequences: who takes part.
      batch: what was compiled for so many sequences or more; the rest of it is empty.
      steps: how many steps.
      until_one_ends: stop as soon as one of them ends, as somebody waits for its place; else run on until all have ended.
    """

    sequences: tuple[Sequence, ...]
    batch: int
    steps: int
    until_one_ends: bool


class Scheduler:
    """First come, first served: the first that waits is admitted as soon as a slot and all pages it may ever need are to be had.

    Attributes:
      pool: the pages.
      waiting: in the order of their arrival.
      prefilling: the one whose prompt is being written.
      running: those that get a token from each decode step.
    """

    def __init__(self, pool: PagePool, *, max_batch: int, piece: int, max_steps: int, batch_invariant: bool = False) -> None:
        """Sets the limits.

        Args:
          pool: all pages, none of them held.
          max_batch: sequences that prefill or run at the same time, one of BATCHES.
          piece: positions written by one Prefill at most.
          max_steps: steps in one Decode at most.
          batch_invariant: whether what is computed of a sequence may depend on itself alone: all decode steps are of max_batch, pieces of a prompt
            begin at multiples of `piece`, which is one of the page's size, and what decode steps have written is nobody's prefix.

        Raises:
          ValueError: max_batch is another number.
        """
        if max_batch not in BATCHES:
            raise ValueError(f"{max_batch=}; it is one of {', '.join(map(str, BATCHES))}")
        self.pool = pool
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.prefilling: Sequence | None = None
        self.running: list[Sequence] = []
        self._slots = list(range(max_batch))[::-1]
        self._piece, self._max_steps, self._batch_invariant = piece, max_steps, batch_invariant
        self._batches = (max_batch,) if batch_invariant else BATCHES
        self._unit = piece if batch_invariant else pool.size
        self._decode_is_due = False

    def check(self, prompt: int, max_tokens: int) -> None:
        """Refuses what would wait for ever. It reads what never changes, and so may be called from any thread.

        Raises:
          PagesError: a prompt of so many tokens and max_tokens of an answer need more pages than there are.
        """
        pages, pool = pages_at_most(prompt, max_tokens, self.pool.size), self.pool
        if pages > pool.count:
            raise PagesError(
                f"a prompt of {prompt} tokens with {max_tokens=} takes {pages} pages of {pool.size} positions, and there are {pool.count} in all; "
                f"prompt and answer together may have {pool.count * pool.size + 1} tokens: shorten them, or give the engine more pages"
            )

    def submit(self, prompt: Many[int], max_tokens: int) -> Sequence:
        """A new request, which waits from now on.

        Args:
          prompt: token ids, one at least.
          max_tokens: of the answer at most, one at least.

        Returns:
          Its sequence.

        Raises:
          PagesError: see `check`.
        """
        self.check(len(prompt), max_tokens)
        sequence = Sequence(prompt=tuple(prompt), max_tokens=max_tokens)
        self.waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence wherever it stands, and frees what it holds. One that has ended stays as it is. Not while its step is under way."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
            sequence.state = State.CANCELLED
        elif sequence.slot is not None:
            self._end(sequence, State.CANCELLED)

    def lost(self) -> list[Sequence]:
        """The device has lost its memory: cancels all that had something in it, forgets all that was kept, and returns the former."""
        admitted = [*self.running, *([self.prefilling] if self.prefilling else [])]
        for sequence in admitted:
            self._end(sequence, State.CANCELLED)
        self.pool.forget()
        return admitted

    def next(self) -> Prefill | Decode | None:
        """What to do now; None where there is nothing. What came of it is told by `prefilled` or `decoded` before the next call.

        Between two pieces of a prompt the others get a token: so they never wait for more than one piece.
        """
        self._admit()
        if self.prefilling and not (self._decode_is_due and self.running):
            self._decode_is_due = True
            return self._prefill(self.prefilling)
        self._decode_is_due = False
        return self._decode() if self.running else None

    def prefilled(self, step: Prefill) -> None:
        """The positions are written."""
        step.sequence.prefilled(self.pool, step.stop)
        if not step.sequence.unfilled:
            self.prefilling = None
            self._run(step.sequence)

    def decoded(self, sequence: Sequence, tokens: Many[int], *, ended: bool) -> None:
        """What one sequence of a Decode said.

        Args:
          sequence: one that took part.
          tokens: those that belong to its answer, not more than the steps.
          ended: nothing follows them. Where max_tokens are reached, nothing does anyway.
        """
        sequence.said(self.pool, tokens, publish=not self._batch_invariant)
        if ended or not sequence.remaining:
            self._end(sequence, State.FINISHED)

    def _admit(self) -> None:
        """One prompt is written at a time: those behind it then find the pages that they share with it."""
        while self.waiting and self._slots and not self.prefilling and self.waiting[0].claim(self.pool, self._unit):
            sequence = self.waiting.popleft()
            sequence.slot = self._slots.pop()
            if sequence.unfilled:
                sequence.state, self.prefilling = State.PREFILLING, sequence
            else:
                self._run(sequence)

    def _run(self, sequence: Sequence) -> None:
        sequence.state = State.RUNNING
        self.running.append(sequence)

    def _prefill(self, sequence: Sequence) -> Prefill:
        stop = sequence.written + min(self._piece, sequence.unfilled)
        sequence.take_until(self.pool, stop)
        return Prefill(sequence=sequence, start=sequence.written, stop=stop)

    def _decode(self) -> Decode:
        """One step where somebody is about to join. Where those who wait cannot be admitted, some one's end is what they wait for."""
        steps = 1 if self.prefilling else min(self._max_steps, *(sequence.remaining for sequence in self.running))
        for sequence in self.running:
            sequence.take_until(self.pool, sequence.written + steps)
        batch = next(size for size in self._batches if size >= len(self.running))
        return Decode(sequences=tuple(self.running), batch=batch, steps=steps, until_one_ends=bool(self.waiting))

    def _end(self, sequence: Sequence, state: State) -> None:
        assert sequence.slot is not None
        sequence.release(self.pool)
        self._slots.append(sequence.slot)
        sequence.state, sequence.slot = state, None
        if sequence is self.prefilling:
            self.prefilling = None
        else:
            self.running.remove(sequence)
