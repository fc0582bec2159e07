"""A start from which copying works before any training.

Almost every skill of the demo copies words from the prompt, and a small model needs most of its training to find out how. So the
heads that do it are built in. Layer 0 writes, beside each token, which token came before it. Layer 1 looks for the place that came
after the present token the last time, and says what stood there. Everything else starts random, and training may change all of it.

Besides, `word`, `Word` and `WORD` start from one embedding, so that what is learned of one case helps the others.
"""

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .model import DemoModel

STD = 0.2  # of an embedding
TRACE = 0.35  # how loud the previous token is written, and
SAID = 2.4  # how loud a copied token is said
PREVIOUS = (0, 2, 4, 6, 8)  # rotary pairs that tell neighbours apart
FAR = 16  # rotary pairs from here on hardly turn within a few thousand tokens, so they may carry content


def orthonormal(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(width, rows, generator=generator))[0].T


def initialise(model: DemoModel, tokenizer: Tokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    text = model.model["language_model"]
    width, dim = text.cfg.hidden_size, text.cfg.head_dim
    always = orthonormal(1, width, generator)[0]
    with torch.no_grad():
        embed(text.embed_tokens.weight, tokenizer, always, generator)
        text.norm.weight.fill_(0.3)
        for layer in text.layers:
            attention = layer.self_attn
            attention.o_proj.weight.mul_(0.1)
            attention.q_norm.weight.fill_(1.5)
            attention.k_norm.weight.fill_(1.5)
        first, second = text.layers[0].self_attn, text.layers[1].self_attn
        heads = -(-width // (2 * dim))  # so many that each carries no more than it has room for
        part = width // 2 // heads
        basis = orthonormal(2 * heads * part, width, generator)
        seen, written = basis[: heads * part], basis[heads * part :]  # what is read of a token, and where its trace is written
        for head in range(heads):
            rows = slice(head * dim, (head + 1) * dim)
            query, key = torch.zeros(dim), torch.zeros(dim)
            for pair in PREVIOUS:
                turn = text.inv_freq[pair]
                query[pair], key[pair], key[pair + dim // 2] = 1.0, turn.cos(), turn.sin()
            first.q_proj.weight[rows] = first.q_proj.weight[rows] * 0.05 + torch.outer(query, always) * 4
            first.k_proj.weight[rows] = first.k_proj.weight[rows] * 0.05 + torch.outer(key, always) * 4
            carried = slice(head * part, (head + 1) * part)
            first.v_proj.weight[head * dim : head * dim + part] = seen[carried]
            first.o_proj.weight[:, head * dim : head * dim + part] = TRACE * written[carried].T
            content = [i for i in range(dim) if i % (dim // 2) >= FAR]
            match = orthonormal(len(content), heads * part, generator)
            second.q_proj.weight[rows] *= 0.1
            second.k_proj.weight[rows] *= 0.1
            second.q_proj.weight[[head * dim + i for i in content]] = match @ seen
            second.k_proj.weight[[head * dim + i for i in content]] = match @ written
        identity = orthonormal(heads * dim, width, generator)
        second.v_proj.weight[: heads * dim] = identity
        second.o_proj.weight[:, : heads * dim] = SAID * identity.T
        first.q_norm.weight.fill_(2.5)
        first.k_norm.weight.fill_(2.5)
        second.q_norm.weight.fill_(2.5)
        second.k_norm.weight.fill_(2.5)


def embed(weight: Tensor, tokenizer: Tokenizer, always: Tensor, generator: torch.Generator) -> None:
    width = weight.shape[1]
    upper, title = (torch.randn(width, generator=generator) * STD for _ in range(2))
    bases: dict[str, Tensor] = {}
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        base = bases.setdefault(token.lower() if token.isascii() else token, torch.randn(width, generator=generator) * STD)
        case = upper if token.isupper() and len(token) > 1 else title if token[:1].isupper() else 0
        weight[i] = base + case + always * STD * width**0.5 / 2
