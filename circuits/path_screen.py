"""A screen of all paths into q, k and v: the receivers' z exactly, and what follows to first order.

The sender's corrupted output is followed to the receiver's z with MLPs held, and Δz meets ∂metric/∂z: one
backward pass serves all pairs. It underestimates receivers whose effect bends on its way to the logits, so
its strongest pairs want an exact look.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.columns import Columns, columns_of
from circuits.graph import Sender
from circuits.path_effects import Senders, as_array, masked
from circuits.path_names import PARTS, Path
from circuits.path_replay import TOKENS, PathReplay, Streams
from interp.run.progress import Progress
from interp.run.resume import Checkpoint


class Screen:
    """What one layer's receivers do with a changed input, to first order in z and exactly before it.

    With MLPs held: Δresid → q, k, v → z is exact, and Δz meets ∂metric/∂z. For q and k,
    Δz · g = Σ ΔA[t, s] (g_t · v_s), for v Δz · g = Σ (Aᵀg)_s · Δv_s: no Δz is formed.

    Args:
        gradient: ∂metric/∂z of the layer, [n pos n_heads d_v].
    """

    def __init__(
        self,
        senders: Senders,
        layer: int,
        mask: Bool[Tensor, "n pos"],
        gradient: Float[Tensor, "n pos n_heads d_v"],
    ):
        replay = self.replay = senders.replay
        self.senders, self.layer, self.mask, self.columns = senders, layer, mask, columns_of(mask)
        softmax = replay.softmaxes[layer]
        assert softmax is not None
        self.softmax, self.suffix = softmax, replay.suffix(self.columns)
        places, rows = list(self.columns), list(self.suffix)
        self.k, self.v = (replay.clean(f"{site}.{layer}").float() for site in "kv")
        self.groups = self.k.shape[2]
        self.q = replay.clean(f"q.{layer}").float().unflatten(2, (self.groups, -1))[:, rows]
        g = gradient.float().unflatten(2, (self.groups, -1))[:, rows]
        of_columns = [self.suffix.index(column) for column in self.columns]
        reads = torch.einsum("nqhgd,nkhd->nhgqk", g, self.v).flatten(1, 2)
        self.reads = {"q": reads[:, :, of_columns], "k": reads}
        self.products = torch.einsum("nqhgd,nkhd->nhgqk", self.q, self.k).flatten(1, 2)
        pattern = softmax.weights(self.products[None].clone(), self.suffix, slice(None))[0]
        self.pattern = {"q": pattern[:, :, of_columns], "k": pattern}
        grouped = pattern[..., places].unflatten(1, (self.groups, -1))
        self.pulled = torch.einsum("nhgqk,nqhgd->nhkdg", grouped, g)

    def __call__(self, changes: Streams) -> Float[Tensor, "senders 3 n_heads"]:
        """First-order change of the mean metric by each sender's write change, into q, k and v of each head."""
        replay, places = self.replay, list(self.columns)
        streams = replay.clean_streams(self.layer, self.columns) + changes
        streams = masked(replay, self.layer, streams, self.columns, self.mask)
        q, k, v = (x.float() for x in replay.projections(self.layer, streams, self.columns))
        q = q.unflatten(2, (self.groups, -1))
        by_q = torch.einsum("xnhgqd,nkhd->xnhgqk", q, self.k).flatten(2, 3)
        by_k = self.products.expand(len(streams), *self.products.shape).clone()
        by_k[..., places] = torch.einsum("nqhgd,xnhkd->xnhgqk", self.q, k).flatten(2, 3)
        moved = v - self.v[:, places].transpose(1, 2)
        effects = (
            self._moved("q", by_q, self.columns),
            self._moved("k", by_k, self.suffix),
            torch.einsum("xnhkd,nhkdg->xhg", moved, self.pulled).flatten(1),
        )
        return torch.stack(effects, 1) / replay.size

    def _moved(
        self, part: str, products: Tensor, rows: Columns
    ) -> Float[Tensor, "senders n_heads"]:
        weights = self.softmax.weights(products, rows, slice(None)).sub_(self.pattern[part])
        return weights.mul_(self.reads[part]).sum((1, 3, 4))


@torch.no_grad()
def screened_effects(
    senders: Senders, chosen: Sequence[Sender], screens: Sequence[Screen]
) -> Float[Tensor, "layers senders 3 n_heads"]:
    """What every screen makes of every sender; all senders of layers before those of the screens."""
    replay, columns = senders.replay, screens[0].columns
    most = max(1, TOKENS // (replay.size * len(columns)))
    step = -(-len(chosen) // -(-len(chosen) // most))
    found: list[list[Tensor]] = [[] for _ in screens]
    with replay.seen():
        for start in range(0, len(chosen), step):
            changes = senders.write_changes(chosen[start : start + step], columns)
            for screen, parts in zip(screens, found, strict=True):
                parts.append(screen(changes).cpu())
    return torch.stack([torch.cat(parts) for parts in found])


def screened_changes(
    senders: Senders,
    paths: Sequence[Path],
    mask: Bool[Tensor, "n pos"],
    units: Checkpoint,
    bars: Progress,
) -> dict[Path, float]:
    """First-order mean change of each path into q, k or v; one backward pass for all."""
    of_layer: dict[int, list[Sender]] = defaultdict(list)
    for sender in dict.fromkeys(sender for sender, _ in paths):
        of_layer[sender.layer].append(sender)
    layers = sorted({receiver.layer for _, receiver in paths})
    screens: list[Screen] = []

    def unit(layer: int) -> dict[str, np.ndarray]:
        if not screens:
            gradients = z_gradients(senders.replay)
            screens.extend(Screen(senders, i, mask, gradients[i]) for i in layers)
        later = [screen for screen in screens if screen.layer > layer]
        return {"change": as_array(screened_effects(senders, of_layer[layer], later))}

    advance = bars.stage("Screening senders", len(of_layer))
    found: dict[tuple[Sender, int], np.ndarray] = {}
    for layer in sorted(of_layer):
        values = units.compute(f"screen {layer}", partial(unit, layer))["change"]
        later = [other for other in layers if other > layer]
        for other, by_sender in zip(later, values, strict=True):
            found |= {(s, other): x for s, x in zip(of_layer[layer], by_sender, strict=True)}
        advance(1)
    return {
        (sender, receiver): float(
            found[sender, receiver.layer][PARTS.index(receiver.kind), receiver.head]
        )
        for sender, receiver in paths
    }


def z_gradients(replay: PathReplay) -> dict[int, Float[Tensor, "n pos n_heads d_v"]]:
    """∂ (sum over prompts of the metric) / ∂z of every layer of the clean run."""
    model, pairs = replay.model, replay.measure.pairs
    run = model.run(pairs.clean_batch, ["z"], logits=torch.tensor([pairs.end]), grad=True)
    assert run.logits is not None
    target = replay.measure(run.logits[:, -1].float()).sum()
    z = run.cache.by_layer("z")
    return dict(zip(z, torch.autograd.grad(target, list(z.values())), strict=True))
