"""`--warm-prompts FILE`: computes prompts that will be asked, before anybody asks. Part of the composition root.

The file is JSON lines, each the body of a chat (`messages`, `tools`) or of a completion (`prompt`). Each is asked for
one token, in the background's priority and in every caller's namespace; what is on disk already costs nothing. A prompt
that fails is said in the log and passed over. Event loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path

from vllm_mlx.api.body import parse_body
from vllm_mlx.api.context import ServerContext
from vllm_mlx.api.openai.convert import chat_request, completion_request, prompts_of
from vllm_mlx.api.openai.schemas import ChatCompletionRequest, CompletionRequest
from vllm_mlx.engine.request import BACKGROUND
from vllm_mlx.errors import InvalidRequest, SettingsError, VllmMlxError
from vllm_mlx.generation.events import collect
from vllm_mlx.generation.request import GenerationRequest

log = logging.getLogger(__name__)

Body = ChatCompletionRequest | CompletionRequest


def read_prompts(file: str) -> list[Body]:
    """The file's bodies; raises SettingsError naming the line, before anything is loaded."""
    try:
        lines = Path(file).expanduser().read_bytes().splitlines()
    except OSError as error:
        raise SettingsError(f"--warm-prompts {file} cannot be read: {error.strerror or error}.") from error
    bodies: list[Body] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        is_completion = b'"prompt"' in line and b'"messages"' not in line
        try:
            body: Body = (
                parse_body(line, CompletionRequest) if is_completion else parse_body(line, ChatCompletionRequest)
            )
            _requests(body, number, "")
        except InvalidRequest as error:
            raise SettingsError(f"--warm-prompts {file}, line {number}: {error}") from error
        bodies.append(body)
    return bodies


async def warm(context: ServerContext, bodies: Iterable[Body]) -> None:
    """Compute them all, one after the other, each in every namespace."""
    service, started, num_tokens, num_done = context.require_service(), time.monotonic(), 0, 0
    server = context.settings.server
    is_split = bool(context.api_keys) and not server.shared_cache
    namespaces = [f"key:{name}/" for name in context.api_keys] if is_split else [""]
    for index, body in enumerate(bodies):
        for namespace in namespaces:
            for request in _requests(body, index, namespace):
                try:
                    message = await collect(service.generate(request))
                    num_tokens += message.accepted.num_prompt_tokens if message.accepted is not None else 0
                    num_done += 1
                except VllmMlxError as error:
                    log.warning("warm prompt %d was not computed: %s", index + 1, error)
    log.info("%d warm prompts (%d tokens) are ready after %.1f s", num_done, num_tokens, time.monotonic() - started)


def _requests(body: Body, number: int, namespace: str) -> list[GenerationRequest]:
    body = body.model_copy(update={"max_tokens": 1, "priority": BACKGROUND, "stream": False, "n": 1})
    if isinstance(body, ChatCompletionRequest):
        return [chat_request(body, id=f"warm-{number}-{namespace}", client="warm", namespace=namespace)]
    return [
        completion_request(body, prompt, id=f"warm-{number}-{i}-{namespace}", client="warm", namespace=namespace)
        for i, prompt in enumerate(prompts_of(body))
    ]
