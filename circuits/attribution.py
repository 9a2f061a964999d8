"""Direct logit attribution: what every head, MLP, neuron, embedding and bias adds to a logit, exactly.

The final residual is a sum of writes, and with the final norm's scale held fixed a logit is linear in
it, so the writes' contributions sum to the logit. The direction that a logit reads is pulled back
through W_O to where z lives, and through W_out to the neurons: no head's d_model-wide output is ever
formed, and of every activation only the row at the read position is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.devices import wide
from interp.direction import logit_direction, norm_behind, places_of, token_ids
from interp.errors import BadInput
from interp.models.calls import uncapped_logits
from interp.models.model import Model
from interp.models.weights import FrozenNorm
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.batch import Batch
from interp.run.edits import Edit, Seen
from interp.sites import ranges

NEEDED = ("attn_out", "attn_write", "mlp_write", "mlp_out")


@dataclass(frozen=True, eq=False)
class Contributions:
    """What each part adds to one logit (or logit difference) of every prompt; everything in logits.

    Attributes:
        logits: the explained logits, by the model's own norm and unembedding, before a soft-cap.
        heads, attn_biases, mlps, embed, constant: the parts; they sum to `logits`. 0 where a layer has
            no such head, no attention or no MLP. `constant` is what biases after the last block add.
        neurons: by layer, the parts of its MLP (where it has neurons); with `mlp_biases` they sum to
            `mlps`. activations: the neurons' values (`mlp_post`).
        sources: by layer, the parts of each head by the position it read; they sum to `heads`.
            weights: the attention weights of the read position.
        answers, instead: token ids. positions: the read position of each prompt in the batch.
    """

    logits: Float[Tensor, " batch"]
    heads: Float[Tensor, "batch n_layers n_heads"]
    attn_biases: Float[Tensor, "batch n_layers"]
    mlps: Float[Tensor, "batch n_layers"]
    mlp_biases: Float[Tensor, "batch n_layers"]
    embed: Float[Tensor, " batch"]
    constant: Float[Tensor, " batch"]
    answers: Int[Tensor, " batch"]
    instead: Int[Tensor, " batch"] | None
    positions: Int[Tensor, " batch"]
    neurons: dict[int, Float[Tensor, "batch d_mlp"]] = field(default_factory=dict)
    activations: dict[int, Float[Tensor, "batch d_mlp"]] = field(default_factory=dict)
    sources: dict[int, Float[Tensor, "batch n_heads key_pos"]] = field(default_factory=dict)
    weights: dict[int, Float[Tensor, "batch n_heads key_pos"]] = field(default_factory=dict)

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """Sum of all parts: `logits` to rounding."""
        of_layers = self.heads.sum((1, 2)) + self.attn_biases.sum(1) + self.mlps.sum(1)
        return of_layers + self.embed + self.constant


@torch.no_grad()
def direct_contributions(
    model: Model,
    prompt: Batch | Tensor | str | Sequence[str],
    *,
    answer: str | int | Tensor | None = None,
    instead: str | int | Tensor | None = None,
    position: int = -1,
    neurons: bool = False,
    sources: bool = False,
) -> Contributions:
    """Every part's contribution to a logit or logit difference, as tensors, from one forward.

    See `direct_attribution` for the equation and what it does not show. Without `sources` no pattern is
    formed; of every site only the row at `position` is kept, and nothing but that row is unembedded.

    Args:
        prompt: text or texts, token ids, or a Batch.
        answer, instead: text, an id, or one id a prompt [batch]; no answer: the model's own top token.
        position: which position's logits; negative from the end of the real tokens.
        neurons, sources: whether to take MLPs apart by neuron, heads by source position.

    Raises:
        BadInput, Refused: as `direct_attribution`.

    >>> found = direct_contributions(tiny_model(), torch.tensor([[5, 6, 7], [8, 9, 1]]), answer=3)
    >>> found.heads.shape, torch.allclose(found.total, found.logits, atol=1e-4)
    (torch.Size([2, 2, 4]), True)
    """
    model.require_sum("direct attribution")
    for site in NEEDED:
        model.layers_with(site)
    _ = model.W_U
    batch = model.as_batch(prompt)
    places = places_of(batch, position)
    wanted, other = (token_ids(model, token, batch.size) for token in (answer, instead))
    if neurons:
        neurons = "mlp_post" not in model.spec.refused
    sites = ["embed", *write_sites(model), f"resid_post.{model.n_layers - 1}"]
    kept = rows_at(
        model, batch, places, [*sites, "mlp_post"] if neurons else sites, attention=sources
    )
    final = kept["resid_post", model.n_layers - 1]
    if wanted is None:
        wanted = model.unembed(final).argmax(-1).cpu()
    direction = logit_direction(model, final, wanted, other)
    parts = Parts(model, batch.size)
    for layer in range(model.n_layers):
        parts.add_attention(layer, kept, direction.vector)
        parts.add_mlp(layer, kept, direction.vector)
    return Contributions(
        logits=_uncapped(model, final, wanted, other).cpu(),
        embed=_dot(kept["embed", 0], direction.vector).cpu(),
        constant=direction.constant.cpu(),
        answers=wanted,
        instead=other,
        positions=places,
        heads=parts.heads,
        attn_biases=parts.attn_biases,
        mlps=parts.mlps,
        mlp_biases=parts.mlp_biases,
        neurons=parts.neurons,
        activations=parts.activations,
        sources=parts.sources,
        weights=parts.weights,
    )


def check_options(*, neurons: int = 20, **_: object) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if neurons < 0:
        raise BadInput(f"neurons={neurons}: wanted 0 (none shown) or more")


def strongest(report: Report) -> pd.DataFrame:
    """The fifteen largest contributions, of either sign."""
    order = np.argsort(-report.table["contribution"].abs().to_numpy(), kind="stable")
    return report.table.iloc[order[:15]]


@analysis(
    name="attribute",
    source="Elhage et al. 2021, §path expansion; nostalgebraist 2020 for reading the residual stream",
    example='interp attribute smollm2-135m "The capital of France is" --answer " Paris"',
    figure="contributions",
    validate=check_options,
    summary=strongest,
)
@torch.no_grad()
def direct_attribution(
    model: Model,
    prompt: Batch | Tensor | str | Sequence[str],
    *,
    answer: str | int | None = None,
    instead: str | int | None = None,
    position: int = -1,
    sources: bool = True,
    neurons: int = 20,
) -> Report:
    """Contribution of each head, MLP, neuron, embedding and bias to a logit or logit difference.

    logit = Σ_w w · d + constant, w every write to the residual stream at `position`, d the answer's
    unembedding direction pulled back through the final norm with its scale frozen. Head h adds
    z_h · (W_O^h d); its part from source position s is A[q,s] v_s · (W_O^h d). Neuron n adds
    a_n (W_out[n] · d). Norms between a write and the stream are frozen in the same way.

    It does not show indirect effects: a head may matter only through what later heads read. The scale
    of the norm is itself made by all writes together. With a soft-cap, the sum is the logit before it.

    Args:
        prompt: text or texts, token ids, or a Batch.
        answer: the token explained, text or id; by default each prompt's most likely next token.
        instead: explain the logit difference answer − instead.
        position: which position's logits; negative from the end of the real tokens.
        sources: also by the position each head read; costs the patterns' computation.
        neurons: how many neurons to name for each prompt, the largest contributions of either sign.

    Returns: a Report. Table "attribute": one row for each (prompt, component): component ("embed",
        "head", "attn_bias", "mlp", "constant"), layer, head (missing where it has none), contribution
        (logits), which sum over a prompt to meta["logits"][prompt]. Table "sources": (prompt, layer,
        head, source, token, weight, contribution) of every head by the position it read. Table
        "neurons": (prompt, layer, neuron, contribution, activation), parts of their MLP's contribution,
        strongest first; meta["notes"] says where a model has no neurons to name.

    Raises:
        BadInput: a token that is not one, a position not in the prompt. Refused: writes or unembedding
        were not verified.

    >>> report = direct_attribution(tiny_model(), torch.tensor([[5, 6, 7]]), answer=3, neurons=2)
    >>> total = report.table["contribution"].sum()
    >>> bool(abs(total - report.meta["logits"][0]) < 1e-4), len(report.tables["neurons"])
    (True, 2)
    """
    started = time.perf_counter()
    check_options(neurons=neurons)
    batch = model.as_batch(prompt)
    found = direct_contributions(
        model,
        batch,
        answer=answer,
        instead=instead,
        position=position,
        neurons=neurons > 0,
        sources=sources,
    )
    tokens = [model.tokens(ids.tolist()) for ids in batch.ids]
    tables = {"attribute": _component_table(model, found)}
    if sources:
        tables["sources"] = _source_table(found, tokens)
    if neurons > 0:
        tables["neurons"] = _neuron_table(found, neurons)
    options = {"position": position, "sources": sources, "neurons": neurons}
    meta = provenance(model, options=options, seed=0) | {
        "logits": found.logits.tolist(),
        "tokens": tokens,
        "positions": found.positions.tolist(),
        "answers": model.tokens(found.answers.tolist()),
        "instead": None if found.instead is None else model.tokens(found.instead.tolist()),
        "notes": [*model.notes, *(_about_neurons(model) if neurons else ())],
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    return Report("attribute", tables, {}, meta)


# --- the pass -----------------------------------------------------------------------------------

Kept = dict[tuple[str, int], Tensor]
"""Activations at the read position by (site, layer); `v` whole, and of patterns one query row."""


def write_sites(model: Model) -> list[str]:
    """What is written to the stream, before any norm that stands behind it, and after where one does."""
    sites = [site for site in ("z", "mlp_out") if model.layers_with(site)]
    for layer, block in enumerate(model.spec.blocks):
        if block.attn_write is not None and not block.direct:
            sites += [f"attn_out.{layer}", f"attn_write.{layer}"]
        if block.mlp_write is not None and block.mlp_write.module != block.mlp_out:
            sites.append(f"mlp_write.{layer}")
    return sites


@torch.no_grad()
def rows_at(
    model: Model, batch: Batch, places: Tensor, sites: Sequence[str], *, attention: bool = False
) -> Kept:
    """One forward that keeps of every site the row at `places` [batch], by (site, layer).

    With `attention`: `v` whole as well, and of every pattern the query row [batch n_heads key_pos].
    """
    kept: Kept = {}
    rows, home = torch.arange(batch.size), model.device

    def row(name: str) -> Callable[[Tensor, Seen], Tensor]:
        def keep(x: Tensor, seen: Seen) -> Tensor:
            kept[name, seen.layer] = x[rows, places.to(x.device)].to(home)
            return x

        return keep

    def whole(x: Tensor, seen: Seen) -> Tensor:
        kept["v", seen.layer] = x.to(home)
        return x

    def query_row(x: Tensor, seen: Seen) -> Tensor:
        """Of a chunk of pattern rows, those that are read; keys it leaves out have weight 0."""
        key = "pattern", seen.layer
        if key not in kept:
            kept[key] = x.new_zeros(*x.shape[:2], batch.ids.shape[1], device=home)
        at = places - seen.start
        here = rows[(at >= 0) & (at < x.shape[2])]
        kept[key][here, :, : x.shape[3]] = x[here, :, at[here].to(x.device)].to(home)
        return x

    edits = [Edit.apply(site, row(site.partition(".")[0])) for site in sites]
    if attention:
        edits += [Edit.apply("v", whole), Edit.apply("pattern", query_row)]
    model.run(batch, edits=edits, logits=False)
    return kept


class Parts:
    """What heads, biases and MLPs add along a direction, filled layer by layer from `rows_at`."""

    def __init__(self, model: Model, size: int):
        n = model.n_layers
        self.model = model
        self.heads = torch.zeros(size, n, model.spec.n_heads)
        self.attn_biases, self.mlps, self.mlp_biases = (torch.zeros(size, n) for _ in range(3))
        self.neurons: dict[int, Tensor] = {}
        self.activations: dict[int, Tensor] = {}
        self.sources: dict[int, Tensor] = {}
        self.weights: dict[int, Tensor] = {}

    def add_attention(self, layer: int, kept: Kept, vector: Tensor) -> None:
        """Heads by z_h · (W_O^h d), the bias by b_O · d."""
        model, block = self.model, self.model.spec.blocks[layer]
        if block.attn_write is None:
            return
        pulled, constant = _through_norm(model, layer, "attn", kept, vector)
        z = wide(kept["z", layer])
        by_head = torch.einsum("bm,hdm->bhd", pulled.to(z.device), wide(model.W_O(layer)))
        self.heads[:, layer, : z.shape[1]] = (z * by_head).sum(-1).cpu()
        self.attn_biases[:, layer] = (_dot(model.b_O(layer), pulled) + constant).cpu()
        if ("pattern", layer) in kept:
            groups = [model.spec.kv_group(layer, head) for head in range(z.shape[1])]
            v, weights = wide(kept["v", layer])[:, :, groups], wide(kept["pattern", layer])
            found = weights * torch.einsum("bshd,bhd->bhs", v, by_head.to(v.device))
            self.sources[layer], self.weights[layer] = found.cpu(), weights.cpu()

    def add_mlp(self, layer: int, kept: Kept, vector: Tensor) -> None:
        """The MLP's write, and its neurons by a_n (W_out[n] · d)."""
        model, block = self.model, self.model.spec.blocks[layer]
        if block.mlp_write is None:
            return
        pulled, constant = _through_norm(model, layer, "mlp", kept, vector)
        self.mlps[:, layer] = (_dot(kept["mlp_out", layer], pulled) + constant).cpu()
        if ("mlp_post", layer) in kept:
            W, b = model.W_out(layer), model.b_out(layer)
            active = wide(kept["mlp_post", layer])
            self.neurons[layer] = (active * (pulled.to(W.device) @ wide(W).T)).cpu()
            self.activations[layer] = active.cpu()
            self.mlp_biases[:, layer] = (_dot(b, pulled) + constant).cpu()


