"""What a detector declares: its prompts, what it reads of an attention row, its null, its label rule."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

import circuits.heads
from circuits.heads.prompt_sets import PromptSet
from circuits.heads.streamed import Streamed
from interp.data.images import Images, reads_images
from interp.data.prompts import Prompts
from interp.errors import unknown
from interp.models.model import Model
from interp.run.cache import Run
from interp.run.statistics import Statistic

PerPrompt = Float[Tensor, "n n_layers n_heads"]


@dataclass(frozen=True)
class Detector:
    """One role (or score) of attention heads.

    Attributes:
        name: column name and label. title, letter: how the page shows it.
        description: what a high score says, and what it does not.
        source: paper and section, and where we differ.
        unit: of the score.
        reads: the prompt set it looks at; None for one that brings its own procedure, `observe`.
        sees: the prompt set in its place on a model that reads images; None where it makes no sense there.
        null: sentence: what the null is.
        threshold: a label needs a mean score of at least this. None: a score without a label.
        margin: and a mean distance from the null of at least this.
        side: 1 where the score must lie above the null, -1 where it must lie below.
        statistics: (model, prompts) -> row statistics wanted from a prompt set, by name; a `Streamed`
            where none of `interp.run.statistics` fits.
        combine: (statistics of the prompts, of their control) -> (score, null) for every prompt;
            None for a set without control. With `observe`: the same of its arrays.
        measure: instead of statistics: (model, prompts, run) -> score for every prompt, with the
            same measure on the control as null; `captures(model)` names the sites it needs.
        from_gradient: instead of statistics: (z, dL/dz), each [layer] -> [n pos n_heads d_head], -> arrays
            [n n_layers n_heads …] for `combine`; L is the loss on `prompts.judged`, summed over prompts.
        observe: instead of all these: (model, n, seed) -> arrays "score" and "null" [n n_layers n_heads] and
            whatever `tables` and `notes` want to tell; n is how many prompts (or other units of the
            test) are asked for. Detectors with the same `observe` share one call.
        tables, notes: from the arrays of `observe` (or the statistics of the prompts), tables for the
            report and sentences for its reader.
        slow: costs far more than one pass over a shared prompt set; left out of "fast".
        needs_text: whether `observe` needs a tokenizer. needs_logits: whether it needs a language-model
            head.
        causal_only: whether it makes sense only where a model reads left to right.
        encoder_only: only where it reads in both directions.
        unfit: why it makes no sense on a model, for any other reason; None where it does.
        serves: the metric that ablating such a head should hurt, "repeated" or "text".
        rank: order in tables, most telling first.
    """

    name: str
    title: str
    letter: str
    description: str
    source: str
    reads: PromptSet | None
    null: str
    threshold: float | None
    margin: float
    rank: int
    side: int = 1
    unit: str = "attention mass"
    sees: PromptSet | None = None
    statistics: Callable[[Model, Any], Mapping[str, Statistic | Streamed]] | None = None
    combine: (
        Callable[
            [Mapping[str, PerPrompt], Mapping[str, PerPrompt] | None], tuple[PerPrompt, PerPrompt]
        ]
        | None
    ) = None
    measure: Callable[[Model, Prompts, Run], PerPrompt] | None = None
    captures: Callable[[Model], Sequence[str]] = lambda model: ()
    from_gradient: (
        Callable[[Mapping[int, Tensor], Mapping[int, Tensor]], dict[str, Tensor]] | None
    ) = None
    observe: Callable[[Model, int, int], dict[str, np.ndarray]] | None = None
    tables: Callable[[Mapping[str, np.ndarray]], dict[str, pd.DataFrame]] | None = None
    notes: Callable[[Mapping[str, np.ndarray]], list[str]] | None = None
    slow: bool = False
    needs_text: bool = False
    needs_logits: bool = False
    causal_only: bool = False
    encoder_only: bool = False
    unfit: Callable[[Model], str | None] = lambda model: None
    min_layers: int = 1
    serves: str = "text"

    @property
    def labels(self) -> bool:
        """Whether this detector gives a label."""
        return self.threshold is not None

    def on(self, model: Model) -> Detector:
        """The same detector with the prompt set that this model reads."""
        return replace(self, reads=self.sees) if self.sees and reads_images(model) else self

    def declaration(self) -> dict[str, Any]:
        """The facts a report carries."""
        names = (
            "name",
            "title",
            "letter",
            "description",
            "source",
            "unit",
            "null",
            "threshold",
            "margin",
            "labels",
        )
        return {name: getattr(self, name) for name in names} | {
            "prompts": self.reads.name if self.reads else "its own",
            "cost": "slow" if self.slow else "fast",
        }


@cache
def catalogue() -> tuple[Detector, ...]:
    """Every detector in this package's files and at entry points "interp.detectors", most telling first."""
    found: list[Detector] = [point.load() for point in entry_points(group="interp.detectors")]
    for module in pkgutil.iter_modules(circuits.heads.__path__):
        loaded = importlib.import_module(f"circuits.heads.{module.name}")
        found += [value for value in vars(loaded).values() if isinstance(value, Detector)]
    return tuple(sorted(set(found), key=lambda detector: (detector.rank, detector.name)))


