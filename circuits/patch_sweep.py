"""One sweep of activation patching: both runs, what is put where, and two engines for what comes of it.

A head's q, k, v and pattern act only through its z: one pass, in which every block reads its own clean
input, gives the z that all replaced q (k, v, patterns) lead to, and the sweep is then one over z. So k and
v of one *query* head can be replaced where several heads share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.measure import Measure, measure_of
from interp.data.pairs import Pairs
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.run.edits import Edit, Seen
from interp.run.resume import Checkpoint
from interp.sites import Site

THROUGH_Z = ("q", "k", "v", "pattern")
HEADS = ("z", *THROUGH_Z)
NEURONS = "mlp_post"
ALL = "all"

Values = dict[int, Tensor]


@dataclass(frozen=True)
class Place:
    """One thing that is replaced: a layer's site, one head or neuron of it, at some positions."""

    layer: int
    unit: int | None
    position: str


@dataclass(frozen=True)
class Replacement:
    """What is put where, for one choice of positions: `values` of site `site` at `where` (None: all)."""

    site: str
    values: Values
    where: Tensor | list[int] | None


@dataclass(frozen=True)
class Sweep:
    """Both runs of a task, what is put where, and the two engines that say what comes of it.

    Attributes:
        base: the run patched into, with resid_pre and the replaced site. base_values: its metric [n].
        raw: the replacing activations of `site`. replacements: what the fast engine puts in, by position.
    """

    model: Model
    pairs: Pairs
    site: str
    direction: str
    measure: Measure
    base: Run
    base_values: Float[Tensor, " n"]
    raw: Values
    replacements: Mapping[str, Replacement]
    naive: bool
    notes: tuple[str, ...]

    @staticmethod
    def of(
        model: Model,
        pairs: Pairs,
        site: str,
        direction: str,
        kind: str,
        metric: str,
        names: Sequence[str],
        seed: int,
        naive: bool,
    ) -> Sweep:
        """The two runs (last logits alone), the metric's ends, and the replacing activations."""
        touched = "z" if site in THROUGH_Z else site
        clean, corrupted = pairs.clean_batch, pairs.corrupted_batch
        into, out_of = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
        last = torch.tensor([pairs.end])
        base = model.run(into, capture=["resid_pre", touched, site], logits=last)
        source = model.run(out_of, capture=[site], logits=last)
        runs = (source, base) if direction == "denoise" else (base, source)
        measure = measure_of(pairs, metric, *(last_logits(model, run) for run in runs))
        values = replaced(source.cache.by_layer(site), kind, seed)
        notes = list(measure.notes)
        if not naive and (error := _replay_error(model, base, pairs.end)):
            naive = True
            notes.append(
                f"replaying {model.id} from the middle changes its logits by {error:.1e} of their size: "
                "plain full forwards were used"
            )
        if site in ("k", "v") and model.spec.n_kv_heads < model.spec.n_heads:
            notes.append(
                f"{site} is replaced for one query head at a time; its group keeps its own"
            )
        where = {name: where_of(pairs, name) for name in names}
        made = {
            name: Replacement("z", _z_of(model, base, site, values, w), None)
            if site in THROUGH_Z
            else Replacement(site, values, w)
            for name, w in where.items()
        }
        base_values = measure.corrupted if direction == "denoise" else measure.clean
        return Sweep(
            model,
            pairs,
            site,
            direction,
            measure,
            base,
            base_values,
            values,
            made,
            naive,
            tuple(notes),
        )

    def places(self) -> list[Place]:
        """Every place of the sweep: layer by layer, unit by unit, position by position."""
        return [
            Place(layer, unit, name)
            for layer, values in sorted(next(iter(self.replacements.values())).values.items())
            for unit in _units(self.site, values)
            for name in self.replacements
        ]

    def edits(self, place: Place) -> list[Edit]:
        """What the fast engine does at a place."""
        new = self.replacements[place.position]
        return [_edit(new.site, new.values, place, new.where)]

    def exact(
        self, places: Sequence[Place], units: Checkpoint, advance: Callable[[int], None]
    ) -> Float[np.ndarray, "places n"]:
        """The metric of every pair with each place replaced, stored layer by layer."""
        out = np.zeros((len(places), len(self.pairs)), np.float32)
        for layer in sorted({place.layer for place in places}):
            mine = [i for i, place in enumerate(places) if place.layer == layer]
            here = [places[i] for i in mine]
            done = 0

            def step(count: int) -> None:
                nonlocal done
                done += count
                advance(count)

            def unit(here: list[Place] = here) -> dict[str, np.ndarray]:
                found = self._naive(here, step) if self.naive else self._moved(here, step)
                return {"values": torch.stack(found).float().cpu().numpy()}

            out[mine] = units.compute(f"layer {layer}: {here}", unit)["values"]
            advance(len(here) - done)
        return out

    def _moved(self, places: Sequence[Place], advance: Callable[[int], None]) -> list[Tensor]:
        """Replays of the places whose activation changes; elsewhere the metric is the base run's.

        Before the first token in which two prompts differ, all their activations are the same.
        """
        moving = [i for i, place in enumerate(places) if self._changes(place)]
        out = [self.base_values] * len(places)
        advance(len(places) - len(moving))
        found = self._replayed([places[i] for i in moving], advance) if moving else []
        for i, values in zip(moving, found, strict=True):
            out[i] = values
        return out

    def _changes(self, place: Place) -> bool:
        """Whether what is put in at a place differs, in any bit, from what the base run has there."""
        new = self.replacements[place.position]
        pair = (self.base.cache[Site(new.site, place.layer)], new.values[place.layer])
        old, put = (_here(x, new.where) for x in pair)
        if place.unit is not None:
            last = (place.unit,) if self.site == NEURONS else (place.unit, slice(None))
            old, put = old[(..., *last)], put[(..., *last)]
        return not torch.equal(put.to(old), old)

    def _replayed(self, places: Sequence[Place], advance: Callable[[int], None]) -> list[Tensor]:
        return self.model.replay(
            self.base,
            [self.edits(place) for place in places],
            lambda run: self.measure(last_logits(self.model, run)),
            logits=torch.tensor([self.pairs.end]),
            progress=advance,
        )

    def _naive(self, places: Sequence[Place], advance: Callable[[int], None]) -> list[Tensor]:
        """A full forward with all logits for each place; two where heads share a k or v."""
        out = []
        for place in places:
            run = self.model.run(self.base.batch, edits=self._plain_edits(place))
            out.append(self.measure(last_logits(self.model, run)))
            advance(1)
        return out

    def _plain_edits(self, place: Place) -> list[Edit]:
        where = where_of(self.pairs, place.position)
        block = self.model.spec.blocks[place.layer]
        if self.site not in ("k", "v") or block.n_kv_heads == block.n_heads:
            return [_edit(self.site, self.raw, place, where)]
        assert place.unit is not None
        group = Place(
            place.layer, self.model.spec.kv_group(place.layer, place.unit), place.position
        )
        z = f"z.{place.layer}"
        run = self.model.run(
            self.base.batch, capture=[z], edits=[_edit(self.site, self.raw, group, where)]
        )
        return [_edit("z", {place.layer: run.cache[z]}, place, None)]

    def estimates(self, places: Sequence[Place]) -> Float[np.ndarray, " places"]:
        """First-order change of the mean metric at every place: Σ gradient · (new - old)."""
        site = next(iter(self.replacements.values())).site
        gradients = metric_gradients(self.model, self.base.batch, self.measure, [site])[site]
        sums: dict[tuple[int, str], Tensor] = {}
        for name, new in self.replacements.items():
            for layer, values in new.values.items():
                change = gradients[layer] * (values - self.base.cache[Site(site, layer)])
                change = _here(change, new.where).float().mean(0)
                # What is left of [pos, unit, d] is the unit; of [pos, d_mlp] the neuron.
                by_unit = change.sum(0) if site == NEURONS else change.sum((0, -1))
                sums[layer, name] = by_unit.cpu()
        return np.array(
            [
                float(found if place.unit is None else found[place.unit])
                for place in places
                for found in [sums[place.layer, place.position]]
            ]
        )


