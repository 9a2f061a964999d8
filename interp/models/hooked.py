"""Hooks on every module that one pass looks at: which they are follows from the plan and the verified map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from interp.errors import BadInput, Refused
from interp.models.attention import Watch, window
from interp.models.block_map import Write
from interp.models.hooks import (
    BlockInput,
    BlockOutput,
    RunWatch,
    Turns,
    argument,
    read_here,
)
from interp.models.layout import PARTED, PLAIN, Layout, held_inside, shown_inside
from interp.models.nested import inside_others
from interp.models.own_attention import own
from interp.models.plan import Plan
from interp.models.pooling import Pooling
from interp.models.repeated import CallsOnStream
from interp.models.several import Part, attention_calls
from interp.models.spec import Spec, first_tensor, with_first
from interp.models.turned import channels_first, channels_last
from interp.models.windows import in_one_row
from interp.models.write_hooks import Factor, Middle, Opening, write_change
from interp.run.cache import Run
from interp.run.edits import Seen
from interp.sites import ATTENTION_SITES

Change = Callable[[Tensor], Tensor]


def parts_of(module: nn.Module, spec: Spec) -> list[list[nn.Module]]:
    """The modules of each layer: one block, in most models, or several called one after the other."""
    names = [[member.name for member in block.members] or [block.name] for block in spec.blocks]
    return [[module.get_submodule(name) for name in each] for each in names]


@contextmanager
def hooked(
    module: nn.Module,
    spec: Spec,
    layouts: Mapping[int, Layout],
    run: Run,
    plan: Plan,
    *,
    stop_at: int | None = None,
    grad: bool = False,
) -> Iterator[None]:
    """Inside, a forward of `module` on the batch of `run` carries out the plan; what it captures is in the Run's cache.

    Args:
        layouts: those of the layers that attend within windows, for inputs of this shape.
        stop_at: the layer before which it raises `hooks.Stop`; None: it runs through.
        grad: gradients are wanted of what is captured.

    Raises:
        BadInput: a stop before the first block, with nothing to capture there.
    """
    plan.grad = grad
    if stop_at == 0 and not plan.layers_of("embed", "resid_pre"):
        raise BadInput("stop_at=0 runs no block: nothing to capture")
    turns = Turns([block.name for block in spec.blocks]) if spec.shared else None
    with ExitStack() as stack:
        this = _Pass(module, spec, layouts, run, plan, turns, stack)
        _hook_calls(this)
        _hook_turns(this)
        for layer, parts in enumerate(parts_of(module, spec)):
            if stop_at is not None and layer > stop_at:
                break
            _LayerHooks(this, layer).put(parts, stop_at, grad)
        _hook_attention(this)
        yield


@dataclass(frozen=True)
class _Pass:
    """One pass; `stack` takes its hooks off. `inside`: the modules in blocks that it looks at."""

    module: nn.Module
    spec: Spec
    layouts: Mapping[int, Layout]
    run: Run
    plan: Plan
    turns: Turns | None
    stack: ExitStack
    inside: set[str] = field(default_factory=set)

    def touch(self, name: str, layer: int, x: Tensor, start: int = 0) -> Tensor:
        """A site's activation after the edits there, kept if it is captured."""
        for edit in self.plan.edits_at(name, layer):
            x = edit(x, Seen(layer, start, self.run.batch.mask_of(name)))
        if (name, layer) in self.plan.capture:
            x = self.run.cache.put(name, layer, self.plan.kept(x))
        return x


def _hook_attention(this: _Pass) -> None:
    """The window, where something of attention is wanted: each call is shown as that of its layer."""
    plan = this.plan
    shown = plan.statistics is not None or any(name in ATTENTION_SITES for name, _ in plan.sites)
    if not shown and not any(_in_own_attention(this.module, name) for name in this.inside):
        return
    places: dict[nn.Module, list[tuple[int, str | None, Part | None]]] = {}
    for layer, block in enumerate(this.spec.blocks):
        for name, prefix, part in attention_calls(block):
            places.setdefault(this.module.get_submodule(name), []).append((layer, prefix, part))
    left: dict[nn.Module, Iterator[tuple[int, str | None, Part | None]]] = {}

    def begin(*_: Any) -> None:
        left.update((module, iter(calls)) for module, calls in places.items())

    def watch(module: nn.Module) -> Watch:
        if module not in left:
            return Watch()
        expected = next(left[module], None)
        layer, prefix, part = (
            expected or [call for call in places[module] if call[1] is not None][-1]
        )
        if prefix is None:  # what it writes to is at no site
            return Watch()
        now = this.turns.now if this.turns else layer
        axes, layout = this.spec.blocks[now].axes, this.layouts.get(now)
        watching = RunWatch(now, plan, this.touch, this.run, prefix, part, layout is not None)
        if expected is None:
            if watching.looks:
                raise Refused(_more_often(this.module, module, "attends"))
            return Watch()
        return in_one_row(watching, module, axes, layout, this.run.batch.size)

    begin()
    this.stack.callback(this.module.register_forward_pre_hook(begin).remove)
    watching = this.stack.enter_context(inside_others(this.module, watch))
    this.stack.enter_context(window(this.module, watching))