def declarations() -> pd.DataFrame:
    """List every detector of `interp heads`: what it reads, what it costs, where it comes from."""
    rows = [detector.declaration() for detector in catalogue()]
    columns = ["name", "labels", "cost", "prompts", "unit", "description", "source"]
    return pd.DataFrame(rows, columns=columns)


def choose(names: Sequence[str] | None) -> tuple[Detector, ...]:
    """The detectors of these names; BadInput with the nearest name for a typo.

    "fast" stands for all that read shared prompt sets in one pass, "all" for every one; None is "fast".

    >>> [detector.name for detector in choose(["induction", "recency"])]
    ['induction', 'recency']
    """
    names = ["fast"] if names is None else names
    known = {detector.name: detector for detector in catalogue()}
    for name in names:
        if name not in known and name not in ("all", "fast"):
            raise unknown("detector", name, [*known, "fast", "all"])
    return tuple(
        d
        for d in catalogue()
        if "all" in names or d.name in names or ("fast" in names and not d.slow)
    )


def head_table(**columns: Float[np.ndarray, "n_layers n_heads"]) -> pd.DataFrame:
    """One row a head that has the first column's value: its place, then every column.

    >>> head_table(score=np.array([[0.5, np.nan], [0.1, 0.2]]))
       layer  head  score
    0      0     0    0.5
    1      1     0    0.1
    2      1     1    0.2
    """
    place = np.nonzero(~np.isnan(next(iter(columns.values()))))
    values = {name: value[place] for name, value in columns.items()}
    return pd.DataFrame({"layer": place[0], "head": place[1]} | values)


# --- keys of a row, as functions of the query position -----------------------------------------


def offset_key(prompts: Prompts | Images, offset: int) -> Int[Tensor, "n pos 1"]:
    """The key `offset` positions back (ahead where it is negative); -1 where there is none."""
    key = prompts.positions - offset
    return torch.where((key >= 0) & (key < prompts.length), key, -1)[..., None]


def random_key(prompts: Prompts | Images, lowest: int = 0, seed: int = 0) -> Int[Tensor, "n pos 1"]:
    """A visible key drawn at random for every query, from `lowest` on; -1 where there is none."""
    generator = torch.Generator().manual_seed(seed)
    top = (
        prompts.positions + 1
        if prompts.causal
        else torch.full_like(prompts.positions, prompts.length)
    )
    share = torch.rand(prompts.positions.shape, generator=generator)
    key = lowest + (share * (top - lowest)).long()
    return torch.where(top > lowest, key, -1)[..., None]


def visible_keys(prompts: Prompts | Images) -> Int[Tensor, "n pos"]:
    """How many keys each query sees."""
    return (
        prompts.positions + 1
        if prompts.causal
        else torch.full_like(prompts.positions, prompts.length)
    )


def score_and_null(seen, control) -> tuple[PerPrompt, PerPrompt]:
    """Score and null are two statistics of the same prompts."""
    return seen["score"], seen["null"]


def score_on_control(seen, control) -> tuple[PerPrompt, PerPrompt]:
    """The null is the score on the control prompts."""
    return seen["score"], control["score"]


def strongest(per_offset: Sequence[PerPrompt]) -> PerPrompt:
    """For every head, the statistic with the largest mean over prompts."""
    stacked = torch.stack(list(per_offset))
    best = stacked.mean(dim=1).nan_to_num(-1.0).argmax(dim=0)
    return stacked.gather(0, best[None, None].expand(1, stacked.shape[1], -1, -1))[0]
