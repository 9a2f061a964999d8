"""Attention by PyTorch's composed functions: seen and edited as where a model computes it step by step.

`multi_head_attention_forward`, and `scaled_dot_product_attention` of heads that are folded into rows.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.models.model import Model
from interp.models.weights import linear_map
from interp.run.edits import Edit
from interp.sites import AXES

EXACT = 1e-6
"""The function's own steps on the same numbers, and two kernels of the same attention."""
IDS = torch.randint(10, 97, (2, 9), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        normed = self.first(x)
        out, _ = self.attention(normed, normed, normed, need_weights=self.weights)
        x = x + out
        return x + self.down(self.up(self.second(x)).relu())


class Encoder(transformers.BertPreTrainedModel):
    main_input_name = "input_ids"

    def __init__(self, weights: bool) -> None:
        super().__init__(transformers.BertConfig(vocab_size=97, hidden_size=32))
        self.embed = nn.Embedding(97, 32)
        self.layers = nn.ModuleList([Block(weights) for _ in range(3)])

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=x)


@cache
def encoder(weights: bool) -> Model:
    torch.manual_seed(0)
    module = Encoder(weights).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return Model(module, id="encoder")


@cache
def wavlm() -> Model:
    return Model(tiny_model("wavlm", "WavLMForCTC", partial(runs, strict=True)), id="wavlm")


def waves() -> dict[str, Tensor]:
    """Two rows of 5000 samples, the second padded from 3000 on."""
    x = torch.randn(2, 5000, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 5000, dtype=torch.long)
    mask[1, 3000:] = 0
    return {"input_values": x, "attention_mask": mask}


