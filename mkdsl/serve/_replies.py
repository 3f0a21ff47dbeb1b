"""Answers in the two forms of OpenAI's interface, whole and in chunks."""

import collections
import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from mkdsl.engine import Answer, Delta, Logprob

Spell = Callable[[int], str]  # a token's text by itself


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Tokens of the prompts and of all answers."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def event(data: dict) -> str:
    """A server-sent one."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


@dataclasses.dataclass(kw_only=True)
class Reply:
    """One request's reply: its id and time are the same in all chunks."""

    model: str
    spell: Spell
    n: int
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    offsets: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)  # characters that an answer has shown

    prefix, whole, part = "", "", ""

    def body(self, answers: Sequence[tuple[Answer, ...]], prompt_tokens: int) -> dict[str, Any]:
        """All answers, of each prompt in turn."""
        every = [answer for of_one in answers for answer in of_one]
        choices = [self.choice(index, answer) for index, answer in enumerate(every)]
        return self._about(self.whole) | {"choices": choices, "usage": usage(prompt_tokens, sum(len(answer.tokens) for answer in every))}

    def chunk(self, delta: Delta, *, first: bool) -> dict[str, Any]:
        """What one answer has more; `first` says that it is the first of that answer."""
        return self._about(self.part) | {"choices": [self.more(delta.prompt * self.n + delta.choice, delta, first=first)]}

    def last_chunk(self, prompt_tokens: int, answer_tokens: int) -> dict[str, Any]:
        """What a stream ends with that has asked for its usage."""
        return self._about(self.part) | {"choices": [], "usage": usage(prompt_tokens, answer_tokens)}

    def _about(self, kind: str) -> dict[str, Any]:
        return {"id": f"{self.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def more(self, index: int, delta: Delta, *, first: bool) -> dict[str, Any]:
        raise NotImplementedError


class CompletionReply(Reply):
    """Of /v1/completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {"index": index, "text": answer.text, "logprobs": self._logprobs(index, answer.logprobs), "finish_reason": answer.finish}

    def more(self, index: int, delta: Delta, *, first: bool) -> dict[str, Any]:
        return {"index": index, "text": delta.text, "logprobs": self._logprobs(index, delta.logprobs), "finish_reason": delta.finish}

    def _logprobs(self, index: int, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        texts, start = [self.spell(one.token) for one in logprobs], self.offsets[index]
        self.offsets[index] += sum(map(len, texts))
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [{self.spell(t): p for t, p in reversed(one.top)} for one in logprobs],  # of equal texts the likelier stays
            "text_offset": [start + sum(map(len, texts[:i])) for i in range(len(texts))],
        }


class ChatReply(Reply):
    """Of /v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(answer.logprobs), "finish_reason": answer.finish}

    def more(self, index: int, delta: Delta, *, first: bool) -> dict[str, Any]:
        said = ({"role": "assistant"} if first else {}) | {"content": delta.text}
        return {"index": index, "delta": said, "logprobs": self._logprobs(delta.logprobs), "finish_reason": delta.finish}

    def _logprobs(self, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        content = [self._one(o.token, o.logprob) | {"top_logprobs": [self._one(*top) for top in o.top]} for o in logprobs]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        """Bytes are null where a token is part of a character."""
        text = self.spell(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
