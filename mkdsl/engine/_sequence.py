"""One answer in the making: its tokens, its pages, and where it stands."""

import dataclasses
import enum
from collections.abc import Sequence as Many

from mkdsl.engine._pages import PagePool, digests


class State(enum.Enum):
    """Where a sequence stands; it only ever moves down this list."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"


def pages_at_most(prompt: int, max_tokens: int, size: int) -> int:
    """Pages of a sequence's whole life. The last token of the answer is never fed, and takes no position."""
    return -(-(prompt + max_tokens - 1) // size)


@dataclasses.dataclass(eq=False, kw_only=True)
class Sequence:
    """Only the scheduler changes it.

    Attributes:
      prompt: its tokens, at least one.
      max_tokens: tokens of the answer at most.
      state: where it stands.
      answer: tokens so far.
      slot: its row in the device's arrays while it is prefilling or running, else None.
      written: positions in the cache. The token at this position is the next one to be fed.
      ahead: tokens that decode steps under way may add to the answer.
      pages: of its positions, in order. Those of a prefix found come first, and may have other holders.
      promised: pages it will take yet.
      shared: positions of the prompt that were found written.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    state: State = State.WAITING
    answer: list[int] = dataclasses.field(default_factory=list)
    slot: int | None = None
    written: int = 0
    ahead: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    promised: int = 0
    shared: int = 0
    _digests: list[bytes] = dataclasses.field(default_factory=list)

    @property
    def remaining(self) -> int:
        """Tokens of the answer that are allowed yet."""
        return self.max_tokens - len(self.answer)

    @property
    def unfilled(self) -> int:
        """Tokens of the prompt to be prefilled. The last one is not: it is fed to the first decode step, which gives the first new token."""
        return max(len(self.prompt) - 1 - self.written, 0)

    @property
    def first_page(self) -> bytes | None:
        """The digest of the prompt's first page; None where it fills none. Of a sequence for which `found` was called."""
        return self._digests[0] if self._digests else None

    def found(self, pool: PagePool, unit: int) -> list[int]:
        """The pages of the longest prefix that is there, in whole units of so many positions."""
        self._digests = self._digests or list(digests(self.prompt[:-1], pool.size))  # the last token is fed, so its page is written
        shared = pool.find(self._digests)
        return shared[: len(shared) // (unit // pool.size) * (unit // pool.size)]

    def claim(self, pool: PagePool, unit: int) -> bool:
        """Gets hold of the longest prefix that is there, see `found`, and is promised all pages it may need beside.

        Or it gets neither, and False is returned, where there are too few pages.
        """
        shared = self.found(pool, unit)
        more = pages_at_most(len(self.prompt), self.max_tokens, pool.size) - len(shared)
        if not pool.claim(shared, more):
            return False
        self.pages, self.promised = shared, more
        self.shared = self.written = len(shared) * pool.size
        return True

    def take_until(self, pool: PagePool, position: int) -> list[int]:
        """Takes pages so that all positions before this one lie in one, and those not yet written in pages that it may write. Returns the new ones."""
        held = len(self.pages)
        while len(self.pages) * pool.size < position:
            self.pages.append(pool.take())
            self.promised -= 1
        if not all(map(pool.may_write, self.pages[self.written // pool.size :])):
            raise AssertionError("a page would be written that is shared: this is a mistake of mkdsl's scheduler")
        return self.pages[held:]

    def prefilled(self, pool: PagePool, stop: int) -> None:
        """The prompt is written up to this position; pages that are full now are published."""
        full, self.written = self.written // pool.size, stop
        self._publish(pool, full)

    def said(self, pool: PagePool, tokens: Many[int], *, publish: bool) -> None:
        """The answer goes on with tokens, and as many positions are written; pages that are full now are published, or not."""
        full = self.written // pool.size
        self.answer += tokens
        self.written += len(tokens)
        if publish:
            self._publish(pool, full)

    def _publish(self, pool: PagePool, full: int) -> None:
        for number in range(full, self.written // pool.size):
            pool.publish(self.pages[number], self._digest(number, pool.size))

    def release(self, pool: PagePool) -> None:
        """Gives back what it holds."""
        pool.release(self.pages, self.promised)
        self.pages, self.promised = [], 0

    def _digest(self, number: int, size: int) -> bytes:
        """Of page `number`; those before it are known."""
        if number == len(self._digests):
            tokens = (*self.prompt, *self.answer)[number * size : (number + 1) * size]
            self._digests += digests(tokens, size, self._digests[-1] if number else b"")
        return self._digests[number]
