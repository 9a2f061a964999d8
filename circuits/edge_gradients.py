"""Gradients at the residual stream that each receiver alone reads, from one backward pass.

The gradients of q, k and v of every query head are pulled back through the head's columns of its
projection and the norm in closed form: with l the gradient at those columns, x̂ the normed stream,

    g = W l / σ − x̂ (l · x̂W) / (d σ)

Both terms are summed over integration steps before anything d_model wide is formed, and one matrix
product with the senders' differences gives all scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph import Scores
from circuits.passes import Parts, Pass, heads_of
from circuits.stream import KINDS, head_bias, head_weights, own_columns

LAYERS_AT_ONCE = 4
"""Layers whose receivers go into one matrix product: one layer's alone make it too narrow to be fast."""

Metric = Callable[[Float[Tensor, "batch d_vocab"]], Float[Tensor, " batch"]]
"""A number for each prompt from its logits at the last position."""


@dataclass
class LayerGradient:
    """Σ over steps of the gradients that one layer's receivers have, kept as narrow as they can be.

    The gradient of head h's q is `leaf["q"][h] @ W.T − Σ_steps along · unit`, see the file's opening.
    """

    leaf: dict[str, Float[Tensor, "heads rows width"]] = field(default_factory=dict)
    units: list[Float[Tensor, "rows d_model"]] = field(default_factory=list)
    along: list[Float[Tensor, "receivers rows"]] = field(default_factory=list)
    whole: Float[Tensor, "receivers rows d_model"] | None = None
    mlp: Float[Tensor, "rows d_model"] | None = None

    def dense(self, parts: Parts, layer: int, out: Float[Tensor, "receivers rows d_model"]) -> None:
        """Write all receivers of the layer into `out`, in the graph's order of columns."""
        place = 0
        for kind, leaf in self.leaf.items():
            W = head_weights(parts.model, parts.reads[layer], kind)
            grouped = leaf.reshape(len(W), -1, leaf.shape[-1])  # query heads of a group share W
            here = out[place : place + len(leaf)]
            torch.bmm(grouped, W.transpose(1, 2), out=here.view(len(W), -1, here.shape[-1]))
            place += len(leaf)
        for along, unit in zip(self.along, self.units, strict=True):
            out[:place].addcmul_(along[..., None], unit, value=-1)
        if self.whole is not None:
            out[: len(self.whole)] = self.whole
        if self.mlp is not None:
            out[-1] = self.mlp


