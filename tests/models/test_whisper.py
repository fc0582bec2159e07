"""Whisper in slices: the library's own answer token for token, windows, timestamps that never go back, languages."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_audio.stt.models.whisper.audio import N_FRAMES, N_SAMPLES, log_mel_spectrogram
from mlx_audio.stt.models.whisper.decoding import DecodingOptions
from mlx_audio.stt.utils import load_model

from tests.tiny_whisper import build_whisper, tone
from vllm_mlx.errors import ModelLoadError
from vllm_mlx.models import transcriber, whisper
from vllm_mlx.models.sound import Language, Segment, TranscribeOptions

ENGLISH = TranscribeOptions(language="en", temperature=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def model(folder):
    network = load_model(folder)
    network.set_dtype(mx.float32)
    return network


def heard(model, audio, options=ENGLISH, slice_s=10.0) -> list:
    mx.random.seed(0)
    return [item for item in whisper.transcribe(model, audio, options, slice_s) if item is not None]


def test_a_window_is_decoded_token_for_token_as_by_the_library(model):
    options = DecodingOptions(language="en", without_timestamps=True, fp16=False)
    mel = log_mel_spectrogram(mx.array(tone(2)), n_mels=80, padding=N_SAMPLES)[:N_FRAMES]
    features = model.encoder(mel[None])
    (ours,) = [d for d in whisper._decode(model, features, options, 10, lambda: 0.0) if d is not None]
    theirs = model.decode(features[0], options)
    assert ours.token_ids == theirs.tokens and len(ours.token_ids) > 5
    assert ours.text == theirs.text
    assert ours.avg_logprob == pytest.approx(theirs.avg_logprob, abs=1e-4)
    assert ours.no_speech_prob == pytest.approx(theirs.no_speech_prob, abs=1e-6)


def test_how_large_a_slice_is_changes_nothing_but_the_number_of_slices(model):
    def slices(slice_s: float) -> list:
        mx.random.seed(0)
        return list(whisper.transcribe(model, tone(3), ENGLISH, slice_s))

    small, large = slices(0.0), slices(1000.0)
    assert [s for s in small if s is not None] == [s for s in large if s is not None]
    # One a token against one a window.
    assert len(small) > len(large) + 10


def test_segments_have_text_and_times_in_order_over_several_windows(model):
    segments = heard(model, tone(65))
    assert {segment.seek for segment in segments} - {0}, "more than one window"
    assert all(isinstance(s, Segment) and s.text.strip() and s.start < s.end for s in segments)
    by_window: dict[int, list[Segment]] = {}
    for segment in segments:
        by_window.setdefault(segment.seek, []).append(segment)
    for window in by_window.values():
        times = [time for segment in window for time in (segment.start, segment.end)]
        assert times == sorted(times)
        assert times[0] >= window[0].seek / 100


def test_the_language_is_found_and_told_first(model):
    first, *rest = heard(model, tone(2), TranscribeOptions(temperature=0.5))
    assert isinstance(first, Language) and first.code in transcriber.LANGUAGES
    assert not any(isinstance(item, Language) for item in rest)


def test_translating_is_another_task_and_a_prompt_is_heard(model):
    assert heard(model, tone(2)) == heard(model, tone(2))
    others = [
        TranscribeOptions(language="en", temperature=0.5, translates=True),
        TranscribeOptions(language="de", temperature=0.5),
        TranscribeOptions(language="en", temperature=0.5, prompt="liquor jugs"),
    ]
    for options in others:
        assert heard(model, tone(2), options) != heard(model, tone(2))


def test_words_have_times(model):
    segments = heard(model, tone(2), TranscribeOptions(language="en", temperature=0.5, has_words=True))
    words = [word for segment in segments for word in segment.words]
    assert words and all(0 <= word.start <= word.end <= 30.5 and word.word for word in words)


def test_a_doubtful_result_is_tried_again_at_higher_temperatures(model, monkeypatch):
    tried: list[float] = []
    plain = whisper._decode

    def watched(model, features, options, *rest):
        tried.append(options.temperature)
        return plain(model, features, options, *rest)

    monkeypatch.setattr(whisper, "_decode", watched)
    heard(model, tone(1), TranscribeOptions(language="en"))
    assert tried == list(whisper.TEMPERATURES)  # of random weights every result is improbable
    tried.clear()
    heard(model, tone(1), ENGLISH)
    assert tried == [0.5]


T = 1000  # the first timestamp's id


@pytest.mark.parametrize(
    ("tokens", "spans", "advance"),
    [
        # Two whole segments and one begun: the next window begins where the last pair stands.
        ([T, 1, 2, T + 50, T + 50, 3, T + 100, T + 100, 4], [(0, 1), (1, 2)], 200),
        # Nothing said behind the last timestamp: on to the next window.
        ([T, 1, T + 50, T + 50, 2, T + 80], [(0, 1), (1, 1.6)], 3000),
        ([T, 1, 2, T + 80], [(0, 1.6)], 3000),
        ([1, 2], [(0, 30)], 3000),
        ([], [], 3000),
        ([T, T, 1], [(0, 0)], 3000),
    ],
)
def test_tokens_are_cut_into_segments_at_pairs_of_timestamps(tokens, spans, advance):
    found, frames = whisper.split(tokens, T, 3000)
    assert [(round(start, 6), round(end, 6)) for start, end, _ in found] == spans and frames == advance


def rules(said: list[int], likely: int | None = None) -> set[int]:
    """The tokens that may follow `said`, in a vocabulary of 20 with timestamps from 10; `likely` is much likelier."""
    tokenizer = SimpleNamespace(timestamp_begin=10, eot=8, no_timestamps=9)
    logits = np.zeros((1, 20), np.float32)
    if likely is not None:
        logits[0, likely] = 50
    out = whisper.TimestampRules(tokenizer, 1).apply(mx.array(logits), mx.array([[0, *said]]))
    return set(np.flatnonzero(np.isfinite(np.array(out)[0])).tolist())


def test_timestamps_come_first_in_pairs_and_never_go_back():
    times = set(range(10, 20))
    assert rules([]) == times
    assert rules([12], likely=3) == set(range(9)), "behind a first timestamp comes text"
    assert rules([12, 3], likely=3) == set(range(9)) | set(range(13, 20)), "text, or a later end"
    assert rules([12, 3]) == set(range(13, 20)), "any timestamp is likelier than the likeliest text"
    assert rules([12, 3, 15], likely=8) == {8} | set(range(15, 20)), "its pair, or the end"
    assert rules([12, 3, 15, 15], likely=3) == set(range(9))


def test_a_folder_without_a_tokenizer_is_refused_with_what_to_do(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.warns(UserWarning), pytest.raises(ModelLoadError, match="preprocessor_config.json"):
        transcriber.load_transcriber(tmp_path)


def test_a_folder_of_another_kind_is_one_sentence(tiny_model):
    with pytest.raises(ModelLoadError, match="speech-to-text"):
        transcriber.load_transcriber(tiny_model("llama"))


class WindowModel:
    """A model with mlx-audio's plain interface."""

    def __init__(self, segments: bool = False) -> None:
        self.lengths: list[int] = []
        self.languages: list[str | None] = []
        self.tells_segments = segments

    def generate(self, audio, *, language=None, verbose=False):
        self.lengths.append(audio.shape[0])
        self.languages.append(language)
        text = f"window {len(self.lengths)}"
        segments = [{"start": 1.0, "end": 2.0, "text": text}] if self.tells_segments else None
        return SimpleNamespace(text=text, segments=segments)


def test_other_models_hear_windows_cut_where_it_is_quiet():
    audio = np.ones(50 * 16_000, np.float32)
    audio[18 * 16_000 : 18 * 16_000 + 3200] = 0
    plain = WindowModel()
    found = [s for s in transcriber.windows(plain, audio, TranscribeOptions(language="de")) if isinstance(s, Segment)]
    assert sum(plain.lengths) == len(audio) and plain.languages == ["de"] * len(plain.lengths)
    assert found[0].end == pytest.approx(18.05, abs=0.06)
    assert [s.text for s in found] == [f" window {i + 1}" for i in range(len(plain.lengths))]
    told = [s for s in transcriber.windows(WindowModel(True), audio, TranscribeOptions()) if isinstance(s, Segment)]
    assert told[1].start == pytest.approx(found[1].start + 1)
