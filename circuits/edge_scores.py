"""What corrupting each edge of the computational graph does to a metric, estimated for all edges at once.

    score[s, r] = Σ_positions (corrupted write − clean write of sender s) · g_r, averaged over pairs

with g_r the gradient of the metric with respect to the residual stream that receiver r alone reads. It
estimates metric(edge corrupted) − metric(clean): an edge that the answer needs has a *negative* score
under logit_diff. `importance` turns that into a share of the gap between clean and corrupted, positive
where the answer needs the edge, whatever the metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.edge_gradients import Gradients
from circuits.graph import Graph, Scores
from circuits.measure import Measure
from circuits.passes import Parts, Side, Task, run_pass
from interp.errors import BadInput, unknown
from interp.run.edits import Edit
from interp.run.resume import Checkpoint

METHODS = {
    "eap-ig": "gradients averaged on the way from corrupted to clean embeddings (Hanna et al. 2024)",
    "eap": "gradients at the clean prompts (Syed et al. 2023)",
    "eap-ig-activations": "the sender's own write moved from corrupted to clean (Hanna et al. 2024)",
    "atp": "scores of nodes, the softmax taken exactly for q and k (Kramár et al. 2024); an edge has the "
    "score of its weaker end",
}
PLAIN = ("eap", "eap-ig")
"""Methods that the plain engine has too."""


def check_method(method: str, steps: int, *, naive: bool = False) -> None:
    """BadInput for a method that is not there, or not with the plain engine, and for too few steps."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if steps < 1:
        raise BadInput(f"steps={steps}: give at least 1")
    if naive and method not in PLAIN:
        raise BadInput(f"naive=True is there for {' and '.join(PLAIN)}, not for '{method}'")


def input_scores(task: Task, side: Side, *, steps: int | None) -> Scores:
    """EAP (`steps=None`: gradients at the clean prompts) or EAP-IG over the embeddings, Σ over pairs.

    EAP-IG averages the gradients at embeddings corrupted + α (clean − corrupted), α = 0 … (m − 1)/m.
    """
    gradients = Gradients(task.parts)
    start, end = side.corrupted.embed, side.clean.embed
    for alpha in [1.0] if steps is None else [step / steps for step in range(steps)]:
        at = (start + alpha * (end - start)).requires_grad_()
        seen = run_pass(
            task.parts, side.pairs.clean_batch, edits=[Edit.patch("embed", at)], grad=True
        )
        gradients.add(seen, lambda logits: task.metric(side, logits))
        del seen
    difference = side.corrupted.less(side.clean, task.parts.graph, task.parts.writers)
    return gradients.scores(difference) / (1 if steps is None else steps)


def activation_scores(
    task: Task, side: Side, *, steps: int, units: Checkpoint, advance: Callable[[int], None]
) -> Scores:
    """EAP-IG over each sender's own write, Σ over pairs: one integral for each embedding, layer's heads
    together, and MLP, on otherwise clean prompts.

    The scores of such a group sum to what corrupting the whole group does to the metric, up to the
    error of the sum of `steps` terms.
    """
    parts = task.parts
    difference = side.corrupted.less(side.clean, parts.graph, parts.writers)
    total = torch.zeros(parts.graph.shape)
    for site, rows, first in _groups(parts):

        def unit(site: str = site, rows: slice = rows, first: int = first) -> dict[str, np.ndarray]:
            moved = difference[rows].sum(0)
            gradients = Gradients(parts, first=first)
            for step in range(steps):
                edit = Edit.add(site, (1 - step / steps) * moved)
                seen = run_pass(parts, side.pairs.clean_batch, edits=[edit], grad=True)
                gradients.add(seen, lambda logits: task.metric(side, logits))
                del seen
            scores = gradients.scores(difference[rows], first_row=rows.start) / steps
            return {"scores": scores[rows].numpy()}

        name = f"pairs {side.rows.start} {site}"
        total[rows] = torch.from_numpy(units.compute(name, unit)["scores"])
        advance(1)
    return total


def _groups(parts: Parts) -> Iterator[tuple[str, slice, int]]:
    """(site, rows, first layer that reads it) of what is moved together."""
    yield "embed", slice(0, 1), 0
    for layer, block in enumerate(parts.model.spec.blocks):
        rows = parts.graph.rows(layer)
        mlp = int(block.mlp_write is not None and rows.stop > rows.start)
        if layer in parts.writers:
            first = layer + 1 if block.parallel or not mlp else layer
            yield f"attn_write.{layer}", slice(rows.start, rows.stop - mlp), first
        if mlp:
            yield f"mlp_write.{layer}", slice(rows.stop - 1, rows.stop), layer + 1