@torch.enable_grad()
def metric_gradients(
    model: Model, batch: Batch, measure: Measure, sites: Iterable[str]
) -> dict[str, Values]:
    """Gradient of each pair's metric at every layer of the sites: {site: {layer: shaped like it}}.

    One forward and one backward. The metric is summed over pairs, which do not see each other, so a row
    of the gradient belongs to its pair.

    >>> from circuits.measure import measure
    >>> model = tiny_model()
    >>> pairs = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4])
    >>> found = metric_gradients(model, pairs.clean_batch, measure(model, pairs), ["z", "resid_pre"])
    >>> found["z"][1].shape
    torch.Size([1, 3, 4, 8])
    """
    sites = list(sites)
    run = model.run(batch, capture=sites, logits=torch.tensor([measure.pairs.end]), grad=True)
    total = measure(last_logits(model, run)).sum()
    values = {(site, layer): x for site in sites for layer, x in run.cache.by_layer(site).items()}
    found = torch.autograd.grad(total, list(values.values()), allow_unused=True)
    out: dict[str, Values] = {site: {} for site in sites}
    for ((site, layer), value), gradient in zip(values.items(), found, strict=True):
        out[site][layer] = torch.zeros_like(value) if gradient is None else gradient
    return out


def last_logits(model: Model, run: Run) -> Float[Tensor, "n d_vocab"]:
    """Logits after the last position, float32; Refused for a model without them."""
    logits = run.logits
    if logits is None or logits.ndim != 3 or logits.shape[-1] < (model.spec.d_vocab or 1 << 62):
        raise Refused(
            f"{model.id} gives no next-token logits: load it with its language-model head"
        )
    return logits[:, -1].float()


