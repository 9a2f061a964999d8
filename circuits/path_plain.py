"""The plain engine behind `naive=True` of path patching: two or three full forwards a path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.measure import Measure
from circuits.path_names import PARTS, Path
from interp.models.model import Model
from interp.run.cache import Run
from interp.run.edits import Edit


@torch.no_grad()
def plain_effect(
    model: Model,
    clean: Run,
    corrupted: Run,
    measure: Measure,
    path: Path,
    mask: Bool[Tensor, "n pos"],
    mlps: str,
) -> Float[Tensor, " n"]:
    """Change of the metric of every prompt by one path, in full forwards of the whole model."""
    sender, receiver = path
    layer, batch, last = receiver.layer, clean.batch, torch.tensor([measure.pairs.end])
    # (C) What is held: q, k and v of the heads before the receiver, with mlps="frozen" the MLPs too.
    after_attention = receiver.kind in ("mlp", "logits")
    held = range(min(layer + after_attention, model.n_layers))
    edits = [
        Edit.patch(f"{part}.{i}", clean.cache[f"{part}.{i}"])
        for i in held
        for part in PARTS
        if model.spec.blocks[i].attention
    ]
    if mlps == "frozen":
        writers = [i for i in model.layers_with("mlp_write") if i < layer]
        edits += [Edit.patch(f"mlp_write.{i}", clean.cache[f"mlp_write.{i}"]) for i in writers]
    site = "z" if sender.kind == "head" else "mlp_write"
    value = corrupted.cache[f"{site}.{sender.layer}"]
    place = f".{sender.head}" if sender.kind == "head" else ""
    edits.append(Edit.patch(f"{site}.{sender.layer}{place}", value))

    def metric(edits: Sequence[Edit]) -> Tensor:
        logits = model.run(batch, edits=edits, logits=last).logits
        assert logits is not None
        return measure(logits[:, -1].float()) - measure.clean

    if receiver.kind == "logits":
        return metric(edits)
    recorded = f"{'mlp_write' if receiver.kind == 'mlp' else receiver.kind}.{layer}"
    heard = model.run(batch, capture=[recorded], edits=edits, logits=False).cache[recorded]
    # (D) The receiver's own output from that input, everything after it recomputed.
    if receiver.kind == "mlp":
        return metric([Edit.patch(recorded, heard, positions=mask)])
    if receiver.kind == "q":
        return metric([Edit.patch(f"{recorded}.{receiver.head}", heard, positions=mask)])
    # k and v of one query head: its z is taken from a run in which its whole group reads them.
    group = model.spec.kv_group(layer, receiver.head)
    patch = Edit.patch(f"{recorded}.{group}", heard, positions=mask)
    z = model.run(batch, capture=[f"z.{layer}"], edits=[patch], logits=False).cache[f"z.{layer}"]
    return metric([Edit.patch(f"z.{layer}.{receiver.head}", z)])


def naive_forwards(paths: Sequence[Path]) -> int:
    """How many forwards the plain engine ran."""
    each: dict[str, int] = {"logits": 1, "q": 2, "mlp": 2, "k": 3, "v": 3}
    return 2 + sum(each[receiver.kind] for _, receiver in paths)
