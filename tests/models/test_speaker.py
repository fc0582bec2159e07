"""Text-to-speech models through mlx-audio's plain interface: what they are given, what comes of it, what is missing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from vllm_mlx.errors import MissingPiece, ModelLoadError
from vllm_mlx.models import speaker
from vllm_mlx.models.sound import SpeakOptions


class Kokoro:
    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[dict] = []
        self.error = error

    def generate(self, text, voice=None, speed=1.0, lang_code="a", **kwargs):
        if self.error is not None:
            raise self.error
        self.calls.append({"text": text, "voice": voice, "speed": speed, "lang_code": lang_code, **kwargs})
        yield SimpleNamespace(audio=mx.ones((1, 4)))
        yield SimpleNamespace(audio=mx.zeros(2, dtype=mx.bfloat16))


class Plain:
    def __init__(self) -> None:
        self.calls: list[dict] = []

    def generate(self, text, stream=False, streaming_interval=2.0):
        self.calls.append({"text": text, "stream": stream, "streaming_interval": streaming_interval})
        yield SimpleNamespace(audio=mx.ones(3))


def test_each_piece_is_spoken_in_turn_with_the_options_the_model_takes():
    model = Kokoro()
    options = SpeakOptions(voice="bf_emma", speed=1.5, instructions="calmly")
    sound = list(speaker.speak(model, "kokoro", ["One.", "Two."], options))
    assert [len(part) for part in sound] == [4, 2, 4, 2] and sound[0].dtype == np.float32
    assert model.calls[0] == {
        "text": "One.", "voice": "bf_emma", "speed": 1.5, "lang_code": "b", "instruct": "calmly"
    }  # fmt: skip
    plain = Plain()
    list(speaker.speak(plain, "plain", ["One."], SpeakOptions(voice="x", speed=2.0)))
    assert plain.calls == [{"text": "One.", "stream": True, "streaming_interval": 0.5}]


def test_a_missing_package_is_said_with_its_install_line():
    named = ModuleNotFoundError("No module named 'misaki'", name="misaki.en")
    with pytest.raises(MissingPiece, match="pip install misaki`"):
        list(speaker.speak(Kokoro(named), "kokoro", ["a"], SpeakOptions()))
    told = ImportError("Kokoro requires misaki. Install it with: pip install misaki")
    with pytest.raises(MissingPiece, match="pip install misaki"):
        list(speaker.speak(Kokoro(told), "kokoro", ["a"], SpeakOptions()))


def test_voices_are_files_or_names_in_the_config(tmp_path):
    assert speaker.voices_of(tmp_path) == ()
    (tmp_path / "config.json").write_text(json.dumps({"talker_config": {"spk_id": {"vivian": 1, "ryan": 2}}}))
    assert speaker.voices_of(tmp_path) == ("vivian", "ryan")
    (tmp_path / "voices").mkdir()
    for name in ("bf_emma.safetensors", "af_heart.safetensors", "README.md"):
        (tmp_path / "voices" / name).write_bytes(b"")
    assert speaker.voices_of(tmp_path) == ("af_heart", "bf_emma")


def test_a_folder_of_another_kind_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_voice"}))
    with pytest.raises(ModelLoadError, match="text-to-speech"):
        speaker.load_speaker(tmp_path)
