"""What the heads and neurons on a route are called, and what they say: their shares and their words."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.flow_parts import (
    ELEMENTS,
    Columns,
    attention_parts,
    check_sum,
    proximity,
    through_norm,
)
from interp.devices import wide
from interp.models.model import Model
from interp.run.cache import Run

FFN_PLACES, NEURONS = 64, 5
"""FFN edges of a route that are split into neurons, strongest first, and neurons kept of each."""
READ, WORDS = 200, 5
"""Head parts, and neurons, that are read as words, strongest first, and words of each."""
NEURON_COLUMNS = {
    **dict.fromkeys(["layer", "position", "neuron"], int),
    **dict.fromkeys(["activation", "weight", "through"], float),
}
WORD_PLACE = ["layer", "position", "source_position", "index"]


@torch.no_grad()
def route_neurons(
    model: Model, run: Run, edges: pd.DataFrame, *, top: int = NEURONS, places: int = FFN_PLACES
) -> pd.DataFrame:
    """The neurons that made most of the FFN edges on a route, by proximity.

    Whole: what the block leaves (resid_post); parts: act_n W_out[n] of every neuron, the bias, and all
    that was there before the MLP wrote. weight = π_n / Σ π, as published. Activations can be large and
    cancel: a neuron's weight says how much of the sum lies along it, not that it was needed.

    Args:
        run: with `mlp_post` and `mlp_out` captured beside `SITES`, of one prompt.
        edges: of a FlowGraph. top: neurons kept of each FFN edge. places: how many FFN edges are
            split, those with the most `through` first; each costs d_mlp × d_model.

    Returns: one row a neuron: layer, position, neuron, activation (with a norm's 1/σ after the MLP),
        weight, through (weight times the share of the chosen token that passes the position).

    >>> from circuits.flow import flow_graph
    >>> from circuits.flow_parts import SITES
    >>> model, sites = tiny_model(), [*SITES, "mlp_post", "mlp_out"]
    >>> run = model.run(torch.tensor([[5, 6, 7]]), capture=sites, logits=False)
    >>> found = route_neurons(model, run, flow_graph(model, run, mass=1.0).edges, top=48)
    >>> bool(found.groupby(["layer", "position"])["weight"].sum().lt(1).all())
    True

    Source: Tufanov et al. 2024 (LM Transparency Tool).
    """
    into = edges.loc[(edges["kind"] == "mlp") & edges["layer"].isin(neuron_layers(model))]
    into = into.sort_values(by="through", ascending=False, kind="stable").iloc[:places]
    found = Columns(NEURON_COLUMNS)
    for layer, group in into.groupby("layer"):
        rows = group["position"].to_numpy()
        reached = (group["through"] / group["weight"]).to_numpy()
        acts, W, bias, whole, rest = _neuron_parts(model, run, int(str(layer)), rows.tolist())
        other = proximity(rest, whole)
        if bool(bias.any()):
            other = other + proximity(bias, whole)
        for i, position in enumerate(rows):
            near = _neuron_proximity(acts[i], W, whole[i])
            best = near.topk(min(top, len(near)))
            weight = (best.values / (near.sum() + other[i])).cpu().double().numpy()
            n = len(weight)
            found.add(
                {
                    "layer": np.full(n, layer),
                    "position": np.full(n, position),
                    "neuron": best.indices.cpu().numpy(),
                    "activation": acts[i][best.indices].cpu().double().numpy(),
                    "weight": weight,
                    "through": weight * reached[i],
                }
            )
    return found.table().sort_values(
        by=["layer", "position", "weight"],
        ascending=[False, True, False],
        ignore_index=True,
        kind="stable",
    )


def neuron_layers(model: Model) -> list[int]:
    """Layers whose neurons are seen; none where the model shows none."""
    return [] if "mlp_post" in model.spec.refused else model.layers_with("mlp_post")


def _neuron_parts(
    model: Model, run: Run, layer: int, rows: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """acts [n d_mlp], W [d_mlp d_model], bias [n d_model] of the MLP's write; whole and rest [n d_model].

    Activations include 1/σ of a norm after the MLP, W its gain.
    """
    block, cache = model.spec.blocks[layer], run.cache
    write = block.mlp_write
    assert write is not None and block.W_out is not None
    norm = None if write.module == block.mlp_out else write.module
    out = cache[f"mlp_out.{layer}"][0, rows].detach()
    W, b = wide(model.W_out(layer).detach()), wide(model.b_out(layer).detach())
    shrink, W, bias = through_norm(model, norm, out, W, b, write.scale)
    acts = wide(cache[f"mlp_post.{layer}"][0, rows].detach()) * shrink
    whole = wide(cache[f"resid_post.{layer}"][0, rows].detach())
    written = wide(cache[f"mlp_write.{layer}"][0, rows].detach())
    check_sum(model, layer, "the MLP", acts @ W + bias, written, norm)
    return acts, W, bias, whole, whole - written


def _neuron_proximity(acts: Tensor, W: Tensor, whole: Tensor) -> Float[Tensor, " d_mlp"]:
    step = max(1, ELEMENTS // W.shape[1])
    chunks = zip(acts.split(step), W.split(step), strict=True)
    return torch.cat([proximity(act[:, None] * rows, whole) for act, rows in chunks])


@torch.no_grad()
def route_words(
    model: Model,
    run: Run,
    position: int,
    heads: pd.DataFrame,
    neurons: pd.DataFrame,
    *,
    strongest: int = READ,
    top_k: int = WORDS,
) -> pd.DataFrame:
    """The tokens that the heads and neurons of a route would raise most, each by how many logits.

    A part p of the residual stream is read as norm(p) W_U with the final norm's scale held at the
    chosen token's last residual: what it adds to the logits if nothing after it changes it. Parts at
    other positions or in early layers are read by other heads and MLPs first; for those, the words
    say which way the vector points, not what it does.

    Args:
        position: the chosen token. heads: of a FlowGraph. neurons: from `route_neurons`.
        strongest: how many of each are read, those with the most `through`.

    Returns: one row a word: kind ("head", "neuron"), layer, position, source_position (−1: a neuron),
        index (head or neuron), rank, token, logit.

    Raises: Refused where the model cannot be unembedded.

    >>> from circuits.flow import information_flow
    >>> words = information_flow(tiny_model(), [5, 6, 7]).tables["flow_words"]
    >>> bool(words.query("rank == 0")["logit"].gt(0).all())
    True

    Source: Geva et al. 2021 for neurons, Elhage et al. 2021 for heads.
    """
    tables = {"head": heads.rename(columns={"head": "index"})}
    tables["neuron"] = neurons.rename(columns={"neuron": "index"}).assign(source_position=-1)
    found = []
    for kind, table in tables.items():
        best = table.sort_values(by="through", ascending=False, kind="stable").iloc[:strongest]
        if not len(best):
            continue
        vectors = torch.cat(
            [
                _part_vectors(model, run, kind, int(str(layer)), some)
                for layer, some in best.groupby("layer", sort=False)
            ]
        )
        ids, logits = _raised(model, run, position, vectors, top_k)
        rows = pd.concat([some for _, some in best.groupby("layer", sort=False)])
        k = ids.shape[1]
        table = rows[WORD_PLACE].loc[rows.index.repeat(k)].reset_index(drop=True)
        table.insert(0, "kind", kind)
        found.append(
            table.assign(
                rank=np.tile(np.arange(k), len(rows)),
                token=model.tokens(ids.flatten().tolist()),
                logit=logits.flatten().double().numpy(),
            )
        )
    if not found:
        return pd.DataFrame(columns=["kind", *WORD_PLACE, "rank", "token", "logit"])
    return pd.concat(found, ignore_index=True)


def _part_vectors(
    model: Model, run: Run, kind: str, layer: int, table: pd.DataFrame
) -> Float[Tensor, "parts d_model"]:
    """The parts of one layer that the rows of a table name."""
    at = {name: table[name].tolist() for name in ("position", "source_position", "index")}
    if kind == "neuron":
        acts, W, *_ = _neuron_parts(model, run, layer, at["position"])
        return acts[range(len(acts)), at["index"]][:, None] * W[at["index"]]
    weights, v, W_O, _ = attention_parts(model, run, layer)
    A = weights[at["index"], at["position"], at["source_position"]]
    u = torch.einsum("pd,pdm->pm", v[at["index"], at["source_position"]], W_O[at["index"]])
    return A[:, None] * u


def _raised(
    model: Model, run: Run, position: int, vectors: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """ids and logits [parts top_k] of what each vector adds, largest first, on the CPU."""
    norm, W_U = model.final_norm, wide(model.W_U)
    final = run.cache[f"resid_post.{model.n_layers - 1}"][0, position].detach()
    gain = wide(norm.gain.to(vectors.device))
    read = norm.centre(vectors) * gain / norm.scale(final) * model.spec.logit_scale
    step = max(1, ELEMENTS // W_U.shape[1])
    best = [(part @ W_U).topk(min(top_k, W_U.shape[1])) for part in read.split(step)]
    return torch.cat([b.indices for b in best]).cpu(), torch.cat([b.values for b in best]).cpu()
