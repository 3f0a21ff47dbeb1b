"""Errors in the form that OpenAI's clients expect: a status, and {"error": {message, type, param, code}}."""

import re
from typing import Any

from fastapi.exceptions import RequestValidationError

from mkdsl.engine import ContextError, PagesError, PromptError, SamplingError
from mkdsl.models import CheckpointError

REFUSALS = (SamplingError, ContextError, PagesError, PromptError, CheckpointError)  # of a request: CheckpointErrors are chat templates'
TOO_LONG = (ContextError, PagesError)


class ApiError(Exception):
    """An error with its status. `retry_after` is in seconds."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refusal(error: ValueError) -> ApiError:
    """What the engine refuses; SamplingError's message begins with the field."""
    field = re.match(r"(\w+)=", str(error)) if isinstance(error, SamplingError) else None
    code = "context_length_exceeded" if isinstance(error, TOO_LONG) else None
    return ApiError(400, str(error), param=field[1] if field else None, code=code)


UNIONS = {
    "prompt": "it is text, a list of token ids, or a list of either",
    "stop": "it is text, or a list of texts",
    "content": 'it is text, or a list of parts {"type": "text", "text": ...}',
}


def invalid(error: RequestValidationError) -> ApiError:
    """A body that is no JSON, or not of the fields and types that it should be. The first thing wrong with it is what is said."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON ({first['ctx']['error']}, at character {path[-1]})")
    if not path and isinstance(first["input"], bytes):
        return ApiError(400, "the body was not sent as JSON; send it with Content-Type: application/json")
    param = path[0] if path else None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{'.'.join(path)} is not supported by this server; leave it out", param=param, code="unknown_parameter")
    for end, part in enumerate(path[:-1], 1):
        if part in UNIONS:
            return ApiError(400, f"{'.'.join(path[:end])}: {UNIONS[part]}", param=param)
    return ApiError(400, f"{'.'.join(path) or 'the body'}: {first['msg'].lower()}", param=param)
