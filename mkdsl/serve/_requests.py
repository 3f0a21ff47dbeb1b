"""Requests as OpenAI's clients send them, and what they ask of the engine. A field that is not listed, or has a value that would be ignored, is refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mkdsl.engine import SamplingParams
from mkdsl.serve._errors import ApiError

Tokens = list[int]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Fields that there are not may be null, as clients have them that send all of a message back."""
        return (
            {name: value for name, value in data.items() if value is not None or name in cls.model_fields}
            if isinstance(data, dict)
            else data
        )


class StreamOptions(Strict):
    """What a stream ends with; obfuscation is padding against eavesdroppers that this server never adds."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Common(Strict):
    """Fields of both endpoints. Those after `user` are not OpenAI's; they have the names that other servers use."""

    model: str
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None

    def params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """What is asked for. Raises SamplingError for a value outside its range."""
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options without a stream; set stream to true", param="stream_options")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        asked = {
            "n": self.n,
            "seed": None if self.seed is None else self.seed % (1 << 64),  # OpenAI's may be negative
            "temperature": self.temperature,
            "top_p": self.top_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self._biases(),
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        return SamplingParams(
            **given, stop=tuple(stop), stop_tokens=tuple(self.stop_token_ids or ()), max_tokens=max_tokens, logprobs=logprobs
        )

    def _biases(self) -> dict[int, float] | None:
        try:
            return None if self.logit_bias is None else {int(token): bias for token, bias in self.logit_bias.items()}
        except ValueError:
            raise ApiError(400, f"logit_bias={self.logit_bias}; its keys are token ids", param="logit_bias") from None


class CompletionRequest(Common):
    """Of /v1/completions."""

    prompt: str | Tokens | list[str] | list[Tokens]
    max_tokens: int | None = 16
    logprobs: int | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    @property
    def sampling(self) -> SamplingParams:
        return self.params(max_tokens=self.max_tokens, logprobs=self.logprobs)

    @property
    def prompts(self) -> list[str] | list[Tokens]:
        """All of them, each text or token ids."""
        several: Any = self.prompt
        if not several:
            raise ApiError(400, "prompt is empty; give some text or tokens", param="prompt")
        return several if isinstance(several, list) and not isinstance(several[0], int) else [several]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """Content in parts is their text, one after the other. The server's own answers come back as messages, with a refusal of null."""

    role: str
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None

    def as_template_wants(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({} if self.name is None else {"name": self.name})


class TextFormat(Strict):
    type: Literal["text"]


class ChatRequest(Common):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: TextFormat | None = None

    @property
    def sampling(self) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, f"top_logprobs={self.top_logprobs} without logprobs; set logprobs to true", param="top_logprobs")
        return self.params(
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            logprobs=self.top_logprobs or 0 if self.logprobs else None,
        )
