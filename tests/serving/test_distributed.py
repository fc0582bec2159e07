"""One model over several real processes (MLX's ring): equal answers; when one is lost, an end for all.

Where the system lets us, each process has a network namespace of its own, as if on another machine; else loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from tests.engine.test_oracle_adapters import KINDS, write_adapter
from tests.serving.network import Machine, NotPermitted, machines
from tests.serving.process import ServerProcess, free_port
from vllm_mlx.models.loader import load

PROMPTS = ["The quick brown fox", "The quick brown fox jumps over", "get_weather in Paris, " * 12, "x"]
NUM_TOKENS = 12
KEY = {"authorization": "Bearer k"}


@dataclass
class Group:
    """All ranks of one server; `lead` is the one that listens."""

    lead: ServerProcess
    others: list[subprocess.Popen[bytes]]

    def codes(self) -> list[int]:
        """Wait for all to end; rank 0's first."""
        return [self.lead.wait(), *(other.wait(timeout=60) for other in self.others)]


@contextmanager
def group(
    folders: list[Path], *flags: str, log: Path, is_awaited: bool = True, places: Sequence[Machine] = ()
) -> Iterator[Group]:
    """One process a folder, each with its own copy of the model or the same, at `places` or here."""
    hosts = log.with_suffix(".json")
    addresses = [place.address for place in places] or ["127.0.0.1"] * len(folders)
    hosts.write_text(json.dumps([[f"{address}:{free_port()}"] for address in addresses]))
    environment = {**os.environ, "MLX_HOSTFILE": str(hosts)}
    prefixes = [place.prefix for place in places] or [()] * len(folders)
    others = []
    for rank, folder in enumerate(folders[1:], 1):
        command = [*prefixes[rank], sys.executable, "-m", "vllm_mlx.cli", "serve", str(folder), *flags]
        with (log.parent / f"rank{rank}").open("wb") as file:
            others.append(
                subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env={**environment, "MLX_RANK": str(rank)}
                )
            )
    os.environ.update({"MLX_HOSTFILE": str(hosts), "MLX_RANK": "0"})
    try:
        host = places[0].address if places else None
        everywhere = ("--repetition-policy", "off", *flags)
        lead = ServerProcess(folders[0], *everywhere, log=log, host=host, prefix=prefixes[0])
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
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=KEY, timeout=120)


def expected(folder: Path, adapter: Path | None = None) -> list[str]:
    """mlx-lm's own greedy answers, in one process."""
    model, _ = load_model(folder)
    if adapter is not None:
        load_adapters(model, str(adapter))
        model.eval()
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


@pytest.fixture(scope="module")
def network() -> Iterator[Sequence[Machine]]:
    """Four machines; none where namespaces are not permitted."""
    with ExitStack() as stack:
        try:
            found = stack.enter_context(machines(4))
        except NotPermitted:
            found = ()
        yield found


def test_the_ranks_of_these_tests_have_namespaces_of_their_own(network) -> None:
    if not network:
        pytest.skip("network namespaces need root and `ip`; the other tests ran on loopback")
    assert len({machine.address for machine in network}) == 4


def test_two_ranks_by_tensor_answer_as_one_and_all_end_when_one_dies(tiny_model, tmp_path, network) -> None:
    folder = tiny_model("qwen3")
    adapter = write_adapter(tmp_path / "adapter", folder, seed=0, **KINDS["second"])
    flags = ["--distributed", "tensor", "--served-model-name", "tiny", "--adapter", f"own={adapter}", "--api-key", "k"]
    with group([folder] * 2, *flags, log=tmp_path / "log", places=network[:2]) as both:
        check_answers(both.lead, folder)
        shaped = ask(both.lead, "x", guided_choice=["yes", "no"], ignore_eos=False, seed=3, temperature=1.0, logprobs=1)
        choice = shaped.json()["choices"][0]
        assert choice["text"] in ("yes", "no") and choice["logprobs"]["tokens"]
        check_adapters(both.lead, folder, adapter)
        body = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True, "temperature": 0}
        url = f"{both.lead.url}/v1/completions"
        with httpx.stream("POST", url, json=body, headers=KEY, timeout=60) as response:
            lines = response.iter_lines()
            next(line for line in lines if line.startswith("data: "))
            both.others[0].kill()
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]" and "rank 1 is lost" in json.loads(rest[-2][6:])["error"]["message"]
        assert both.codes()[0] == 1 and "rank 1 is lost" in both.lead.output


def check_adapters(server: ServerProcess, folder: Path, adapter: Path) -> None:
    """One of the start and one that comes live, beside plain rows."""
    body = {"lora_name": "live", "lora_path": str(adapter)}
    loaded = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, headers=KEY, timeout=60)
    assert loaded.status_code == 200, loaded.text
    plain, adapted = expected(folder)[0], expected(folder, adapter)[0]
    wanted = {"tiny": plain, "tiny:own": adapted, "tiny:live": adapted}
    with ThreadPoolExecutor(3) as pool:
        answers = pool.map(lambda name: ask(server, PROMPTS[0], model=name).json(), wanted)
    assert {answer["model"]: answer["choices"][0]["text"] for answer in answers} == wanted


def test_four_ranks_by_pipeline_answer_as_one_and_all_end_when_one_is_stuck(tiny_model, tmp_path, network) -> None:
    folder = tiny_model("qwen2")
    flags = ["--distributed", "pipeline", "--distributed-timeout", "4"]
    with group([folder] * 4, *flags, log=tmp_path / "log", places=network[:4]) as four:
        check_answers(four.lead, folder)
        four.others[1].send_signal(signal.SIGSTOP)
        answer = ask(four.lead, "stuck")
        assert answer.status_code == 500 and "a rank is stuck" in answer.json()["error"]["message"]
        four.others[1].send_signal(signal.SIGCONT)
        assert four.codes()[0] == 1


def test_a_signal_lets_running_requests_finish_and_ends_all_ranks(tiny_model, tmp_path, network) -> None:
    folder = tiny_model("qwen3")
    with group([folder] * 2, "--distributed", "tensor", log=tmp_path / "log", places=network[:2]) as both:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, both.lead, "x", max_tokens=60)
            while not httpx.get(f"{both.lead.url}/v1/requests").json()["data"]:
                pass
            for process in (both.lead.process, *both.others):
                process.send_signal(signal.SIGTERM)
            assert answer.result().json()["usage"]["completion_tokens"] == 60
        assert both.codes() == [0, 0]


def test_a_rank_that_is_cut_off_or_stopped_ends_all_of_them(tiny_model, tmp_path, network) -> None:
    folder = tiny_model("qwen3")
    flags = ["--distributed", "tensor", "--distributed-timeout", "4"]
    with group([folder] * 2, *flags, log=tmp_path / "log", places=network[:2]) as both:
        assert ask(both.lead, "x").status_code == 200
        with network[1].unplugged() if network else stopped(both.lead):
            assert both.others[0].wait(timeout=60) == 1
            if network:  # both sides find out by themselves: nobody is told
                assert both.lead.wait() == 1
        assert both.lead.wait() == 1 and "rank 1 is lost" in both.lead.output


@contextmanager
def stopped(server: ServerProcess) -> Iterator[None]:
    server.signal(signal.SIGSTOP)
    yield
    server.signal(signal.SIGCONT)


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


def test_a_missing_launcher_is_one_sentence(tiny_model, tmp_path) -> None:
    lone = ServerProcess(tiny_model("qwen3"), "--distributed", "tensor", log=tmp_path / "lone")
    assert lone.wait() == 2 and "mlx.launch" in lone.output
