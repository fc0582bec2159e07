"""Claims about the Python API, on the built-in model: vLLM's shape, together and in order, the server's refusals."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from vllm_mlx import LLM, AsyncLLM, SamplingParams
from vllm_mlx.errors import InvalidRequest, ModelLoadError, SettingsError
from vllm_mlx.offline.llm import _many, _prompt
from vllm_mlx.offline.options import settings_of

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PONG = [{"role": "user", "content": "Reply with pong"}]


@pytest.fixture(scope="module")
def llm():
    with LLM(max_num_seqs=4) as loaded:
        yield loaded


def test_importing_the_package_loads_nothing():
    code = ("import sys, vllm_mlx; assert vllm_mlx.__version__; "
            "print([n for n in ('mlx', 'fastapi', 'numpy', 'httpx') if n in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_batch_comes_back_in_the_order_of_its_prompts(llm):
    prompts = ["Hello", "What is", "The", "A"] * 3
    outputs = llm.generate(prompts, GREEDY)
    assert [output.prompt for output in outputs] == prompts
    assert all(output.finished and output.outputs[0].text for output in outputs)
    alone = [llm.generate(prompt, GREEDY)[0].outputs[0].text for prompt in prompts[:4]]
    assert [output.outputs[0].text for output in outputs[:4]] == alone


def test_a_conversation_is_answered_and_its_tokens_counted(llm):
    [output] = llm.chat(PONG, GREEDY)
    assert output.outputs[0].text == "pong" and output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].num_tokens == 2 and len(output.prompt_token_ids) > 5
    two = llm.chat([PONG, PONG], GREEDY)
    assert [o.outputs[0].text for o in two] == ["pong", "pong"]


def test_token_ids_logprobs_and_several_answers(llm):
    ids = llm.generate("Hello", GREEDY)[0].prompt_token_ids
    params = SamplingParams(temperature=0, max_tokens=3, n=2, logprobs=1)
    [by_ids] = llm.generate({"prompt_token_ids": ids}, params)
    [by_text] = llm.generate("Hello", params)
    assert len(by_ids.outputs) == 2 and by_ids.outputs[0].token_ids == by_text.outputs[0].token_ids
    assert len(by_ids.outputs[0].token_ids) == 3 and by_ids.outputs[0].cumulative_logprob <= 0


def test_each_prompt_may_have_parameters_of_its_own(llm):
    short, long = llm.generate(["What is", "What is"], [SamplingParams(max_tokens=1, temperature=0), GREEDY])
    assert short.outputs[0].num_tokens == 1 < long.outputs[0].num_tokens
    with pytest.raises(ValueError, match="2 prompts and 1"):
        llm.generate(["a", "b"], [GREEDY])


def test_structured_outputs_hold(llm):
    params = SamplingParams(max_tokens=5, structured_outputs={"choice": ["yes", "no"]})
    assert llm.generate("Is it?", params)[0].outputs[0].text in ("yes", "no")


def test_what_the_server_refuses_is_refused_with_its_sentence(llm):
    with pytest.raises(InvalidRequest, match="temperature"):
        llm.generate("x", SamplingParams(temperature=-1))
    with pytest.raises(InvalidRequest, match="context"):
        llm.generate(["fine", [5] * 9000], GREEDY)
    assert llm.generate("x", GREEDY)[0].finished  # and nothing is broken by it


def test_a_closed_llm_says_so():
    with pytest.raises(ModelLoadError):
        LLM("/nowhere/at/all")
    with pytest.raises(SettingsError, match="did you mean max_num_seqs"):
        LLM(max_num_seq=3)


def test_vllm_s_names_are_understood():
    settings = settings_of("demo", {"max_model_len": 512, "enable_prefix_caching": False, "tensor_parallel_size": 1})
    assert settings.limits.effective_context_tokens == 512 and settings.cache.prefix_cache is False


@pytest.mark.parametrize(("given", "items"), [
    ("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]]),
    ({"prompt": "a"}, ["a"]), ([{"prompt_token_ids": [1]}, "b"], [[1], "b"]), ([], []),
])
def test_prompts_may_be_written_in_vllm_s_ways(given, items):
    assert [_prompt(item) for item in _many(given)] == items


async def test_an_async_stream_grows_and_leaving_it_ends_the_request():
    async with await AsyncLLM.load() as llm:
        lengths = [len(output.outputs[0].text) async for output in llm.chat(PONG, GREEDY)]
        assert lengths == sorted(lengths) and lengths[-1] == 4
        stream = llm.generate("The", SamplingParams(max_tokens=2000, ignore_eos=True, temperature=1.0))
        async for _ in stream:
            break
        await stream.aclose()
        async with asyncio.timeout(30):
            while llm._backend.engine.status.num_running:
                await asyncio.sleep(0.01)
