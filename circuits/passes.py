"""One forward seen as senders and receivers: what each sender wrote, what each receiver read.

Attention runs under the window with k and v once for every query head, so that each has a gradient and
a value of its own; MLPs read a view of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuits.graph import Graph
from circuits.measure import METRICS, Measure, measure_of
from circuits.reads import find_reads, float_input, with_float_input
from circuits.stream import HeadWrites, Reads, Writes, frozen, head_writers
from interp.data.pairs import Pairs
from interp.models.attention import Watch, window
from interp.models.hooks import Stop, hidden_of, with_hidden
from interp.models.model import Model
from interp.models.spec import first_tensor, with_first
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.run.edits import Edit

BUFFER_BYTES = 192 * 2**20
"""Size of all senders' d_model-wide writes held at once; more prompts are done in turns."""


class HeadsWatch(Watch):
    """Keeps q, k, v as the layer made them, k and v once for each query head, and z; all on `home`."""

    needs_rows = True

    def __init__(self, home: torch.device) -> None:
        self.home = home
        self.made: dict[str, Tensor] = {}
        self.own: dict[str, Tensor] = {}
        self.out = torch.empty(0)

    def inputs(self, q, k, v):
        group, there = q.shape[1] // k.shape[1], q.device
        q, k, v = (x.to(self.home) for x in (q, k, v))
        self.made = {"q": q, "k": k, "v": v}
        self.own = {
            "q": q,
            "k": k if group == 1 else k.repeat_interleave(group, dim=1),
            "v": v if group == 1 else v.repeat_interleave(group, dim=1),
        }
        return tuple(x.to(there) for x in self.own.values())

    def z(self, z):
        self.out = z.to(self.home)
        return z


@dataclass
class Pass:
    """What one forward left: by layer its attention call, leaf outputs, and how the MLP read the stream."""

    run: Run | None = None
    heads: dict[int, HeadsWatch] = field(default_factory=dict)
    leaves: dict[str, Tensor] = field(default_factory=dict)
    mlp_inputs: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    calls: dict[int, tuple[tuple, dict]] = field(default_factory=dict)

    def __getitem__(self, site: str) -> Tensor:
        assert self.run is not None
        return self.run.cache[site]


@dataclass(frozen=True)
class Parts:
    """What is known of a model before any prompt: its graph, and how its parts read and write."""

    model: Model
    graph: Graph
    reads: Sequence[Reads]
    writers: Mapping[int, HeadWrites]

    @staticmethod
    def of(model: Model) -> Parts:
        """The parts; Refused where they cannot be told apart."""
        graph = Graph.of(model)
        return Parts(model, graph, find_reads(model), head_writers(model, graph))

    @property
    def notes(self) -> tuple[str, ...]:
        """Layers whose heads are run one receiver at a time, with the reason."""
        whole = [(layer, reads.why) for layer, reads in enumerate(self.reads) if reads.why]
        if not whole:
            return ()
        return (
            f"{len(whole)} of {len(self.reads)} layers compute q, k and v of every receiver from the block "
            f"itself (exact, slower): {whole[0][1]}",
        )


