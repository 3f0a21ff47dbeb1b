"""Several servers of one model: which of them is asked next. Plain Python, for whatever sends the requests on."""

import collections
import hashlib
import json
from collections.abc import Hashable, Iterable, Iterator

BLOCK = 256  # characters of a prompt: of the order of a page of tokens
MOST = 1 << 16  # beginnings that are remembered


class Routes[Replica: Hashable]:
    """Sends prompts to where their beginning has been before, as long as it is not much busier there than elsewhere; others to the least busy.

    What a replica has in its prefix cache is not known here. It is what was sent there, so far as it is not evicted: a guess, and no harm if wrong.
    """

    def __init__(self, *, slack: int) -> None:
        """A replica may have at most `slack` more requests under way than the least busy, and still get a prompt for its beginning."""
        self._slack = slack
        self._seen: collections.OrderedDict[bytes, Replica] = collections.OrderedDict()
        self._open: collections.Counter[Replica] = collections.Counter()
        self._last: collections.Counter[Replica] = collections.Counter()  # when each was asked last, in requests

    def order(self, prompt: str, replicas: Iterable[Replica]) -> list[Replica]:
        """The replicas, the one to ask first before the others."""
        beginnings = list(_beginnings(prompt))
        idle_first = sorted(replicas, key=lambda replica: (self._open[replica], _rank(beginnings, replica), self._last[replica]))
        first = self._first(beginnings, idle_first)
        self._remember(beginnings, first)
        return sorted(idle_first, key=lambda replica: replica != first)

    def begun(self, replica: Replica) -> None:
        """A request was sent there."""
        self._open[replica] += 1
        self._last[replica] = 1 + max(self._last.values(), default=0)

    def ended(self, replica: Replica) -> None:
        """One that was sent there is over."""
        self._open[replica] -= 1

    def _first(self, beginnings: list[bytes], idle_first: list[Replica]) -> Replica:
        """Where the longest beginning was sent that is known of those that may have it, or else the least busy."""
        bearable = [replica for replica in idle_first if self._open[replica] <= self._open[idle_first[0]] + self._slack]
        sent = (self._seen[beginning] for beginning in reversed(beginnings) if beginning in self._seen)
        return next((replica for replica in sent if replica in bearable), idle_first[0])

    def _remember(self, beginnings: list[bytes], replica: Replica) -> None:
        """The longest first: what is forgotten, oldest first, is a beginning's end."""
        for beginning in reversed(beginnings):
            self._seen[beginning] = replica
            self._seen.move_to_end(beginning)
        while len(self._seen) > MOST:
            self._seen.popitem(last=False)


def prompt_of(body: bytes) -> str:
    """What a request's body asks to be answered, as text of which equal prompts have equal beginnings; nothing if it is no such request."""
    try:
        asked = json.loads(body)
        said = asked.get("messages") or asked.get("prompt")
    except (ValueError, AttributeError):
        return ""
    return said if isinstance(said, str) else json.dumps(said)


def _beginnings(prompt: str) -> Iterator[bytes]:
    """Digests of all whole blocks with what is before them."""
    digest = hashlib.blake2b(digest_size=16)
    for end in range(BLOCK, len(prompt) + 1, BLOCK):
        digest.update(prompt[end - BLOCK : end].encode("utf-8", "surrogatepass"))
        yield digest.digest()


def _rank(beginnings: list[bytes], replica: Hashable) -> bytes:
    """A replica's place among equally busy ones; the same for all who ask, so that several front ends agree."""
    return hashlib.blake2b(beginnings[0] + repr(replica).encode(), digest_size=8).digest() if beginnings else b""
