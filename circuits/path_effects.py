"""Exact effects of paths from senders to receivers.

The sender's corrupted output is followed to the receiver's input with every z held (and the MLPs
recomputed, or held too), the receiver's output is made from that input, and the model runs on from there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.columns import Columns, columns_of
from circuits.graph import Receiver, Sender
from circuits.path_names import Path
from circuits.path_replay import TOKENS, PathReplay, Streams
from interp.models.calls import at_home
from interp.models.verify import relative_error, relative_tolerance
from interp.run.cache import Run
from interp.run.resume import Checkpoint

STREAM_BYTES = 2**28
"""Residual streams that are kept at once; more senders are followed in several groups."""


class Senders:
    """What each sender writes when its output is the corrupted one.

    Args:
        corrupted: a run of the corrupted prompts with z (and mlp_write for MLP senders) captured.
        mlps: "recompute" or "frozen".
    """

    def __init__(self, replay: PathReplay, corrupted: Run, mlps: str):
        self.replay, self.corrupted, self.mlps = replay, corrupted, mlps

    def attention_changes(self, layer: int, heads: Sequence[int], columns: Columns) -> Streams:
        """Δz W_O of these heads: the change of what the layer's output projection returns."""
        site = f"z.{layer}"
        there = self.corrupted.cache[site][self.replay.rows][:, list(columns)]
        delta = (there - self.replay.clean(site, columns))[:, :, list(heads)]
        return torch.einsum("nphd,hdm->hnpm", delta, self.replay.model.W_O(layer)[list(heads)])

    def write_changes(self, senders: Sequence[Sender], columns: Columns) -> Streams:
        """Change of what each sender adds to the residual stream, nothing else being different."""
        replay, model = self.replay, self.replay.model
        parts: dict[Sender, Tensor] = {}
        for layer, heads in _by_layer(senders).items():
            changes = self.attention_changes(layer, heads, columns)
            write = model.spec.blocks[layer].attn_write
            assert write is not None
            if not model.spec.blocks[layer].direct:
                norm = model.module.get_submodule(write.module)
                out = replay.clean(f"attn_out.{layer}", columns)
                changes = at_home(norm, out + changes) - at_home(norm, out)
            changes = changes * write.scale
            parts |= {Sender("head", layer, h): x for h, x in zip(heads, changes, strict=True)}
        for sender in senders:
            if sender.kind == "mlp":
                site = f"mlp_write.{sender.layer}"
                there = self.corrupted.cache[site][replay.rows][:, list(columns)]
                parts[sender] = there - replay.clean(site, columns)
        return torch.stack([parts[sender] for sender in senders])

    def fault(self) -> str | None:
        """None where a norm between W_O and the residual stream is a function of what W_O returns."""
        model = self.replay.model
        allowed = relative_tolerance(model.dtype)
        for layer, block in enumerate(model.spec.blocks):
            if block.attn_write is None:
                return f"what the attention of layer {layer} writes is not known"
            if not block.direct:
                norm = model.module.get_submodule(block.attn_write.module)
                made = (
                    at_home(norm, self.replay.clean(f"attn_out.{layer}")) * block.attn_write.scale
                )
                error, _ = relative_error(made, self.replay.clean(f"attn_write.{layer}"))
                if error > allowed:
                    return f"the attention write of layer {layer} is no norm of its output"
        return None

    def streams(
        self, last_layer: Mapping[Sender, int], columns: Columns
    ) -> Callable[[int, Sequence[Sender]], Streams]:
        """A function of a layer and senders: the residual streams before that block.

        Layers have to be asked for in ascending order. A sender's stream is followed up to its
        `last_layer`.
        """
        if self.mlps == "frozen":
            return lambda layer, senders: self.write_changes(senders, columns).add_(
                self.replay.clean_streams(layer, columns)
            )
        steps = self._recomputed(last_layer, columns)
        reached: dict[str, tuple[int, list[Sender], Streams | None]] = {"now": (-1, [], None)}

        def at(layer: int, senders: Sequence[Sender]) -> Streams:
            while reached["now"][0] < layer:
                reached["now"] = next(steps)
            _, live, streams = reached["now"]
            assert streams is not None
            if list(senders) == live:
                return streams
            return streams[[live.index(sender) for sender in senders]]

        return at

    def _recomputed(
        self, last_layer: Mapping[Sender, int], columns: Columns
    ) -> Iterator[tuple[int, list[Sender], Streams | None]]:
        """(layer, senders, their streams before it), layer by layer: only norms and MLPs run."""
        replay = self.replay
        live: list[Sender] = []
        streams: Streams | None = None
        for layer in range(replay.model.n_layers + 1):
            keep = [i for i, sender in enumerate(live) if last_layer[sender] >= layer]
            if streams is not None and len(keep) < len(live):
                live, streams = [live[i] for i in keep], streams[keep]
            yield layer, live, streams
            if layer == replay.model.n_layers:
                return
            after = [] if streams is None else [replay.frozen_block(layer, streams, columns)]
            here = [
                sender
                for sender in last_layer
                if sender.layer == layer and last_layer[sender] > layer
            ]
            heads = [sender.head for sender in here if sender.kind == "head"]
            if heads:
                out = replay.clean(f"attn_out.{layer}", columns)
                before = replay.clean_streams(layer, columns).expand(len(heads), -1, -1, -1)
                changed = out + self.attention_changes(layer, heads, columns)
                after.append(replay.frozen_block(layer, before, columns, changed))
                live = live + [Sender("head", layer, head) for head in heads]
            if (mlp := Sender("mlp", layer)) in here:
                post = replay.clean_streams(layer + 1, columns)
                after.append(post + self.write_changes([mlp], columns))
                live = [*live, mlp]
            streams = torch.cat(after) if after else None


