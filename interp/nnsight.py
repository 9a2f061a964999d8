"""Sites by name inside nnsight traces, and what of ours works where a model runs on NDIF.

nnsight sees the inputs and outputs of modules. Most sites are one of these; `address` says which, `at`
reads and writes it inside `with model.trace(...)`. What lies inside the attention function is not. A
model that runs elsewhere is opened with `interp.load(model, remote=True)` (see `interp.remote`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from interp.errors import BadInput, Refused
from interp.models.layout import PLAIN, require_rows_first
from interp.models.model import Model
from interp.models.probe import probe, probe_batch
from interp.models.recording import Recording, record
from interp.models.sources.nnsight_model import is_nnsight
from interp.models.spec import Spec
from interp.sites import Site
from interp.skeleton import skeleton

INSIDE_ATTENTION = (
    "it is inside the attention function, and nnsight sees inputs and outputs of modules only"
)
PASSES = (
    ("resid_pre, resid_post, embed", True, "input and output of a block"),
    ("attn_out, attn_write, mlp_out, mlp_write", True, "output of the module that writes"),
    ("z, mlp_post", True, "input of the output projection"),
    ("resid_mid (capture)", True, "added up here from resid_pre and attn_write"),
    ("logits, whole or of some positions", True, "output of the model; positions are taken there"),
    ("Edit.zero, scale, add, patch, mean, resample", True, "sent as numbers and masks"),
    ("Edit.apply with a function of yours", False, "code of yours does not run on that machine"),
    ("edits of resid_mid", False, "no module's input or output: edit attn_write instead"),
    ("q, k, v, scores, pattern; statistics", False, INSIDE_ATTENTION),
    (
        "replay: patching, path patching, circuits",
        False,
        "a block cannot be called again on its own",
    ),
    ("gradients: edge attribution, training", False, "the graph stays on that machine"),
    ("weights: logit lens, direct attribution, W_O", False, "weights do not leave that machine"),
    (
        "registered analyses and their reports",
        False,
        "they need one of these, and name a weights hash",
    ),
)
"""(pass, whether a remote model does it, how or why not)."""


def passes() -> list[dict[str, Any]]:
    """What works on a model that runs on NDIF, and why the rest does not: one row a pass.

    >>> passes()[2]
    {'pass': 'z, mlp_post', 'remote': True, 'why': 'input of the output projection'}
    """
    return [{"pass": what, "remote": works, "why": why} for what, works, why in PASSES]


# --- addresses ---------------------------------------------------------------------------------------


class _Stays:
    """An object that must not travel with a remote trace: interp is not installed where it would arrive,
    and nnsight's simulation would import a second copy of it, which takes over our attention function."""

    def __reduce__(self) -> Any:
        raise BadInput(
            f"{type(self).__name__} objects do not travel with a remote trace: take the strings "
            "address(...).path and .side out of it before the `with`, and write model.get(path).input"
        )


@dataclass(frozen=True)
class Called:
    """One module's call on the probe: when it returned, and the shapes of what it read and returned."""

    order: int
    read: torch.Size | None
    returned: torch.Size | None


@dataclass(frozen=True)
class Address(_Stays):
    """Where a site is in an nnsight model.

    Attributes:
        path: of the module, as `model.get(path)` takes it. side: "input" or "output".
        scale: the site is this many times that value. heads: (n_heads, d_head) into which its last
            axis is cut, None where a site has no heads. head: the one asked for. order: of the forward.
    """

    path: str
    side: str
    scale: float = 1.0
    heads: tuple[int, int] | None = None
    head: int | None = None
    order: float = 0.0


def address(model: Any, site: str | Site) -> Address:
    """Where a site of one layer is in an nnsight model.

    In a trace that runs remotely, spell it with strings: `path = address(model, "z.5").path` before the
    `with`, `model.get(path).input` in it, as objects of ours are not known there. In a local one,
    `at(model, site)` reads and writes it.

    Args:
        model: an nnsight model, a Model of one, or a RemoteModel.
        site: "z.5.1", "resid_post.3", "blocks.3.hook_attn_out".

    Raises:
        BadInput: no such site or layer. Refused: a site that no module's input or output is.
    """
    return addresses(model)[Site.parse(site)]


def at(model: Any, site: str | Site) -> Place:
    """A site of one layer, to be read and written inside `with model.trace(...)`.

        place = interp.nnsight.at(model, "z.5.1")
        with model.trace("Hello"):
            z = place.get().save()        # [batch pos d_head]
            place.set(torch.zeros_like(z))

    nnsight serves values in the order of the forward pass: read them in that order.

    Raises:
        BadInput: no such site or layer. Refused: a site that no module's input or output is, or that the module
            holds in another shape than `cache[site]` (positions flattened into rows, or cut into windows).
    """
    return Place(model, addresses(model).as_shown(Site.parse(site)))


class Place(_Stays):
    """One site of an nnsight model; see `at`."""

    def __init__(self, model: Any, where: Address):
        self._model, self.address = model, where

    def get(self) -> Tensor:
        """The activation, as `cache[site]` has it; only inside a trace."""
        x = self._whole()
        return x if self.address.head is None else x[..., self.address.head, :]

    def set(self, value: Tensor | float) -> None:
        """Put `value` in its place; only inside a trace."""
        where, module = self.address, self._model.get(self.address.path)
        new = self._whole().clone()
        if where.head is None:
            new[...] = value
        else:
            new[..., where.head, :] = value
        old = getattr(module, where.side)
        first = old[0] if isinstance(old, tuple) else old
        new = (new / where.scale).reshape(first.shape)
        setattr(module, where.side, (new, *old[1:]) if isinstance(old, tuple) else new)

    def _whole(self) -> Tensor:
        x = getattr(self._model.get(self.address.path), self.address.side)
        x = (x[0] if isinstance(x, tuple) else x) * self.address.scale
        return x if self.address.heads is None else x.unflatten(-1, self.address.heads)


