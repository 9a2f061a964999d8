"""A GPT-2 whose first layer holds one head of every kind, weights set by hand; its second does nothing.

The stream has a token slot and a position slot of one-hot ± pairs, and a constant pair that every head
without a question of its own asks with. Heads write nothing: only where they attend is planted.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from interp.data.prompts import prose
from tests.ground_truth.blank import blank_gpt2, slot
from tests.ground_truth.induction_model import SYMBOLS

D_VOCAB, N_CTX = len(SYMBOLS), 64
D_HEAD = D_VOCAB + N_CTX
TOKEN, POSITION, CONSTANT = 0, D_VOCAB, D_VOCAB + N_CTX
WINDOW = 10
FIXED = 3

Features = Tensor
"""[D_HEAD, slots]: which one-hot features each dimension of q or k reads, and how strongly."""


def _of(pairs: dict[tuple[int, int], float]) -> Features:
    out = torch.zeros(D_HEAD, D_VOCAB + N_CTX + 1)
    for place, value in pairs.items():
        out[place] = value
    return out


def _positions(*shifts: int) -> tuple[Features, Features]:
    """Query at p, keys at p - shift for each shift."""
    q = _of({(p, POSITION + p): 1.0 for p in range(N_CTX)})
    k = _of({(p + s, POSITION + p): 1.0 for p in range(N_CTX) for s in shifts if p + s < N_CTX})
    return q, k


def _duplicates() -> tuple[Features, Features]:
    """Query token t, keys with token t; the query's own position is taken out again."""
    tokens = {(t, TOKEN + t): 1.0 for t in range(D_VOCAB)}
    places = {(D_VOCAB + p, POSITION + p): 1.0 for p in range(N_CTX)}
    minus = {place: -value for place, value in places.items()}
    return _of(tokens | places), _of(tokens | minus)


def _first() -> tuple[Features, Features]:
    """Any query, the key at position 0."""
    return _of({(0, CONSTANT): 1.0}), _of({(0, POSITION): 1.0})


def _leaning() -> tuple[Features, Features]:
    """Any query, every key, those with an even token a little more."""
    return _of({(0, CONSTANT): 1.0}), _of({(0, TOKEN + t): 0.055 for t in range(0, D_VOCAB, 2)})


def _any_query(*features: int) -> tuple[Features, Features]:
    """Any query, every key that has one of these features."""
    return _of({(0, CONSTANT): 1.0}), _of({(0, feature): 1.0 for feature in features})


def _delimiters() -> tuple[Features, Features]:
    return _any_query(*(TOKEN + i for i, symbol in enumerate(SYMBOLS) if symbol in ",.;'\"-!?\n"))


def _rare() -> tuple[Features, Features]:
    """The letters that together make up 5 % of the shipped prose."""
    counts = [prose().count(symbol) if len(symbol) == 1 else 0 for symbol in SYMBOLS]
    counts[1] = len(prose()) - sum(counts)  # what has no symbol of its own
    order = sorted(range(D_VOCAB), key=lambda i: counts[i])
    total, few = 0, []
    for i in order:
        total += counts[i]
        if total > 0.05 * len(prose()):
            break
        few += [TOKEN + i] if i else []  # the lead token is nobody's rare token
    return _any_query(*few)


def _nothing() -> tuple[Features, Features]:
    return _of({}), _of({})


ZOO: dict[str, Callable[[], tuple[Features, Features]]] = {
    "previous_token": lambda: _positions(1),
    "fixed_offset": lambda: _positions(FIXED),
    "current_token": lambda: _positions(0),
    "recency": lambda: _positions(*range(WINDOW + 1)),
    "first_token_sink": _first,
    "duplicate_token": _duplicates,
    "broad": _leaning,
    "delimiter": _delimiters,
    "rare_token": _rare,
    "later_sink": lambda: _any_query(POSITION + 7),
    "": _nothing,
}
"""The label each head of layer 0 should get, in order of heads."""


def head_zoo() -> GPT2LMHeadModel:
    """The model, in eval mode."""
    d_model = D_HEAD * len(ZOO)
    model = blank_gpt2(
        vocab_size=D_VOCAB,
        n_positions=N_CTX,
        n_embd=d_model,
        n_layer=2,
        n_head=len(ZOO),
        n_inner=4,
    )
    pairs = slot(0, D_VOCAB + N_CTX + 1, d_model)
    with torch.no_grad():
        body = model.transformer
        body.wte.weight.copy_(pairs[TOKEN : TOKEN + D_VOCAB])
        body.wpe.weight.copy_(pairs[POSITION : POSITION + N_CTX] + pairs[CONSTANT])
        # LayerNorm multiplies each pair by sqrt(d_model / 6); undone here, a match scores 40.
        scale = (40 * D_HEAD**0.5) ** 0.5 / (2 * (d_model / 6) ** 0.5)
        for head, features in enumerate(ZOO.values()):
            for part, weights in enumerate(features()):
                first = part * d_model + head * D_HEAD
                body.h[0].attn.c_attn.weight[:, first : first + D_HEAD] = (
                    weights @ pairs
                ).T * scale
    return model