@torch.no_grad()
def exact_effects(
    senders: Senders,
    paths: Sequence[Path],
    mask: Bool[Tensor, "n pos"],
    *,
    units: Checkpoint,
    advance: Callable[[int], None],
) -> Float[Tensor, "paths n"]:
    """Change of the metric of every prompt when one path alone carries the corrupted output.

    Args:
        mask: positions at which a receiver's input is replaced (the logits': the last one).
    """
    replay = senders.replay
    found = torch.zeros(len(paths), replay.size)
    index = {path: i for i, path in enumerate(paths)}
    to_logits = [path for path in paths if path[1].kind == "logits"]
    inside = [path for path in paths if path[1].kind != "logits"]
    end = torch.zeros_like(mask)
    end[:, -1] = True
    for chosen, where in ((to_logits, end), (inside, mask)):
        columns = columns_of(where)
        size = replay.size * len(columns) * replay.model.spec.d_model * 4
        for group in _groups(chosen, max(1, STREAM_BYTES // size)):
            last_layer: dict[Sender, int] = {}
            for sender, receiver in sorted(group, key=lambda path: path[0].layer):
                last_layer[sender] = max(receiver.layer, last_layer.get(sender, -1))
            at = senders.streams(last_layer, columns)
            layers = defaultdict(list)
            for path in group:
                layers[path[1].layer].append(path)
            for layer, here in sorted(layers.items()):
                name = f"{group[0][0].name} {columns} layer {layer} {len(here)}"
                values = units.compute(
                    name,
                    lambda layer=layer, here=here, at=at, where=where: {
                        "change": _effects_at(senders, layer, here, at, where).cpu().numpy()
                    },
                )["change"]
                for path, value in zip(here, torch.from_numpy(values), strict=True):
                    found[index[path]] = value
                advance(len(here))
    return found


def _effects_at(
    senders: Senders,
    layer: int,
    paths: Sequence[Path],
    at: Callable[[int, Sequence[Sender]], Streams],
    mask: Bool[Tensor, "n pos"],
) -> Float[Tensor, "paths n"]:
    """`exact_effects` of paths into one layer."""
    replay, columns = senders.replay, columns_of(mask)
    values = torch.zeros(len(paths), replay.size, device=replay.model.device)
    by_receiver: dict[Receiver, list[int]] = defaultdict(list)
    for i, (_, receiver) in enumerate(paths):
        by_receiver[receiver].append(i)
    earlier = list(dict.fromkeys(sender for sender, _ in paths if sender.layer < layer))
    earlier.sort(key=lambda sender: sender.layer)
    streams = at(layer, earlier) if earlier else None
    if streams is not None:
        if layer == replay.model.n_layers:
            change = replay.read(streams) - replay.read(replay.clean_streams(layer, columns))
            places = {sender: i for i, sender in enumerate(earlier)}
            return change[[places[sender] for sender, _ in paths]]
        streams = masked(replay, layer, streams, columns, mask)
    for receiver, mine in by_receiver.items():
        if receiver.kind == "mlp":
            from_senders = [paths[i][0] for i in mine]
            values[mine] = _into_mlp(senders, receiver, from_senders, earlier, streams, mask)
    heads = {receiver: mine for receiver, mine in by_receiver.items() if receiver.kind != "mlp"}
    if heads and streams is not None:
        step = max(1, TOKENS // (replay.size * len(columns)))
        for start in range(0, len(earlier), step):
            part = {sender: place for place, sender in enumerate(earlier[start : start + step])}
            qkv = replay.projections(layer, streams[start : start + step], columns)
            for receiver, mine in heads.items():
                rows = [i for i in mine if paths[i][0] in part]
                places = [part[paths[i][0]] for i in rows]
                if rows:
                    changed = dict(zip("qkv", (x[places] for x in qkv), strict=True))
                    values[rows] = _into_head(replay, receiver, changed[receiver.kind], columns)
    return values


def masked(
    replay: PathReplay, layer: int, streams: Streams, columns: Columns, mask: Tensor
) -> Streams:
    """Streams that are clean again where a prompt does not name the position."""
    chosen = mask[replay.rows][:, list(columns)].to(streams.device)
    if bool(chosen.all()):
        return streams
    return torch.where(chosen[..., None], streams, replay.clean_streams(layer, columns))


def _into_head(
    replay: PathReplay,
    receiver: Receiver,
    changed: Float[Tensor, "variants n heads pos d_head"],
    columns: Columns,
) -> Float[Tensor, "variants n"]:
    """Change of the metric when one head has these q, k or v at `columns`."""
    layer, head = receiver.layer, receiver.head
    group = replay.model.spec.kv_group(layer, head)
    # Only q at its own positions changes there; keys and values change what every later query reads.
    suffix = replay.suffix(columns)
    own = {"q": head, "k": group, "v": group}
    inputs = {
        kind: replay.clean(f"{kind}.{layer}")[:, :, own[kind]].expand(len(changed), -1, -1, -1)
        for kind in "qkv"
    }
    clean = {kind: x[:1] for kind, x in inputs.items()}
    new = inputs[receiver.kind].clone()
    new[:, :, list(columns)] = changed[:, :, own[receiver.kind]]
    inputs[receiver.kind] = new

    def z(parts: dict[str, Tensor]) -> Tensor:
        q = parts["q"][:, :, list(suffix)]
        return replay.head_outputs(layer, head, suffix, q, parts["k"], parts["v"])

    delta = z(inputs) - z(clean)
    values = torch.zeros(delta.shape[:2], device=delta.device)
    # A head that is not moved has no effect, nor is one of the last layer moved elsewhere: exactly 0.
    last = layer + 1 == replay.model.n_layers
    moved = (delta[:, :, -1:] if last else delta).flatten(1).any(1)
    if not bool(moved.any()):
        return values
    out = replay.clean(f"attn_out.{layer}", suffix)
    attention = out + delta[moved] @ replay.model.W_O(layer)[head]
    before = replay.clean_streams(layer, suffix).expand(len(attention), -1, -1, -1)
    after = replay.frozen_block(layer, before, suffix, attention)
    values[moved] = replay.read(replay.rest(layer + 1, after, suffix)) - replay.clean_metric
    return values


def _into_mlp(
    senders: Senders,
    receiver: Receiver,
    wanted: Sequence[Sender],
    earlier: Sequence[Sender],
    streams: Streams | None,
    mask: Bool[Tensor, "n pos"],
) -> Float[Tensor, "variants n"]:
    """Change of the metric when an MLP reads these senders' corrupted outputs at the masked positions."""
    replay, layer, columns = senders.replay, receiver.layer, columns_of(mask)
    written = replay.clean(f"mlp_write.{layer}", columns)
    values = torch.zeros(len(wanted), replay.size, device=written.device)
    rows: list[int] = []
    made: list[Tensor] = []
    before = [i for i, sender in enumerate(wanted) if sender.layer < layer]
    if before and streams is not None:
        mine = streams[[earlier.index(wanted[i]) for i in before]]
        rows += before
        made.append(replay.frozen_block(layer, mine, columns, mlp_write=True))
    beside = [i for i, sender in enumerate(wanted) if sender.layer == layer]
    if beside:  # heads of the same block, which its MLP reads
        changes = senders.attention_changes(layer, [wanted[i].head for i in beside], columns)
        attention = replay.clean(f"attn_out.{layer}", columns) + changes
        pre = replay.clean_streams(layer, columns).expand(len(beside), -1, -1, -1)
        rows += beside
        made.append(replay.frozen_block(layer, pre, columns, attention, mlp_write=True))
    chosen = mask[replay.rows][:, list(columns)].to(written.device)
    delta = torch.where(chosen[..., None], torch.cat(made) - written, 0.0)
    suffix = replay.suffix(columns)
    after = replay.clean_streams(layer + 1, suffix).repeat(len(delta), 1, 1, 1)
    after[:, :, [suffix.index(column) for column in columns]] += delta
    values[rows] = replay.read(replay.rest(layer + 1, after, suffix)) - replay.clean_metric
    return values


def _by_layer(senders: Sequence[Sender]) -> dict[int, list[int]]:
    """Head senders' heads, by layer."""
    found: dict[int, list[int]] = defaultdict(list)
    for sender in senders:
        if sender.kind == "head":
            found[sender.layer].append(sender.head)
    return found


def _groups(paths: Sequence[Path], senders: int) -> list[list[Path]]:
    """Paths in groups of at most so many senders, early senders first."""
    names = sorted(dict.fromkeys(sender for sender, _ in paths), key=lambda sender: sender.layer)
    group_of = {sender: i // senders for i, sender in enumerate(names)}
    groups: list[list[Path]] = [[] for _ in range(-(-len(names) // senders))]
    for path in paths:
        groups[group_of[path[0]]].append(path)
    return groups


def as_array(values: Tensor) -> np.ndarray:
    """As a checkpoint keeps it."""
    return values.detach().cpu().numpy()
