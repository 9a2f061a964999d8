"""Running a model with only a circuit's edges clean, exactly, in one forward.

Every receiver r reads a residual stream of its own,

    x_r = stream_other + Σ_s circuit[s, r] (write_s − other write_s)

with write_s what sender s writes in this very run and "other" the corrupted run (or zeros, or the mean):
an edge outside of the circuit carries the other side's write. The sums of all receivers of a layer are one
matrix product; each head's q, k and v are then that head's columns of the projection applied to its own
normed stream. Heads of a group have k and v of their own: members of a group take turns through the
layer's way from projection to attention, which then sees one k and v a query head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuits.edge_gradients import LAYERS_AT_ONCE
from circuits.edges_plain import mlp_input
from circuits.graph import Circuit, Graph
from circuits.passes import BUFFER_BYTES, Parts, Side, Task, heads_of, run_pass
from circuits.reads import float_input, with_float_input
from circuits.stream import KINDS, Writes, head_bias, head_weights
from interp.data.pairs import Pairs
from interp.errors import unknown
from interp.models.attention import Watch, window
from interp.models.calls import at_home
from interp.models.forwards import other_forwards
from interp.models.spec import first_tensor, with_first

ABLATIONS = ("resample", "mean", "zero")


@dataclass(frozen=True)
class Other:
    """The side that edges outside of a circuit carry, for some pairs.

    writes: what senders write there. streams: what a receiver would read there, by site.
    """

    pairs: Pairs
    embed: Float[Tensor, "batch pos d_model"]
    writes: Writes
    streams: dict[str, Float[Tensor, "batch pos d_model"]]


class EdgeReplay:
    """Logits of circuits of one task.

    Args:
        task: the pairs on the model, both sides run.
        ablation: what edges outside of the circuit carry: "resample" (the corrupted run's writes),
            "mean" (their mean over the corrupted prompts, position by position) or "zero".

    >>> from circuits.passes import task_of
    >>> pairs = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4])
    >>> task = task_of(Parts.of(tiny_model()), pairs)
    >>> replay = EdgeReplay(task)
    >>> both = replay.logits([task.parts.graph.whole, task.parts.graph.empty])
    >>> bool((both[0] - task.measure.clean_logits).abs().max() < 1e-4)
    True
    """

    def __init__(self, task: Task, ablation: str = "resample"):
        if ablation not in ABLATIONS:
            raise unknown("ablation", ablation, ABLATIONS)
        self.task, self.parts, self.ablation = task, task.parts, ablation
        self.graph, self.measure = task.parts.graph, task.measure
        model = self.parts.model
        self.sites = [f"resid_pre.{layer}" for layer in range(model.n_layers)]
        self.sites += [
            site
            for layer, block in enumerate(model.spec.blocks)
            if block.mlp_write is not None and (site := mlp_input(model, layer)) not in self.sites
        ]
        self.sites.append(f"resid_post.{model.n_layers - 1}")
        self.others = self._others()

    @torch.no_grad()
    def logits(self, circuits: Sequence[Circuit]) -> Float[Tensor, "circuits n d_vocab"]:
        """Logits at the last position with only each circuit's edges clean."""
        for circuit in circuits:
            self.graph.check(circuit)
        found = []
        for other in self.others:
            size = 4 * self.graph.shape[0] * other.embed.numel()
            at_once = max(1, BUFFER_BYTES // size)
            chunks = [circuits[i : i + at_once] for i in range(0, len(circuits), at_once)]
            found.append(torch.cat([self._run(other, chunk) for chunk in chunks]))
        return torch.cat(found, dim=1)

    def values(self, circuits: Sequence[Circuit]) -> Float[Tensor, "circuits n"]:
        """The task's metric of every circuit and pair, raw."""
        return torch.stack([self.measure(logits) for logits in self.logits(circuits)])

    def _run(self, other: Other, circuits: Sequence[Circuit]) -> Tensor:
        model, run = self.parts.model, _Run(self.parts, other, circuits)
        batch = other.pairs.clean_batch.repeat(len(circuits))
        with run.hooked():
            logits = model.run(batch, logits=torch.tensor([other.pairs.end])).logits
        assert logits is not None
        return logits[:, -1].float().unflatten(0, (len(circuits), -1))

    @torch.no_grad()
    def _others(self) -> list[Other]:
        """The other side of all pairs, in the task's portions."""
        sides = self.task.sides
        if self.ablation == "resample":
            found = [side.corrupted for side in sides]
        elif self.ablation == "zero":
            found = [side.corrupted.zero() for side in sides]
        else:
            mean = Writes.mean([side.corrupted for side in sides])
            found = [mean.expand(len(side.pairs)) for side in sides]
        return [
            Other(side.pairs, side.clean.embed, writes, self._streams(side, writes))
            for side, writes in zip(sides, found, strict=True)
        ]

    def _streams(self, side: Side, writes: Writes) -> dict[str, Tensor]:
        """The residual stream where everyone writes `writes`, at every site that is read."""
        if writes is side.corrupted:
            batch = side.pairs.corrupted_batch
            seen = run_pass(self.parts, batch, capture=self.sites, logits=False)
            return {site: seen[site].float() for site in self.sites}
        # Summed from what is written: zeros stay zero, to the last bit, for the norms that follow.
        graph, streams = self.parts.graph, {}
        each = writes.less(writes.zero(), graph, self.parts.writers)
        for site in self.sites:
            name, layer = site.split(".")
            before = [at for at in self.parts.writers if at < int(layer) + (name != "resid_pre")]
            constant = torch.zeros_like(each[0, 0, 0])
            for at in before:
                constant = constant + self.parts.writers[at].constant
            streams[site] = each[: senders_before(graph, site)].sum(0) + constant
        return streams


def senders_before(graph: Graph, site: str) -> int:
    """How many senders have written to a site of the residual stream."""
    name, layer = site.split(".")
    rows = graph.rows(int(layer))
    return {"resid_pre": rows.start, "resid_mid": rows.stop - 1, "resid_post": rows.stop}[name]


class _Run:
    """One forward over several circuits: rows are circuits × pairs.

    `change` holds, for every sender, its write in this run minus the other side's.
    """

    def __init__(self, parts: Parts, other: Other, circuits: Sequence[Circuit]):
        self.parts, self.other = parts, other
        graph, embed = parts.graph, other.embed
        self.mask = torch.stack([(c & graph.allowed).T for c in circuits]).to(embed)
        self.change = torch.zeros(len(circuits), graph.shape[0], *embed.shape, device=embed.device)
        self.change[:, 0] = embed - other.writes.embed
        self.heads: dict[int, dict[str, Tensor]] = {}
        self.leaves: dict[str, Tensor] = {}
        self.z: dict[int, Tensor] = {}
        self.first = 0
        self.layer_sums: Tensor | None = None

    def stream(self, layer: int, columns: slice) -> Tensor:
        """What receivers of one layer read [circuits receivers batch pos d_model]."""
        if layer >= self.first + LAYERS_AT_ONCE or self.layer_sums is None:
            self._start(layer)
        assert self.layer_sums is not None
        graph, offset = self.parts.graph, self.parts.graph.columns(self.first).start
        # What was written since the sums were started: a few rows.
        rows = slice(graph.rows(self.first).start, self._written(columns))
        made = self.layer_sums[:, columns.start - offset : columns.stop - offset]
        if rows.stop > rows.start:
            made = torch.baddbmm(made, self.mask[:, columns, rows], self.change[:, rows].flatten(2))
        return made.unflatten(2, tuple(self.other.embed.shape))

    def _written(self, columns: slice) -> int:
        """How many senders have written before these receivers read."""
        return int(self.parts.graph.allowed[:, columns.start].sum())

    def _start(self, layer: int) -> None:
        """Sums over all senders before `layer`, for the receivers of some layers in one product.

        One layer's receivers alone would make the product too narrow to be fast.
        """
        graph, model = self.parts.graph, self.parts.model
        self.first = layer
        layers = range(layer, min(layer + LAYERS_AT_ONCE, model.n_layers))
        columns = slice(graph.columns(layers[0]).start, graph.columns(layers[-1]).stop)
        n = graph.rows(layer).start
        mask, change = self.mask[:, columns, :n], self.change[:, :n]
        used = mask.any(1).any(0).nonzero()[:, 0]
        if 2 * len(used) < n:  # small circuits: most senders feed nothing here
            mask, change = mask[..., used], change[:, used]
        sums = torch.empty(
            len(mask), mask.shape[1], self.other.embed.numel(), device=self.change.device
        )
        for place, receiver in enumerate(graph.receivers[columns]):
            at_mlp = receiver.kind == "mlp"
            site = mlp_input(model, receiver.layer) if at_mlp else f"resid_pre.{receiver.layer}"
            sums[:, place] = self.other.streams[site].flatten()
        self.layer_sums = sums.baddbmm_(mask, change.flatten(2))

    def final_stream(self) -> Float[Tensor, "circuits batch d_model"]:
        """What the logits read at the last position."""
        base = self.other.streams[f"resid_post.{self.parts.model.n_layers - 1}"][:, -1]
        change = self.change[..., -1, :].flatten(2)
        found = torch.bmm(self.mask[:, -1:], change)[:, 0]
        return base + found.unflatten(1, tuple(base.shape))

    # --- heads ---------------------------------------------------------------------------------

    def enter_block(self, layer: int, call: tuple[tuple, dict]) -> None:
        """Make q, k and v of every head of the layer, each from a stream of its own."""
        graph = self.parts.graph
        n_heads = self.other.writes.z[layer].shape[2]
        first = graph.columns(layer).start
        stream = self.stream(layer, slice(first, first + 3 * n_heads))
        stream = stream.unflatten(1, (3, n_heads))
        split = self.parts.reads[layer].split
        self.heads[layer] = (self._split if split else self._whole)(layer, call, stream)

    def _split(self, layer: int, call: tuple[tuple, dict], stream: Tensor) -> dict[str, Tensor]:
        """Each head's columns of the projections, applied to its own normed stream."""
        model, reads = self.parts.model, self.parts.reads[layer]
        assert reads.norm is not None
        made: dict[str, Tensor] = {}  # [members rows pos own width]
        for i, kind in enumerate(KINDS):
            x = stream[:, i]  # [circuits heads batch pos d_model]
            W, bias = head_weights(model, reads, kind), head_bias(model, reads, kind)
            members = x.shape[1] // len(W)
            inner = x.reshape(len(x), len(W), -1, x.shape[-1]) @ W
            inner = inner.view(len(x), len(W), members, *x.shape[2:4], -1)
            sigma = reads.norm.sigma(x).view(inner.shape[:-1])
            out = inner / sigma[..., None] + bias[:, None, None, None]
            made[kind] = out.permute(2, 0, 3, 4, 1, 5).flatten(1, 2)
        hidden = call[0][0] if call[0] else call[1]["hidden_states"]
        turns = []
        for member in range(len(made["k"])):
            self.leaves.clear()
            for kind in KINDS:
                projection = reads.projections[kind]
                value = made[kind][member % len(made[kind])].to(model.dtype)
                leaf = self.leaves.get(projection.module)
                if leaf is None:
                    leaf = value.new_zeros(*value.shape[:2], projection.width)
                    self.leaves[projection.module] = leaf
                leaf[..., projection.columns.flatten().to(leaf.device)] = value.flatten(2)
            turns.append(heads_of(model, layer, call, hidden))
        by_head = {
            kind: torch.stack([turn[kind] for turn in turns], 2).flatten(1, 2)
            for kind in ("k", "v")
        }
        return {"q": turns[0]["q"], **by_head}

    def _whole(self, layer: int, call: tuple[tuple, dict], stream: Tensor) -> dict[str, Tensor]:
        """The block's own way from the stream to q, k and v, run once for every receiver."""
        n_circuits, _, n_heads, size = stream.shape[:4]
        found = {}
        for i, kind in enumerate(KINDS):
            copies = stream[:, i].transpose(0, 1).flatten(0, 2).to(self.parts.model.dtype)
            made = heads_of(self.parts.model, layer, call, copies)[kind]
            made = made.unflatten(0, (n_heads, n_circuits * size))
            members = n_heads // made.shape[2]
            found[kind] = torch.stack([made[h, :, h // members] for h in range(n_heads)], 1)
        return found

    def leave_heads(self, layer: int, z: Tensor, attn_out: Tensor | None = None) -> None:
        """Keep what the heads wrote, less the other side's writes."""
        writer, other, n = self.parts.writers[layer], self.other.writes, len(self.mask)
        z = z.to(self.change.device)
        first = self.parts.graph.rows(layer).start
        if attn_out is None:
            less = z.unflatten(0, (n, -1)) - other.z[layer]
            parts = writer.parts(less.flatten(0, 1)).unflatten(1, (n, -1))
        else:
            assert writer.norm is not None
            sigma = writer.norm.sigma(attn_out.to(z.device).float().view(*z.shape[:2], -1))
            parts = writer.parts(z, sigma).unflatten(1, (n, -1))
            parts = parts - other.heads(self.parts.writers, layer)[:, None]
        self.change[:, first : first + z.shape[2]] = parts.transpose(0, 1)

    def leave_mlp(self, layer: int, written: Tensor) -> None:
        """Keep what the MLP wrote, less the other side's write."""
        other = self.other.writes.mlp[layer]
        by_circuit = written.to(other.device).float().reshape(len(self.mask), *other.shape)
        self.change[:, self.parts.graph.rows(layer).stop - 1] = by_circuit - other

    # --- hooks ---------------------------------------------------------------------------------

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside, a forward of the model over circuits × pairs is this run."""
        model, parts = self.parts.model, self.parts
        layer_of = {
            model.module.get_submodule(model.spec.blocks[layer].attention or ""): layer
            for layer in parts.writers
        }

        def listen(module: nn.Module) -> Watch:
            return _OwnHeads(self, layer_of[module]) if module in layer_of else Watch()

        with ExitStack() as stack:
            stack.enter_context(window(model.module, listen))

            def before(name: str, hook: Any) -> None:
                module = model.module.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

            def after(name: str, hook: Any) -> None:
                module = model.module.get_submodule(name)
                stack.callback(module.register_forward_hook(hook).remove)

            for layer, (block, reads) in enumerate(
                zip(model.spec.blocks, parts.reads, strict=True)
            ):
                if layer in parts.writers:
                    before(block.name, self._at_block(layer))
                    for name in {p.module for p in reads.projections.values()}:
                        stack.enter_context(self._in_place_of(name))
                    if parts.writers[layer].norm is not None:
                        after(block.W_O or "", self._at_attn_out(layer))
                for name in reads.mlp_entries:
                    before(name, self._at_mlp(layer))
                if block.mlp_write is not None:
                    after(block.mlp_write.module, self._at_mlp_out(layer, block.mlp_write.scale))
            after(model.spec.blocks[-1].name, self._at_end)
            yield

    def _in_place_of(self, name: str) -> AbstractContextManager[None]:
        """A projection returns what was made for it, and computes nothing."""
        module = self.parts.model.module.get_submodule(name)
        own = module.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            leaf = self.leaves.get(name)
            if leaf is None:  # asked for its weights (`linear_map`), which are not in memory
                return own(x, *args, **kwargs)
            return leaf.view(*x.shape[:-1], leaf.shape[-1]).to(x.device)

        return other_forwards({module: forward})

    def _at_block(self, layer: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.enter_block(layer, (args, kwargs))

        return hook

    def _at_attn_out(self, layer: int):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self.leave_heads(layer, self.z[layer], first_tensor(output))

        return hook

    def _at_mlp(self, layer: int):
        reads, model = self.parts.reads[layer], self.parts.model
        last = self.parts.graph.columns(layer).stop

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            x = self.stream(layer, slice(last - 1, last))[:, 0].flatten(0, 1).to(model.dtype)
            if reads.mlp_norm:
                x = at_home(model.module.get_submodule(reads.mlp_norm), x)
            old = float_input(args, kwargs)
            assert old is not None
            return with_float_input(args, kwargs, x.reshape(old.shape).to(old.device))

        return hook

    def _at_mlp_out(self, layer: int, scale: float):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            written = first_tensor(output)
            assert written is not None
            self.leave_mlp(layer, written if scale == 1 else written * scale)

        return hook

    def _at_end(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """The logits' own stream, at the last position; the others are not read."""
        x = first_tensor(output)
        assert x is not None
        own = self.final_stream().flatten(0, 1)[:, None]
        return with_first(output, torch.cat([x[:, :-1], own.to(x)], 1))


class _OwnHeads(Watch):
    """Puts the q, k and v that were made for every head in the place of the layer's."""

    needs_rows = True

    def __init__(self, run: _Run, layer: int):
        self.run, self.layer = run, layer

    def inputs(self, q, k, v):
        own = self.run.heads.pop(self.layer)
        return tuple(own[kind].to(q.device) for kind in KINDS)

    def z(self, z):
        if self.run.parts.writers[self.layer].norm is None:
            self.run.leave_heads(self.layer, z)
        else:
            self.run.z[self.layer] = z
        return z