def _hook_calls(this: _Pass) -> None:
    """What refuses a forward that calls a block more often than the probe's did, where something of it is wanted."""
    firsts = [parts[0] for parts in parts_of(this.module, this.spec)]
    wanted, known, called = {firsts[i] for _, i in this.plan.sites}, Counter(firsts), Counter()

    def count(block: nn.Module, args: tuple) -> None:
        called[block] += 1
        if called[block] > known[block]:
            raise Refused(_more_often(this.module, block, "is called"))

    def begin(*_: Any) -> None:
        called.clear()

    for block in wanted:
        this.stack.callback(block.register_forward_pre_hook(count).remove)
    this.stack.callback(this.module.register_forward_pre_hook(begin).remove)


def _more_often(module: nn.Module, part: nn.Module, what: str) -> str:
    """Why a part that attends, or is called, more often in one forward than on the probe is not shown."""
    name = next(name for name, other in module.named_modules() if other is part)
    return (
        f"'{name}' {what} more often than on the probe: the model reads inputs of this shape piece by piece, and "
        "which positions a piece holds is not known; shorter inputs may be one piece"
    )


def _in_own_attention(module: nn.Module, name: str) -> bool:
    """Whether a module stands in one that computes attention itself, which may read its weights and not call it.

    It is called in the window alone.
    """
    ends = [i for i, letter in enumerate(name) if letter == "."]
    return any(module.get_submodule(name[:end]) in own for end in ends)


def _hook_turns(this: _Pass) -> None:
    """What tells which layer is running, where layers share modules."""
    for name in this.turns.layers if this.turns else ():
        enter = partial(lambda of, name, module, args: of.enter(name), this.turns, name)
        block = this.module.get_submodule(name)
        this.stack.callback(block.register_forward_pre_hook(enter).remove)


