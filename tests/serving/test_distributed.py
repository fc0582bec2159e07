"""One model over several real processes (MLX's ring on loopback): equal answers; when one is lost, an end for all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from tests.serving.process import ServerProcess, free_port
from vllm_mlx.models.loader import load

PROMPTS = ["The quick brown fox", "The quick brown fox jumps over", "get_weather in Paris, " * 12, "x"]
NUM_TOKENS = 12


@dataclass
class Group:
    """All ranks of one server; `lead` is the one that listens."""

    lead: ServerProcess
    others: list[subprocess.Popen[bytes]]

    def codes(self) -> list[int]:
        """Wait for all to end; rank 0's first."""
        return [self.lead.wait(), *(other.wait(timeout=60) for other in self.others)]


@contextmanager
def group(folders: list[Path], *flags: str, log: Path, is_awaited: bool = True) -> Iterator[Group]:
    """One process a folder, each with its own copy of the model or the same."""
    hosts = log.with_suffix(".json")
    hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in folders]))
    environment = {**os.environ, "MLX_HOSTFILE": str(hosts)}
    others = []
    for rank, folder in enumerate(folders[1:], 1):
        command = [sys.executable, "-m", "vllm_mlx.cli", "serve", str(folder), *flags]
        with (log.parent / f"rank{rank}").open("wb") as file:
            others.append(
                subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env={**environment, "MLX_RANK": str(rank)}
                )
            )
    os.environ.update({"MLX_HOSTFILE": str(hosts), "MLX_RANK": "0"})
    try:
        lead = ServerProcess(folders[0], "--repetition-policy", "off", *flags, log=log)
    finally:
        del os.environ["MLX_HOSTFILE"], os.environ["MLX_RANK"]
    try:
        if is_awaited:
            lead.wait_until_healthy()
        yield Group(lead, others)
    finally:
        for process in (lead.process, *others):
            if process.poll() is None:
                process.kill()
                process.wait()


def ask(server: ServerProcess, prompt: str, **fields) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


def expected(folder: Path) -> list[str]:
    """mlx-lm's own greedy answers, in one process."""
    model, _ = load_model(folder)
    tokenizer = load(folder).tokenizer
    answers = []
    for prompt in PROMPTS:
        steps = generate_step(mx.array(tokenizer.encode(prompt)), model, max_tokens=NUM_TOKENS)
        answers.append(tokenizer.decode([int(token) for token, _ in steps], skip_special_tokens=True))
    return answers


def check_answers(server: ServerProcess, folder: Path) -> None:
    wanted = expected(folder)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: ask(server, prompt).json(), PROMPTS))
    assert [answer["choices"][0]["text"] for answer in answers] == wanted
    again = ask(server, PROMPTS[2]).json()
    assert again["choices"][0]["text"] == wanted[2]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, "prefixes are not kept on all ranks"


def test_two_ranks_by_tensor_answer_as_one_and_all_end_when_one_dies(tiny_model, tmp_path) -> None:
    folder = tiny_model("qwen3")
    with group([folder] * 2, "--distributed", "tensor", log=tmp_path / "log") as both:
        check_answers(both.lead, folder)
        shaped = ask(both.lead, "x", guided_choice=["yes", "no"], ignore_eos=False, seed=3, temperature=1.0, logprobs=1)
        choice = shaped.json()["choices"][0]
        assert choice["text"] in ("yes", "no") and choice["logprobs"]["tokens"]
        body = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{both.lead.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(line for line in lines if line.startswith("data: "))
            both.others[0].kill()
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]" and "rank 1 is lost" in json.loads(rest[-2][6:])["error"]["message"]
        assert both.codes()[0] == 1 and "rank 1 is lost" in both.lead.output


def test_four_ranks_by_pipeline_answer_as_one_and_all_end_when_one_is_stuck(tiny_model, tmp_path) -> None:
    folder = tiny_model("qwen2")
    flags = ["--distributed", "pipeline", "--distributed-timeout", "4"]
    with group([folder] * 4, *flags, log=tmp_path / "log") as four:
        check_answers(four.lead, folder)
        four.others[1].send_signal(signal.SIGSTOP)
        answer = ask(four.lead, "stuck")
        assert answer.status_code == 500 and "a rank is stuck" in answer.json()["error"]["message"]
        four.others[1].send_signal(signal.SIGCONT)
        assert four.codes()[0] == 1


def test_a_signal_lets_running_requests_finish_and_ends_all_ranks(tiny_model, tmp_path) -> None:
    folder = tiny_model("qwen3")
    with group([folder] * 2, "--distributed", "tensor", log=tmp_path / "log") as both:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, both.lead, "x", max_tokens=60)
            while not httpx.get(f"{both.lead.url}/v1/requests").json()["data"]:
                pass
            for process in (both.lead.process, *both.others):
                process.send_signal(signal.SIGTERM)
            assert answer.result().json()["usage"]["completion_tokens"] == 60
        assert both.codes() == [0, 0]


def test_ranks_with_different_weights_are_refused_in_one_sentence(tiny_model, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model("qwen3"), other)
    file = other / "model.safetensors"
    content = np.fromfile(file, dtype=np.uint8)
    content[-64:] ^= 1
    content.tofile(file)
    folders = [tiny_model("qwen3"), other]
    with group(folders, "--distributed", "tensor", log=tmp_path / "log", is_awaited=False) as both:
        assert both.lead.wait() == 1
        assert "Rank 1 has other model files than rank 0" in both.lead.output and "Traceback" not in both.lead.output


def test_what_cannot_be_split_and_a_missing_launcher_are_one_sentence(tiny_model, tmp_path) -> None:
    for model, kind, words in (("qwen3", "pipeline", "no pipeline split"), ("mamba2", "tensor", "no tensor split")):
        log = tmp_path / model
        with group([tiny_model(model)] * 2, "--distributed", kind, log=log, is_awaited=False) as both:
            assert both.lead.wait() == 1 and words in both.lead.output, both.lead.output
    lone = ServerProcess(tiny_model("qwen3"), "--distributed", "tensor", log=tmp_path / "lone")
    assert lone.wait() == 2 and "mlx.launch" in lone.output