def held_norm(model: Model, layer: int, kind: str, kept: Kept) -> FrozenNorm | None:
    """The norm between an "attn" or "mlp" output and the stream; None where it is written as it is."""
    if (f"{kind}_write", layer) not in kept:
        return None
    return norm_behind(
        model, layer, kind, *(kept[f"{kind}_{end}", layer] for end in ("out", "write"))
    )


def _through_norm(
    model: Model, layer: int, kind: str, kept: Kept, vector: Tensor
) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, " batch"]]:
    """The direction before the write's scale and the norm behind it, if any, and that norm's bias · d."""
    block = model.spec.blocks[layer]
    write = block.attn_write if kind == "attn" else block.mlp_write
    assert write is not None
    pulled = vector * write.scale
    if (norm := held_norm(model, layer, kind, kept)) is None:
        return pulled, torch.zeros_like(pulled[:, 0])
    return norm.pull_back(pulled, at=kept[f"{kind}_out", layer]), _dot(norm.bias, pulled)


def _dot(write: Tensor, vector: Tensor) -> Float[Tensor, " batch"]:
    return (wide(write.to(vector.device)) * vector).sum(-1)


def _uncapped(model: Model, final: Tensor, answer: Tensor, instead: Tensor | None) -> Tensor:
    """The explained logits, before a soft-cap, by the model's own norm and unembedding."""
    logits = uncapped_logits(model.spec, model.module, final)
    rows = torch.arange(len(final))
    found = wide(logits[rows, answer])
    return found if instead is None else found - wide(logits[rows, instead])