class Addresses:
    """Every site that is a module's input or output, by layer, in the order of the forward pass."""

    def __init__(self, spec: Spec, calls: dict[str, Called], id: str):
        self.spec, self.calls, self.id = spec, calls, id

    def as_shown(self, site: Site) -> Address:
        """Where a site is that its module holds as `cache[site]` has it, before heads are told apart.

        Raises:
            Refused: it holds it in another shape.
        """
        where = self[site]
        called = self.calls[where.path]
        held = called.read if where.side == "input" else called.returned
        places = self.calls[self.spec.blocks[site.layer or 0].returns].returned
        if held is None or places is None or len(held) != 3 or held[:2] != places[:2]:
            raise Refused(
                f"{self.id} holds '{site}' as {None if held is None else tuple(held)} in the {where.side} of "
                f"'{where.path}', not [batch pos width]: read that module yourself, or capture '{site}' in a run"
            )
        return where

    def __getitem__(self, site: Site) -> Address:
        for name in (site.name, f"{site.name}.{site.layer}"):
            if name in self.spec.refused:
                raise Refused(f"{self.id} cannot give '{site}': {self.spec.refused[name]}")
        layer = 0 if site.name == "embed" else site.layer
        if layer is None:
            raise BadInput(f"'{site}' names no layer: write '{site}.5'")
        if layer >= self.spec.n_layers:
            raise BadInput(f"no site '{site}': layers are 0 to {self.spec.n_layers - 1}")
        block, head = self.spec.blocks[layer], site.head
        require_rows_first([block.axes], "a trace")
        if head is not None and head >= block.n_heads:
            raise BadInput(f"no site '{site}': heads are 0 to {block.n_heads - 1}")
        heads = (block.n_heads, block.d_head)
        places: dict[str, tuple[str | None, str, float, tuple[int, int] | None]] = {
            "embed": (block.name, "input", 1.0, None),
            "resid_pre": (block.name, "input", 1.0, None),
            "resid_post": (block.returns, "output", 1.0, None),
            "z": (None if block.between else block.W_O, "input", 1.0, heads),
            "attn_out": (block.attn_out, "output", 1.0, None),
            "mlp_post": (block.W_out, "input", 1.0, None),
            "mlp_out": (block.mlp_out, "output", 1.0, None),
        }
        for name, write in (("attn_write", block.attn_write), ("mlp_write", block.mlp_write)):
            if write is not None and write.plain:
                places[name] = (write.module, "output", write.scale, None)
        path, side, scale, cut = places.get(site.name, (None, "", 1.0, None))
        if site.name in ("embed", "resid_pre") and self.spec.hidden != 0:
            path = None  # nnsight's `input` is the first argument
        if site.name == "resid_post" and block.adds:
            path = None  # code outside adds it to the stream
        if path in block.repeated | block.turned:
            path = None  # called on other things, too, or shown with its axes in another order
        if path in (block.name, block.returns) and self.spec.hidden_axes != PLAIN:
            path = None  # shown in another shape than the block's
        if path is None or self.spec.shared:
            inside = site.name in ("q", "k", "v", "scores", "pattern")
            reason = INSIDE_ATTENTION if inside else "no one module's input or output is this site"
            raise Refused(f"{self.id} cannot give '{site}' in a trace: {reason}")
        return Address(path, side, scale, cut, head, self._order(path, side, layer))

    def _order(self, path: str, side: str, layer: int) -> float:
        """When the value is there: modules are numbered as they return."""
        if side == "output":
            return self.calls[path].order
        if path != self.spec.blocks[layer].name:
            return self.calls[path].order - 0.5
        return self.calls[self.spec.blocks[layer - 1].returns].order + 0.5 if layer else 0.0


def addresses(model: Any) -> Addresses:
    """All addresses of an nnsight model, or of a Model."""
    if isinstance(held := getattr(model, "addresses", None), Addresses):
        return held
    if isinstance(model, Model):
        seen = record(model.module, probe_batch(model.module))
        return Addresses(model.spec, _calls(seen), model.id)
    if not is_nnsight(model):
        raise BadInput(f"cannot find sites in a {type(model).__name__}; wanted an nnsight model")
    return Addresses(*mapped(model), id=name_of(model))


def mapped(model: Any) -> tuple[Spec, dict[str, Called]]:
    """Spec of an nnsight model, its weights here or not, and how its modules were called on the probe."""
    module = model._module
    if module not in _maps:
        # Inside a trace a forward of ours would be taken for the traced one: its modules would have run.
        tracing = model.interleaver.interleaving
        if tracing or any(parameter.is_meta for parameter in module.parameters()):
            spec, seen = skeleton(module)
        else:
            spec, seen = probe(module.eval()), record(module, probe_batch(module))
        _maps[module] = spec, _calls(seen)
    return _maps[module]


_maps: WeakKeyDictionary[nn.Module, tuple[Spec, dict[str, Called]]] = WeakKeyDictionary()
# Not kept on the nnsight model: what hangs on it travels with every remote trace.


def _calls(seen: Recording) -> dict[str, Called]:
    return {
        name: Called(
            call.order,
            call.inputs[0].shape if call.inputs else None,
            None if call.output is None else call.output.shape,
        )
        for name, (call, *more) in seen.calls.items()
        if not more
    }


def name_of(model: Any) -> str:
    """The name of an nnsight model, for messages."""
    return str(getattr(model, "repo_id", None) or type(model._module).__name__)
