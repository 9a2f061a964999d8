"""Blocks that return what code outside adds to the stream: they are seen as their twins that add it themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from interp.errors import Refused
from interp.models.model import Model
from interp.run.edits import Edit
from tests.test_kernels import IDS, WIDTH, Attention

N_LAYERS = 3
OTHER = (IDS + 11) % 97
SITES = ["resid_pre", "resid_post", "mlp_write", "z", "pattern"]


class Block(nn.Module):
    """An MLP reads the stream beside what attention returns, as SuperGlue's."""

    def __init__(self, config: Any, adds: bool) -> None:
        super().__init__()
        self.adds = adds
        self.attn, self.norm = Attention(config), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(2 * WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        both = torch.cat([x, self.attn(self.norm(x))], -1)
        made = self.fc2(torch.relu(self.fc1(both)))
        return (x + made if self.adds else made), None


class Twin(nn.Module):
    def __init__(self, adds: bool, share: float = 1.0) -> None:
        super().__init__()
        self.config: Any = PreTrainedConfig(vocab_size=97, max_position_embeddings=64)  # pyright: ignore
        self.config._attn_implementation_internal = "sdpa"
        self.embed, self.share = nn.Embedding(97, WIDTH), share
        self.blocks = nn.ModuleList(Block(self.config, adds) for _ in range(N_LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 97, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        for block in self.blocks:
            made = block(x)[0]
            x = made if block.adds else x + self.share * made
        return SimpleNamespace(logits=self.head(self.norm(x)))


def twins() -> tuple[Model, Model]:
    made = []
    for adds in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made.append(Model(Twin(adds).eval()))
    return made[0], made[1]


def test_they_have_the_sites_and_the_identities_of_their_twins() -> None:
    outside, inside = twins()
    assert all(block.adds for block in outside.spec.blocks)
    assert not any(block.adds for block in inside.spec.blocks)
    assert outside.spec.refused == inside.spec.refused
    assert not set(outside.spec.refused) - outside.spec.absent
    assert outside.spec.chained and outside.spec.final_norm == "norm"
    a, b = (model.run(IDS, capture=SITES) for model in (outside, inside))
    for site in SITES:
        torch.testing.assert_close(a.cache[site], b.cache[site])
    empty = outside.run(IDS, edits=[Edit.apply("resid_post", lambda x, seen: x)]).logits
    assert torch.equal(empty, outside.run(IDS).logits)


EDITS = [
    Edit.zero("resid_pre.0"),
    Edit.zero("resid_pre.1"),
    Edit.zero("resid_post.1"),
    Edit.zero("resid_post.2"),
    Edit.zero("mlp_write.1"),
    Edit.zero("z.1"),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: str(edit.site))
def test_edits_do_what_they_do_in_their_twins_also_in_replays(edit: Edit) -> None:
    outside, inside = twins()
    ran = [model.run(IDS, capture=["resid_post"], edits=[edit]) for model in (outside, inside)]
    torch.testing.assert_close(ran[0].logits, ran[1].logits)
    torch.testing.assert_close(ran[0].cache["resid_post"], ran[1].cache["resid_post"])
    assert not torch.allclose(ran[0].logits, outside.run(IDS).logits, atol=1e-2)
    clean = outside.run(IDS, capture=["resid_pre"])
    variants = [[edit], [Edit.zero("resid_pre.2")], [edit]]
    again = outside.replay(clean, variants, lambda run: run.logits)
    torch.testing.assert_close(again[2], ran[1].logits)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_a_patched_stream_makes_the_run_that_it_is_of(site: str, layer: int) -> None:
    outside, _ = twins()
    source = outside.run(OTHER, capture=[site])
    patch = Edit.patch(f"{site}.{layer}", source.cache[f"{site}.{layer}"])
    torch.testing.assert_close(outside.run(IDS, edits=[patch]).logits, source.logits)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_write"])
def test_gradients_are_those_of_their_twins(site: str) -> None:
    made = []
    for model in twins():
        run = model.run(IDS, capture=[site], grad=True)
        assert run.logits is not None
        made.append(run.gradients(run.logits.square().sum(), site))
    torch.testing.assert_close(made[0], made[1])


def test_what_is_added_in_part_is_no_such_write() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(Twin(adds=False, share=0.5).eval())
    assert not any(block.adds for block in model.spec.blocks) and not model.spec.chained
    assert {"mlp_write", "resid_mid"} <= set(model.spec.refused)


def test_blocks_that_are_called_by_themselves_are_refused() -> None:
    outside, inside = twins()
    with pytest.raises(Refused, match="code outside adds"):
        _ = outside.blocks
    assert len(inside.blocks) == N_LAYERS
