"""A Whisper of random weights with the real shape of files: HF tokenizer, preprocessor, config, float32 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_audio.stt.models.whisper import Model
from mlx_audio.stt.models.whisper.tokenizer import LANGUAGES
from mlx_audio.stt.models.whisper.whisper import ModelDimensions
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.tiny_models import CORPUS, randomize, save_weights, write_json

# Enough entries to count as multilingual (51865 and more), most of them never seen.
NUM_VOCAB = 51865
NUM_TEXT_CONTEXT = 48


def build_whisper(out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    size = dict(
        n_mels=80, n_audio_ctx=1500, n_audio_state=16, n_audio_head=2, n_audio_layer=1, n_vocab=NUM_VOCAB,
        n_text_ctx=NUM_TEXT_CONTEXT, n_text_state=16, n_text_head=2, n_text_layer=2,
    )  # fmt: skip
    write_json(out / "config.json", {"model_type": "whisper", **size})
    _tokenizer(out)
    write_json(
        out / "preprocessor_config.json",
        {"feature_extractor_type": "WhisperFeatureExtractor", "processor_class": "WhisperProcessor", "n_fft": 400,
         "feature_size": 80, "hop_length": 160, "chunk_length": 30, "sampling_rate": 16000},
    )  # fmt: skip
    mx.random.seed(5)
    network: Any = Model(ModelDimensions(**size), mx.float32)
    randomize(network)
    network.decoder.positional_embedding = mx.random.normal((NUM_TEXT_CONTEXT, 16))
    save_weights(network, out)
    return out


def _tokenizer(out: Path) -> None:
    """The real layout of ids: text below 50257, then the end, control tokens, and 1501 timestamps at the top."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    specials = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in list(LANGUAGES)[:99])]
    specials += ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>"]
    specials += ["<|notimestamps|>", *(f"<|{i * 0.02:.2f}|>" for i in range(1501))]
    num_words = NUM_VOCAB - len(specials) - tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"w{i:05d}", normalized=False) for i in range(num_words)])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    assert tokenizer.get_vocab_size() == NUM_VOCAB
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
         "bos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "model_max_length": 448},
    )  # fmt: skip


def tone(seconds: float, *, rate: int = 16_000, pitch: float = 440.0) -> np.ndarray:
    """A sound that rises and falls, mono float32."""
    t = np.arange(int(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * pitch * t) * np.sin(2 * np.pi * 1.5 * t)).astype(np.float32)
