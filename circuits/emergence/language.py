"""A language of characters in which copying pays: repeated random segments among Markov text.

A row is BOS and then either a segment of distinct random characters, repeated to the end, its length
drawn anew for every row (so no fixed distance gives the next character away), or a walk of a fixed
sparse Markov chain. The chain is learned smoothly; the repeats only by looking up what followed
last time, which is what an induction head does.
"""

from __future__ import annotations

import string

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

BOS, UNKNOWN = 0, 1
SYMBOLS = [*string.ascii_lowercase, *"ABCDEFGHIJ ,.;'\"-!?:"]
FIRST = 2
"""Id of the first ordinary character."""
D_VOCAB = FIRST + len(SYMBOLS)
SHORTEST = 6
"""Characters of the shortest segment."""
MARKOV = 0.25
"""Share of rows that are Markov text."""


def markov_chain(seed: int) -> Float[np.ndarray, "symbols symbols"]:
    """Transition probabilities between characters, most of the mass of each row on a few.

    >>> bool(np.allclose(markov_chain(0).sum(1), 1))
    True
    """
    n = len(SYMBOLS)
    return np.random.default_rng(seed).dirichlet(np.full(n, 0.1), size=n)


def sample_rows(
    rng: np.random.Generator,
    n: int,
    length: int,
    chain: Float[np.ndarray, "symbols symbols"],
    *,
    markov: float = MARKOV,
) -> Int[Tensor, "n length"]:
    """Token ids of `n` rows in random order: `round(n * markov)` of Markov text, the others repeated segments.

    Walks begin where the chain is in the long run, so that no position is easier than another.

    >>> rows = sample_rows(np.random.default_rng(0), 4, 20, markov_chain(0), markov=0.5)
    >>> rows.shape, set(rows[:, 0].tolist())
    (torch.Size([4, 20]), {0})
    """
    width, symbols = length - 1, len(SYMBOLS)
    walks = round(n * markov)
    rows = np.empty((n, width), dtype=np.int64)
    if walks:
        cumulated = chain.cumsum(1)
        often = np.linalg.matrix_power(chain, 64)[0]
        state = rng.choice(symbols, size=walks, p=often / often.sum())
        for place in range(width):
            rows[:walks, place] = state
            below = cumulated[state] < rng.random(walks)[:, None]
            state = below.sum(1).clip(max=symbols - 1)
    longest = min(width // 2, symbols)
    periods = rng.integers(SHORTEST, longest + 1, size=n - walks)
    segments = rng.permuted(np.tile(np.arange(symbols), (n - walks, 1)), axis=1)
    rows[walks:] = np.take_along_axis(segments, np.arange(width) % periods[:, None], axis=1)
    ids = torch.from_numpy(rng.permutation(rows)) + FIRST
    return torch.cat([torch.full((n, 1), BOS), ids], dim=1)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of SYMBOLS; anything else is <unk>.

    >>> tokenizer()("ab?").input_ids
    [2, 3, 46]
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    names = {"<bos>": BOS, "<unk>": UNKNOWN}
    names |= {symbol: FIRST + i for i, symbol in enumerate(SYMBOLS)}
    made = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", unk_token="<unk>")


def as_text(rows: Int[Tensor, "n length"]) -> str:
    """Rows as lines of text, without BOS.

    >>> as_text(torch.tensor([[0, 2, 3], [0, 4, 4]]))
    'ab\\ncc\\n'
    """
    return "".join("".join(SYMBOLS[i - FIRST] for i in row[1:]) + "\n" for row in rows.tolist())
