"""What the device does next: a piece of somebody's prompt, or some decode steps of all who run. It is told what came of it.

Nothing here knows of a device or a clock, so all of it is tested without either. The rules, and why they are so, are in docs/engine.md.
"""

import collections
import dataclasses
from collections.abc import Sequence as Many

from mkdsl.engine._pages import PagePool
from mkdsl.engine._pieces import next_piece, row
from mkdsl.engine._sequence import Sequence, State, pages_at_most

BATCHES = (1, 2, 4, 8, 16)  # a decode step is compiled for each


class PagesError(ValueError):
    """A request needs more pages than there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Positions start to stop - 1 of a sequence's prompt."""

    sequence: Sequence
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill:
    """Write a piece of a prompt, or several short prompts at once. fresh: pages that they have only now, with whatever these held before."""

    parts: tuple[Part, ...]
    fresh: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Run decode steps.

    Attributes:
      sequences: who takes part.
      counts: tokens that each gets at most: fewer than others where its answer must end.
      batch: what was compiled for so many sequences or more; the rest of it is empty.
      fresh: pages that they have only now.
    """

    sequences: tuple[Sequence, ...]
    counts: tuple[int, ...]
    batch: int
    fresh: tuple[int, ...]


class Scheduler:
    """First come, first served: the first that waits is admitted as soon as a slot and all pages it may ever need are to be had.

    Attributes:
      pool: the pages.
      waiting: in the order of their arrival.
      prefilling: the one whose prompt is being written.
      running: those that get a token from each decode step.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_batch: int,
        piece: int,
        steps: int,
        beside: int | None = None,
        packed: int = 0,
        batch_invariant: bool = False,
    ) -> None:
        """Sets the limits.

        Args:
          pool: all pages, none of them held.
          max_batch: sequences that prefill or run at the same time, one of BATCHES.
          piece: positions written by one Prefill at most.
          steps: decode steps in one Decode.
          beside: positions written by one Prefill at most while somebody's answer runs; None for `piece`.
          packed: positions that the short prompts which are written together have at most, all rows as long as the longest's; 0 where none are.
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
        self._piece, self._steps, self._batch_invariant = piece, steps, batch_invariant
        self._beside, self._packed, self._most = beside or piece, packed, max_batch
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
        """What to do now; None where there is nothing, or nothing before it is known what came of what is under way.

        A Prefill counts as done. What came of a Decode is told by `decoded`, in the order of the Decodes, and may be told later: the device does
        one thing after the other. Between two pieces of a prompt the others decode: so they never wait for more than one piece.
        """
        self._admit()
        ready = [sequence for sequence in self.running if sequence.remaining > sequence.ahead]
        if self.prefilling and not (self._decode_is_due and ready):
            self._decode_is_due = True
            return self._prefill(self.prefilling)
        self._decode_is_due = False
        return self._decode(ready) if ready else None

    def decoded(self, sequence: Sequence, count: int, tokens: Many[int], *, ended: bool) -> None:
        """What one sequence of a Decode said, if it has not ended meanwhile.

        Args:
          sequence: one that took part.
          count: tokens that it might have got.
          tokens: those that belong to its answer: as many, or fewer where it ended.
          ended: nothing follows them. Where max_tokens are reached, nothing does anyway.
        """
        sequence.ahead -= count
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

    def _prefill(self, first: Sequence) -> Prefill:
        length = next_piece(first.unfilled, self._beside if self.running else self._piece)
        whole = not first.written and length == first.unfilled
        together = [first, *self._company(first)] if whole else [first]
        fresh: list[int] = []
        parts = [self._part(sequence, sequence.written + (sequence.unfilled if whole else length), fresh) for sequence in together]
        return Prefill(parts=tuple(parts), fresh=tuple(fresh))

    def _part(self, sequence: Sequence, stop: int, fresh: list[int]) -> Part:
        start = sequence.written
        fresh += sequence.take_until(self.pool, stop)
        sequence.prefilled(self.pool, stop)
        if not sequence.unfilled:
            self.prefilling = None  # the others of a packed piece never were
            self._run(sequence)
        return Part(sequence=sequence, start=start, stop=stop)

    def _company(self, first: Sequence) -> list[Sequence]:
        """Those who wait and are written together with a short prompt, being short as well. Who begins like one of them finds it written next time."""
        together, longest = [first], first.unfilled
        while self.waiting and self._slots:
            sequence = self.waiting[0]
            longest = max(longest, sequence.unfilled)
            fits = (len(together) + 1) * row(longest, self._packed, self._most) <= self._packed
            if not fits or not sequence.unfilled or sequence.found(self.pool, self._unit):
                break
            alike = sequence.first_page is not None and sequence.first_page in [other.first_page for other in together]
            if alike or not sequence.claim(self.pool, self._unit):
                break
            self.waiting.popleft().slot = self._slots.pop()
            together.append(sequence)
        return together[1:]

    def _decode(self, ready: Many[Sequence]) -> Decode:
        counts = [min(self._steps, sequence.remaining - sequence.ahead) for sequence in ready]
        fresh: list[int] = []
        for sequence, count in zip(ready, counts, strict=True):
            sequence.ahead += count
            fresh += sequence.take_until(self.pool, sequence.written + sequence.ahead)
        batch = next(size for size in self._batches if size >= len(ready))
        return Decode(sequences=tuple(ready), counts=tuple(counts), batch=batch, fresh=tuple(fresh))

    def _end(self, sequence: Sequence, state: State) -> None:
        assert sequence.slot is not None
        sequence.release(self.pool)
        self._slots.append(sequence.slot)
        sequence.state, sequence.slot = state, None
        if sequence is self.prefilling:
            self.prefilling = None
        else:
            self.running.remove(sequence)
