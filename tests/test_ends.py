"""Logits by other ways than a head that the model names: the head is found, or the model's own modules make them."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.errors import Refused
from interp.models.model import Model
from interp.models.probe import probe_batch
from tests.families import FAMILIES

ROUNDING = 1e-5
"""A norm and a product in float32, taken at other rows than the model takes them."""


@cache
def model_of(model_type: str, class_name: str) -> Model:
    return Model(tiny_model(model_type, class_name, runs), id=model_type)


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [("mobilebert", "MobileBertForMaskedLM"), ("parakeet_ctc", "ParakeetForCTC")],
)
def test_modules_of_their_own_make_the_logits_of_the_final_residual(
    model_type: str, class_name: str
) -> None:
    model = model_of(model_type, class_name)
    last = f"resid_post.{model.n_layers - 1}"
    run = model.run(probe_batch(model.module), capture=[last])
    assert model.spec.readout and "unembedding" in model.spec.absent
    assert off(model.unembed(run.cache[last].flip(0)), run.logits.flip(0)) < ROUNDING
    with pytest.raises(Refused, match="is no linear layer"):
        _ = model.W_U


class Wrapped(nn.Module):
    """A language model inside another, which says nothing of its head; or which changes its logits."""

    main_input_name = "input_ids"

    def __init__(self, several: bool = False) -> None:
        super().__init__()
        self.inside: Any = FAMILIES["llama"]()
        self.config = self.inside.config
        self.several = several

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        logits = self.inside(input_ids, use_cache=use_cache).logits
        return SimpleNamespace(logits=logits.repeat(2, 1, 1) if self.several else logits)


def test_a_head_that_the_model_does_not_name_is_found_by_what_it_returns() -> None:
    ids = torch.arange(10, 18).reshape(2, 4)
    model = Model(Wrapped().eval(), id="wrapped")
    plain = Model(FAMILIES["llama"](), id="plain")
    assert not model.spec.refused
    assert model.spec.unembedding == f"inside.{plain.spec.unembedding}"
    last = model.run(ids, capture=["resid_post.2"]).cache["resid_post.2"]
    assert off(model.unembed(last), plain.run(ids).logits) < ROUNDING


def test_logits_of_other_rows_have_no_one_unembedding() -> None:
    model = Model(Wrapped(several=True).eval(), id="several")
    assert set(model.spec.refused) == model.spec.absent == {"unembedding"}
    with pytest.raises(Refused, match="other rows or positions"):
        model.unembed(torch.zeros(2, model.spec.d_model))


def test_a_soft_cap_that_the_config_class_fixes_is_found() -> None:
    """Diffusion Gemma's config has it for all of its models alike: it stands in no config file."""
    model = model_of("diffusion_gemma", "DiffusionGemmaForBlockDiffusion")
    text = model.module.config.get_text_config()  # type: ignore[operator, union-attr]
    assert "final_logit_softcapping" not in text.to_dict()
    assert model.spec.logit_softcap == text.final_logit_softcapping == 30.0
    assert "unembedding" not in model.spec.refused