class Gradients:
    """Σ over steps of the gradient of Σ metric at every receiver's input, in layers from `first` on."""

    def __init__(self, parts: Parts, *, first: int = 0):
        self.parts, self.first = parts, first
        self.layers = {layer: LayerGradient() for layer in range(parts.model.n_layers)}
        self.logits: Tensor | None = None

    def add(self, seen: Pass, metric: Metric) -> None:
        """Add one pass's gradients; the pass was run with `grad=True`."""
        parts, run = self.parts, seen.run
        assert run is not None and run.logits is not None
        value = metric(run.logits[:, -1].float()).sum()
        final = seen[f"resid_post.{parts.model.n_layers - 1}"]
        layers = range(self.first, parts.model.n_layers)
        names: list[tuple[int, str]] = []
        targets: list[Tensor] = []
        for layer in layers:
            if layer in parts.writers:
                names += [(layer, kind) for kind in KINDS]
                targets += [seen.heads[layer].own[kind] for kind in KINDS]
            for _, view in seen.mlp_inputs.get(layer, ()):
                names.append((layer, "mlp"))
                targets.append(view)
        found = torch.autograd.grad(value, [*targets, final], retain_graph=True, allow_unused=True)
        grads: dict[tuple[int, str], list[Tensor]] = {}
        for name, target, grad in zip(names, targets, found[:-1], strict=True):
            grads.setdefault(name, []).append(torch.zeros_like(target) if grad is None else grad)
        for layer in layers:
            x = seen[f"resid_pre.{layer}"]
            if layer in parts.writers:
                heads = {kind: grads[layer, kind][0] for kind in KINDS}
                if parts.reads[layer].split:
                    self._add_split(seen, layer, x, heads)
                else:
                    self._add_whole(seen, layer, x, heads)
            if (layer, "mlp") in grads:
                self._add_mlp(seen, layer, x, grads[layer, "mlp"])
        assert found[-1] is not None
        rows = _rows(found[-1])
        self.logits = rows if self.logits is None else self.logits + rows

    def _add_split(self, seen: Pass, layer: int, x: Tensor, grads: dict[str, Tensor]) -> None:
        """q, k and v from columns of their own: back to those columns by autograd, the rest is closed."""
        parts, total = self.parts, self.layers[layer]
        reads, made = parts.reads[layer], seen.heads[layer].made
        norm = reads.norm
        assert norm is not None
        stream = _rows(x.detach())
        sigma = norm.sigma(stream)
        along = []
        for kind in KINDS:
            projection = reads.projections[kind]
            leaf = seen.leaves[projection.module]
            columns = projection.columns
            n_own, group = len(columns), grads[kind].shape[1] // len(columns)
            by_member = grads[kind].unflatten(1, (n_own, group))
            at_leaf = []
            for member in range(group):  # each query head of a group in turn
                (grad,) = torch.autograd.grad(
                    made[kind], leaf, by_member[:, :, member], retain_graph=True
                )
                at_leaf.append(own_columns(_rows(grad), columns))
            grad = torch.stack(at_leaf, 2).permute(1, 2, 0, 3)  # [own group rows width]
            if norm.live:
                bias = head_bias(parts.model, reads, kind)
                unbiased = own_columns(_rows(leaf.detach()), columns) - bias
                dot = torch.einsum("ogrw,row->ogr", grad, unbiased)
                along.append(dot.flatten(0, 1) / (stream.shape[-1] * sigma))
            narrow = (grad / sigma[:, None]).flatten(0, 1)
            total.leaf[kind] = total.leaf[kind] + narrow if kind in total.leaf else narrow
        if norm.live:
            total.units.append(norm.centre(stream) / sigma[:, None])
            total.along.append(torch.cat(along))

    def _add_whole(self, seen: Pass, layer: int, x: Tensor, grads: dict[str, Tensor]) -> None:
        """Any other layer: the block's own way to q, k and v, run on a copy of x for each receiver."""
        total = self.layers[layer]
        n_heads, size = grads["q"].shape[1], x.shape[0]
        found = []
        with torch.enable_grad():
            for kind in KINDS:
                copies = x.detach().repeat(n_heads, 1, 1).requires_grad_()
                made = heads_of(self.parts.model, layer, seen.calls[layer], copies)[kind]
                own = made.unflatten(0, (n_heads, size))
                group = n_heads // made.shape[1]
                picked = torch.stack([own[h, :, h // group] for h in range(n_heads)], 1)
                (grad,) = torch.autograd.grad(picked, copies, grads[kind])
                found.append(grad.unflatten(0, (n_heads, size)).flatten(1, 2).float())
        whole = torch.cat(found)
        total.whole = whole if total.whole is None else total.whole + whole

    def _add_mlp(self, seen: Pass, layer: int, x: Tensor, grads: list[Tensor]) -> None:
        """The gradient where the MLP reads the stream; back through the norm where that is shared."""
        total, shared = self.layers[layer], self.parts.reads[layer].mlp_norm
        if shared:
            values = [value for value, _ in seen.mlp_inputs[layer]]
            summed = torch.autograd.grad(values, x, grads, retain_graph=True)[0]
        else:
            summed = grads[0] if len(grads) == 1 else torch.stack(grads).sum(0)
        rows = _rows(summed)
        total.mlp = rows if total.mlp is None else total.mlp + rows

    def scores(
        self, difference: Float[Tensor, "senders batch pos d_model"], *, first_row: int = 0
    ) -> Scores:
        """Σ over batch and positions of difference[s] · gradient[r], for every edge; 0 where there is none.

        `difference` may be of some senders only, from row `first_row` on.
        """
        graph, n_layers = self.parts.graph, self.parts.model.n_layers
        flat = difference.flatten(1)
        rows = slice(first_row, first_row + len(flat))
        out = torch.zeros(graph.shape, device=flat.device)
        n, d_model = difference[0, ..., 0].numel(), difference.shape[-1]
        for start in range(self.first, n_layers, LAYERS_AT_ONCE):
            layers = range(start, min(start + LAYERS_AT_ONCE, n_layers))
            offset, end = graph.columns(layers[0]).start, graph.columns(layers[-1]).stop
            dense = torch.empty(end - offset, n, d_model, device=flat.device)
            for layer in layers:
                columns = graph.columns(layer)
                here = dense[columns.start - offset : columns.stop - offset]
                self.layers[layer].dense(self.parts, layer, here)
            stop = min(graph.rows(layers[-1]).stop, rows.stop)  # later senders feed none of these
            own = flat[: max(0, stop - first_row)]
            out[first_row : first_row + len(own), offset:end] = own @ dense.flatten(1).T
        assert self.logits is not None
        out[rows, -1] = flat @ self.logits.flatten()
        return out.cpu() * graph.allowed


def _rows(x: Tensor) -> Float[Tensor, "rows width"]:
    """Batch and positions as one axis, in float32."""
    return x.reshape(-1, x.shape[-1]).float()