def replaced(source: Values, kind: str, seed: int = 0) -> Values:
    """What is put in for the source run's activations [n …] of every layer.

    >>> new = replaced({0: torch.tensor([[1.0], [3.0]])}, "mean")
    >>> new[0].flatten().tolist(), replaced({0: torch.eye(2)}, "resample")[0].tolist()
    ([2.0, 2.0], [[0.0, 1.0], [1.0, 0.0]])
    """
    if kind == "patch":
        return source
    if kind == "zero":
        return {layer: torch.zeros_like(x) for layer, x in source.items()}
    if kind == "mean":
        return {layer: x.mean(0, keepdim=True).expand_as(x) for layer, x in source.items()}
    size = len(next(iter(source.values())))
    if size < 2:
        raise BadInput("resampling takes another pair's activation: give at least two pairs")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    rows = torch.empty_like(order)
    rows[order] = order.roll(1)  # one cycle: no pair keeps its own
    return {layer: x[rows.to(x.device)] for layer, x in source.items()}


def _z_of(
    model: Model, base: Run, site: str, values: Values, where: Tensor | list[int] | None
) -> Values:
    """z of every head of the base run where its q (k, v, pattern) is replaced, all layers in one pass.

    Every block is given its own base input, so what is replaced in one layer does not reach another.
    """
    kept = Edit.patch("resid_pre", base.cache.by_layer("resid_pre"))
    edits = [kept, Edit.patch(site, values, positions=where)]
    return model.run(base.batch, capture=["z"], edits=edits, logits=False).cache.by_layer("z")


def _edit(site: str, values: Values, place: Place, where: Tensor | list[int] | None) -> Edit:
    """The activation at one place replaced."""
    if site == NEURONS:

        def change(x: Tensor, seen: Seen) -> Tensor:
            x = x.clone()
            x[..., place.unit] = values[seen.layer][..., place.unit].to(x)
            return x

        return Edit.apply(f"{site}.{place.layer}", change, positions=where)
    if place.unit is None:
        return Edit.patch(f"{site}.{place.layer}", values, positions=where)
    return Edit.patch(site, values, heads=[(place.layer, place.unit)], positions=where)


def _replay_error(model: Model, base: Run, end: int) -> float:
    """Relative error of the logits when the upper half is replayed unchanged; 0 where it is rounding."""
    site = f"resid_pre.{model.n_layers // 2}"
    same = [Edit.patch(site, base.cache[site])]
    read = partial(last_logits, model)
    again = model.replay(base, [same], read, logits=torch.tensor([end]))[0]
    logits = read(base)
    error = float((again - logits).abs().max() / logits.abs().max())
    allowed = max(1e-4, 8 * torch.finfo(model.dtype).eps)
    return error if not error <= allowed else 0.0


# --- where


def where_of(pairs: Pairs, name: str) -> Tensor | list[int] | None:
    """A position as edits take it: None for all, [i] in every row, or one a row."""
    if name == ALL:
        return None
    return [int(name)] if name.isdigit() else pairs.position(name)


def _here(x: Tensor, where: Tensor | list[int] | None) -> Tensor:
    """x [n pos …] at the positions asked for, as [n 1 …] where it is one of each row."""
    if where is None:
        return x
    if isinstance(where, list):
        return x[:, where]
    rows = torch.arange(len(x), device=x.device)
    return x[rows, where.to(x.device)][:, None]


def _units(site: str, values: Tensor) -> Iterable[int | None]:
    """Heads or neurons of one layer; [None] where a layer is one thing."""
    if site == NEURONS:
        return range(values.shape[-1])
    return range(values.shape[2]) if site in HEADS else [None]
