"""A prompt of n_ctx tokens runs, and one more would read past the end of a table of positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp.errors import BadInput
from interp.models.model import Model
from tests.families import FAMILIES
from tests.test_ngram_streams import opened


def model_of(name: str) -> Model:
    return opened(name.partition(" ")[2]) if "prophetnet" in name else Model(FAMILIES[name]())


@pytest.mark.parametrize(
    ("name", "n_ctx"),
    [
        ("gpt2", 64),
        ("opt", 64),  # a table of 66 rows, of which the third is the first position's
        ("roberta", 62),  # one of 64 rows, the third
        (
            "prophetnet decoder",
            62,
        ),  # one of 64 rows, the second, and the third for what is predicted
        ("prophetnet encoder-decoder", 62),
    ],
)
def test_the_longest_prompt_is_the_longest_that_the_model_reads(name: str, n_ctx: int) -> None:
    model = model_of(name)
    assert model.spec.n_ctx == n_ctx
    ids = torch.full((1, n_ctx), 7)
    given: Any = {"input_ids": ids[:, :5], "decoder_input_ids": ids} if "-" in name else ids
    assert model.run(given).logits.shape[1] == n_ctx  # type: ignore[union-attr]
    longer = torch.cat([ids, ids[:, :1]], 1)
    given = {"input_ids": ids[:, :5], "decoder_input_ids": longer} if "-" in name else longer
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        model.module(**given) if isinstance(given, dict) else model.module(given)
    with pytest.raises(BadInput, match=rf"{n_ctx + 1} tokens.* at most {n_ctx} \(n_ctx\)"):
        model.run(given)
