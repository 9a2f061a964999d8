"""Where a learned lens begins: at the least-squares map, in units of each coordinate's deviation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.affine_lens import AffineLens, cached_lens
from interp.lens_text import Parts, evenly
from interp.models.model import Model
from interp.ridge_lens import Moments, fit_ridge_lens
from interp.run.progress import Progress
from interp.unembedding import Unembedding
from probes.lens_inputs import Inputs, Maps
from probes.training import read_state, under, write_state

SAMPLE_TOKENS = {"layers": 2048, "heads": 8192}
SAMPLE_ROWS = 1024
"""Text from which scales and frequencies are taken, and the least-squares maps of heads."""
HEAD_PENALTY = 1e-2


@dataclass(frozen=True)
class Start:
    """Where training begins, and what makes its steps independent of the model's scale.

    Attributes:
        maps: of all units. frequency: the final distribution, averaged over a sample.
        mean, spread: of every unit's inputs [n_layers units d_in]. size: deviation of every
            coordinate of the final residual [d_model].
    """

    maps: Maps
    mean: Tensor
    spread: Tensor
    size: Tensor
    frequency: Tensor

    def inward(self, maps: Mapping[str, Tensor]) -> Maps:
        """Maps from and to standardised coordinates: y = size · (x̂ Ã + b̃), x̂ = (x − mean) / spread."""
        first = maps["A"] if "A" in maps else maps["U"]
        moved = torch.einsum("lui,luio->luo", self.mean, first)
        if "A" in maps:
            A = self.spread[..., None] * maps["A"] / self.size
            return {"A": A, "b": (maps["b"] + moved) / self.size}
        moved = torch.einsum("lur,luro->luo", moved, maps["V"])
        return {
            "U": self.spread[..., None] * maps["U"],
            "V": maps["V"] / self.size,
            "b": (maps["b"] + moved) / self.size,
        }

    def outward(self, inner: Mapping[str, Tensor]) -> Maps:
        """The maps of plain coordinates again."""
        b = inner["b"] * self.size
        if "A" in inner:
            A = inner["A"] / self.spread[..., None] * self.size
            return {"A": A, "b": b - torch.einsum("lui,luio->luo", self.mean, A)}
        U, V = inner["U"] / self.spread[..., None], inner["V"] * self.size
        moved = torch.einsum("lui,luir->lur", self.mean, U)
        return {"U": U, "V": V, "b": b - torch.einsum("lur,luro->luo", moved, V)}

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a file."""
        rest = {name: getattr(self, name) for name in ("mean", "spread", "size", "frequency")}
        return rest | {f"maps.{name}": value for name, value in self.maps.items()}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Start:
        """What `tensors` gave."""
        rest = {name: tensors[name] for name in ("mean", "spread", "size", "frequency")}
        return Start(under("maps.", tensors), **rest)


def spread_of(x: Float[Tensor, "*batch rows width"]) -> Float[Tensor, "*batch width"]:
    """Each coordinate's deviation; 1 where it never varies."""
    found = x.std(-2, unbiased=False)
    return torch.where(found <= 1e-5 * x.abs().mean(-2), 1.0, found)


def write_start(path: Path, key: Mapping[str, Any], start: Start, simple: Maps) -> None:
    tensors = start.tensors() | {f"ridge.{name}": value for name, value in simple.items()}
    # Without a low rank the start is the ridge maps, and one tensor cannot be written twice.
    write_state(path, {name: value.clone() for name, value in tensors.items()}, key)


def read_start(path: Path, key: Mapping[str, Any]) -> tuple[Start, Maps]:
    """(where training begins, the ridge maps), as an earlier call has left them."""
    tensors, _ = read_state(path, key)
    return Start.of(tensors), under("ridge.", tensors)


def own_ridge_lens(
    model: Model,
    content: str | Tensor | None,
    name: str,
    chosen: list[int],
    key: Mapping[str, Any],
    progress: bool | None,
) -> AffineLens:
    """The ridge lens of this very text, from the cache if it is there: it has the same parts held out."""
    whole = len(chosen) == model.n_layers
    found = cached_lens(model, "ridge", key["sha256"])
    if (
        found is not None
        and found.about["text"]["sha256"] == key["text"]
        and found.about["window"] == key["window"]
        and found.A is not None
    ):
        return found
    return fit_ridge_lens(
        model,
        text=content,
        text_name=name,
        window=key["window"],
        layers=None if whole else chosen,
        keep=whole and content is None,
        progress=progress,
    )


