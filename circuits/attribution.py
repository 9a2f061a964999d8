"""Direct logit attribution: what every head, MLP, embedding and bias adds to a logit, exactly.

The final residual is a sum of writes, and with the final norm's scale held fixed a logit is linear in
it, so the writes' contributions sum to the logit. The direction that a logit reads is pulled back
through W_O to where z lives: no head's d_model-wide output is ever formed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import BadInput, Refused
from interp.models.calls import uncapped_logits
from interp.models.model import Model
from interp.models.weights import FrozenNorm, linear_map
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.batch import Batch
from interp.run.cache import Run


@dataclass(frozen=True)
class Direction:
    """The residual direction of a logit (or logit difference) at one position of each prompt.

    vector: [batch d_model], final norm's gain and scale folded in: its dot product with a write is the
    write's contribution in logits. constant: [batch], what biases after the last block add.
    """

    vector: Float[Tensor, "batch d_model"]
    constant: Float[Tensor, " batch"]


@torch.no_grad()
def logit_direction(
    model: Model, final: Float[Tensor, "batch d_model"], answer: Tensor, instead: Tensor | None
) -> Direction:
    """The direction that logit[answer] (− logit[instead]) reads at the final residual `final`."""
    W_U, b_U = linear_map(
        model.module.get_submodule(model.spec.unembedding or ""), model.spec.d_model
    )
    d, b = W_U.T[answer].float(), b_U[answer].float()
    if instead is not None:
        d, b = d - W_U.T[instead].float(), b - b_U[instead].float()
    norm, scale = model.final_norm, model.spec.logit_scale
    constant = (d @ norm.bias.to(d.device).float() + b) * scale
    return Direction(norm.pull_back(d, at=final) * scale, constant)


def check_options(*, position: int = -1) -> None:
    """Nothing about these options can be judged without the prompt."""


@analysis(
    name="attribution",
    source="Elhage et al. 2021, §path expansion; nostalgebraist 2020 for reading the residual stream",
    example='interp attribution smollm2-135m "The capital of France is" --answer " Paris"',
    figure="contributions",
    validate=check_options,
)
@torch.no_grad()
def direct_attribution(
    model: Model,
    prompt: Batch | Tensor | str | Sequence[str],
    *,
    answer: str | int | None = None,
    instead: str | int | None = None,
    position: int = -1,
) -> Report:
    """Contribution of each head, MLP, embedding and bias to a logit or logit difference, in logits.

    logit = Σ_w w · d + constant, w every write to the residual stream at `position`, d the answer's
    unembedding direction pulled back through the final norm with its scale frozen. Head h adds
    z_h · (W_O^h d); its part from source position s is A[q,s] v_s · (W_O^h d).

    It does not show indirect effects: a head may matter only through what later heads read. The scale
    of the norm is itself made by all writes together. With a soft-cap, the sum is the logit before it.

    Args:
        prompt: text or texts, token ids, or a Batch.
        answer: the token explained, text or id; by default each prompt's most likely next token.
        instead: explain the logit difference answer − instead.
        position: which position's logits; negative from the end of the real tokens.

    Returns: a Report. Table "attribution": one row for each (prompt, component): component ("embed",
        "head", "attn_bias", "mlp", "constant"), layer, head, contribution (logits), which sum over a
        prompt to meta["logits"][prompt]. Table "sources": (prompt, layer, head, source, token,
        contribution) of every head by the position it read.

    Raises:
        BadInput: a token that is not one, a position not in the prompt. Refused: writes or unembedding
        were not verified.

    >>> report = direct_attribution(tiny_model(), torch.tensor([[5, 6, 7]]), answer=3)
    >>> total = report.table["contribution"].sum()
    >>> bool(abs(total - report.meta["logits"][0]) < 1e-4)
    True
    """
    started = time.perf_counter()
    for site in ("attn_out", "attn_write", "mlp_write"):
        model.layers_with(site)
    _ = model.W_U
    batch = model.as_batch(prompt)
    places = _places(batch, position)
    wanted = None if answer is None else torch.tensor([model.token_id(answer)] * batch.size)
    other = None if instead is None else torch.tensor([model.token_id(instead)] * batch.size)
    last = model.n_layers - 1
    run = model.run(
        batch,
        capture=[
            "embed",
            "attn_out",
            "attn_write",
            "mlp_write",
            "z",
            "v",
            "pattern",
            f"resid_post.{last}",
        ],
        logits=False,
    )
    rows = torch.arange(batch.size)
    final = run.cache[f"resid_post.{last}"][rows, places]
    if wanted is None:
        wanted = model.unembed(final).argmax(-1).cpu()
    direction = logit_direction(model, final, wanted, other)
    table, sources = _contributions(model, run, places, direction)
    logits = _uncapped(model, final, wanted, other)
    meta = provenance(model, options={"position": position}, seed=0) | {
        "logits": [float(value) for value in logits],
        "tokens": [model.tokens(ids.tolist()) for ids in batch.ids],
        "positions": places.tolist(),
        "answers": model.tokens(wanted.tolist()),
        "instead": None if other is None else model.tokens(other.tolist()),
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    return Report("attribution", {"attribution": table, "sources": sources}, {}, meta)


def _places(batch: Batch, position: int) -> Tensor:
    """Each prompt's position, counted over its real tokens."""
    assert batch.mask is not None
    real = batch.mask.sum(1).cpu()
    if int(real.min()) < max(-position, position + 1):
        raise BadInput(f"position {position} is not in a prompt of {int(real.min())} tokens")
    first = batch.mask.int().argmax(1).cpu()
    return first + (position if position >= 0 else real + position)


