"""Activations held fixed while a model trains, or is measured: the site, what it is held at, since when.

After Singh et al. 2024: with one part of a circuit clamped at what it will become, the others show how
fast they form on their own. A clamp is an Edit whose value does not depend on the weights, so no
gradient reaches what makes the activation (W_Q and W_K behind a clamped pattern), and all others flow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import BadInput, unknown
from interp.models.model import Model
from interp.open import load
from interp.run.cache import Run
from interp.run.edits import Edit, Seen
from interp.sites import Site

Ids = Int[Tensor, "batch pos"]
Pattern = Float[Tensor, "batch pos pos"]


def previous_token_pattern(ids: Ids) -> Pattern:
    """Each row looks one token back; the first at itself.

    >>> previous_token_pattern(torch.tensor([[5, 6, 7]]))[0].int().tolist()
    [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
    """
    length = ids.shape[1]
    back = (torch.arange(length) - 1).clamp_min(0)
    return torch.nn.functional.one_hot(back, length).float().expand(len(ids), -1, -1)


def induction_pattern(ids: Ids) -> Pattern:
    """Each row looks at what followed the earlier copies of its token, evenly; at the first token if none did.

    >>> induction_pattern(torch.tensor([[5, 6, 7, 5]]))[0].int().tolist()
    [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    """
    same = ids[:, :, None] == torch.roll(ids, 1, dims=1)[:, None, :]
    same[:, :, 0] = False
    found = same.tril().float()
    total = found.sum(-1, keepdim=True)
    first = torch.zeros_like(found)
    first[..., 0] = 1.0
    return torch.where(total > 0, found / total.clamp_min(1), first)


def uniform_pattern(ids: Ids) -> Pattern:
    """Each row looks evenly at all it sees."""
    length = ids.shape[1]
    seen = torch.ones(length, length).tril()
    return (seen / seen.sum(-1, keepdim=True)).expand(len(ids), -1, -1)


def first_token_pattern(ids: Ids) -> Pattern:
    """Each row looks at the first token."""
    length = ids.shape[1]
    return (
        torch.nn.functional.one_hot(torch.zeros(length).long(), length)
        .float()
        .expand(len(ids), -1, -1)
    )


IDEALS = {
    "previous_token": previous_token_pattern,
    "induction": induction_pattern,
    "uniform": uniform_pattern,
    "first_token": first_token_pattern,
}
"""Patterns that a head can be held at."""

HELD = ("pattern", "z")


@dataclass(frozen=True)
class Clamp:
    """One site, what it is held at, and the step from which on.

    Attributes:
        site: `pattern.0.1` or `z.0.1` (a head), `pattern.0` (every head of a layer).
        to: a name in IDEALS (patterns), "zero" (z), or the folder of a checkpoint whose own
            activation, on the same tokens, is put there.
        since: the first step that is clamped; before it the model is free.

    >>> Clamp.parse("pattern.0.1=previous_token@64")
    Clamp(site='pattern.0.1', to='previous_token', since=64)
    """

    site: str
    to: str
    since: int = 0

    def __str__(self) -> str:
        return f"{self.site}={self.to}" + (f"@{self.since}" if self.since else "")

    @staticmethod
    def parse(text: str | Clamp) -> Clamp:
        """A clamp from `SITE=TO` or `SITE=TO@STEP`.

        Raises:
            BadInput: another form, a site that cannot be held, an unknown ideal, no such folder.
        """
        if isinstance(text, Clamp):
            return text
        parts = re.fullmatch(r"([^=]+)=(.+?)(?:@(\d+))?", text.strip())
        if parts is None:
            raise BadInput(
                f"'{text}' is no clamp: write SITE=TO, such as pattern.0.0=previous_token, or SITE=TO@STEP"
            )
        site, to, since = Site.parse(parts[1]), parts[2], int(parts[3] or 0)
        if site.name not in HELD or site.layer is None:
            raise BadInput(
                f"'{site}' cannot be clamped; wanted a layer's or a head's pattern or z, such as pattern.0.1 or z.0.1"
            )
        names = [*IDEALS] if site.name == "pattern" else ["zero"]
        if to not in names and not Path(to).is_dir():
            if "/" in to:
                raise BadInput(f"no folder '{to}' to hold {site} at: give a checkpoint's folder")
            raise unknown(f"value to hold {site.name} at (or folder of a checkpoint)", to, names)
        return Clamp(str(site), to if to in names else str(Path(to).resolve()), since)


class Clamps:
    """Clamps ready to be applied to a model's batches; checkpoints that they name are open."""

    def __init__(self, clamps: Iterable[str | Clamp] = ()):
        self.clamps = tuple(map(Clamp.parse, clamps))
        folders = {c.to for c in self.clamps if c.to not in IDEALS and c.to != "zero"}
        self.teachers = {folder: load(folder) for folder in sorted(folders)}

    def at(self, step: int) -> tuple[Clamp, ...]:
        """The clamps that are held at a step."""
        return tuple(clamp for clamp in self.clamps if step >= clamp.since)

    def edits(self, ids: Ids, step: int) -> list[Edit]:
        """The edits that hold these activations on these tokens at this step."""
        held = self.at(step)
        return [self._edit(clamp, ids) for clamp in held]

    def _edit(self, clamp: Clamp, ids: Ids) -> Edit:
        site = Site.parse(clamp.site)
        if clamp.to == "zero":
            return Edit.zero(site)
        if clamp.to in self.teachers:
            whole = Site(site.name, site.layer)
            run = self.teachers[clamp.to].run(ids, capture=[whole], logits=False)
            return Edit.patch(site, run.cache[whole])
        ideal = IDEALS[clamp.to](ids)[:, None]

        def change(x: Tensor, seen: Seen) -> Tensor:
            # A chunk has some rows only, and not the keys behind its last row.
            return (
                ideal[:, :, seen.start : seen.start + x.shape[2], : x.shape[3]].to(x).expand_as(x)
            )

        return Edit.apply(site, change)


class Clamped(Model):
    """A model whose every `run` is under its clamps, so that what is measured of it is measured so.

    `replay` and `hooked` are those of the model without clamps.
    """

    def __init__(self, model: Model, clamps: Clamps, step: int):
        self.__dict__.update(model.__dict__)
        self.clamps, self.step = clamps, step

    def run(self, data: Any, capture: Any = (), edits: Sequence[Edit] = (), **options: Any) -> Run:
        """As `Model.run`; the clamps are applied before `edits`."""
        batch = self.as_batch(data)
        held = self.clamps.edits(batch.ids, self.step)
        return super().run(batch, capture, [*held, *edits], **options)