@torch.no_grad()
def observed(
    inputs: Inputs, rank: int | None, parts: Parts, ridge: AffineLens | None, bars: Progress
) -> tuple[Start, Maps]:
    """(where training begins, the ridge maps): scales and frequencies are those of a sample of the text.

    For heads the least-squares maps are solved here, shrunk towards W_O; for a low rank r the maps
    keep the r directions in which they move the sample most (reduced-rank regression).
    """
    model, n_units = inputs.model, len(inputs.layers) * inputs.units
    d = model.spec.d_model
    windows = evenly(parts.fit, SAMPLE_TOKENS[inputs.kind], each=parts.fit.shape[1])
    moments = Moments(d, range(n_units), inputs.d_in) if inputs.kind == "heads" else None
    each = max(2, -(-SAMPLE_ROWS // len(windows)))
    width = windows.shape[1] - 1
    places = ((torch.arange(min(each, width)) + 0.5) * width / min(each, width)).long()
    advance = bars.stage("Reading a sample", len(windows))
    xs: dict[int, list[Tensor]] = {}
    finals = []
    for rows in windows.split(max(1, 1024 // windows.shape[1])):
        x, final = inputs.read(rows, slice(1, None))
        if moments is not None:
            flat = {
                place * inputs.units + unit: value[unit]
                for place, value in x.items()
                for unit in range(inputs.units)
            }
            moments.add(flat | {n_units: final})
        some = (torch.arange(len(rows))[:, None] * width + places).flatten()
        for place, value in x.items():
            xs.setdefault(place, []).append(value[:, some])
        finals.append(final[some])
        advance(len(rows))
    sample = torch.stack([torch.cat(xs[place], 1) for place in range(len(inputs.layers))]).cpu()
    final = torch.cat(finals)
    if moments is not None:
        simple = _solved(inputs, moments)
    else:
        assert ridge is not None and ridge.A is not None
        simple = {"A": ridge.A[:, None], "b": ridge.b[:, None]}
    unembed = Unembedding(model)
    shares = [unembed(rows).softmax(-1).sum(0).cpu() for rows in final.split(128)]
    frequency = torch.stack(shares).sum(0) / len(final)
    maps = simple if rank is None else _reduced(inputs, simple, sample, rank)
    mean, spread = sample.mean(-2), spread_of(sample)
    return Start(maps, mean, spread, spread_of(final.float().cpu()), frequency), simple


def _solved(inputs: Inputs, moments: Moments) -> Maps:
    """Every head's least-squares map, shrunk towards its slice of W_O."""
    A, b = [], []
    for place in range(len(inputs.layers)):
        base = inputs.base(place)
        assert base is not None
        for unit in range(inputs.units):
            index = place * inputs.units + unit
            found = moments.solve(index, HEAD_PENALTY, towards=base[unit].cpu())
            A.append(found[0])
            b.append(found[1])
    shape = len(inputs.layers), inputs.units
    return {"A": torch.stack(A).unflatten(0, shape), "b": torch.stack(b).unflatten(0, shape)}


def _reduced(
    inputs: Inputs, maps: Maps, sample: Float[Tensor, "n_layers units rows d_in"], rank: int
) -> Maps:
    """U V of this rank that keeps most of what A (for layers: A − I) does to the sample.

    U is scaled so that x U varies by 1 in every direction: Adam's steps have one size for all numbers,
    and on another scale they would be far too large for U or for V.
    """
    A = maps["A"].double()
    if inputs.kind == "layers":
        A = A - torch.eye(A.shape[-1], dtype=A.dtype)
    x = sample.double()
    moved = (x - x.mean(-2, keepdim=True)) @ A
    values, vectors = torch.linalg.eigh(moved.mT @ moved)  # smallest first
    V = vectors[..., -rank:].mT
    unit = (values[..., -rank:].clamp_min(0) / x.shape[-2]).sqrt()
    unit = unit.clamp_min(1e-3 * unit.amax(-1, keepdim=True))
    unit = torch.where(unit > 0, unit, 1.0)[..., None]
    lost = A - A @ V.mT @ V
    # The mean of what is left out goes into the bias.
    b = maps["b"] + torch.einsum("lui,luio->luo", x.mean(-2), lost)
    return {"U": (A @ (V / unit).mT).float(), "V": (unit * V).float(), "b": b.float()}
