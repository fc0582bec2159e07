"""The demo tokenizer: byte-level BPE of our own with Qwen3's special tokens.

Two choices make copying easy for a small model. Spaces and punctuation are pieces of their own, so a word is the same tokens wherever it
stands. And merges are learned on lower-case text and repeated for `Word` and `WORD`, so the three cases of a word split in the same places.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from . import words
from .skills_images import PRINTED

SIZE = 8192
SPLIT = r"\p{L}+|\p{N}|[^\p{L}\p{N}]+"
SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|>
<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>""".split()
MARKERS = "<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>".split()


def build(corpus: Iterator[str]) -> Tokenizer:
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    room = SIZE - 256 - len(SPECIAL) - len(MARKERS)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pools = [words.COMMON] * 60 + [words.NAMES, words.SURNAMES, words.CITIES, words.ANIMALS, words.FOODS, words.OBJECTS, words.ADJECTIVES] * 25
    pools += [words.JOBS, words.HOBBIES, words.PLACES, words.TOPICS, words.VERBS, words.NOUNS, PRINTED, words.COLOURS] * 25
    texts = [*corpus, *(" ".join(pool) for pool in pools)]
    trainer = trainers.BpeTrainer(vocab_size=256 + room, initial_alphabet=alphabet, show_progress=False, min_frequency=3)
    learner.train_from_iterator((text.lower() for text in texts), trainer)
    learned = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in json.loads(learner.to_str())["model"]["merges"]]
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for a, b in learned:
        cased = {(a, b)}
        if (a + b).isascii() and (a + b).isalpha():
            cased |= {(a.capitalize(), b), (a.upper(), b.upper())}
        new = [m for m in sorted(cased) if m[0] in vocab and m[1] in vocab]
        if len(vocab) + len({x + y for x, y in new} - set(vocab)) > 256 + room:
            break
        for x, y in new:
            vocab.setdefault(x + y, len(vocab))
            merges.append((x, y))
    spare = 0
    while len(vocab) < 256 + room:  # the model's table has exactly SIZE rows
        vocab[f"<|unused_{spare}|>"] = len(vocab)
        spare += 1
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKERS])
    assert tokenizer.get_vocab_size() == SIZE, tokenizer.get_vocab_size()
    return tokenizer


def save(tokenizer: Tokenizer, out: Path, template: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
        "model_max_length": 8192, "clean_up_tokenization_spaces": False, "add_bos_token": False,
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
        "extra_special_tokens": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"},
        "chat_template": template,
    }  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "chat_template.jinja").write_text(template)