def node_effects(
    task: Task, side: Side
) -> tuple[Float[Tensor, " n_senders"], Float[Tensor, " n_receivers"]]:
    """AtP: first-order effect on the metric of corrupting each node, Σ over pairs.

    A sender's effect is Δz · ∂metric/∂z (write for embedding and MLPs), at the clean prompts. For q, k
    and v of a head, Δz is computed exactly: the head's own z where that q (k, v), at all positions, is the
    corrupted run's, everything else clean; a saturated softmax, where the plain gradient of q and k is
    zero, does not hide them. The logits' entry is infinite: they are always in.
    """
    parts, model = task.parts, task.parts.model
    graph, clean = parts.graph, side.pairs.clean_batch
    seen = run_pass(parts, clean, grad=True, capture=("embed",))
    assert seen.run is not None and seen.run.logits is not None
    value = task.metric(side, seen.run.logits[:, -1].float()).sum()
    mlps = list(side.clean.mlp)
    heads = list(parts.writers)
    targets = [seen["embed"], *(seen[f"mlp_write.{layer}"] for layer in mlps)]
    targets += [seen.heads[layer].out for layer in heads]
    found = torch.autograd.grad(value, targets, allow_unused=True)
    grads = [
        torch.zeros_like(x) if g is None else g.float() for x, g in zip(targets, found, strict=True)
    ]
    by_mlp = dict(zip(mlps, grads[1 : 1 + len(mlps)], strict=True))
    by_head = dict(zip(heads, grads[1 + len(mlps) :], strict=True))
    base = {f"resid_pre.{layer}": seen[f"resid_pre.{layer}"].detach() for layer in heads}
    del seen, value, targets

    senders, receivers = torch.zeros(graph.shape[0]), torch.full((graph.shape[1],), torch.inf)
    senders[0] = float((grads[0] * (side.corrupted.embed - side.clean.embed)).sum())
    for layer, grad in by_mlp.items():
        effect = float((grad * (side.corrupted.mlp[layer] - side.clean.mlp[layer])).sum())
        senders[graph.rows(layer).stop - 1] = effect
        receivers[graph.columns(layer).stop - 1] = effect
    for layer, grad in by_head.items():
        effects = (grad * (side.corrupted.z[layer] - side.clean.z[layer]).float()).sum((0, 1, 3))
        first = graph.rows(layer).start
        senders[first : first + len(effects)] = effects.cpu()
    kept = [
        Edit.patch(site, x) for site, x in base.items()
    ]  # nothing replaced reaches another layer
    corrupted = model.run(side.pairs.corrupted_batch, capture=["q", "k", "v"], logits=False).cache
    for i, kind in enumerate("qkv"):
        edits = [*kept, Edit.patch(kind, corrupted.by_layer(kind))]
        made = model.run(clean, capture=["z"], edits=edits, logits=False).cache
        for layer, grad in by_head.items():
            effects = (grad * (made[f"z.{layer}"] - side.clean.z[layer]).float()).sum((0, 1, 3))
            first = graph.columns(layer).start + i * len(effects)
            receivers[first : first + len(effects)] = effects.cpu()
    return senders, receivers


def weaker_end(graph: Graph, senders: Tensor, receivers: Tensor) -> Scores:
    """Scores of nodes as scores of edges: each edge has the score of its end of smaller magnitude.

    The n highest edges are then those among the highest nodes.
    """
    smaller = senders.abs()[:, None] <= receivers.abs()
    return torch.where(smaller, senders[:, None], receivers) * graph.allowed


def atp(
    task: Task, units: Checkpoint, advance: Callable[[int], None] = lambda done: None
) -> tuple[Tensor, Tensor]:
    """`node_effects` of all pairs, mean: scores of senders and of receivers."""
    totals = torch.zeros(task.parts.graph.shape[0]), torch.zeros(task.parts.graph.shape[1])
    for side in task.sides:

        def unit(side: Side = side) -> dict[str, np.ndarray]:
            senders, receivers = node_effects(task, side)
            return {"senders": senders.numpy(), "receivers": receivers.numpy()}

        found = units.compute(f"nodes of pairs {side.rows.start}", unit)
        for total, name in zip(totals, ("senders", "receivers"), strict=True):
            total += torch.from_numpy(found[name])
        advance(1)
    return totals[0] / len(task.pairs), totals[1] / len(task.pairs)


def score_edges(
    task: Task,
    method: str = "eap-ig",
    *,
    steps: int = 5,
    units: Checkpoint | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Effect on the metric of corrupting each edge [n_senders n_receivers], mean over the task's pairs.

    Args:
        task: from `task_of`. method: one of METHODS. steps: of the integral.
        units: finished portions, for long methods. advance: called with portions just done.

    >>> from circuits.passes import task_of
    >>> from interp.data.pairs import Pairs
    >>> model = tiny_model()
    >>> pairs = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4])
    >>> task = task_of(Parts.of(model), pairs)
    >>> scores = score_edges(task, "eap-ig", steps=64)
    >>> gap = float(task.measure.corrupted.mean() - task.measure.clean.mean())
    >>> abs(float(scores[0].sum()) - gap) < 0.05 * abs(gap)  # complete over the embedding's edges
    True
    """
    check_method(method, steps)
    units = Checkpoint() if units is None else units
    if method == "atp":
        return weaker_end(task.parts.graph, *atp(task, units, advance))
    total = torch.zeros(task.parts.graph.shape)
    for side in task.sides:
        if method == "eap-ig-activations":
            total += activation_scores(task, side, steps=steps, units=units, advance=advance)
            continue

        def unit(side: Side = side) -> dict[str, np.ndarray]:
            found = input_scores(task, side, steps=None if method == "eap" else steps)
            return {"scores": found.numpy()}

        total += torch.from_numpy(units.compute(f"pairs {side.rows.start}", unit)["scores"])
        advance(1)
    return total / len(task.pairs)


def n_units(task: Task, method: str) -> int:
    """How many portions `score_edges` tells of."""
    return len(task.sides) * (
        len(list(_groups(task.parts))) if method == "eap-ig-activations" else 1
    )


def importance(scores: Tensor, measured: Measure) -> Tensor:
    """Scores as shares of the metric's gap between clean and corrupted; positive: the answer needs it."""
    return -scores / float(measured.clean.mean() - measured.corrupted.mean())
