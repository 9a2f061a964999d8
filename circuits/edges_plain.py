"""The plain engines behind `naive=True`: one receiver at a time, full forwards, public edits only.

Nothing here shares a shortcut with `circuits.edge_scores` or `circuits.edge_replay`: a receiver's gradient is
autograd's, from a forward in which that receiver alone reads a residual stream of its own, and an edge
circuit is run by computing every q, k, v and MLP in a forward of its own. Slow; the fast engines must
agree with it, and models whose parts they cannot tell apart are served by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph import Circuit, Graph, Receiver, Scores, Sender
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.run.edits import Edit

Metric = Callable[[Float[Tensor, "batch d_vocab"]], Float[Tensor, " batch"]]
"""A number for each prompt from its logits at the last position."""


def last_position(batch: Batch) -> Tensor:
    """The position whose logits are read."""
    return torch.tensor([batch.ids.shape[1] - 1])


def mlp_input(model: Model, layer: int) -> str:
    """The site that the MLP of a layer reads."""
    block = model.spec.blocks[layer]
    after = block.attn_write is not None and not block.parallel
    return f"resid_mid.{layer}" if after else f"resid_pre.{layer}"


def sender_writes(
    model: Model, graph: Graph, batch: Batch, edits: Sequence[Edit] = ()
) -> Float[Tensor, "n_senders batch pos d_model"]:
    """What every sender adds to the residual stream in one run.

    A head's part of a normed attention output is formed with the norm's scale held at the run's own.
    """
    sites = ["embed", "z", "attn_out", "mlp_write"]
    sites = [site for site in sites if site == "embed" or model.layers_with(site)]
    run = model.run(batch, capture=sites, edits=edits, logits=False)
    writes = []
    for kind, layer, head in graph.senders:
        if kind == "embed":
            writes.append(run.cache["embed"])
        elif kind == "mlp":
            writes.append(run.cache[f"mlp_write.{layer}"])
        else:
            writes.append(_head_write(model, run, layer, head))
    return torch.stack([write.detach().float() for write in writes])


def _head_write(model: Model, run: Run, layer: int, head: int) -> Tensor:
    block = model.spec.blocks[layer]
    assert block.attn_write is not None
    own = run.cache[f"z.{layer}.{head}"].float() @ model.W_O(layer)[head].float()
    if not block.direct:
        norm = model.norm(block.attn_write.module)
        out = run.cache[f"attn_out.{layer}"].float()
        z = run.cache[f"z.{layer}"].float()
        bias = out - torch.einsum("bphd,hdm->bpm", z, model.W_O(layer).float())
        own = norm.gain * norm.centre(own + bias / block.n_heads) / norm.scale(out)
    return own * block.attn_write.scale


def receiver_gradient(
    model: Model, batch: Batch, receiver: Receiver, metric: Metric, edits: Sequence[Edit] = ()
) -> Float[Tensor, "batch pos d_model"]:
    """d Σ metric / d the residual stream that this receiver alone reads, in the run with `edits`."""
    kind, layer, head = receiver
    site = mlp_input(model, layer) if kind == "mlp" else f"resid_pre.{layer}"
    if kind == "logits":
        site = f"resid_post.{layer - 1}"
    here = model.run(batch, capture=[site], edits=edits, logits=False).cache[site]
    x = here.detach().clone().requires_grad_()
    put = Edit.patch(site, x)

    def with_x(capture: str) -> Tensor:
        run = model.run(batch, capture=[capture], edits=[*edits, put], logits=False, grad=True)
        return run.cache[capture]

    if kind == "logits":
        last = put
    elif kind == "mlp":
        last = Edit.patch(f"mlp_write.{layer}", with_x(f"mlp_write.{layer}"))
    else:
        if kind == "q":
            change = Edit.patch(f"q.{layer}.{head}", with_x(f"q.{layer}"))
        else:
            group = model.spec.kv_group(layer, head)
            change = Edit.patch(f"{kind}.{layer}.{group}", with_x(f"{kind}.{layer}"))
        # The heads of a group share k and v: let this head alone see the change, through its z.
        attended = model.run(
            batch, capture=[f"z.{layer}"], edits=[*edits, change], logits=False, grad=True
        )
        last = Edit.patch(f"z.{layer}.{head}", attended.cache[f"z.{layer}"])
    run = model.run(batch, edits=[*edits, last], logits=last_position(batch), grad=True)
    assert run.logits is not None
    (grad,) = torch.autograd.grad(metric(run.logits[:, -1].float()).sum(), x)
    return grad.float()


def plain_edge_scores(
    model: Model,
    graph: Graph,
    clean: Batch,
    corrupted: Batch,
    metric: Metric,
    *,
    alphas: Sequence[float],
    receivers: Sequence[int] | None = None,
) -> Scores:
    """(corrupted − clean write) · mean over α of the receiver's gradient, at embeddings a share α of the
    way from corrupted to clean; the mean over prompts. Columns not in `receivers` are left 0.
    """
    ends = [
        model.run(batch, capture=["embed"], logits=False).cache["embed"]
        for batch in (corrupted, clean)
    ]
    difference = sender_writes(model, graph, corrupted) - sender_writes(model, graph, clean)
    scores = torch.zeros(graph.shape)
    for column in range(graph.shape[1]) if receivers is None else receivers:
        for alpha in alphas:
            embed = Edit.patch("embed", ends[0] + alpha * (ends[1] - ends[0]))
            grad = receiver_gradient(model, clean, graph.receivers[column], metric, [embed])
            effect = torch.einsum("sbpm,bpm->s", difference, grad).cpu()
            scores[:, column] += effect / (len(alphas) * clean.size)
    return scores * graph.allowed


@dataclass(frozen=True)
class PlainState:
    """What the plain circuit run knows of the corrupted (or ablated) side.

    writes: every sender's write there [n_senders batch pos d_model]; stream: the residual stream that
    each receiver would read there, by site.
    """

    writes: Tensor
    stream: dict[str, Tensor]


def plain_circuit_logits(
    model: Model, graph: Graph, circuit: Circuit, clean: Batch, other: PlainState
) -> Float[Tensor, "batch d_vocab"]:
    """Logits at the last position when every receiver reads

        x_r = stream_other + Σ_s circuit[s, r] (write_s − other write_s)

    with write_s the sender's current write, computed from what it read itself.
    """
    change = torch.zeros_like(other.writes)  # current write − the other side's
    embed = model.run(clean, capture=["embed"], logits=False).cache["embed"].float()
    change[0] = embed - other.writes[0]

    def reads(column: int, site: str) -> Edit:
        chosen = circuit[:, column].to(change)
        x = other.stream[site] + torch.einsum("s,sbpm->bpm", chosen, change)
        return Edit.patch(site, x.to(model.dtype))

    for layer, block in enumerate(model.spec.blocks):
        site = f"resid_pre.{layer}"
        heads = [s.head for s in graph.senders if s.kind == "head" and s.layer == layer]
        zs = []
        for head in heads:
            group, changes = model.spec.kv_group(layer, head), []
            for kind in "qkv":
                edit = reads(graph.receiver(f"{layer}.{head}.{kind}"), site)
                value = model.run(clean, capture=[f"{kind}.{layer}"], edits=[edit], logits=False)
                place = head if kind == "q" else group
                changes.append(
                    Edit.patch(f"{kind}.{layer}.{place}", value.cache[f"{kind}.{layer}"])
                )
            run = model.run(clean, capture=[f"z.{layer}"], edits=changes, logits=False)
            zs.append(run.cache[f"z.{layer}.{head}"])
        if heads:
            run = model.run(
                clean,
                capture=[f"z.{layer}", f"attn_out.{layer}"],
                edits=[Edit.patch(f"z.{layer}", torch.stack(zs, 2))],
                logits=False,
            )
            for head in heads:
                row = graph.sender(f"{layer}.{head}")
                change[row] = _head_write(model, run, layer, head) - other.writes[row]
        if block.mlp_write is not None:
            edit = reads(graph.receiver(f"mlp.{layer}"), mlp_input(model, layer))
            run = model.run(clean, capture=[f"mlp_write.{layer}"], edits=[edit], logits=False)
            row = graph.sender(f"mlp.{layer}")
            change[row] = run.cache[f"mlp_write.{layer}"].float() - other.writes[row]
    site = f"resid_post.{model.n_layers - 1}"
    final = reads(len(graph.receivers) - 1, site)
    run = model.run(clean, edits=[final], logits=last_position(clean))
    assert run.logits is not None
    return run.logits[:, -1].float()


def plain_state(
    model: Model, graph: Graph, corrupted: Batch, ablation: str = "resample"
) -> PlainState:
    """What edges outside of a circuit carry: the corrupted side's writes, their mean over prompts, or 0."""
    sites = ["resid_pre", f"resid_post.{model.n_layers - 1}"]
    sites += sorted(
        {
            mlp_input(model, layer)
            for layer, block in enumerate(model.spec.blocks)
            if block.mlp_write
        }
    )
    run = model.run(corrupted, capture=sites, logits=False)
    stream = {
        f"{name}.{layer}": value.float()
        for name in run.cache
        for layer, value in run.cache.by_layer(name).items()
    }
    writes = sender_writes(model, graph, corrupted)
    if ablation == "resample":
        return PlainState(writes, stream)
    new = writes.mean(1, keepdim=True).expand_as(writes)
    new = torch.zeros_like(new) if ablation == "zero" else new
    for site in stream:
        # The stream is the sum of what was written before it, so it changes by what they change.
        before = [i for i, sender in enumerate(graph.senders) if _wrote_before(model, sender, site)]
        stream[site] = stream[site] + (new - writes)[before].sum(0)
    return PlainState(new, stream)


def _wrote_before(model: Model, sender: Sender, site: str) -> bool:
    """Whether a sender's write is in the stream at a site."""
    name, layer = site.split(".")
    if sender.kind == "embed" or sender.layer < int(layer):
        return True
    attended = name == "resid_mid" and sender.kind == "head"
    return sender.layer == int(layer) and (name == "resid_post" or attended)
