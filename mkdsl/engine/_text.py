"""Text as its tokens arrive: never half a character, and nothing that may turn out to be the beginning of a stop string."""

from collections.abc import Callable, Iterable, Sequence

UNFINISHED = "\ufffd"  # what the first bytes of a character decode to while the rest is missing
CONTEXT = 8  # tokens before the first one that decide how it decodes


class Detokenizer:
    """Tokens to text, one after the other.

    A token may hold part of a character, and may decode differently after its neighbour (SentencePiece drops the space that a text begins
    with, and only that one): so the tokens not yet shown are decoded after those shown last, and held back while they end in the middle of a
    character. Special tokens show as nothing.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, after: Sequence[int] = ()) -> None:
        """Starts a text.

        Args:
          decode: tokens to text, as a whole.
          after: the tokens that the text continues. It is what the two together have beyond these alone.
        """
        self._decode = decode
        tails = (list(after[len(after) - n :]) for n in range(min(CONTEXT, len(after)), 0, -1))
        self._shown = next((tail for tail in tails if UNFINISHED not in decode(tail)), [])  # half a character would spoil what is beside it
        self._before = decode(self._shown)  # kept: it is wanted for each token
        self._waiting: list[int] = []

    def feed(self, tokens: Iterable[int]) -> str:
        """The text that these tokens finish."""
        return "".join(map(self._one, tokens))

    def finish(self) -> str:
        """What is left when no more tokens come."""
        rest, self._waiting = self._beyond(), []
        return rest

    def _one(self, token: int) -> str:
        self._waiting.append(token)
        piece = self._beyond()
        if not piece or piece.endswith(UNFINISHED):
            return ""
        self._shown, self._waiting = self._waiting, []
        self._before = self._decode(self._shown)
        return piece

    def _beyond(self) -> str:
        return self._decode(self._shown + self._waiting)[len(self._before) :]


class StopStrings:
    """Text up to the first of some strings. The result is the same however the text is cut into pieces.

    Attributes:
      found: whether one of them has come: then nothing follows.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings, self._held, self.found = strings, "", False

    def feed(self, text: str) -> str:
        """What can be shown now: of the text so far, all but what may be the beginning of a stop string."""
        if self.found:
            return ""
        self._held += text
        ends = [(at + len(string), at) for string in self._strings if (at := self._held.find(string)) >= 0]
        self.found = bool(ends)
        keep = 0 if self.found else self._beginning()
        shown = self._held[: min(ends)[1]] if self.found else self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        rest, self._held = self._held, ""
        return rest

    def _beginning(self) -> int:
        """Characters at the end of what is held that some string begins with."""
        longest = min(len(self._held), max(map(len, self._strings), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._strings)), 0)
