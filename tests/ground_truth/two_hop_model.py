"""A three-layer attention-only GPT-2, weights set by hand, that looks a fact up with the result of another.

A prompt lists facts as key–value pairs of tokens, "a b" "b c" …, in any order, and ends with a key; what
should follow is the value of the key's value: of "b c x y a b a" it is "c". As in `induction_model`, the
residual stream has slots of one-hot features, each a ± pair of coordinates: token, position, previous
token, first hop, prediction, and one that nothing reads.

- L0H1 writes the previous token into the previous-token slot.
- L1H2 looks from a key to the value after it (its previous-token slot holds the key) and copies the value
  into the first-hop slot.
- L2H0 does the same with the first hop as key, and copies the value into the prediction slot.
- L1H0, a distractor, copies its own token into the slot that nothing reads.

All other heads write nothing; the MLPs are zero. Values stand at odd positions, and both lookups prefer
these: where a value is also the key of the next fact, the position after it is a value only once.
"""

import random

import torch
from transformers import GPT2LMHeadModel

from interp.data.pairs import Pairs
from tests.ground_truth.blank import blank_gpt2, slot

D_VOCAB, N_CTX, N_HEADS, N_FACTS = 24, 16, 4, 5
TOKEN, POSITION, PREVIOUS, FIRST_HOP, PREDICTION, UNREAD = (
    0,
    D_VOCAB,
    D_VOCAB + N_CTX,
    2 * D_VOCAB + N_CTX,
    3 * D_VOCAB + N_CTX,
    4 * D_VOCAB + N_CTX,
)
D_MODEL = 2 * (5 * D_VOCAB + N_CTX)
PREVIOUS_TOKEN_HEAD, FIRST_HOP_HEAD, SECOND_HOP_HEAD, DISTRACTOR = (0, 1), (1, 2), (2, 0), (1, 0)

CIRCUIT = (
    ("embed", "0.1.v"),
    ("embed", "1.2.q"),
    ("embed", "1.2.v"),
    ("0.1", "1.2.k"),
    ("embed", "2.0.v"),
    ("1.2", "2.0.q"),
    ("0.1", "2.0.k"),
    ("2.0", "logits"),
)
"""Every edge that carries what differs between two prompts; where heads look for positions does not."""


def two_hop_model() -> GPT2LMHeadModel:
    """The model, in eval mode."""
    model = blank_gpt2(
        vocab_size=D_VOCAB,
        n_positions=N_CTX,
        n_embd=D_MODEL,
        n_layer=3,
        n_head=N_HEADS,
        n_inner=4,
    )
    with torch.no_grad():
        body = model.transformer
        body.wte.weight.copy_(slot(TOKEN, D_VOCAB, D_MODEL))
        body.wpe.weight.copy_(slot(POSITION, N_CTX, D_MODEL))
        position = slot(POSITION, N_CTX, D_MODEL)
        _head(model, PREVIOUS_TOKEN_HEAD, q=position[1:], k=position[:-1], out=PREVIOUS)
        _head(model, DISTRACTOR, q=position, k=position, out=UNREAD)
        for place, asked, out in (
            (FIRST_HOP_HEAD, TOKEN, FIRST_HOP),
            (SECOND_HOP_HEAD, FIRST_HOP, PREDICTION),
        ):
            # One more dimension: every position asks for odd ones, half as strongly as for its key.
            q = torch.cat([slot(asked, D_VOCAB, D_MODEL), 0.5 * position.sum(0, keepdim=True)])
            k = torch.cat([slot(PREVIOUS, D_VOCAB, D_MODEL), position[1::2].sum(0, keepdim=True)])
            # Twice as strong: what a lookup finds is then certain to 1e-5.
            _head(model, place, q=2 * q, k=k, out=out)
        model.lm_head.weight.copy_(slot(PREDICTION, D_VOCAB, D_MODEL))
    return model


def two_hop_pairs(n: int, seed: int = 0) -> Pairs:
    """Prompts of N_FACTS facts and a key, each beside another prompt of the same form.

    Positions: "first" and "second" are the values that the two lookups find in the clean prompt.
    """
    draw = random.Random(seed)
    clean, corrupted = [], []
    while len(clean) < n:
        a, b = _prompt(draw), _prompt(draw)
        if a[1] != b[1]:
            clean.append(a)
            corrupted.append(b)
    return Pairs.of(
        [ids for ids, _, _ in clean],
        [ids for ids, _, _ in corrupted],
        answers=[answer for _, answer, _ in clean],
        wrong=[answer for _, answer, _ in corrupted],
        positions={
            name: [places[i] for _, _, places in clean]
            for i, name in enumerate(("first", "second"))
        },
        name="two_hop",
    )


def _prompt(draw: random.Random) -> tuple[list[int], int, tuple[int, int]]:
    """(ids, answer, positions of the two values looked up); no key appears twice."""
    start, middle, end, *rest = draw.sample(range(D_VOCAB), 2 * N_FACTS - 1)
    facts = [(start, middle), (middle, end), *zip(rest[::2], rest[1::2], strict=True)]
    draw.shuffle(facts)
    ids = [token for fact in facts for token in fact] + [start]
    places = [2 * facts.index(fact) + 1 for fact in ((start, middle), (middle, end))]
    return ids, end, (places[0], places[1])


def _head(
    model: GPT2LMHeadModel, place: tuple[int, int], *, q: torch.Tensor, k: torch.Tensor, out: int
) -> None:
    """Attend where row i of `q` and row i of `k` are both on; copy the token there into slot `out`."""
    layer, head = place
    attention, d_head = model.transformer.h[layer].attn, D_MODEL // N_HEADS
    first = head * d_head
    attention.c_attn.weight[:, first : first + len(q)] = q.T
    attention.c_attn.weight[:, D_MODEL + first : D_MODEL + first + len(k)] = k.T
    values = slice(2 * D_MODEL + first, 2 * D_MODEL + first + D_VOCAB)
    attention.c_attn.weight[:, values] = slot(TOKEN, D_VOCAB, D_MODEL).T
    # LayerNorm has multiplied the ± pair by about 7 and reading it gives twice that: write about 1.
    attention.c_proj.weight[first : first + D_VOCAB] = slot(out, D_VOCAB, D_MODEL) / 14
