"""The two seams through which generation sees the world below: the engine, and the model's tokenizer.

Both are Protocols, so that tests put small honest fakes behind them. `engine/thread.py` satisfies EnginePort, a
transformers fast tokenizer satisfies Tokenizer. Used on the event loop, the tokenizer in worker threads too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, overload

from vllm_mlx.engine.request import Request
from vllm_mlx.engine.step import EngineStatus, TokenEvent

T = TypeVar("T")


class EnginePort(Protocol):
    """What generation may ask of an engine. All methods belong to the event loop."""

    def stream(self, request: Request) -> AsyncIterator[TokenEvent]:
        """Submit, and give the request's events: exactly one final event, the last. Leaving early (`aclose`) cancels.

        `TokenEvent.cache` should be set as soon as it is known, and on the final event at the latest.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; its stream then gives the final event. An unknown id does nothing."""
        ...

    @property
    def status(self) -> EngineStatus:
        """The engine as of its last step; never waits."""
        ...

    async def call(self, job: Callable[[], T]) -> T:
        """Run a job on the MLX thread between two steps."""
        ...


class Tokenizer(Protocol):
    """The part of a transformers fast tokenizer that generation uses."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Added tokens by id; each has `content` and `special`."""
        ...

    def get_vocab(self) -> Mapping[str, int]: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str: ...

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str | None: ...

    @overload
    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]: ...

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> Any: ...
