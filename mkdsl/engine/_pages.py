"""The pool of cache pages: who holds which, which are kept for the prefix they hold, and which are promised.

A page is the keys and values of a fixed number of positions. It is in one of three states:

  held    by one or more sequences. Only a page with one holder that is not published is ever written.
  kept    by nobody, but its content is published: a sequence with the same prefix may hold it again. Evicted least recently used.
  free    by nobody, with nothing in it.

Published content is found by the digest of all tokens up to the page's end, so a page stands for its whole prefix.
"""

import array
import collections
import hashlib
from collections.abc import Iterator, Sequence


class PagePool:
    """Pages 0 to count - 1 of `size` positions each. Methods that take pages want them in the order of their positions.

    Attributes:
      count: pages there are.
      size: positions in each.
      promised: pages that sequences will take, and nobody else may.
    """

    def __init__(self, *, count: int, size: int) -> None:
        self.count, self.size, self.promised = count, size, 0
        self._free = list(range(count))[::-1]
        self._holders = [0] * count
        self._digests: dict[int, bytes] = {}  # of published pages
        self._published: dict[bytes, int] = {}
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()  # the least recently used first

    @property
    def available(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._kept)

    @property
    def published(self) -> int:
        """Pages whose content may be found."""
        return len(self._digests)

    def holders(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._holders[page]

    def may_write(self, page: int) -> bool:
        """Whether a page has one holder, who has not published it."""
        return self._holders[page] == 1 and page not in self._digests

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the longest prefix that is published, given the digests of a sequence's pages."""
        pages = []
        for digest in digests:
            if digest not in self._published:
                break
            pages.append(self._published[digest])
        return pages

    def claim(self, shared: Sequence[int], more: int) -> bool:
        """Holds pages that `find` gave and has `more` promised, or does nothing and returns False where so many are not to be had."""
        unheld = sum(not self._holders[page] for page in shared)
        if self.promised + unheld + more > self.available:
            return False
        self.promised += more
        for page in shared:
            self._holders[page] += 1
            self._kept.pop(page, None)
        return True

    def take(self) -> int:
        """One of the pages promised, for its holder alone; where none is free, the one kept that was used longest ago is evicted."""
        if not self.promised:
            raise AssertionError("a page is taken that was not promised: this is a mistake of mkdsl's scheduler")
        self.promised -= 1
        page = self._free.pop() if self._free else self._evict()
        self._holders[page] = 1
        return page

    def publish(self, page: int, digest: bytes) -> None:
        """Lets a full page be found. It is not written from here on. Where another page has this content already, nothing changes."""
        if digest not in self._published:
            self._published[digest], self._digests[page] = page, digest

    def release(self, pages: Sequence[int], promised: int) -> None:
        """Gives back a sequence's pages and what it was promised. The last page is used longest ago: a prefix is kept from its beginning."""
        self.promised -= promised
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                self._give_back(page)

    def forget(self) -> None:
        """Frees the pages kept: their content is lost."""
        while self._kept:
            self._free.append(self._evict())

    def _give_back(self, page: int) -> None:
        if page in self._digests:
            self._kept[page] = None
        else:
            self._free.append(page)

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        del self._published[self._digests.pop(page)]
        return page


def digests(tokens: Sequence[int], size: int, before: bytes = b"") -> Iterator[bytes]:
    """A digest for each whole page of tokens, of its tokens and of all before: the chain starts from the digest `before`.

    It is a cryptographic one. A collision would show one user's text to another, and prompts are chosen by anybody.
    """
    for start in range(0, len(tokens) - size + 1, size):
        before = hashlib.blake2b(before + array.array("q", tokens[start : start + size]).tobytes(), digest_size=16).digest()
        yield before
