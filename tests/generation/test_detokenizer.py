import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import ByteTokenizer
from vllm_mlx.generation.detokenizer import TokenTable, byte_alphabet

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

TEXTS = [
    "The quick brown fox jumps over the lazy dog. Grüße, naïve café, 日本語のテキスト, emoji 👩‍👩‍👧 🚀 and so on.",
    "def add(a, b):\n    return a + b\n\n\tprint('x')  # comment   with   spaces",
]


def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return wrap(tokenizer)


def sentencepiece_like(decoder_steps):
    from tokenizers import Tokenizer, decoders, models

    pieces = ["<unk>", *[f"<0x{b:02X}>" for b in range(256)]]
    pieces += ["▁", "▁The", "▁quick", "fox", "é", "日", "▁▁", "a", "b", "<0xZZ>", "▁<0x41>", ".", "\n"]
    tokenizer = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoder_steps(decoders)
    return wrap(tokenizer)


def wordpiece():
    from tokenizers import Tokenizer, decoders, models

    vocab = {p: i for i, p in enumerate(["[UNK]", "hello", "world", "##ly", "##ing", "go", ",", "."])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return wrap(tokenizer)


def wrap(tokenizer):
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens(["<|end|>", "<|start of it|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


KINDS = {
    "byte-level": (byte_level, "byte-level"),
    "llama": (
        lambda: sentencepiece_like(
            lambda d: d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
        ),
        "pieces",
    ),
    "gemma": (
        lambda: sentencepiece_like(lambda d: d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse()])),
        "pieces",
    ),
    "metaspace": (lambda: sentencepiece_like(lambda d: d.Metaspace()), "pieces"),
    "wordpiece": (wordpiece, "window"),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return request.param, KINDS[request.param][0]()


def test_the_decoder_is_recognised(tokenizer):
    name, made = tokenizer
    assert TokenTable(made).kind == KINDS[name][1]


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_joined_deltas_equal_the_tokenizers_own_decoding(tokenizer, data):
    _, made = tokenizer
    table = TokenTable(made)
    ids = data.draw(st.lists(st.integers(0, len(made) - 1), max_size=40))
    skips = data.draw(st.booleans())
    wanted = made.decode(ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
    for size in (1, 3, 1000):
        detokenizer = table.new(table.special_ids if skips else frozenset())
        deltas = [detokenizer.feed(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert "".join([*deltas, detokenizer.flush()]) == wanted


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_text_survives_the_round_trip_one_token_at_a_time(text):
    made = _byte_level_once()
    detokenizer = TokenTable(made).new()
    ids = made.encode(text, add_special_tokens=False)
    deltas = [detokenizer.feed([i]) for i in ids]
    assert "".join([*deltas, detokenizer.flush()]) == text
    assert "�" in text or not any("�" in d for d in deltas)


_MADE = {}


def _byte_level_once():
    if "byte-level" not in _MADE:
        _MADE["byte-level"] = byte_level()
    return _MADE["byte-level"]


def test_part_of_a_character_is_held_back_and_becomes_a_replacement_at_the_end():
    made = _byte_level_once()
    alphabet = {byte: character for character, byte in byte_alphabet().items()}
    first, second = (made.convert_tokens_to_ids(alphabet[b]) for b in "é".encode())
    whole = TokenTable(made).new()
    assert whole.feed([first]) == "" and whole.is_holding
    assert whole.feed([second]) == "é" and not whole.is_holding
    cut = TokenTable(made).new()
    assert cut.feed([first]) == ""
    assert cut.flush() == "�"


def test_ids_beyond_the_vocabulary_are_no_text():
    made = _byte_level_once()
    table = TokenTable(made)
    assert table.new().feed([len(made) + 5]) == ""
    assert table.token_bytes(len(made) + 5) == b""


def test_the_byte_tokenizer_of_the_tests_goes_through_the_window():
    made = ByteTokenizer()
    detokenizer = TokenTable(made).new(frozenset(made.all_special_ids))
    ids = made.encode("né<|im_end|> 🚀<think>")
    assert "".join([*(detokenizer.feed([i]) for i in ids), detokenizer.flush()]) == "né 🚀<think>"