@contextmanager
def _watched(parts: Parts, seen: Pass, *, grad: bool) -> Iterator[None]:
    """Hooks of a Pass: attention under the window, outputs of the projections, inputs of the MLPs."""
    model = parts.model
    layer_of = {
        model.module.get_submodule(block.attention): layer
        for layer, block in enumerate(model.spec.blocks)
        if block.attention
    }

    def listen(module: nn.Module) -> Watch:
        if module not in layer_of:
            return Watch()
        return seen.heads.setdefault(layer_of[module], HeadsWatch(model.device))

    def leaf(name: str):
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            made = first_tensor(output)
            assert made is not None
            seen.leaves[name] = made.to(model.device)
            return with_first(output, seen.leaves[name].to(made.device))

        return hook

    def mlp(layer: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            value = float_input(args, kwargs)
            assert value is not None
            kept = value.to(model.device)
            view = kept.view_as(kept)  # a node of its own: its gradient is the MLP's alone
            seen.mlp_inputs.setdefault(layer, []).append((kept, view))
            return with_float_input(args, kwargs, view.to(value.device))

        return hook

    def call(layer: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.calls[layer] = (args, kwargs)

        return hook

    with ExitStack() as stack:
        stack.enter_context(window(model.module, listen))
        for layer, reads in enumerate(parts.reads if grad else ()):
            for name in {projection.module for projection in reads.projections.values()}:
                module = model.module.get_submodule(name)
                stack.callback(module.register_forward_hook(leaf(name)).remove)
            for name in reads.mlp_entries:
                module = model.module.get_submodule(name)
                hook = module.register_forward_pre_hook(mlp(layer), with_kwargs=True)
                stack.callback(hook.remove)
            if reads.why:
                block = model.blocks[layer]
                stack.callback(
                    block.register_forward_pre_hook(call(layer), with_kwargs=True).remove
                )
        yield


def run_pass(
    parts: Parts,
    batch: Batch,
    *,
    edits: Sequence[Edit] = (),
    grad: bool = False,
    capture: Sequence[str] = (),
    logits: bool = True,
) -> Pass:
    """One forward under the window, last position's logits only; with `grad`, its graph is kept."""
    model, seen = parts.model, Pass()
    sites = {"embed", "mlp_write", *capture}
    sites |= {f"attn_out.{layer}" for layer, writer in parts.writers.items() if writer.norm}
    if grad:
        sites |= {"resid_pre", f"resid_post.{model.n_layers - 1}"}
    sites = {site for site in sites if "." in site or model.layers_with(site)}
    read = torch.tensor([batch.ids.shape[1] - 1]) if logits else False
    with frozen(model.module), _watched(parts, seen, grad=grad):
        seen.run = model.run(batch, capture=sorted(sites), edits=edits, logits=read, grad=grad)
    return seen


def writes_of(parts: Parts, seen: Pass) -> Writes:
    """What every sender wrote in a pass, without its graph."""
    writes = Writes(seen["embed"].detach().float())
    for layer, writer in parts.writers.items():
        writes.z[layer] = seen.heads[layer].out.detach()
        if writer.norm is not None:
            writes.sigma[layer] = writer.norm.sigma(seen[f"attn_out.{layer}"].detach().float())
    for sender in parts.graph.senders:
        if sender.kind == "mlp":
            writes.mlp[sender.layer] = seen[f"mlp_write.{sender.layer}"].detach().float()
    return writes


class _Stopped(Watch):
    """Keeps q, k and v of one call and stops there."""

    def __init__(self) -> None:
        self.made: dict[str, Tensor] = {}

    def inputs(self, q, k, v):
        self.made = {"q": q, "k": k, "v": v}
        raise Stop


def heads_of(
    model: Model, layer: int, call: tuple[tuple, dict], stream: Float[Tensor, "rows pos d_model"]
) -> dict[str, Tensor]:
    """q, k, v [rows heads pos d_head] that a block makes of `stream`: several copies of a batch.

    `call` is what the block was called with; its other tensors are repeated for every copy.
    """
    block, watch = model.blocks[layer], _Stopped()
    args, kwargs = call
    old = hidden_of(args, kwargs, model.spec, layer)
    size, times = old.shape[0], stream.shape[0] // old.shape[0]

    def again(x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(again(part) for part in x)
        if isinstance(x, Tensor) and x.ndim > 1 and x.shape[0] == size and size > 1:
            return x.repeat(times, *[1] * (x.ndim - 1))
        return x

    args, kwargs = (
        tuple(map(again, args)),
        {name: again(value) for name, value in kwargs.items()},
    )
    args, kwargs = with_hidden(args, kwargs, stream, model.spec, layer)
    # Some models hand their blocks a cache of keys even when told not to use one.
    kwargs = {name: None if name.startswith("past_key") else x for name, x in kwargs.items()}
    with window(block, lambda module: watch), suppress(Stop):
        block.forward(*args, **kwargs)  # not __call__: hooks on the block are for its real call
    return {kind: x.to(stream.device) for kind, x in watch.made.items()}


# --- both sides of a task --------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """Some pairs that are run together: their clean and corrupted writes."""

    rows: slice
    pairs: Pairs
    clean: Writes
    corrupted: Writes


@dataclass(frozen=True)
class Task:
    """A task on a model: its parts, its metric with both ends, and the writes of both sides."""

    parts: Parts
    measure: Measure
    sides: tuple[Side, ...]

    @property
    def pairs(self) -> Pairs:
        return self.measure.pairs

    def metric(self, side: Side, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        """The metric of some pairs."""
        function = METRICS[self.measure.metric][1]
        return function(logits, side.pairs, self.measure.clean_logits[side.rows])


def task_of(parts: Parts, pairs: Pairs, metric: str = "logit_diff") -> Task:
    """Both sides run once: writes, and the metric's ends.

    Raises: BadInput: an unknown metric, one that is not finite, or the same on both sides.
    """
    n_senders, d_model = parts.graph.shape[0], parts.model.spec.d_model
    at_once = max(1, BUFFER_BYTES // (4 * n_senders * d_model * pairs.length))
    sides, logits = [], ([], [])
    for start in range(0, len(pairs), at_once):
        rows = slice(start, min(start + at_once, len(pairs)))
        some = pairs.rows(rows)
        writes = []
        for batch, found in zip((some.clean_batch, some.corrupted_batch), logits, strict=True):
            seen = run_pass(parts, batch)
            writes.append(writes_of(parts, seen))
            assert seen.run is not None and seen.run.logits is not None
            found.append(seen.run.logits[:, -1].float())
        sides.append(Side(rows, some, *writes))
    clean, corrupted = (torch.cat(found) for found in logits)
    return Task(parts, measure_of(pairs, metric, clean, corrupted), tuple(sides))
