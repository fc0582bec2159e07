"""Models whose prompts are read whole: one pass by mlx-vlm's code, one row at a time, and mlx-vlm's own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_vlm.utils
import numpy as np
import pytest
from mlx_lm.models.llama import Model as Llama
from mlx_lm.models.llama import ModelArgs as LlamaArgs
from mlx_vlm.models.phi3_v.vision import VisionModel as Phi3Tower
from mlx_vlm.utils import prepare_inputs, should_add_special_tokens

from tests.engine.harness import EngineHarness
from tests.models.test_multimodal import mlx_vlm_greedy, rendered
from tests.tiny_vlms import WHOLE, picture
from vllm_mlx.engine.assembly import EngineOptions, build_engine
from vllm_mlx.engine.request import Prompt
from vllm_mlx.errors import InvalidRequest, ModelLoadError
from vllm_mlx.models import loader
from vllm_mlx.models.profile import read_json

NUM_TOKENS = 12
# Of these mlx-vlm's generator drops the mask that its model makes; the model called as a whole is the oracle.
MASKED = ("moondream2", "moondream3")
NUMBERED = ("phi3_v", "phi4mm")
LAID_FIRST = ("florence2", *MASKED)


@pytest.fixture(scope="module", autouse=True)
def small_phi3_tower() -> Iterator[None]:
    """Phi-3-V's tower has its sizes in the code, 300 million weights; here it has one narrow layer."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = Phi3Tower.CLIP_VIT_LARGE_PATCH14_336_CONFIG
        patch.setattr(sizes, "num_hidden_layers", 1)
        patch.setattr(sizes, "intermediate_size", 64)
        yield


class Subject:
    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.loaded: Any = loader.load(folder)
        self.text = rendered(self.loaded, 1)

    def prompt(self, seed: int = 1) -> Prompt:
        return Prompt(*self.loaded.media.expand(self.text, [picture(seed)]))

    def alone(self, prompt: Prompt, **options: Any) -> list[int]:
        return EngineHarness(self.loaded.model, prefix_bytes=0, **options).lone(prompt, max_tokens=NUM_TOKENS)

    def inputs(self, text: str, seeds: Sequence[int]) -> dict[str, Any]:
        """What mlx-vlm's generator would be given for the same text and pictures."""
        if self.name in NUMBERED:
            for number in range(1, len(seeds) + 1):
                text = text.replace("<image>", f"<|image_{number}|>", 1)
        if self.name in LAID_FIRST:
            text = text.replace("<image>", "")
        processor = self.loaded.processor
        add_special_tokens = should_add_special_tokens(self.loaded.profile.model_type, processor)
        images = [picture(seed) for seed in seeds]
        out = prepare_inputs(processor, images=images, prompts=text, add_special_tokens=add_special_tokens)
        return {k: v for k, v in out.items() if k not in ("labels", "token_type_ids")}


