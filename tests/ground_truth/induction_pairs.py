"""Clean and corrupted prompts for `induction_model`, and every edge of its circuit."""

import random

from interp.data.pairs import Pairs
from tests.ground_truth.induction_model import D_VOCAB

CIRCUIT = (
    ("embed", "0.1.v"),
    ("0.1", "1.2.k"),
    ("embed", "1.2.q"),
    ("embed", "1.2.v"),
    ("1.2", "logits"),
)


def induction_pairs(n: int, length: int = 12, seed: int = 0) -> Pairs:
    """Random tokens that end with one seen before; what followed it then should follow it now.

    Position "target" holds the answer of the clean prompt; the corrupted prompt is another of the
    same form, and its answer the wrong one.
    """
    draw = random.Random(seed)
    clean, corrupted = [], []
    while len(clean) < n:
        a, b = _prompt(draw, length), _prompt(draw, length)
        if a[1] != b[1]:
            clean.append(a)
            corrupted.append(b)
    return Pairs.of(
        [ids for ids, _, _ in clean],
        [ids for ids, _, _ in corrupted],
        answers=[answer for _, answer, _ in clean],
        wrong=[answer for _, answer, _ in corrupted],
        positions={"target": [target for _, _, target in clean]},
        name="induction",
    )


def _prompt(draw: random.Random, length: int) -> tuple[list[int], int, int]:
    ids = draw.sample(range(2, D_VOCAB), length - 1)
    target = draw.randrange(1, length - 1)
    return [*ids, ids[target - 1]], ids[target], target
