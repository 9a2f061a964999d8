"""Is a behaviour restored when chosen heads are made to do their part?

A head can be told where to look (its pattern at one position is set), how loud to be (its output is
scaled), or what to say (its output of the other side's run is put back). The same is done to as many
random heads of the same layers: what they restore, any heads would.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.heads.ablation import matched_heads
from circuits.heads.claims import INTERVAL, resampling
from circuits.tasks import as_pairs, check_task
from interp.data.pairs import Pairs
from interp.errors import BadInput, unknown
from interp.metrics import logit_diff
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.cache import Run
from interp.run.edits import Edit, Seen
from interp.run.progress import Progress

Head = tuple[int, int]

SIDES = ("clean", "corrupted")


def look_at(
    heads: Sequence[Head], keys: Sequence[Int[Tensor, " n"]], query: Int[Tensor, " n"]
) -> Edit:
    """The edit that makes heads attend, from each prompt's `query` position, evenly to its `keys`.

    >>> edit = look_at([(0, 1)], [torch.tensor([1])], torch.tensor([2]))
    >>> run = tiny_model().run(torch.tensor([[5, 6, 7]]), capture=["pattern.0"], edits=[edit])
    >>> run.cache["pattern.0.1"][0, 2].tolist()
    [0.0, 1.0, 0.0]
    """

    def change(x: Tensor, seen: Seen) -> Tensor:
        places = torch.arange(x.shape[-1], device=x.device)
        hits = sum((places == key.to(x.device)[:, None]).to(x.dtype) for key in keys)
        assert isinstance(hits, Tensor)
        return (hits / len(keys))[:, None, None].expand_as(x)

    return Edit.apply("pattern", change, heads=heads, positions=query)


def check_options(
    *,
    task: Any = None,
    heads: Sequence[str] = ("0.0",),
    attend: Sequence[str] | None = None,
    scale: float | None = None,
    restore: bool = False,
    silence: Sequence[str] = (),
    on: str = "clean",
    controls: int = 20,
    n: int = 32,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if isinstance(task, (str, Path)):
        check_task(task)
    if not list(heads):
        raise BadInput("no head: name at least one, such as --heads 20.0")
    parsed, silenced = [_head(name) for name in heads], [_head(name) for name in silence]
    if both := set(parsed) & set(silenced):
        raise BadInput(f"head {_name(min(both))} is both repaired and silenced: choose one")
    if on not in SIDES:
        raise unknown("side", on, SIDES)
    if (given := [attend is not None, scale is not None, restore]).count(True) != 1:
        what = "none" if not any(given) else "several"
        raise BadInput(
            f"{what} of attend, scale and restore given: say what the heads are made to do with exactly one"
        )
    if attend is not None and not list(attend):
        raise BadInput("attend names no position: give at least one of the task's")
    if controls < 1:
        raise BadInput(f"controls={controls}: give at least one draw of random heads")
    if n < 1:
        raise BadInput(f"n={n}: give at least one pair")


@analysis(
    name="repair",
    source="Merullo, Eickhoff & Pavlick 2024, circuit component reuse across tasks, §5",
    example="interp repair smollm2-135m ioi --heads 23.0,23.1 --attend IO",
    figure="bars",
    validate=check_options,
    takes="text",
)
@torch.no_grad()
def repair(
    model: Model,
    task: Pairs | str,
    *,
    heads: Sequence[str],
    attend: Sequence[str] | None = None,
    scale: float | None = None,
    restore: bool = False,
    silence: Sequence[str] = (),
    at: str = "end",
    on: str = "clean",
    controls: int = 20,
    n: int = 32,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """Accuracy and logit difference before and after chosen heads are made to do their part.

    Exactly one of: A_h[at] = evenly on the named positions; z_h[at] = scale · z_h[at]; z_h[at] = that of
    the other side's run. `silence` sets further heads to zero at the same time. Everything after follows.

    It does not show that the heads do this by themselves, or that they are the only ones that could:
    the controls say how often as many random heads of the same layers restore as much.

    Args:
        task: a shipped task ("ioi", "facts:language"), a file of pairs, or Pairs.
        heads: (layer.head) names, such as 20.0.
        attend: named positions of the task that the heads are made to attend to.
        scale: what the heads' outputs are multiplied with.
        restore: put back the heads' outputs from the other side's run.
        silence: heads set to zero besides, such as negative movers.
        at: the named position whose attention or output is set.
        on: which prompts are repaired, clean or corrupted; the answer is the clean one either way.
        controls: draws of as many random heads of the same layers.
        n: pairs of a named task. seed: of the task, the controls and the bootstrap.
        progress: show a progress bar; by default in a terminal or a notebook.

    Returns: a Report. Table "repair", one row for "before", "after" and "control" (means over draws):
        accuracy (share of prompts whose most likely token is an answer), prefers (share with a logit
        difference above 0), logit_diff (logits), each with a 95 % interval from a bootstrap over
        pairs, and change of logit_diff. Table "controls": one row a draw. meta["as_good"]: share of
        draws whose logit_diff is at least that of the chosen heads.

    Raises:
        BadInput: unknown head or position, a position after `at`, none or several interventions.
        Refused: the model's patterns or z cannot be seen.

    >>> pairs = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4], positions={"name": [1]})
    >>> report = repair(tiny_model(), pairs, heads=["0.1"], attend=["name"], controls=3, progress=False)
    >>> report.table["condition"].tolist()
    ['before', 'after', 'control']
    """
    started = time.perf_counter()
    check_options(
        heads=heads,
        attend=attend,
        scale=scale,
        restore=restore,
        silence=silence,
        on=on,
        controls=controls,
        n=n,
    )
    model.layers_with("pattern")
    pairs = as_pairs(model, task, n=n, seed=seed)
    chosen, silenced = [_existing(model, x) for x in heads], [_existing(model, x) for x in silence]
    query = pairs.position(at)
    keys = [pairs.position(place) for place in attend or ()]
    _check_order(model, pairs, attend or (), at)
    batch = pairs.clean_batch if on == "clean" else pairs.corrupted_batch
    other = None
    if restore:
        source = pairs.corrupted_batch if on == "clean" else pairs.clean_batch
        other = model.run(source, capture=["z"], logits=False).cache.by_layer("z")

    def edits(doing: Sequence[Head], silent: Sequence[Head]) -> list[Edit]:
        if attend is not None:
            found = [look_at(doing, keys, query)]
        elif other is not None:
            found = [Edit.patch("z", other, heads=doing, positions=query)]
        else:
            assert scale is not None
            found = [Edit.scale("z", scale, heads=doing, positions=query)]
        return found + ([Edit.zero("z", heads=silent, positions=query)] if silent else [])

    draws = [_random_heads(model, chosen, silenced, seed + i) for i in range(controls)]
    variants = [edits(chosen, silenced), *(edits(*draw) for draw in draws)]
    with Progress(progress) as bars:
        read = torch.tensor([pairs.end])
        run = model.run(batch, capture=["resid_pre"], logits=read)
        after, *others = model.replay(
            run,
            variants,
            lambda variant: _measured(pairs, variant),
            logits=read,
            progress=bars.stage("Repairing", len(variants)),
        )
    before = _measured(pairs, run)
    control = {name: np.mean([one[name] for one in others], axis=0) for name in before}
    weights = resampling(len(pairs), seed)
    rows = [
        {"condition": condition, **_row(values, before, weights)}
        for condition, values in (("before", before), ("after", after), ("control", control))
    ]
    drawn = [
        {"heads": ", ".join(map(_name, draw[0])), **{k: v.mean() for k, v in values.items()}}
        for draw, values in zip(draws, others, strict=True)
    ]
    as_good = np.mean([row["logit_diff"] >= after["logit_diff"].mean() for row in drawn])
    options = {
        "task": pairs.name,
        "heads": list(heads),
        "attend": None if attend is None else list(attend),
        "scale": scale,
        "restore": restore,
        "silence": list(silence),
        "at": at,
        "on": on,
        "controls": controls,
        "n": len(pairs),
    }
    meta = provenance(model, options=options, seed=seed) | {
        "as_good": float(as_good),
        "notes": [
            f"random heads of the same layers do at least as well in {as_good:.0%} of {controls} draws",
            *model.notes,
        ],
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    tables = {"repair": pd.DataFrame(rows), "controls": pd.DataFrame(drawn)}
    return Report("repair", tables, {}, meta)


def _measured(pairs: Pairs, run: Run) -> dict[str, Float[np.ndarray, " n"]]:
    """Accuracy, preference and logit difference of every prompt at the last position."""
    assert run.logits is not None
    logits = run.logits[:, -1].float()
    difference = logit_diff(logits, pairs.answers, pairs.wrong).cpu().numpy()
    hit = (logits.argmax(-1).cpu()[:, None] == pairs.answers).any(1).float().numpy()
    return {"accuracy": hit, "prefers": (difference > 0).astype(float), "logit_diff": difference}


def _row(
    values: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray], weights: np.ndarray
) -> dict[str, float]:
    """Means and intervals of one condition, and of its change in logit difference."""
    out: dict[str, float] = {}
    changed = {"change": values["logit_diff"] - before["logit_diff"]}
    for name, each in {**values, **changed}.items():
        low, high = np.quantile(weights @ each, INTERVAL)
        out |= {name: float(each.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
    return out


def _random_heads(
    model: Model, chosen: Sequence[Head], silenced: Sequence[Head], seed: int
) -> tuple[list[Head], list[Head]]:
    """As many other heads of the same layers for either set; of any layer where there are too few."""
    draw = np.random.default_rng(seed)
    taken = {*chosen, *silenced}
    every = [head for head in model.spec.heads if head not in taken]
    if len(every) < len(chosen) + len(silenced):
        raise BadInput(
            f"{len(taken)} of {len(model.spec.heads)} heads are chosen: too few are left for controls"
        )
    sets: list[list[Head]] = []
    for heads in (chosen, silenced):
        found = matched_heads([head for head in every if head not in taken], heads, draw)
        taken |= set(found)
        rest = [head for head in every if head not in taken]
        found += [rest[i] for i in draw.permutation(len(rest))[: len(heads) - len(found)]]
        taken |= set(found)
        sets.append(sorted(found))
    return sets[0], sets[1]


def _check_order(model: Model, pairs: Pairs, attend: Sequence[str], at: str) -> None:
    """A model that reads left to right cannot be made to look ahead."""
    for name in attend if model.spec.causal else ():
        ahead = pairs.position(name) > pairs.position(at)
        if bool(ahead.any()):
            raise BadInput(
                f"position '{name}' lies after '{at}' in prompt {int(ahead.nonzero()[0])}: a causal head "
                "never sees it"
            )


def _head(name: str) -> Head:
    layer, _, head = name.partition(".")
    if not (layer.isdigit() and head.isdigit()):
        raise BadInput(f"'{name}' is not a head; write layer.head, such as 20.0")
    return int(layer), int(head)


def _existing(model: Model, name: str) -> Head:
    head = _head(name)
    if head not in model.spec.heads:
        raise unknown("head", name, [_name(place) for place in model.spec.heads])
    return head


def _name(head: Head) -> str:
    return f"{head[0]}.{head[1]}"
