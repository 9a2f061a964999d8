"""Where the residual stream is not a sum of heads' and MLPs' writes, what needs the sum is refused.

Nowhere does an analysis return parts that do not add up; and the reason names what stands in the way.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from circuits.attribution import direct_contributions
from circuits.contextual import Decomposition
from circuits.edges import edge_attribution
from circuits.flow import flow_graph
from circuits.heads.own_token import written
from circuits.word_vectors import word_vectors
from interp.data.pairs import Pairs
from interp.errors import Refused
from interp.models.model import Model
from probes.saes.attention import write_sites
from tests.families import FAMILIES, NOT_A_SUM, WINDOWED

ROUNDING = 1e-4
"""Of the largest logit: three blocks in float32, one order of additions against another."""
SPEAKS = [name for name in WINDOWED if FAMILIES[name].model.endswith(("CausalLM", "LMHeadModel"))]
OTHERS = [name for name in SPEAKS if not FAMILIES[name].sums]
PAIRS = Pairs.of(
    [[15, 16, 17, 18, 19], [20, 21, 22, 23, 24]],
    [[15, 26, 17, 28, 19], [20, 31, 22, 23, 34]],
    answers=[13, 14],
    wrong=[14, 13],
)


def model_of(name: str) -> Model:
    return Model(FAMILIES[name](), id=name)


def test_there_are_such_families() -> None:
    found = {trait for name in OTHERS for trait in FAMILIES[name].traits} & NOT_A_SUM
    assert found == NOT_A_SUM - {"layer scale as a parameter"}  # vision models do not speak


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "analysis",
    [
        lambda model: direct_contributions(model, PAIRS.clean_batch),
        lambda model: edge_attribution(model, PAIRS, progress=False),
        lambda model: word_vectors(model, PAIRS.clean_batch.ids[:1]),
        lambda model: flow_graph(model, PAIRS.clean_batch.ids[:1]),
    ],
    ids=["attribution", "edges", "words", "flow"],
)
def test_what_needs_the_sum_is_refused(name: str, analysis: Callable[[Model], object]) -> None:
    with pytest.raises(Refused):
        analysis(model_of(name))


@pytest.mark.parametrize("name", ["bert", "lfm2", "gemma4", "beit"])
def test_the_reason_names_the_module(name: str) -> None:
    model = model_of(name)
    with pytest.raises(Refused, match=r"'.*(LayerNorm|conv|per_layer|lambda).*'"):
        model.require_sum("this")
    layer = model.spec.attention_layers[0]
    with pytest.raises(Refused, match="attn_write and mlp_write"):
        write_sites(model, layer)


@pytest.mark.parametrize("name", OTHERS)
def test_decomposed_parts_add_up_or_are_refused(name: str) -> None:
    try:
        whole = Decomposition(model_of(name), PAIRS)
    except Refused:
        return
    diff = whole.logit_diff
    for part in whole.split([f"{whole.model.spec.attention_layers[0]}.1", "embed"]):
        allowed = ROUNDING * float(part.logit_diff.abs().max()) + ROUNDING
        assert torch.allclose(part.logit_diff + part.rest, diff, atol=allowed)


@pytest.mark.parametrize("name", [n for n in OTHERS if "rescaled stream" in FAMILIES[n].traits])
def test_heads_of_a_rescaled_stream_are_read_as_weights_where_w_o_is_times_a_number(
    name: str,
) -> None:
    """Elsewhere what W_O makes is scaled by channel, or rescaled behind it: no norm explains the write."""
    model = model_of(name)
    if not model.spec.blocks[0].direct:
        with pytest.raises(Refused):
            written(model, 0)
        return
    run = model.run(torch.tensor([[15, 16, 17, 18, 19]]), capture=["z.0", "attn_write.0"])
    heads = torch.einsum("bphd,hdm->bpm", run.cache["z.0"], written(model, 0))
    bias = run.cache["attn_write.0"] - heads
    torch.testing.assert_close(bias, bias[:, :1].expand_as(bias), atol=1e-5, rtol=0)


class Mixer(nn.Module):
    """In place of attention: a linear map of each position, `share` of the one before it, and a constant."""

    def __init__(self, width: int, share: float, constant: float) -> None:
        super().__init__()
        self.own, self.share, self.constant = nn.Linear(width, width), share, constant

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        own = self.own(hidden_states)
        return own + self.share * own.roll(1, 1) + self.constant, None


@pytest.mark.parametrize(("share", "constant"), [(1e-4, 0.0), (0.5, 1e3)])
def test_a_mixer_of_which_little_is_seen_is_no_mlp(share: float, constant: float) -> None:
    """What it takes from other positions may be little beside its own, as untrained, or beside a bias."""
    module = FAMILIES["llama"]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module.model.layers[0].self_attn = Mixer(module.config.hidden_size, share, constant)
    assert Model(module).spec.blocks[0].mlp_out == "model.layers.0.mlp"