@pytest.mark.parametrize("weights", [True, False])
def test_pytorchs_own_module_is_seen(weights: bool) -> None:
    model = encoder(weights)
    sites = [site for site in AXES if site not in model.spec.refused and model.layers_with(site)]
    assert not set(model.spec.refused) - model.spec.absent
    with torch.no_grad():
        plain = model.module(IDS).last_hidden_state
    run = model.run(IDS, capture=sites)
    torch.testing.assert_close(run.logits, plain, atol=EXACT, rtol=1e-5)
    block: Any = model.blocks[1]
    with torch.no_grad():
        x = block.first(run.cache["resid_pre.1"])
        out, pattern = block.attention(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(run.cache["pattern.1"], pattern, atol=EXACT, rtol=1e-5)
    torch.testing.assert_close(run.cache["attn_out.1"], out, atol=EXACT, rtol=1e-5)
    heads = torch.einsum("bqhd,hdm->bqm", run.cache["z.1"], model.W_O(1)) + model.b_O(1)
    torch.testing.assert_close(heads, out, atol=EXACT, rtol=1e-5)


@pytest.mark.parametrize("weights", [True, False])
def test_its_output_projection_is_seen_where_nothing_else_is(weights: bool) -> None:
    """PyTorch reads the projection's weights and does not call it: a hook there alone would hear nothing."""
    model = encoder(weights)
    alone = model.run(IDS, capture=["attn_out"]).cache["attn_out"]
    beside = model.run(IDS, capture=["attn_out", "z"]).cache["attn_out"]
    torch.testing.assert_close(alone, beside, atol=EXACT, rtol=1e-5)
    block: Any = model.blocks[1]
    hook = block.attention.register_forward_hook(lambda of, args, out: (0 * out[0], *out[1:]))
    with torch.no_grad():
        wanted = model.module(IDS).last_hidden_state
    hook.remove()
    without = Edit.zero("attn_out.1")
    clean = model.run(IDS, capture=["resid_pre"])
    (replayed,) = model.replay(clean, [[without]], lambda run: run.logits)
    for got in (model.run(IDS, edits=[without]).logits, replayed):
        torch.testing.assert_close(got, wanted, atol=EXACT, rtol=1e-5)
    assert (wanted - clean.logits).abs().max() > 1e-3


@pytest.mark.parametrize("weights", [True, False])
def test_a_head_without_output_is_w_o_without_its_rows(weights: bool) -> None:
    model = encoder(weights)
    edited = model.run(IDS, edits=[Edit.zero("z.1.2")]).logits
    block: Any = model.blocks[1]
    projection = block.attention.out_proj
    before = projection.weight.detach().clone()
    with torch.no_grad():
        projection.weight[:, 16:24] = 0
        wanted = model.module(IDS).last_hidden_state
        projection.weight.copy_(before)
    torch.testing.assert_close(edited, wanted, atol=1e-5, rtol=1e-5)
    assert (edited - model.run(IDS).logits).abs().max() > 1e-3


def test_an_edited_pattern_mixes_other_values() -> None:
    model = encoder(True)
    cache = model.run(IDS, capture=["v.1", "pattern.1"]).cache
    turned = Edit.apply("pattern.1", lambda x, seen: x.flip(-1))
    z = model.run(IDS, capture=["z.1"], edits=[turned]).cache["z.1"]
    wanted = torch.einsum("bhqk,bkhd->bqhd", cache["pattern.1"].flip(-1), cache["v.1"])
    torch.testing.assert_close(z, wanted, atol=EXACT, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_gated_positions_and_padded_samples() -> None:
    """WavLM adds a bias of positions, times a gate that its input opens, and hides the keys of padding."""
    model, given = wavlm(), waves()
    assert not model.spec.refused and model.spec.n_heads == 4
    sites = [site for site in AXES if model.layers_with(site)]
    run = model.run(given, capture=sites)
    with torch.no_grad():
        theirs = model.module(**given, output_attentions=True)
    torch.testing.assert_close(run.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    for layer, mean in enumerate(theirs.attentions):  # PyTorch averages them over heads
        pattern = run.cache[f"pattern.{layer}"]
        torch.testing.assert_close(pattern.mean(1), mean[:, 0], atol=EXACT, rtol=1e-5)
        assert (pattern[1, ..., -1] == 0).all() and pattern[0].all()
    same = [Edit.apply(site, lambda x, seen: x) for site in sites]
    torch.testing.assert_close(
        model.run(given, edits=same).logits, theirs.logits, atol=1e-5, rtol=1e-5
    )
    # Its first block hands on a bias of rows times heads, of which no copies can be made.
    variants = [[Edit.zero("z", heads=[(1, head)])] for head in (0, 1)]
    for edits, logits in zip(
        variants, model.replay(run, variants, lambda v: v.logits), strict=True
    ):
        wanted = model.run(given, edits=edits).logits
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)


class Torch(Encoder):
    """PyTorch's own encoder layers, which take a fused path of their own where no one looks."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__(False)
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first)
        encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.layers = encoder.layers


@pytest.mark.parametrize("norm_first", [True, False])
def test_pytorchs_own_encoder_is_seen(norm_first: bool) -> None:
    torch.manual_seed(0)
    module = Torch(norm_first).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
        plain = module(IDS).last_hidden_state
    model = Model(module, id="torch")
    assert not model.spec.refused
    sites = [site for site in AXES if model.layers_with(site)]
    run = model.run(IDS, capture=sites)
    torch.testing.assert_close(run.logits, plain, atol=1e-5, rtol=1e-5)
    head = run.cache["z.1"][:, :, 2] @ model.W_O(1)[2]
    without = model.run(IDS, capture=["attn_out.1"], edits=[Edit.zero("z.1.2")]).cache["attn_out.1"]
    torch.testing.assert_close(run.cache["attn_out.1"] - without, head, atol=1e-5, rtol=1e-5)


class Folded(nn.Module):
    """A block's attention by SDPA of [rows·heads pos d_head], or of [row head window pos d_head]."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.how = how

    def mask(self, n: int) -> Tensor:
        """Its own key and the one before."""
        near = torch.ones(n, n).tril(-1) - torch.ones(n, n).tril(-2)
        return (torch.eye(n) + near).bool()

    def forward(self, x: Tensor) -> Tensor:
        rows, n, _ = x.shape
        q, k, v = (
            self.qkv(self.first(x)).view(rows, n, 3, 4, 8).permute(2, 0, 3, 1, 4).flatten(1, 2)
        )
        sdpa = nn.functional.scaled_dot_product_attention
        if self.how == "causal":
            z = sdpa(q, k, v, is_causal=True)
        elif self.how == "windows":
            z = sdpa(*(x.view(rows, 4, 1, n, 8) for x in (q, k, v)), is_causal=True)
        elif self.how == "masked":
            z = sdpa(query=q, key=k, value=v, attn_mask=self.mask(n), scale=0.5)
        else:
            z = sdpa(q, k, v, 0.1 * torch.arange(n).float())
        x = x + self.proj(z.view(rows, 4, n, 8).transpose(1, 2).flatten(2))
        return x + self.down(self.up(self.second(x)).relu())


class Rows(Encoder):
    def __init__(self, how: str) -> None:
        super().__init__(False)
        self.layers = nn.ModuleList([Folded(how) for _ in range(3)])


@pytest.mark.parametrize("how", ["causal", "windows", "masked", "added"])
def test_sdpa_of_other_axes_than_row_and_head_is_seen(how: str) -> None:
    torch.manual_seed(0)
    module = Rows(how).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
        plain = module(IDS).last_hidden_state
    model = Model(module, id="folded")
    assert not model.spec.refused and model.spec.n_heads == 4
    sites = [site for site in AXES if model.layers_with(site)]
    run = model.run(IDS, capture=sites)
    torch.testing.assert_close(run.logits, plain, atol=1e-5, rtol=1e-5)
    same = [Edit.apply(site, lambda x, seen: x) for site in sites]
    torch.testing.assert_close(model.run(IDS, edits=same).logits, plain, atol=1e-5, rtol=1e-5)
    q, k = (run.cache[site].transpose(1, 2) for site in ("q.1", "k.1"))
    scores = q @ k.mT * (0.5 if how == "masked" else 8**-0.5)
    hidden = ~(model.blocks[1].mask(9) if how == "masked" else torch.ones(9, 9).bool().tril())
    added = how == "added"
    scores = scores + 0.1 * torch.arange(9) if added else scores.masked_fill(hidden, float("-inf"))
    torch.testing.assert_close(run.cache["pattern.1"], scores.softmax(-1), atol=EXACT, rtol=1e-5)
    head = run.cache["z.1"][:, :, 2] @ model.W_O(1)[2]
    without = model.run(IDS, capture=["attn_out.1"], edits=[Edit.zero("z.1.2")]).cache["attn_out.1"]
    torch.testing.assert_close(run.cache["attn_out.1"] - without, head, atol=1e-5, rtol=1e-5)


class Normed(nn.Module):
    """A linear layer whose output goes through a norm of all rows and positions in one, as LeViT's do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).flatten(0, 1)).reshape(*x.shape[:2], 4)


def test_a_linear_map_that_folds_rows_and_positions_itself_is_read() -> None:
    torch.manual_seed(0)
    module = Normed().eval()
    for x in (module.norm.weight.data, module.norm.running_mean):
        assert x is not None
        x.normal_()
    W, b = linear_map(module, 6)
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(x @ W + b, module(x), atol=1e-5, rtol=1e-5)