# --- tables -------------------------------------------------------------------------------------


def _component_table(model: Model, found: Contributions) -> pd.DataFrame:
    """One row for every prompt and component, prompts innermost."""
    size = len(found.logits)
    rows: list[tuple[str, int | None, int | None, Tensor]] = [
        ("embed", None, None, found.embed),
        ("constant", None, None, found.constant),
    ]
    for layer, block in enumerate(model.spec.blocks):
        if block.mlp_write is not None:
            rows.append(("mlp", layer, None, found.mlps[:, layer]))
        if block.attn_write is not None:
            heads = found.heads[:, layer].unbind(1)[: block.n_heads]
            rows += [("head", layer, head, values) for head, values in enumerate(heads)]
            rows.append(("attn_bias", layer, None, found.attn_biases[:, layer]))
    components, layers, heads, values = zip(*rows, strict=True)
    return pd.DataFrame(
        {
            "prompt": np.tile(np.arange(size), len(rows)),
            "component": np.repeat(np.array(components, dtype=object), size),
            "layer": pd.array(layers, dtype="Int64").repeat(size),
            "head": pd.array(heads, dtype="Int64").repeat(size),
            "contribution": torch.cat(list(values)).numpy(),
        }
    )


def _source_table(found: Contributions, tokens: list[list[str]]) -> pd.DataFrame:
    """One row for every prompt, head and position it could read."""
    names = np.array(tokens, dtype=object)
    tables = []
    for layer, values in found.sources.items():
        prompt, head, source = (axis.ravel() for axis in np.indices(values.shape))
        tables.append(
            pd.DataFrame(
                {
                    "prompt": prompt,
                    "layer": layer,
                    "head": head,
                    "source": source,
                    "token": names[prompt, source],
                    "weight": found.weights[layer].flatten().numpy(),
                    "contribution": values.flatten().numpy(),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def _neuron_table(found: Contributions, k: int) -> pd.DataFrame:
    """The k neurons of each prompt with the largest contributions of either sign, strongest first."""
    columns = ["prompt", "layer", "neuron", "contribution", "activation"]
    kept: list[tuple[Tensor, ...]] = []
    for layer, values in found.neurons.items():
        best = values.abs().topk(min(k, values.shape[1]), dim=1).indices
        layers = torch.full_like(best, layer)
        active = found.activations[layer].gather(1, best)
        kept.append((layers, best, values.gather(1, best), active))
    if not kept:
        return pd.DataFrame(columns=columns)
    layers, neurons, values, active = (torch.cat(parts, dim=1) for parts in zip(*kept, strict=True))
    order = values.abs().argsort(dim=1, descending=True, stable=True)[:, :k]
    prompts = torch.arange(len(values))[:, None].expand_as(order)
    fields = [prompts, *(x.gather(1, order) for x in (layers, neurons, values, active))]
    return pd.DataFrame({n: x.flatten().numpy() for n, x in zip(columns, fields, strict=True)})


def _about_neurons(model: Model) -> list[str]:
    """What to say where MLPs cannot be taken apart."""
    if reason := model.spec.refused.get("mlp_post"):
        whole = any(block.mlp_write is not None for block in model.spec.blocks)
        return [f"{'MLPs are given whole, no' if whole else 'No'} neurons are named: {reason}."]
    having = model.layers_with("mlp_post")
    without = [
        layer
        for layer, block in enumerate(model.spec.blocks)
        if block.mlp_write is not None and layer not in having
    ]
    return (
        [f"The MLPs of layers {ranges(without)} are given whole: they have no neurons to name."]
        if without
        else []
    )
