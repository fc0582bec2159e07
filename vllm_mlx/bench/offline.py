"""The engine without HTTP, in a process of its own: `python -m vllm_mlx.bench.offline MODEL`.

Reads one JSON job a line (conversations, number of streams) and answers with the traces, one JSON line each. Steps the
engine directly: no threads, no event loop, no text. What a server adds is measured against this.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from vllm_mlx import blas


class OfflineRunner:
    """One loaded model. `run` plays conversations, at most `num_streams` at a time, as fast as they end."""

    def __init__(self, folder: str) -> None:
        from vllm_mlx.engine.assembly import EngineOptions, build_engine  # after the BLAS: these import MLX
        from vllm_mlx.models import device, loader

        loaded = loader.load(folder)
        free = device.free_bytes()
        options = EngineOptions(memory_bytes=int(free * 0.5), prefix_cache_bytes=int(free * 0.2))
        self._tokenizer = loaded.tokenizer
        self._traces: dict[str, dict[str, Any]] = {}
        self._ended: list[str] = []
        self._engine = build_engine(loaded.model, options, self._publish)
        self.seconds: dict[str, float] = {}
        self._time_parts()

    def _time_parts(self) -> None:
        """Note what each part of a step takes. On a GPU `wait` is the device's time; on a CPU `launch` computes too."""
        engine = self._engine
        parts = ((engine.scheduler, "plan", "plan"), (engine.runner, "launch", "launch"),
                 (engine.runner, "collect", "wait"), (engine.scheduler, "commit", "commit"),
                 (engine, "_flush", "publish"), (engine, "step", "step"))  # fmt: skip
        for owner, method, name in parts:
            setattr(owner, method, self._timed(getattr(owner, method), name))

    def _timed(self, inner: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        return call

    def run(self, conversations: Sequence[dict[str, Any]], num_streams: int) -> list[dict[str, Any]]:
        todo = deque((number, dict(c), 0) for number, c in enumerate(conversations))
        live: dict[str, tuple[int, dict[str, Any], int]] = {}
        done = []
        while todo or live:
            while todo and len(live) < num_streams:
                item = todo.popleft()
                live[self._submit(*item)] = item
            self._engine.step()
            ended, self._ended = self._ended, []
            for request_id in ended:
                number, conversation, turn = live.pop(request_id)
                trace = self._traces.pop(request_id)
                done.append(trace)
                if conversation["followups"]:
                    text = self._tokenizer.decode(trace.pop("tokens"))
                    first, *rest = conversation["followups"]
                    messages = [*conversation["opening"], {"role": "assistant", "content": text},
                                {"role": "user", "content": first}]  # fmt: skip
                    todo.appendleft((number, {**conversation, "opening": messages, "followups": rest}, turn + 1))
                trace.pop("tokens", None)
        return done

    def _submit(self, number: int, conversation: dict[str, Any], turn: int) -> str:
        from vllm_mlx.engine.request import Prompt, Request

        started = time.perf_counter()
        ids = self._tokenizer.apply_chat_template(
            list(conversation["opening"]), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        request = Request(f"{number}.{turn}", Prompt(tuple(ids)), conversation["max_tokens"])
        self._traces[request.id] = {
            "started": started, "stamps": [], "tokens": [], "turn": turn, "num_prompt_tokens": len(ids)
        }  # fmt: skip
        self._engine.submit(request)
        return request.id

    def _publish(self, events: Sequence[Any], status: Any) -> None:
        now = time.perf_counter()
        for event in events:
            trace = self._traces[event.request_id]
            if event.token_ids:
                trace["stamps"].append(now)
                trace["tokens"] += event.token_ids
            if event.finish_reason is not None:
                trace["ended"] = now
                trace["error"] = event.detail
                trace["num_completion_tokens"] = event.usage.num_completion_tokens if event.usage else 0
                trace["num_cached_tokens"] = event.usage.num_cached_tokens if event.usage else 0
                self._ended.append(event.request_id)


def main(folder: str) -> None:
    """Answer jobs until the input ends."""
    report = blas.load()
    runner = OfflineRunner(folder)
    print(json.dumps({"ready": True, "blas": str(report)}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if job == "seconds":
            print(json.dumps(runner.seconds), flush=True)
            continue
        print(json.dumps(runner.run(job["conversations"], job["num_streams"])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
