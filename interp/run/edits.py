"""Edits: what an intervention puts in place of an activation, on any site, head, position and row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from interp.errors import BadInput
from interp.sites import Site, by_query, has_heads, head_axis, ranges

Positions = Sequence[int] | Tensor | None
Kind = Literal["apply", "zero", "scale", "add", "mean", "resample", "patch"]


_FORMS = (
    "the same positions in every row are a list ([3, 5]), one position a row is a LongTensor [batch], a mask "
    "is a BoolTensor [batch pos]"
)
_FROM_THE_END = (
    "; each row's last token is positions=batch.mask.sum(1) - 1 where padding is on the right"
)


def _check_takes_two(change: Any, site: Site) -> None:
    try:
        signature = inspect.signature(change)
    except ValueError:  # of a builtin that tells none
        return
    except TypeError:
        raise BadInput(
            f"an edit of '{site}' by {change!r}, which is no function: give change(activation, seen)"
        ) from None
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise BadInput(
            f"the function of the edit of '{site}' is called with two arguments, the activation and "
            f"where it is, and {error}: write change(activation, seen)"
        ) from None


def _spread(value: Tensor, x: Tensor) -> Tensor:
    """A given value over the leading axes of x (rows; rows and positions) that it has no or one entry along.

    As it is where its other axes are not those of x.
    """
    value = value.to(x)
    own = next((value.shape[i:] for i, n in enumerate(value.shape) if n != 1), torch.Size())
    fits = value.ndim <= x.ndim and own == x.shape[x.ndim - len(own) :]
    return value.expand_as(x) if fits else value


def _places(positions: Positions) -> Positions:
    """`positions`, or BadInput where they are none: told when the edit is written, not when it is run."""
    if positions is None:
        return None
    try:
        given = torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError):  # a slice, a name, rows of different lengths
        raise BadInput(f"positions={positions!r} are no positions; {_FORMS}") from None
    by_row = isinstance(positions, Tensor)
    mask = given.dtype == torch.bool
    axes = given.ndim == 2 if mask else given.ndim == 1 if by_row else given.ndim < 2
    if not axes or (given.numel() and given.is_floating_point()):
        raise BadInput(
            f"positions of shape {list(given.shape)} and type {given.dtype} are none; {_FORMS}"
        )
    return positions


@dataclass(frozen=True)
class Seen:
    """What an edit's function gets beside the activation.

    `start` is the first query row of the chunk (scores and patterns come in chunks), `mask` marks
    real positions [batch pos].
    """

    layer: int
    start: int = 0
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Edit:
    """New values for one site: `change(x, seen)` where heads, positions and rows say so.

    Args (of every constructor):
        site: `"z"`, `"resid_post.5"`, `"pattern.3.1"`; without a layer, every layer.
        heads: (layer, head) pairs, for sites that have heads; instead of naming them in `site`.
        positions: the same positions in every row; or one position a row (LongTensor [batch]);
            or a mask (BoolTensor [batch pos]). For scores and pattern: query positions.

    `kind` is the constructor's name and `given` its factor, vector, mean or value: what travels where a function
    does not.

    >>> edit = Edit.zero("z", heads=[(5, 1)])
    >>> edit.kind
    'zero'
    >>> edit(torch.ones(1, 2, 3, 4), Seen(layer=5))[0, 0].sum(-1)
    tensor([4., 0., 4.])
    >>> edit.layers(range(8))
    [5]
    """

    site: Site
    change: Callable[[Tensor, Seen], Tensor | float]
    heads: tuple[tuple[int, int], ...] | None = None
    positions: Positions = None
    rows: slice | None = None
    kind: Kind = "apply"
    given: Any = None

    @staticmethod
    def apply(
        site: str | Site,
        change: Callable[[Tensor, Seen], Tensor | float],
        heads: Iterable[tuple[int, int]] | None = None,
        positions: Positions = None,
    ) -> Edit:
        """An edit by any function of the activation (all heads of a layer, see `interp.sites`)."""
        site = Site.parse(site)
        _check_takes_two(change, site)
        if heads is not None:
            try:
                heads = tuple((int(layer), int(head)) for layer, head in heads)
            except TypeError:
                raise BadInput(
                    f"heads={heads!r} are no (layer, head) pairs; one head is heads=[(5, 1)]"
                ) from None
            if not has_heads(site.name):
                raise BadInput(f"site '{site}' has no heads; leave out heads={list(heads)}")
            if site.layer is not None:
                raise BadInput(
                    f"'{site}' names a layer and heads={list(heads)} do too; name them in the site or in "
                    f"heads=, not in both: '{site.name}' with heads=, or one head as "
                    f"'{site.name}.{site.layer}.{heads[0][1] if heads else 0}'"
                )
        elif site.head is not None and site.layer is not None:
            heads, site = ((site.layer, site.head),), Site(site.name)
        return Edit(site, change, heads, _places(positions))

    @staticmethod
    def zero(site, heads=None, positions=None) -> Edit:
        """Zero in place of the activation."""
        return replace(Edit.apply(site, lambda x, seen: 0.0, heads, positions), kind="zero")

    @staticmethod
    def scale(site, factor: float, heads=None, positions=None) -> Edit:
        """`factor` times the activation."""
        edit = Edit.apply(site, lambda x, seen: x * factor, heads, positions)
        return replace(edit, kind="scale", given=factor)

    @staticmethod
    def add(site, vector: Tensor, heads=None, positions=None) -> Edit:
        """The activation plus `vector` (broadcast over leading axes)."""
        if not isinstance(vector, Tensor):
            raise BadInput(
                f"a vector to add is a tensor, not a {type(vector).__name__}: torch.as_tensor(vector)"
            )

        def change(x: Tensor, seen: Seen) -> Tensor:
            try:
                return x + vector.to(x)
            except RuntimeError as error:
                raise BadInput(
                    f"a vector of shape {list(vector.shape)} cannot be added to '{site}' of shape "
                    f"{list(x.shape)}; give one of width {x.shape[-1]}"
                ) from error

        edit = Edit.apply(site, change, heads, positions)
        return replace(edit, kind="add", given=vector)

    @staticmethod
    def mean(site, heads=None, positions=None, mean: Mapping[int, Tensor] | None = None) -> Edit:
        """The activation's mean over rows and real positions; or `mean[layer]` where given.

        Scores and patterns are averaged over rows alone, each query and key by itself.
        """
        of_pattern = by_query(Site.parse(site).name)

        def change(x: Tensor, seen: Seen) -> Tensor:
            if mean is not None:
                return _spread(mean[seen.layer], x)
            if of_pattern:
                if seen.mask is not None and not bool(seen.mask.all()):
                    raise BadInput(
                        "the mean of patterns of padded rows means nothing: give prompts of one length"
                    )
                return x.mean(dim=0, keepdim=True).expand_as(x)
            if seen.mask is None:
                return x.mean(dim=(0, 1), keepdim=True).expand_as(x)
            if seen.mask.shape != x.shape[:2]:
                raise BadInput(
                    f"which of the {x.shape[1]} positions of '{site}' are padding cannot be told of a mask "
                    f"of {seen.mask.shape[1]} samples or frames: give rows of one length, or the mean itself (mean=)"
                )
            return x[seen.mask.to(x.device)].mean(dim=0).expand_as(x)

        edit = Edit.apply(site, change, heads, positions)
        return replace(edit, kind="mean", given=mean)

    @staticmethod
    def resample(site, heads=None, positions=None, seed: int = 0) -> Edit:
        """The same activation of another row, drawn without repeats (every row moves)."""

        def change(x: Tensor, seen: Seen) -> Tensor:
            if len(x) < 2:
                raise BadInput("resampling takes another row's activation: give at least two rows")
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            source = torch.empty_like(order)
            source[order] = order.roll(1)
            return x[source.to(x.device)]

        edit = Edit.apply(site, change, heads, positions)
        return replace(edit, kind="resample")

    @staticmethod
    def patch(site, value: Mapping[int, Tensor] | Tensor, heads=None, positions=None) -> Edit:
        """`value` in its place: a tensor shaped like the activation, or one a layer.

        One a layer is what `run.cache.by_layer("resid_post")` returns. With heads or positions `value`
        has all of them still, and is read at these. Without its first axes, or with one entry along them, it
        is the same for every row, or for every row and position.
        """
        layers = value.keys() if isinstance(value, Mapping) else ()
        if wrong := [layer for layer in layers if not isinstance(layer, int)]:
            raise BadInput(
                f"values by layer have numbers for names, not {wrong[0]!r}: "
                f'run.cache.by_layer("{Site.parse(site).name}")'
            )

        def change(x: Tensor, seen: Seen) -> Tensor:
            if isinstance(value, Mapping) and seen.layer not in value:
                raise BadInput(
                    f"edit of '{site}' has no value for layer {seen.layer}, only for {ranges(value)}; "
                    f"name the layer in the site, as in '{Site.parse(site).name}.{min(value, default=0)}'"
                )
            new = value[seen.layer] if isinstance(value, Mapping) else value
            if by_query(Site.parse(site).name) and new.ndim > 1:
                new = new[..., seen.start : seen.start + x.shape[2], : x.shape[3]]
            return _spread(new, x)

        edit = Edit.apply(site, change, heads, positions)
        return replace(edit, kind="patch", given=value)

    @staticmethod
    def several(edits: Sequence[Edit]) -> Sequence[Edit]:
        """`edits`, or BadInput where that is something else than a list of them."""
        for edit in [edits] if isinstance(edits, Edit) else edits:
            if isinstance(edit, tuple):
                raise BadInput(
                    "a (name, function) pair is no edit; write interp.Edit.apply(name, function)"
                )
            if not isinstance(edit, Edit):
                raise BadInput(
                    f"edits are interp.Edit, not {type(edit).__name__}: interp.Edit.apply(site, function), "
                    'or one made already, such as interp.Edit.zero("z.5.1")'
                )
        if isinstance(edits, Edit):
            raise BadInput("edits is a list: edits=[edit]")
        return edits

    def __repr__(self) -> str:
        """The constructor and the place; of tensors, their shape."""
        said = [f"'{self.site}'"]
        if self.heads is not None:
            said.append(f"heads={list(self.heads)}")
        if self.positions is not None:
            given = self.positions
            shown = f"a tensor {list(given.shape)}" if isinstance(given, Tensor) else given
            said.append(f"positions={shown}")
        if self.rows is not None:
            said.append(f"rows {self.rows.start} to {self.rows.stop}")
        return f"Edit.{self.kind}({', '.join(said)})"

    def layers(self, existing: Iterable[int]) -> list[int]:
        """The layers this edit touches, out of the `existing` ones."""
        if self.heads is not None:
            wanted = {layer for layer, _ in self.heads}
        elif self.site.layer is not None:
            wanted = {self.site.layer}
        elif self.site.name == "embed":
            wanted = {0}
        else:
            return list(existing)
        existing = set(existing)
        if missing := wanted - existing:
            raise BadInput(
                f"edit of '{self.site}' names layer {min(missing)}; layers with this site: "
                f"{ranges(existing)}"
            )
        return sorted(wanted)

    def on_rows(self, rows: slice) -> Edit:
        """The same edit for these rows of a larger batch only; of one that has rows already, for those among them.

        >>> Edit.zero("z").on_rows(slice(-1, None)).on_rows(slice(4, 6)).rows
        slice(5, 6, 1)
        """
        if self.rows is None:
            return replace(self, rows=rows)
        if (rows.start or 0) < 0 or rows.stop is None or rows.stop < 0:
            raise BadInput(f"an edit of rows {self.rows} of {rows}: give the latter counted from 0")
        mine = range(rows.stop)[rows][self.rows]
        return replace(self, rows=slice(mine.start, mine.stop, mine.step))

    def __call__(self, x: Tensor, seen: Seen) -> Tensor:
        """x after the edit; x itself is not changed."""
        if self.rows is not None:
            mask = None if seen.mask is None else seen.mask[self.rows]
            changed = self._changed(x[self.rows], replace(seen, mask=mask))
            x = x.clone()
            x[self.rows] = changed
            return x
        return self._changed(x, seen)

    def _changed(self, x: Tensor, seen: Seen) -> Tensor:
        new, where = self.values(x, seen), self.where(x, seen)
        return new if where is None else torch.where(where, new, x)

    def values(self, x: Tensor, seen: Seen) -> Tensor:
        """What is put in place of x where heads, positions and rows say so; shaped like x.

        Raises:
            BadInput: the edit gives nothing, or values of another shape that are not one number.
        """
        # A function of the caller's may change what it is given in place; elsewhere x stays as it was.
        new = self.change(x.clone() if self.kind == "apply" else x, seen)
        if new is None:
            raise BadInput(
                f"the function of the edit of '{self.site}' returned nothing; return the new activation"
            )
        new = torch.as_tensor(new, dtype=x.dtype, device=x.device)
        if new.ndim and new.shape != x.shape:  # [batch d_model] would be taken for [pos d_model]
            raise BadInput(
                f"edit of '{self.site}' gives values of shape {tuple(new.shape)} for an activation of "
                f"shape {tuple(x.shape)} ({', '.join(self.site.axes)}): give values of that shape, as "
                "value.expand_as(activation) makes them, or one number"
            )
        return new.expand_as(x)

    def where(self, x: Tensor, seen: Seen) -> Tensor | None:
        """Mask, broadcastable to x, of what is edited; None for all of it."""
        masks = []
        if self.heads is not None:
            chosen = [head for layer, head in self.heads if layer == seen.layer]
            axis, n_heads = head_axis(self.site.name), x.shape[head_axis(self.site.name)]
            if beyond := [head for head in chosen if not 0 <= head < n_heads]:
                raise BadInput(
                    f"'{self.site.name}.{seen.layer}' has heads 0 to {n_heads - 1}, not {beyond[0]}"
                )
            mask = torch.zeros(n_heads, dtype=torch.bool, device=x.device)
            mask[chosen] = True
            masks.append(mask.view(*[-1 if i == axis else 1 for i in range(x.ndim)]))
        if self.positions is not None:
            masks.append(self._position_mask(x, seen))
        return None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]

    def _position_mask(self, x: Tensor, seen: Seen) -> Tensor:
        axis = 2 if by_query(self.site.name) else 1
        here = torch.arange(seen.start, seen.start + x.shape[axis], device=x.device)
        positions = torch.as_tensor(self.positions, device=x.device)
        # A chunk has not all queries, and in a causal model not all keys.
        length = x.shape[-1] if axis == 2 else x.shape[1]
        if axis == 2 and seen.mask is not None:
            length = seen.mask.shape[1]
        if positions.dtype != torch.bool and positions.numel():
            low, high = int(positions.min()), int(positions.max())
            if low < 0 or high >= length:
                raise BadInput(
                    f"edit of '{self.site}' names position {low if low < 0 else high}; "
                    f"positions are 0 to {length - 1}{_FROM_THE_END if low < 0 else ''}"
                )
        rows, end = len(x), seen.start + x.shape[axis]
        by_row = positions.dtype == torch.bool or isinstance(self.positions, Tensor)
        if by_row and (
            len(positions) not in (1, rows)
            or (positions.ndim == 2 and positions.shape[1] < end)
            or (positions.ndim == 2 and axis == 1 and positions.shape[1] > end)
        ):
            raise BadInput(
                f"edit of '{self.site}' has positions of shape {list(positions.shape)} for {rows} rows of "
                f"{length} positions; {_FORMS}"
            )
        if positions.dtype == torch.bool:
            mask = positions[:, seen.start : seen.start + x.shape[axis]]
        elif isinstance(self.positions, Tensor):
            mask = here == positions[:, None]
        else:
            mask = torch.isin(here, positions)[None]
        shape = [1] * x.ndim
        shape[0], shape[axis] = mask.shape
        return mask.view(shape)
