"""`vllm-mlx bench --images`: what this server promises for pictures, counted and timed over HTTP. asyncio thread.

  the same picture, asked about twice     time to first token of the second question beside the first
  eight chats with a picture each         throughput together beside one after the other
  a conversation of 32 turns, 4 pictures  encoder runs beyond one a picture; tokens computed a second time
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import statistics
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
from PIL import Image

from vllm_mlx.bench.client import Endpoint, stream_chat
from vllm_mlx.bench.measure import Trace, summarize
from vllm_mlx.bench.report import Number, Report, Run
from vllm_mlx.bench.workloads import Writer

SIDE = 256
NUM_CHATS, NUM_TURNS, NUM_PICTURES = 8, 32, 4
BLOCK = 64
EXTRA = {"repetition_policy_override": "off", "ignore_eos": True, "enable_thinking": False}

Message = dict[str, Any]


def picture(seed: int, side: int = SIDE) -> Message:
    """An image part: coloured squares, others for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST).save(out, "PNG")
    data = base64.b64encode(out.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def user(text: str, *pictures: Message) -> Message:
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


class ImageBench:
    """One server's numbers. `name` heads the rows of the report."""

    def __init__(self, name: str, endpoint: Endpoint, report: Report, *, max_tokens: int, seed: int) -> None:
        self._name = name
        self._endpoint = endpoint
        self._report = report
        self._max_tokens = max_tokens
        self._seed = seed
        self._writer = Writer(seed)

    async def run(self, num_rounds: int) -> None:
        first_shares, gains = [], []
        for round_number in range(num_rounds):
            first_shares.append(await self._same_picture_twice(round_number))
            gains.append(await self._eight_chats(round_number))
        self._number("same picture asked again: time to first token, of the first", first_shares, 25, at_least=False,
                     unit=" %")  # fmt: skip
        self._number(f"{NUM_CHATS} image chats at once, times one after the other", gains, 2.0, at_least=True, unit="x")
        num_encoded, recomputed = await self._long_conversation()
        self._report.numbers += [
            Number(f"{NUM_TURNS} turns, {NUM_PICTURES} pictures: encoder runs", num_encoded, NUM_PICTURES,
                   at_least=False),
            Number("tokens computed again in a turn, at most", max(recomputed), BLOCK, at_least=False,
                   rounds=tuple(recomputed)),
        ]  # fmt: skip

    # ── the three cases ─────────────────────────────────────────────────────────────────────────────────────────

    async def _same_picture_twice(self, round_number: int) -> float:
        """Percent of the first question's time to first token that the second takes."""
        shown = picture(self._seed + round_number)
        traces = [await self._ask([user(self._writer.text(16), shown)], 4) for _ in range(2)]
        for step, trace in zip(("first question", "second question"), traces, strict=True):
            self._report.runs.append(Run(self._name, f"a picture, {step}", 1, round_number, summarize([trace])))
        if any(trace.error or not trace.stamps for trace in traces):
            return float("inf")
        return 100 * traces[1].ttft_ms / traces[0].ttft_ms

    async def _eight_chats(self, round_number: int) -> float:
        """Throughput at once by throughput in sequence; which comes first changes from round to round."""
        rates = {}
        for at_once in (True, False) if round_number % 2 else (False, True):
            seed = self._seed + 1000 * (round_number + 1) + 100 * at_once
            chats = [[user(self._writer.text(16), picture(seed + i))] for i in range(NUM_CHATS)]
            if at_once:
                traces = list(await asyncio.gather(*(self._ask(chat, self._max_tokens) for chat in chats)))
            else:
                traces = [await self._ask(chat, self._max_tokens) for chat in chats]
            summary = summarize(traces)
            num_streams = NUM_CHATS if at_once else 1
            self._report.runs.append(Run(self._name, "image chats", num_streams, round_number, summary))
            rates[at_once] = summary.tokens_per_s if not summary.num_failed else 0.0
        return rates[True] / rates[False] if rates[False] else 0.0

    async def _long_conversation(self) -> tuple[int, list[float]]:
        """(encoder runs, tokens computed a second time in each turn but the first)."""
        before = await self._num_encoder_runs()
        messages: list[Message] = []
        known: list[int] = []  # the last prompt's tokens
        num_answered = 0
        recomputed = []
        traces: list[Trace] = []
        for turn in range(NUM_TURNS):
            is_new = turn % (NUM_TURNS // NUM_PICTURES) == 0
            pictures = [picture(self._seed + 5000 + turn)] if is_new else []
            messages.append(user(self._writer.text(12), *pictures))
            prompt = await self._token_ids(messages)
            trace = await self._ask(messages, 16)
            trace.turn = turn
            traces.append(trace)
            if trace.error:
                break
            common = len(os.path.commonprefix([prompt, known]))
            if turn and common == len(known):
                common += max(0, num_answered - 1)  # the answer was computed too, but for its last token
            if turn:
                recomputed.append(float(max(0, common - trace.num_cached_tokens)))
            known, num_answered = prompt, trace.num_completion_tokens or 0
            messages.append({"role": "assistant", "content": trace.text})
        self._report.runs.append(Run(self._name, f"{NUM_TURNS} turns", 1, 0, summarize(traces)))
        return await self._num_encoder_runs() - before, recomputed or [float("inf")]

    # ── the server ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _ask(self, messages: Sequence[Message], max_tokens: int) -> Trace:
        return await stream_chat(self._endpoint, {
            "model": self._endpoint.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}, **EXTRA,
        })  # fmt: skip

    async def _token_ids(self, messages: Sequence[Message]) -> list[int]:
        body = {"messages": list(messages), "chat_template_kwargs": {"enable_thinking": False}}
        return list((await self._call("POST", "/tokenize", body))["tokens"])

    async def _num_encoder_runs(self) -> int:
        return int((await self._call("GET", "/v1/cache/stats"))["num_encoder_runs"])

    async def _call(self, method: str, path: str, body: object = None) -> Any:
        url = self._endpoint.url.rstrip("/").removesuffix("/v1") + path
        headers = {"authorization": f"Bearer {self._endpoint.api_key}"} if self._endpoint.api_key else {}
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.request(method, url, json=body, headers=headers)
        answer.raise_for_status()
        return answer.json()

    def _number(self, name: str, values: Sequence[float], limit: float, *, at_least: bool, unit: str = "") -> None:
        value = statistics.median(values)
        self._report.numbers.append(Number(name, value, limit, at_least, unit, tuple(values)))