def _contributions(
    model: Model, run: Run, places: Tensor, direction: Direction
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables: by component, and by head and source position."""
    rows = torch.arange(run.batch.size)
    parts: list[pd.DataFrame] = [
        _rows("embed", np.nan, np.nan, _dot(run.cache["embed"][rows, places], direction.vector)),
        _rows("constant", np.nan, np.nan, direction.constant),
    ]
    sources: list[pd.DataFrame] = []
    for layer, block in enumerate(model.spec.blocks):
        if block.mlp_write is not None:
            write = run.cache[f"mlp_write.{layer}"][rows, places]
            parts.append(_rows("mlp", layer, np.nan, _dot(write, direction.vector)))
        if block.attn_write is None:
            continue
        write = _dot(run.cache[f"attn_write.{layer}"][rows, places], direction.vector)
        pulled = _through_attention_norm(model, run, layer, places, direction.vector)
        by_head = torch.einsum("bm,hdm->bhd", pulled, model.W_O(layer).float())
        z = run.cache[f"z.{layer}"][rows, places].float()
        heads = (z * by_head).sum(-1)
        parts += [_rows("head", layer, head, heads[:, head]) for head in range(heads.shape[1])]
        parts.append(_rows("attn_bias", layer, np.nan, write - heads.sum(-1)))
        sources.append(_sources(model, run, layer, places, by_head))
    return pd.concat(parts, ignore_index=True), pd.concat(sources, ignore_index=True)


def _through_attention_norm(
    model: Model, run: Run, layer: int, places: Tensor, vector: Tensor
) -> Float[Tensor, "batch d_model"]:
    """The direction before attn_write's scale and, where there is one, the norm after attention."""
    block = model.spec.blocks[layer]
    assert block.attn_write is not None
    pulled = vector * block.attn_write.scale
    if block.direct:
        return pulled
    norm = FrozenNorm(model.module.get_submodule(block.attn_write.module), model.spec.d_model)
    rows = torch.arange(run.batch.size)
    out = run.cache[f"attn_out.{layer}"][rows, places]
    made = norm.gain.float() * norm.centre(out.float()) / norm.scale(out) + norm.bias.float()
    write = run.cache[f"attn_write.{layer}"][rows, places].float() / block.attn_write.scale
    if not torch.allclose(made, write, rtol=1e-2, atol=1e-3 * float(write.abs().max())):
        raise Refused(
            f"layer {layer} of {model.id}: what stands between the attention output and the residual "
            "stream is not a norm that could be held fixed"
        )
    return norm.pull_back(pulled, at=out)


def _sources(
    model: Model, run: Run, layer: int, places: Tensor, by_head: Float[Tensor, "batch heads d_head"]
) -> pd.DataFrame:
    """What each head contributes from each position it read: A[q, s] v_s · (W_O^h d)."""
    rows = torch.arange(run.batch.size)
    groups = [model.spec.kv_group(layer, head) for head in range(by_head.shape[1])]
    v = run.cache[f"v.{layer}"].float()[:, :, groups]
    weights = run.cache[f"pattern.{layer}"][rows, :, places].float()
    values = torch.einsum("bhs,bshd,bhd->bhs", weights, v, by_head).cpu().numpy()
    prompt, head, source = (axis.ravel() for axis in np.indices(values.shape))
    table = pd.DataFrame({"prompt": prompt, "layer": layer, "head": head, "source": source})
    return table.assign(contribution=values.ravel())


def _dot(write: Tensor, vector: Tensor) -> Float[Tensor, " batch"]:
    return (write.float() * vector).sum(-1)


def _rows(component: str, layer: float, head: float, values: Tensor) -> pd.DataFrame:
    found = pd.DataFrame({"prompt": range(len(values)), "component": component})
    return found.assign(layer=layer, head=head, contribution=values.cpu().numpy())


def _uncapped(model: Model, final: Tensor, answer: Tensor, instead: Tensor | None) -> Tensor:
    """The explained logits, before a soft-cap, by the model's own norm and unembedding."""
    logits = uncapped_logits(model.spec, model.module, final)
    rows = torch.arange(len(final))
    found = logits[rows, answer].float()
    return found if instead is None else found - logits[rows, instead].float()
