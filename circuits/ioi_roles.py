"""Roles in indirect object identification, read off path patching: who moves the name, and who tells it which.

The circuit of Wang et al. is followed backwards from the logits, a role at a time. A head has a role if
corrupting its path into the role after it costs a share of the metric, and if it attends where that
role must; either alone is not enough.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.path_patching import path_patch
from circuits.tasks import as_pairs
from interp.data.pairs import Pairs
from interp.errors import BadInput
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report

CONFIRM = 24
"""Strongest screened paths of a step that are computed exactly."""


@dataclass(frozen=True)
class Role:
    """A head's part, and how it shows.

    Attributes:
        into: the role it acts through ("" for the logits), at which of q, k, v (`parts`) and `position`.
        attends: (query, key) positions it looks between. sign: whether it supports the answer (+1) or not.
    """

    name: str
    into: str
    parts: str
    position: str
    attends: tuple[str, str]
    sign: int = 1


ROLES = (
    Role("name mover", "", "", "end", ("end", "IO")),
    Role("negative name mover", "", "", "end", ("end", "IO"), sign=-1),
    Role("subject suppressor", "", "", "end", ("end", "S2")),
    Role("S-inhibition", "name mover", "q", "end", ("end", "S2")),
    Role("induction", "S-inhibition", "kv", "S2", ("S2", "S1+1")),
    Role("duplicate token", "S-inhibition", "kv", "S2", ("S2", "S1")),
    Role("previous token", "induction", "k", "S1+1", ("S1+1", "S1")),
)
"""Backwards from the logits: each role is looked for among the senders into the one before it."""


def check_options(*, min_effect: float = 0.02, min_attention: float = 0.2, n: int = 32) -> None:
    """What can be judged without a model."""
    for name, value in (("min_effect", min_effect), ("min_attention", min_attention)):
        if not 0 < value < 1:
            raise BadInput(f"{name}={value}: wanted a share between 0 and 1")
    if n < 1:
        raise BadInput(f"n={n}: give at least one pair of prompts")


@analysis(
    name="ioi_roles",
    source="Wang et al. 2022, Interpretability in the Wild, §3 (the circuit, backwards from the logits)",
    example="interp ioi-roles smollm2-135m",
    figure="map",
    validate=check_options,
    takes="text",
)
def ioi_roles(
    model: Model,
    task: Pairs | str = "ioi",
    *,
    min_effect: float = 0.02,
    min_attention: float = 0.2,
    n: int = 32,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """Heads with a role in naming the indirect object, by the paths they act through and where they look.

    Backwards from the logits: name movers (into the logits, end → IO; negative ones lower the answer),
    subject suppressors (into the logits, end → S2),
    S-inhibition (into name movers' q at the end, end → S2), induction and duplicate token (into
    S-inhibition's k and v at S2; S2 → S1+1, S2 → S1), previous token (into induction's k at S1+1,
    S1+1 → S1). effect = −Σ change / (clean − corrupted) over the paths into all heads of the next role,
    MLPs recomputed.

    A role is not a mechanism: a head that acts through heads below the threshold, or through an MLP, is
    missed, and the sum over receivers ignores that they interact. Attention is a mean over prompts.

    Args:
        task: pairs with positions IO, S1, S1+1, S2, or the name of a task.
        min_effect: smallest share of the metric's way from corrupted to clean.
        min_attention: smallest mean attention.
        n: pairs of prompts, where the task is given by name.
        checkpoint: folder for finished units, so that an interrupted call can be resumed.
        resume: go on from what is there.
        progress: show progress bars; by default in a terminal or a notebook.

    Returns: a Report. Table "ioi_roles", one row for each head and role: role, layer, head, effect (share),
        into (receivers), attends, attention. Table "paths": every exactly computed path, by step, with
        the sender's attention. meta["thresholds"].

    Raises:
        BadInput: a position that the task lacks. Refused: as `path_patch`.

    >>> names = {"IO": [1], "S1": [2], "S1+1": [3], "S2": [4]}
    >>> pairs = Pairs.of([[5, 6, 7, 8, 7, 9]], [[5, 2, 3, 8, 4, 9]], answers=[6], wrong=[7], positions=names)
    >>> report = ioi_roles(tiny_model(), pairs, min_attention=0.01, progress=False)
    >>> list(report.table)
    ['role', 'layer', 'head', 'effect', 'into', 'attends', 'attention']
    """
    started = time.perf_counter()
    check_options(min_effect=min_effect, min_attention=min_attention, n=n)
    pairs = as_pairs(model, task, n=n, seed=seed)
    attention = {role.attends: _attention(pairs, role.attends) for role in ROLES}
    patterns = model.run(pairs.clean_batch, capture=["pattern"], logits=False).cache
    looks = {
        pair: {
            (layer, head): float(value)
            for layer, pattern in patterns.by_layer("pattern").items()
            for head, value in enumerate(_mean_weight(pattern, *places))
        }
        for pair, places in attention.items()
    }
    members: dict[str, list[tuple[int, int]]] = {}
    rows: list[dict[str, Any]] = []
    paths: list[pd.DataFrame] = []
    steps: dict[tuple[str, str, str], tuple[dict, Report]] = {}
    notes: list[str] = []
    meta: dict[str, Any] = {}
    for role in ROLES:
        step = (role.into, role.parts, role.position)
        into = [place for place in members.get(role.into, []) if place[0] > 0]
        if role.into and not into:
            notes.append(
                f"no {role.into} head after layer 0 was found, so no {role.name} heads were looked for"
            )
            members[role.name] = []
            continue
        receivers = [f"{layer}.{head}.{part}" for layer, head in into for part in role.parts]
        if step not in steps:
            folder = None if checkpoint is None else checkpoint / (role.into or "logits")
            report = path_patch(
                model,
                pairs,
                receiver=receivers or "logits",
                positions=role.position if receivers else None,
                confirm=CONFIRM if receivers else None,
                seed=seed,
                checkpoint=folder,
                resume=resume,
                progress=progress,
            )
            steps[step] = _effects(report), report
            exact = report.table.query("exact")
            paths.append(exact.assign(step=f"into {role.into or 'logits'}"))
        effects, report = steps[step]
        meta = meta or report.meta
        found = [
            place
            for place, effect in sorted(effects.items(), key=lambda item: -abs(item[1]))
            if role.sign * effect >= min_effect and looks[role.attends][place] >= min_attention
        ]
        members[role.name] = found
        rows += [
            {
                "role": role.name,
                "layer": layer,
                "head": head,
                "effect": effects[layer, head],
                "into": ", ".join(receivers) or "logits",
                "attends": " → ".join(role.attends),
                "attention": looks[role.attends][layer, head],
            }
            for layer, head in found
        ]
    columns = ["role", "layer", "head", "effect", "into", "attends", "attention"]
    tables = {
        "ioi_roles": pd.DataFrame(rows, columns=pd.Index(columns)),
        "paths": _with_attention(pd.concat(paths, ignore_index=True), looks),
    }
    meta = meta | {
        "options": {"task": pairs.name, "n": len(pairs)}
        | {"min_effect": min_effect, "min_attention": min_attention},
        "thresholds": {"effect": min_effect, "attention": min_attention, "confirmed": CONFIRM},
        "forwards": {
            side: round(sum(report.meta["forwards"][side] for _, report in steps.values()), 2)
            for side in ("ours", "plain")
        },
        "notes": [*dict.fromkeys(n for _, r in steps.values() for n in r.meta["notes"]), *notes],
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    return Report("ioi_roles", tables, {}, meta)


def _attention(pairs: Pairs, attends: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Query and key position of every prompt."""
    return pairs.position(attends[0]), pairs.position(attends[1])


def _mean_weight(
    pattern: Float[Tensor, "n n_heads query_pos key_pos"], queries: Tensor, keys: Tensor
) -> Float[Tensor, " n_heads"]:
    """Mean over prompts of each head's weight between two positions."""
    rows = torch.arange(len(pattern))
    return pattern[rows, :, queries, keys].float().mean(0)


def _effects(report: Report) -> dict[tuple[int, int], float]:
    """−Σ normalised change over the exact paths of each head."""
    found: dict[tuple[int, int], float] = {}
    for row in report.table.query("exact").to_dict("records"):
        place = row["layer"], row["head"]
        found[place] = found.get(place, 0.0) - row["normalised"]
    return found


def _with_attention(
    paths: pd.DataFrame, looks: dict[tuple[str, str], dict[tuple[int, int], float]]
) -> pd.DataFrame:
    """Every path with what its sender attends to."""
    places: Sequence[tuple[int, int]] = list(zip(paths["layer"], paths["head"], strict=True))
    columns = {
        " → ".join(pair): [weights[place] for place in places] for pair, weights in looks.items()
    }
    return paths.assign(**columns)
