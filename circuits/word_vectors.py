"""What heads and neurons write and look for at one position, each as a vector in the residual stream.

A query is compared with a key after rotary positions, in the key head that its group shares. So the
direction that query q_i looks for *at position j* is the gradient of its score q_i · k_j along the
stream at j, through the block's own key projection, with the scale of every norm on the way held
fixed. Its dot product with that residual is the score, up to biases. Nothing here knows how a model
positions or groups its heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution import Kept, held_norm, rows_at, write_sites
from circuits.held_norms import NormCall, RecordedNorms, norms_held
from interp.devices import wide
from interp.direction import places_of
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.unembedding import Unembedding

NEEDED = ("q", "k", "v", "z", "pattern", "attn_out", "attn_write")


@dataclass(frozen=True, eq=False)
class HeadVectors:
    """All heads of one layer at one position of each prompt.

    Attributes:
        sources: j, the position each head takes most from. weights: A[i, j].
        vectors: by "output", "value", "query", "key": in the residual stream. Queries and keys are
            missing where k or q does not depend on the layer's input (keys shared between layers).
        scores: q_i · k_j, before scaling and masks.
    """

    sources: Int[Tensor, "batch n_heads"]
    weights: Float[Tensor, "batch n_heads"]
    scores: Float[Tensor, "batch n_heads"]
    vectors: dict[str, Float[Tensor, "batch n_heads d_model"]]


@dataclass(frozen=True, eq=False)
class Neuron:
    """One neuron at one position of one prompt: its value, ‖a W_out‖, and its vectors in the stream."""

    prompt: int
    layer: int
    index: int
    activation: float
    norm: float
    vectors: dict[str, Float[Tensor, " d_model"]]


@dataclass(frozen=True, eq=False)
class WordVectors:
    """What `words` reads: heads by layer, neurons strongest first within a prompt, norms in order.

    `final`: the final residual [batch d_model]. `positions`: the read one of each prompt in the batch.
    """

    batch: Batch
    positions: Int[Tensor, " batch"]
    heads: dict[int, HeadVectors]
    neurons: list[Neuron]
    norms: list[NormCall]
    final: Float[Tensor, "batch d_model"]
    notes: list[str] = field(default_factory=list)


def word_vectors(
    model: Model,
    prompt: Batch | Tensor | str | Sequence[str],
    *,
    position: int = -1,
    neurons: int = 20,
) -> WordVectors:
    """Every vector that `words` reads, as tensors in the residual stream.

    See `words` for what they are, Args and Raises.

    >>> model, ids = tiny_model(), torch.tensor([[5, 6, 7]])
    >>> heads = word_vectors(model, ids).heads[1]
    >>> pre = model.run(ids, capture=["resid_pre.1"], logits=False).cache["resid_pre.1"]
    >>> at_source = pre[0, heads.sources[0]]
    >>> score = (heads.vectors["query"][0] * at_source).sum(-1)
    >>> torch.allclose(score, heads.scores[0], atol=1e-4)  # this model has no biases
    True
    """
    model.require_sum("word vectors")
    for site in NEEDED:
        model.layers_with(site)
    Unembedding(model)
    batch = model.as_batch(prompt)
    places = places_of(batch, position)
    notes = []
    with_neurons = neurons > 0 and "mlp_post" not in model.spec.refused
    if neurons > 0 and not with_neurons:
        notes.append(f"No neurons are named: {model.spec.refused['mlp_post']}.")
    with_mlps = not {"mlp_out", "mlp_write"} & set(model.spec.refused)
    last = model.n_layers - 1
    streams = ["resid_pre", f"resid_post.{last}", *(["mlp_post"] if with_neurons else [])]
    streams += [] if "resid_mid" in model.spec.refused else ["resid_mid"]
    writes = [site for site in write_sites(model) if with_mlps or not site.startswith("mlp")]
    writes += [] if "attn_out" in writes else ["attn_out"]
    kept = rows_at(model, batch, places, [*streams, *writes], attention=True)

    recorded = RecordedNorms(batch, places)
    graph_sites = ["resid_pre", "q", "k"]
    graph_sites += [site for site in ("mlp_post", "resid_mid") if site in streams]
    with norms_held(model, recorded), torch.enable_grad():
        run = model.run(batch, capture=graph_sites, grad=True, logits=False)
    heads = {
        layer: _head_vectors(model, run, layer, kept, places)
        for layer in model.spec.attention_layers
        if model.spec.blocks[layer].attn_write is not None
    }
    if unread := [n for n, found in heads.items() if "query" not in found.vectors]:
        notes.append(f"Queries and keys of layers {unread} do not come from the layer's own input.")
    found = _neurons(model, run, kept, places, neurons) if with_neurons else []
    return WordVectors(
        batch, places, heads, found, recorded.calls(model, kept), kept["resid_post", last], notes
    )


def _head_vectors(model: Model, run: Run, layer: int, kept: Kept, places: Tensor) -> HeadVectors:
    """Outputs and values by W_O, queries and keys by the gradient of the score."""
    z, v = wide(kept["z", layer]), wide(kept["v", layer])
    size, n_heads, _ = z.shape
    groups = [model.spec.kv_group(layer, head) for head in range(n_heads)]
    W, shrink = _written(model, layer, "attn", kept, wide(model.W_O(layer)))
    gram = W @ W.transpose(-1, -2)
    of_heads = v[:, :, groups]
    sizes = torch.einsum("bshd,hde,bshe->bhs", of_heads, gram, of_heads).clamp_min(0).sqrt()
    taken = wide(kept["pattern", layer]) * sizes
    source = taken.argmax(-1)
    rows = torch.arange(size)[:, None]
    value = of_heads[rows, source, torch.arange(n_heads)]
    vectors = {
        "output": torch.einsum("bhd,hdm->bhm", z, W) * shrink[:, None],
        "value": torch.einsum("bhd,hdm->bhm", value, W) * shrink[:, None],
    }
    q = run.cache[f"q.{layer}"][rows[:, 0], places]
    k = run.cache[f"k.{layer}"][rows, source][rows, torch.arange(n_heads), groups]
    pre = run.cache[f"resid_pre.{layer}"]
    query, key = (
        torch.zeros(size, n_heads, pre.shape[-1]),
        torch.zeros(size, n_heads, pre.shape[-1]),
    )
    seen = True
    for head in range(n_heads):
        at_source = _gradient((q[:, head].detach() * k[:, head]).sum(), pre)
        at_query = _gradient((q[:, head] * k[:, head].detach()).sum(), pre)
        if at_source is None or at_query is None:
            seen = False
            break
        query[:, head] = wide(at_source[rows[:, 0], source[:, head]]).cpu()
        key[:, head] = wide(at_query[rows[:, 0], places]).cpu()
    if seen:
        vectors |= {"query": query, "key": key}
    return HeadVectors(
        source.cpu(),
        wide(kept["pattern", layer].gather(-1, source[..., None])[..., 0]).cpu(),
        wide((q * k).sum(-1).detach()).cpu(),
        {what: x.detach().cpu() for what, x in vectors.items()},
    )


def _gradient(target: Tensor, at: Tensor) -> Tensor | None:
    if not target.requires_grad:
        return None
    return torch.autograd.grad(target, at, retain_graph=True, allow_unused=True)[0]


def _written(
    model: Model, layer: int, kind: str, kept: Kept, W: Float[Tensor, "*parts d_model"]
) -> tuple[Float[Tensor, "*parts d_model"], Float[Tensor, "batch 1"]]:
    """(W', s) with s · x W' what reaches the stream of x W, a norm behind it held at its scale."""
    block = model.spec.blocks[layer]
    write = block.attn_write if kind == "attn" else block.mlp_write
    assert write is not None
    shrink = torch.full((len(kept[f"{kind}_out", layer]), 1), write.scale)
    if (norm := held_norm(model, layer, kind, kept)) is None:
        return W, shrink.to(W.device)
    W = norm.centre(W) * wide(norm.gain.to(W.device))
    return W, shrink.to(W.device) / norm.scale(kept[f"{kind}_out", layer]).to(W.device)


@dataclass(frozen=True)
class _Strong:
    """A neuron that is named: its prompt, layer, index, value and ‖a W_out‖."""

    prompt: int
    layer: int
    index: int
    activation: float
    norm: float


def _neurons(model: Model, run: Run, kept: Kept, places: Tensor, count: int) -> list[Neuron]:
    """The `count` neurons of each prompt that write most, with what they write and what excites them."""
    candidates: list[_Strong] = []
    written: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in model.layers_with("mlp_post"):
        block = model.spec.blocks[layer]
        if block.mlp_write is None:
            continue
        W, shrink = _written(model, layer, "mlp", kept, wide(model.W_out(layer)))
        written[layer] = W, shrink
        active = wide(kept["mlp_post", layer])
        size = active.abs() * W.norm(dim=-1) * shrink.abs()
        best = size.topk(min(count, size.shape[1]), dim=1)
        for prompt, indices in enumerate(best.indices.tolist()):
            candidates += [
                _Strong(prompt, layer, i, float(active[prompt, i]), float(norm))
                for i, norm in zip(indices, best.values[prompt].tolist(), strict=True)
            ]
    found = []
    for prompt in range(run.batch.size):
        own = sorted((c for c in candidates if c.prompt == prompt), key=lambda c: -c.norm)[:count]
        for strong in own:
            W, shrink = written[strong.layer]
            write = (strong.activation * W[strong.index] * shrink[prompt]).detach().cpu()
            vectors = {"up": write, "down": -write}
            key = _excitation(model, run, strong, int(places[prompt]))
            if key is not None:
                vectors["key"] = key
            found.append(
                Neuron(prompt, strong.layer, strong.index, strong.activation, strong.norm, vectors)
            )
    return found


def _excitation(
    model: Model, run: Run, neuron: _Strong, place: int
) -> Float[Tensor, " d_model"] | None:
    """The gradient of a neuron's activation along what its MLP reads of the stream."""
    site = "resid_mid" if neuron.layer in run.cache.layers("resid_mid") else "resid_pre"
    target = run.cache[f"mlp_post.{neuron.layer}"][neuron.prompt, place, neuron.index]
    gradient = _gradient(target, run.cache[f"{site}.{neuron.layer}"])
    found = None if gradient is None else wide(gradient[neuron.prompt, place]).cpu()
    return None if found is None or not bool(found.any()) else found
