"""Every error the program raises on purpose.

    VllmMlxError
     ├─ InvalidRequest           the client can mend it (400); names the field
     │   ├─ ContextLengthExceeded
     │   └─ UnknownModel         404
     ├─ Overloaded               no permit now (429), come back after `retry_after_s`
     ├─ Unavailable              the server cannot serve at all now (503)
     ├─ MissingPiece             a program or package that this needs is not installed (501); says how to install it
     ├─ DeadlineExceeded         the request's time ran out (504)
     ├─ Cancelled                the client left, or somebody cancelled the request
     ├─ EngineError              a step failed (500)
     ├─ ModelLoadError           a model folder that cannot be served; one-line cause and remedy
     └─ SettingsError            contradictory or impossible flags; exit code 2

A message is one sentence for a person: what is wrong, then what to do.
"""

from __future__ import annotations


class VllmMlxError(Exception):
    """Root of the tree; `str(error)` is fit to be shown to a client."""


class InvalidRequest(VllmMlxError):
    """The request is wrong in a way its sender can mend.

    `param` is the path of the offending field (`messages.2.content`), `code` a stable machine-readable word.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthExceeded(InvalidRequest):
    """Prompt, or prompt and completion budget together, do not fit the context."""

    def __init__(self, *, num_prompt_tokens: int, max_tokens: int, context_tokens: int) -> None:
        super().__init__(
            f"This model's maximum context length is {context_tokens} tokens, but the request asks for "
            f"{num_prompt_tokens + max_tokens} ({num_prompt_tokens} in the prompt, {max_tokens} for the completion). "
            "Shorten the prompt or ask for fewer tokens.",
            param="messages",
            code="context_length_exceeded",
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        self.context_tokens = context_tokens


class UnknownModel(InvalidRequest):
    """The request names a model that is not served here."""


class Overloaded(VllmMlxError):
    """Too many requests at once; the client should return after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(VllmMlxError):
    """Nothing can be served now: no model, engine unhealthy, or memory pressure."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class MissingPiece(VllmMlxError):
    """What was asked for needs a program or a package that is not installed here; the message has the install line."""


class DeadlineExceeded(VllmMlxError):
    """The request's time-out passed before it finished."""


class Cancelled(VllmMlxError):
    """The request was cancelled before its natural end."""


class EngineError(VllmMlxError):
    """A step of the engine failed; the request cannot be continued."""


class ModelLoadError(VllmMlxError):
    """A model cannot be loaded; the message says why and what to do, and exit code is 1."""


class SettingsError(VllmMlxError):
    """Flags that contradict each other or cannot be met; exit code is 2."""