@pytest.fixture(scope="module", params=WHOLE)
def subject(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Subject:
    return Subject(request.param, tiny_model(request.param))


def test_it_is_loaded_and_says_how_it_is_served(subject: Subject) -> None:
    profile = subject.loaded.profile
    assert profile.is_multimodal and profile.modalities == {"text", "image"}
    assert not profile.runs_batched and not profile.shares_prefixes
    assert any("one request at a time and without prefix cache: " in note for note in profile.notes)


def test_tokens_equal_mlx_vlm_whatever_the_chunks(subject: Subject) -> None:
    prompt, inputs = subject.prompt(), subject.inputs(subject.text, [1])
    given = prompt.media[0].inputs.get("input_ids", np.array(prompt.token_ids))
    assert given.tolist() == np.array(inputs["input_ids"])[0].tolist()
    if subject.name in MASKED:
        expected = recomputed(mlx_vlm.utils.load_model(subject.folder), inputs, 4)
    else:
        expected = mlx_vlm_greedy(subject.folder, inputs, NUM_TOKENS)
        assert len(set(expected)) > 4, "weights so dull prove nothing"
    assert subject.alone(prompt)[: len(expected)] == expected
    assert subject.alone(prompt, chunk=16)[: len(expected)] == expected
    assert subject.alone(subject.prompt(2)) != subject.alone(prompt)


def recomputed(model: Any, inputs: dict[str, Any], num_tokens: int) -> list[int]:
    """Greedy tokens of an mlx-vlm model called with the whole text each time, without a cache."""
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    ids = np.array(inputs["input_ids"])[0].tolist()
    for _ in range(num_tokens):
        logits = model(mx.array([ids]), **rest).logits[0, -1]
        ids.append(int(mx.argmax(logits).item()))
    return ids[-num_tokens:]


def test_rows_beside_each_other_and_after_preemption_are_the_row_alone(subject: Subject) -> None:
    loaded = subject.loaded
    prompts = [subject.prompt(1), subject.prompt(2), Prompt(*loaded.media.expand(rendered(loaded, 0), []))]
    alone = [subject.alone(p) for p in prompts]
    harness = EngineHarness(loaded.model, prefix_bytes=0)
    ids = [harness.ask(prompt, max_tokens=NUM_TOKENS) for prompt in prompts]
    for turn in range(6):
        harness.step(2)
        running = list(harness.scheduler.running.values())
        if turn % 2 and running:
            harness.scheduler.preempt(running[turn % len(running)])
    harness.run()
    assert [harness.answers[i].tokens for i in ids] == alone


@pytest.mark.parametrize("name", ["mllama", "florence2", "phi4mm"])
def test_what_a_row_in_mlx_vlms_own_cache_will_hold_is_known_before_it_runs(
    name: str, tiny_model: Callable[..., Path]
) -> None:
    subject = Subject(name, tiny_model(name))
    harness = EngineHarness(subject.loaded.model, prefix_bytes=0)
    prompt = subject.prompt()
    harness.ask(prompt, max_tokens=4)
    while not (running := list(harness.scheduler.running.values())) or running[0].num_completion_tokens < 2:
        harness.step(1)
    held = harness.runner.metrics()["kv_held_bytes"]
    assert 0.4 <= held / harness.runner.bytes_for(len(prompt)) <= 1.2
    harness.run()


def test_no_prefix_is_kept(subject: Subject) -> None:
    options = EngineOptions(memory_bytes=1 << 30, prefix_cache_bytes=1 << 28)
    assert build_engine(subject.loaded.model, options, lambda events, status: None).scheduler.prefixes.cache is None


def test_a_placeholder_in_a_text_is_refused(subject: Subject) -> None:
    with pytest.raises(InvalidRequest, match="keeps for images"):
        subject.loaded.media.expand(subject.text, [])


@pytest.mark.parametrize("name", ["paligemma", "florence2", "moondream3"])
def test_a_second_picture_is_refused_where_the_model_takes_one(name: str, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(InvalidRequest, match="1 image"):
        loader.load(tiny_model(name)).media.expand("<image><image>x", [picture(1), picture(2)])


@pytest.mark.parametrize("name", ["mllama", "phi3_v", "phi4mm", "phi4-siglip"])
def test_two_pictures_of_a_prompt_stay_in_order(name: str, tiny_model: Callable[..., Path]) -> None:
    subject = Subject(name, tiny_model(name))
    text = rendered(subject.loaded, 2)
    prompt = Prompt(*subject.loaded.media.expand(text, [picture(1), picture(2)]))
    assert subject.alone(prompt) == mlx_vlm_greedy(subject.folder, subject.inputs(text, [1, 2]), NUM_TOKENS)


@pytest.mark.parametrize("name", ["paligemma", "florence2"])
def test_a_chat_template_of_ours_writes_the_picture_first_and_then_the_words(
    name: str, tiny_model: Callable[..., Path]
) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]},
    ]
    tokenizer = loader.load(tiny_model(name)).tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<image>Be brief.\nWhat is it?"


def test_llama_vision_without_a_picture_is_the_llama_in_it(tiny_model: Callable[..., Path]) -> None:
    """Its cross-attention layers look at nothing then, so the others are a model of mlx-lm's."""
    folder = tiny_model("mllama")
    text = read_json(folder / "config.json")["text_config"]
    sizes = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": text["vocab_size"] + 8}
    llama = Llama(LlamaArgs.from_dict({**text, **sizes, "tie_word_embeddings": False}))
    weights = {}
    for name, array in mx.load(str(folder / "model.safetensors")).items():
        parts = name.removeprefix("language_model.")
        for ours, theirs in (("model.layers.0.", "model.layers.0."), ("model.layers.2.", "model.layers.1.")):
            if parts.startswith(ours):
                weights[parts.replace(ours, theirs)] = array
        if parts in ("model.embed_tokens.weight", "model.norm.weight"):
            weights[parts] = array
        if parts == "lm_head.weight":
            weights[parts] = mx.concatenate([array, mx.zeros((8, array.shape[1]))])
    llama.load_weights(list(weights.items()))
    subject = Subject("mllama", folder)
    prompt = Prompt(*subject.loaded.media.expand(rendered(subject.loaded, 0), []))
    ids = list(prompt.token_ids)
    for _ in range(NUM_TOKENS):
        ids.append(int(mx.argmax(llama(mx.array([ids]))[0, -1, : text["vocab_size"]]).item()))
    assert subject.alone(prompt) == ids[-NUM_TOKENS:]


def test_moondream_with_another_models_tokenizer_is_refused_with_the_remedy(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "moondream2"
    folder.mkdir()
    for file in tiny_model("moondream2").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for file in tiny_model("paligemma").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelLoadError, match="starmie"):
        loader.load(folder)
