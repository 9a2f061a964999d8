"""Head attribution and logit lens of the default model beside TransformerLens' own functions.

Two independent implementations of the same formulas over the same weights: their TransformerBridge in
compatibility mode (norm gains folded into the weights, unembedding centred) with
`direct_logit_attribution` and `logit_lens` of `transformer_lens.tools.analysis`, ours on the plain
Hugging Face module. 1e-3 of the largest value allows for float32 through 30 blocks with another
attention kernel and folded weights.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
import transformer_lens
from transformer_lens.tools.analysis import direct_logit_attribution
from transformer_lens.tools.analysis import logit_lens as their_logit_lens

from circuits.attribution import direct_contributions
from interp.lens import logit_lens
from interp.models.model import Model
from interp.unembedding import Unembedding

STORE = "When Mary and John went to the store, John gave a drink to"
AGREEMENT = 1e-3
VERSIONS = {"transformer-lens": "4.3", "transformers": "5."}
"""What this agreement was found with; another version is worth a look before it is trusted."""


@pytest.fixture(scope="module")
def bridge(smollm: Model) -> Any:
    """Their model of the same weights, made from the same folder."""
    folder = str(smollm.module.config._name_or_path)  # type: ignore[union-attr]
    made = transformer_lens.TransformerBridge.boot_transformers(
        folder, dtype=torch.float32, device="cpu"
    )
    made.enable_compatibility_mode()
    return made


def test_versions() -> None:
    for package, wanted in VERSIONS.items():
        assert version(package).startswith(wanted), f"{package} {version(package)}"


@torch.no_grad()
def test_head_attribution_agrees(smollm: Model, bridge: Any) -> None:
    ids = smollm.as_batch(STORE).ids
    mary, john = smollm.token_id(" Mary"), smollm.token_id(" John")
    found = direct_logit_attribution(bridge, ids, mary, john, unit="head")
    heads = [i for i, label in enumerate(found.labels) if label.startswith("L")]
    theirs = found.attribution[heads].reshape(smollm.n_layers, smollm.spec.n_heads)
    ours = direct_contributions(smollm, ids, answer=mary, instead=john).heads[0]
    assert [found.labels[i] for i in heads] == [f"L{a}H{b}" for a, b in smollm.spec.heads]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < AGREEMENT
    assert float(theirs.abs().max()) > 1  # logits: there is something to agree about


@torch.no_grad()
def test_logit_lens_agrees(smollm: Model, bridge: Any) -> None:
    """Every layer's input and the last one's output, at the last position."""
    ids = smollm.as_batch(STORE).ids
    theirs = their_logit_lens(bridge, ids, return_type="logits").readout.values.squeeze()
    run = smollm.run(ids, capture=["resid_pre", "resid_post"], logits=False)
    last = f"resid_post.{smollm.n_layers - 1}"
    stack = torch.cat([run.cache["resid_pre"][0, -1], run.cache[last][0, -1:]])
    ours = Unembedding(smollm)(stack)
    # Their unembedding is centred: its logits are ours but for one number a row.
    ours, theirs = (x - x.mean(-1, keepdim=True) for x in (ours, theirs.float()))
    error = (ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)
    assert float(error.max()) < AGREEMENT

    table = logit_lens(smollm, ids, sites="resid_post", lens="logit", positions=[-1]).table
    probability = theirs[1:].softmax(-1).amax(-1)
    assert torch.allclose(
        torch.tensor(table["top_probability"].to_numpy()), probability, rtol=1e-2, atol=1e-4
    )
    assert table["top_token"].tolist() == smollm.tokens(theirs[1:].argmax(-1).tolist())