class _LayerHooks:
    """The hooks of one pass on one layer's modules."""

    def __init__(self, this: _Pass, layer: int):
        self.this, self.layer = this, layer
        self.module, self.spec = this.module, this.spec
        self.block, self.layout = this.spec.blocks[layer], this.layouts.get(layer)
        self.calls = CallsOnStream(self.block, this.spec.hidden)
        self.touch = this.touch
        self.n_read = 0
        self.on = partial(this.turns.only, layer) if this.turns else _as_it_is

    def put(self, parts: list[nn.Module], stop_at: int | None, grad: bool) -> None:
        """Put them on the layer's modules, the first and last of which are among `parts`."""
        this, layer, block, on = self.this, self.layer, self.block, self.on
        pre = BlockInput(
            *(layer, self.touch, this.plan, this.run, self.spec),
            stop=stop_at == layer,
            grad=grad and layer == 0,
        )
        last = stop_at == layer + 1 == self.spec.n_layers
        of_post = layer, self.touch, this.run, this.plan, block.axes
        post = BlockOutput(
            *of_post,
            stop=last,
            pre=pre if block.adds else None,
            copied=block.returns in self.spec.copies,
        )
        pre.needed |= block.adds and post.needed
        if any(where == layer for _, where in this.plan.sites):
            begun = on(self._begun)
            self._until_done(parts[0].register_forward_pre_hook(begun, with_kwargs=True))
            if block.placed:
                whole = on(self._require_all_parts)
                self._until_done(parts[0].register_forward_pre_hook(whole, with_kwargs=True))
        if pre.needed:
            self._until_done(parts[0].register_forward_pre_hook(on(pre), with_kwargs=True))
        if block.repeated:
            begin = on(self.calls.begin)
            self._until_done(parts[0].register_forward_pre_hook(begin, with_kwargs=True))
        if block.W_out and self._wants("mlp_post"):
            self._on_input(block.W_out, partial(self.touch, "mlp_post", layer))
        for name, module, write in self._outputs():
            if self._wants(name):
                factor = 1.0 if write is None else self._factor(write)
                self._on_output(module, write_change(name, layer, factor, self.touch))
        if block.before_mid and self._wants("resid_mid"):
            self._on_middle(pre)
        if post.needed or self.spec.tuple_blocks:
            self._until_done(parts[-1].register_forward_hook(on(post)))

    def _begun(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note that the layer runs, and on how many positions of all rows."""
        self.this.plan.ran.add(self.layer)
        if self.block.axes == PLAIN:
            self.n_read = argument(args, kwargs, self.spec.hidden).shape[:-1].numel()

    def _require_all_positions(self, name: str, x: Tensor) -> None:
        """Refused where a module that is handed positions in one row is handed some of them: whose is not known."""
        reshapes = self.block.starts_stage or self.block.ends_stage or self.block.reshapes_behind
        if x.ndim == 2 and self.n_read and not reshapes and len(x) != self.n_read:
            raise Refused(
                f"'{name}' sees {len(x)} of the {self.n_read} positions of these inputs, and saw all on the probe: "
                "which they are is not known (tokens of another kind may go elsewhere); give inputs of one kind, or "
                "name a site of the stream"
            )

    def _require_all_parts(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Refused where the block reads fewer parts than the inputs have."""
        x, place = argument(args, kwargs, self.spec.hidden), self.block.placed[0]
        rows = x.shape[:2].numel() if self.block.axes == PARTED else x.shape[0]
        place.require(self.block.name, rows, self.this.run.batch.size, of=place.n_parts)

    def _wants(self, name: str) -> bool:
        return self.this.plan.wants(name, self.layer)

    def _until_done(self, hook: RemovableHandle) -> None:
        self.this.stack.callback(hook.remove)

    def _outputs(self) -> Iterator[tuple[str, str, Write | None]]:
        """(site, module, write) of the sites that are a module's output, or what is written of it."""
        block, crosses = self.block, self.block.sources
        outs = [("attn_out", block.attn_out), ("mlp_out", block.mlp_out)]
        outs += [(f"{of}out", cross.out) for of, cross in crosses]
        for name, module in outs:
            if module is not None:
                yield name, module, None
        writes = [("attn_write", block.attn_write), ("mlp_write", block.mlp_write)]
        writes += [(f"{of}write", cross.write) for of, cross in crosses]
        for name, write in writes:
            if write is not None:
                yield name, write.module, write

    def _factor(self, write: Write) -> Factor:
        """What a write multiplies its module's output with; a gate is seen when its module returns it."""
        fixed = write.factor(self.module)
        if write.gate is None:
            return fixed
        opening = Opening(write.gate, fixed, self.this.run.batch.size, self.block.d_model)
        module = self.module.get_submodule(write.gate.module)
        self.this.inside.add(write.gate.module)
        self._until_done(module.register_forward_hook(self.on(opening.see)))
        return opening

    def _on_middle(self, pre: BlockInput) -> None:
        """Hooks for resid_mid: on the norm that returns it, or on the writes that make it."""
        block = self.block
        if block.norm_mid is not None:
            change = write_change("resid_mid", self.layer, 1.0, self.touch)
            self._on_output(block.norm_mid, change)
            return
        factors = [self._factor(write) for write in block.before_mid]
        middle = Middle(self.layer, factors, self.touch, pre, block.carry_mid)
        if block.norm_pre is not None:
            self._on_output(block.norm_pre, middle.keep_normed)
        for write in block.before_mid[:-1]:
            self._on_output(write.module, middle.keep, write.pooling)
        self._on_output(block.before_mid[-1].module, middle.change)

    def _on_input(self, name: str, change: Change) -> None:
        """Hook a module's input, seen as [batch pos width] even where the block flattened it."""
        axes, size = self.block.axes, self.this.run.batch.size

        def hook(module: nn.Module, args: tuple) -> Any:
            x = args[0]
            if not self.calls.has(name, x, change):
                return None
            self._require_all_positions(name, x)
            new = change(shown_inside(read_here(x), axes, size))
            return None if new is x else (held_inside(new, axes, x.shape), *args[1:])

        self.this.inside.add(name)
        self._until_done(self.module.get_submodule(name).register_forward_pre_hook(self.on(hook)))

    def _on_output(self, name: str, change: Change, pooling: Pooling | None = None) -> None:
        """Hook a module's output, seen as [batch pos d_model] even where the block flattened or cut it.

        What it writes once that is pooled is read alone.
        """
        block, layout, size = self.block, self.layout, self.this.run.batch.size

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            x = first_tensor(output)
            assert x is not None
            if not self.calls.has(name, x, change):
                return None
            cut = None if layout is None else layout.holding(name, x, size)
            if cut is not None:
                seen = cut.positions(x.flatten(1, -2))
            elif name in block.turned:
                seen = channels_last(x)
            else:
                self._require_all_positions(name, x)
                seen = shown_inside(x, block.axes, size)
            if pooling is not None:
                change(pooling(x if cut is None else seen))
                return None
            if name in self.spec.copies:  # the block changes this tensor in place later on
                seen = seen.clone()
            new = change(seen)
            if new is x or (new is seen and cut is not None and not torch.is_grad_enabled()):
                return None
            # A view or a copy goes on in place of x, so that what is captured has a gradient; where
            # the block writes into it, it gets a copy of its own.
            new = new.clone() if name in self.spec.copies else new
            if cut is not None:
                new = cut.windows(new, x.flatten(1, -2))
                return with_first(output, new.reshape(x.shape))
            if name in block.turned:
                return with_first(output, channels_first(new, x.shape))
            return with_first(output, held_inside(new, block.axes, x.shape))

        self.this.inside.add(name)
        self._until_done(self.module.get_submodule(name).register_forward_hook(self.on(hook)))


def _as_it_is(hook: Callable[..., Any]) -> Callable[..., Any]:
    return hook
