"""For tests of grammars: a byte-level tokenizer made in memory, and random walks through a constraint."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from vllm_mlx.engine.constraint import GrammarConstraint, is_allowed
from vllm_mlx.engine.request import Constraint
from vllm_mlx.generation.grammar import GrammarCompiler

EOS = "<eos>"


def byte_tokenizer(special: Sequence[str] = (), merges: Sequence[str] = ()) -> Tokenizer:
    """256 bytes, whole words of `merges` (ASCII) as tokens of their own, then <eos> and the special tokens."""
    vocab = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    pairs: list[tuple[str, str]] = []
    for word in merges:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                pairs.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, *dict.fromkeys(special)])
    return tokenizer


def compiler_for(tokenizer: Tokenizer, padded_vocab: int | None = None, **options: int) -> GrammarCompiler:
    """As for a model whose vocabulary is a little larger than its tokenizer's."""
    vocab_size = padded_vocab or tokenizer.get_vocab_size()
    return GrammarCompiler(
        tokenizer.to_str, vocab_size=vocab_size, eos_token_ids=[tokenizer.token_to_id(EOS)], **options
    )


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def text_of(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    return tokenizer.decode(list(token_ids), skip_special_tokens=False)


def allowed_ids(constraint: Constraint) -> set[int]:
    mask = constraint.allowed()
    assert mask is not None
    return set(np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0].tolist())


def takes(constraint: Constraint, token_ids: Sequence[int]) -> bool:
    """Feed tokens as long as they are allowed; True when all were."""
    for token_id in token_ids:
        if not is_allowed(constraint.allowed(), token_id):
            return False
        constraint.accept(token_id)
    return True


def random_walk(
    constraint: Constraint, tokenizer: Tokenizer, seed: int, *, closers: Sequence[str] = (), limit: int = 2000
) -> str | None:
    """A random text of the grammar, or None when it has not ended in `limit` tokens.

    Now and then it takes a whole text of `closers` where that is possible, or it would hardly ever come to an end.
    """
    assert isinstance(constraint, GrammarConstraint)
    rng = np.random.default_rng(seed)
    endings = [ids_of(tokenizer, text) for text in closers if text]
    eos = tokenizer.token_to_id(EOS)
    written: list[int] = []
    while len(written) < limit:
        ending = endings[rng.integers(len(endings))] if endings and rng.random() < 0.3 else []
        if ending and constraint.num_accepted_of(ending) == len(ending):
            chosen = ending
        else:
            possible = sorted(allowed_ids(constraint))
            assert possible, constraint.failure
            if eos in possible and (len(possible) == 1 or rng.random() < 0.3):
                return text_of(tokenizer, written)
            chosen = [int(rng.choice([i for i in possible if i != eos]))]
        written += chosen
        assert takes(constraint, chosen)
    return None
