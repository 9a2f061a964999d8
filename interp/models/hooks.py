"""What each hook of a pass does: it shows one call's tensors to what captures and edits them, or stops the pass.

`hooked` puts them on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import BadInput, Refused
from interp.models.attention import Watch
from interp.models.layout import held, require_rows_first, shown
from interp.models.plan import Plan
from interp.models.several import HEADS, Part
from interp.models.spec import Spec, first_tensor, with_first
from interp.run.cache import Run
from interp.run.edits import Seen
from interp.sites import SELF_SITES, Site


class Stop(Exception):
    """Raised inside a forward when nothing after this point is needed."""


class RunWatch(Watch):
    """Shows one attention call's tensors to `touch`, heads behind positions.

    `row_by_row`: one that has another number of rows than inputs (`n_rows`) is refused, and not shown as it is.
    `own_first`: keys that are no position's, such as padding of windows, come behind those that are.
    """

    row_by_row = False

    def __init__(
        self,
        layer: int,
        plan: Plan,
        touch: Callable[..., Tensor],
        run: Run,
        prefix: str = "",
        part: Part | None = None,
        own_first: bool = False,
    ):
        self.layer, self.plan, self.touch, self.run = layer, plan, touch, run
        self.prefix, self.part, self.own_first = prefix, part, own_first
        self.statistics = plan.statistics if prefix == "" else None
        self.needs_rows = self.wants("scores") or self.wants("pattern")
        self.at_once = part is not None and part.place is not None
        self._whole: dict[str, list[Tensor]] = {}
        self._n_queries = self._n_keys = 0

    @property
    def looks(self) -> bool:
        """Whether anything is read or changed of this call."""
        names = (self.prefix + name for name in SELF_SITES)
        return self.statistics is not None or self.plan.wants_any(names, self.layer)

    def wants(self, which: str) -> bool:
        """Whether something is read or changed of "scores" or of "pattern"."""
        of_rows = self.statistics is not None and which == "pattern"
        return of_rows or self.plan.wants(self.prefix + which, self.layer)

    def inputs(self, q, k, v):
        self._n_queries, self._n_keys = q.shape[2], k.shape[2]
        if self.statistics is not None and (self.part is None or self.part.place is None):
            tokens = "input_ids" in self.run.batch.inputs  # before what a model puts besides
            self.statistics.require(self.layer, self._n_queries, or_more=tokens)
            if self._n_keys > self._n_queries and not (tokens or self.own_first):
                raise Refused(
                    f"row statistics take a key's number for its position; layer {self.layer} has {self._n_keys} keys "
                    f"for {self._n_queries} positions, and which are the positions' own is not known: capture 'pattern'"
                )
        if self.row_by_row and self.looks and len(q) != self.n_rows:
            raise BadInput(
                f"'{self.prefix}q.{self.layer}' has {len(q)} rows for {self.n_rows} inputs, which do not see each "
                "other (several prompts an image, perhaps): give each as an input of its own"
            )
        if self.part is not None and self.part.place is not None and self.looks:
            for name, x in (("q", q), ("k", k)):
                self.part.place.require(f"{self.prefix}{name}.{self.layer}", len(x), self.n_rows)
        seen = []
        for which, x in (("q", q), ("k", k), ("v", v)):
            name = self.prefix + which
            if self.plan.wants(name, self.layer):
                x = self._touched(name, x.transpose(1, 2)).transpose(1, 2)
            seen.append(x)
        return tuple(seen)

    def scores(self, scores, start):
        return self._chunk(self.prefix + "scores", scores, start, fill=-torch.inf)

    def pattern(self, pattern, start):
        pattern = self._chunk(self.prefix + "pattern", pattern, start, fill=0.0)
        if self.statistics is not None:
            mask = self.run.batch.mask
            n = self._n_queries if mask is None else mask.shape[1]
            of_positions = pattern[
                :, :, : n - start, :n
            ]  # what is no position's comes behind these
            if self.part is None:
                self.statistics.update(self.layer, of_positions, start)
            elif self.part.place is not None:
                self.statistics.update(self.layer, self.part.spread(pattern), start)
            elif self.part.along == HEADS or self.part.index == 0:
                self.statistics.update(self.layer, self.part.spread(of_positions), start)
        return pattern

    def z(self, z):
        for name, chunks in self._whole.items():
            whole = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)
            self._keep(name, whole)
        name = self.prefix + "z"
        return self._touched(name, z) if self.plan.wants(name, self.layer) else z

    def _touched(self, name: str, x: Tensor) -> Tensor:
        if self.part is None:
            return self.touch(name, self.layer, x)
        x = self._edited(name, x, 0)
        if (name, self.layer) in self.plan.capture:
            x = self._with_gradient(name, x)
            self._keep(name, x)
        return x

    def _with_gradient(self, name: str, x: Tensor) -> Tensor:
        """x of one of several calls, on a way to the logits that leads through the layer's whole site, which is
        joined beside it: where gradients are wanted, zeros in the shape of the whole stand in for it."""
        if self.part is None or not torch.is_grad_enabled():
            return x
        if self.part.first:
            zeros = torch.zeros_like(self.part.among(name, x), requires_grad=True)
            self.run.stand_ins[name, self.layer] = zeros
        return x + self.part.mine(name, self.run.stand_ins[name, self.layer], x).to(x.device)

    def _edited(self, name: str, x: Tensor, start: int) -> Tensor:
        for edit in self.plan.edits_at(name, self.layer):
            seen = Seen(self.layer, start, self.run.batch.mask_of(name))
            x = edit(x, seen) if self.part is None else self.part.edited(edit, x, seen, name)
        return x

    def _keep(self, name: str, x: Tensor) -> None:
        if self.part is not None:
            x = self.part.joined(name, lambda: self.run.cache[Site(name, self.layer)], x)
        self.run.cache.put(name, self.layer, x)

    def _chunk(self, name: str, x: Tensor, start: int, fill: float) -> Tensor:
        x = self._edited(name, x, start)
        if (name, self.layer) in self.plan.capture:
            missing = self._n_keys - x.shape[-1]
            if torch.is_grad_enabled() and not missing and self.part is None:  # all rows at once
                return self.run.cache.put(name, self.layer, self.plan.kept(x))
            x = self._with_gradient(name, x)
            whole = nn.functional.pad(x, (0, missing), value=fill) if missing else x
            self._whole.setdefault(name, []).append(whole)
        return x


class BlockInput:
    """Pre-hook of a block: embed, resid_pre, and what resid_mid needs to know."""

    def __init__(
        self,
        layer: int,
        touch,
        plan: Plan,
        run: Run,
        spec: Spec,
        *,
        stop: bool,
        grad: bool,
    ):
        self.layer, self.touch, self.plan, self.run, self.stop, self.grad = (
            layer,
            touch,
            plan,
            run,
            stop,
            grad,
        )
        self.spec = spec
        self.resid: Tensor | None = None
        self.given: Tensor | None = None
        names = ("resid_pre", "embed") if layer == 0 else ("resid_pre",)
        self.needed = stop or grad or plan.wants_any((*names, "resid_mid"), layer)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        axes, held_as = self.spec.blocks[self.layer].axes, argument(args, kwargs, self.spec.hidden)
        self.run.held[self.layer] = held_as.shape
        x = given = shown(held_as, axes, self.run.batch.size)
        self.given = given
        if self.grad and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        for name in ("embed", "resid_pre") if self.layer == 0 else ("resid_pre",):
            if self.plan.wants(name, self.layer):
                x = self.touch(name, self.layer, read_here(x))
        self.resid = x
        if self.stop:
            raise Stop
        if x is given and untouched(x, held_as):
            return None
        return with_hidden(args, kwargs, x, self.spec, self.layer)


class BlockOutput:
    """Forward hook of a block: resid_post, the extras a replay needs, and stopping early.

    `pre`: of a block to whose output code outside adds what it was given, which edits of resid_pre do not reach: what
    it returns makes up for that. `copied`: code outside changes what the block returned in place, later on.
    """

    def __init__(
        self,
        layer: int,
        touch,
        run: Run,
        plan: Plan,
        axes: tuple[str, ...],
        *,
        stop: bool,
        pre: BlockInput | None = None,
        copied: bool = False,
    ):
        self.layer, self.touch, self.run, self.plan, self.stop = layer, touch, run, plan, stop
        self.axes, self.pre, self.copied = axes, pre, copied
        self.needed = stop or plan.wants("resid_post", layer) or (pre is not None and pre.needed)

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        old = first_tensor(output)
        assert old is not None
        x = given = shown(old.clone() if self.copied else old, self.axes, self.run.batch.size)
        read = resid = None
        if self.pre is not None and self.pre.resid is not None:
            read, resid = self.pre.given, self.pre.resid
            x = given = resid.to(x.device) + x
        if isinstance(output, tuple):
            self.run.extras[self.layer] = output[1:]
        if self.plan.wants("resid_post", self.layer):
            x = self.touch("resid_post", self.layer, x)
        if self.stop:
            raise Stop
        if x is given and resid is read and untouched(old, x):
            return None
        x = x if read is None else x - read.to(x.device)
        new = held(x, self.axes, old.shape)
        return with_first(output, new.clone() if self.copied else new)


def read_here(x: Tensor) -> Tensor:
    """x as one module reads it: with gradients a view, since others that read the same tensor do not read the site."""
    return x.view_as(x) if torch.is_grad_enabled() and not x.is_leaf else x


def untouched(x: Tensor, written: Tensor) -> bool:
    """Whether x may go on in place of what was shown of it: with gradients only if it is the same tensor."""
    return written is x or not torch.is_grad_enabled()


class Turns:
    """Which layer is running, for models whose layers share modules: hooks act in their own layer only."""

    def __init__(self, names: list[str]):
        self.layers: dict[str, list[int]] = {}
        for layer, name in enumerate(names):
            self.layers.setdefault(name, []).append(layer)
        self.called = dict.fromkeys(self.layers, 0)
        self.now = -1

    def enter(self, name: str) -> None:
        """The block called `name` begins."""
        layers = self.layers[name]
        self.now = layers[self.called[name] % len(layers)]
        self.called[name] += 1

    def only(self, layer: int, hook: Callable[..., Any]) -> Callable[..., Any]:
        """`hook`, acting while `layer` runs."""
        return lambda *args: hook(*args) if self.now == layer else None


def hidden_of(args: tuple, kwargs: dict, spec: Spec, layer: int) -> Tensor:
    """The hidden state [batch pos d_model] among a block's arguments, at `spec.hidden`.

    For what calls blocks or their modules itself.

    Raises:
        Refused: the blocks hold rows of the batch elsewhere than first.
    """
    require_rows_first([spec.blocks[layer].axes], "calling blocks by themselves")
    x = argument(args, kwargs, spec.hidden)
    return shown(x, spec.blocks[layer].axes, x.shape[0])


def with_hidden(
    args: tuple,
    kwargs: dict,
    hidden: Tensor,
    spec: Spec,
    layer: int,
    like: torch.Size | None = None,
) -> tuple[tuple, dict]:
    """A block's arguments with another hidden state [batch pos d_model] at `spec.hidden`, held as in shape `like`."""
    key = spec.hidden
    like = argument(args, kwargs, key).shape if like is None else like
    return with_argument(args, kwargs, key, held(hidden, spec.blocks[layer].axes, like))


def argument(args: tuple, kwargs: dict, key: int | str) -> Tensor:
    """One argument of a call, by index or keyword."""
    return args[key] if isinstance(key, int) else kwargs[key]


def with_argument(args: tuple, kwargs: dict, key: int | str, x: Tensor) -> tuple[tuple, dict]:
    """A call's arguments with another one, by index or keyword."""
    if isinstance(key, int):
        return (*args[:key], x, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: x}
