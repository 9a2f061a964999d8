"""Function vectors: what the heads that carry a task write, added where no example was given.

The heads that bring the right answer back, over several tasks (`probes.vectors.heads`), carry the task. The sum
of what they write on average is the function vector.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.errors import BadInput, at_least
from interp.models.model import Model
from interp.registry import analysis, intervals
from interp.report import Report, provenance
from interp.run.edits import Edit
from interp.run.progress import Progress
from interp.run.resume import Checkpoint
from probes.vectors.answers import Answers, answers_of, answers_under, best_setting, condition_row
from probes.vectors.heads import (
    SITE,
    best_heads,
    check_writes,
    function_vector,
    indirect_effects,
    last_means,
)
from probes.vectors.in_context import (
    TEMPLATE,
    Pairs,
    WordTask,
    check_template,
    task_names,
    word_task,
)
from probes.vectors.injection import checked_layers, injection, random_vectors

HEADS = (10, 20)
"""Numbers of heads that are tried."""


def check_options(
    *,
    tasks: object = "capital",
    shots: int = 10,
    prompts: int = 32,
    mixed: int = 10,
    heads: Sequence[int] | None = None,
    strengths: Sequence[float] = (1.0,),
    random: int = 5,
    most: int | None = None,
    template: str = TEMPLATE,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if isinstance(tasks, (str, list, tuple, Mapping)):
        task_names(tasks)
    check_template(template)
    at_least(
        shots=(shots, 2),
        prompts=(prompts, 2),
        mixed=(mixed, 2),
        random=(random, 2),
        heads=(min(HEADS if heads is None else heads, default=0), 1),
        most=(most, 14),
    )
    if not strengths:
        raise BadInput("strengths is empty: give at least one")


def of_conditions(report: Report) -> pd.DataFrame:
    """Accuracy of every condition and its interval."""
    columns = ["task", "condition", "layer", "strength", "items", "accuracy"]
    shown = pd.DataFrame(report.table, columns=columns)
    shown["95 %"] = intervals(report.table, "accuracy")
    return shown


@analysis(
    name="vector_function",
    source="Todd et al. 2024, Function Vectors in Large Language Models, arXiv 2310.15213",
    example="interp vector function smollm2-135m past,plural,antonym",
    figure="accuracy",
    validate=check_options,
    summary=of_conditions,
    takes="text",
)
@torch.no_grad()
def vector_function(
    model: Model,
    tasks: str | Sequence[str] | Mapping[str, Pairs],
    *,
    shots: int = 10,
    prompts: int = 32,
    mixed: int = 10,
    heads: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    strengths: Sequence[float] = (1.0, 2.0, 4.0),
    random: int = 5,
    most: int | None = None,
    template: str = TEMPLATE,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """How far a task's function vector, added to prompts without examples, makes the model do the task.

    The heads are those with the largest indirect effect, averaged over the tasks (AIE); a task's vector
    is the sum of their mean writes over its in-context prompts, added to resid_post of one layer at the
    last token. Vector and effects come from training pairs, number of heads, layer and strength from
    validation pairs, what is reported from test pairs that neither has seen.

    An answer counts as right where its first token is the most likely one. What is not shown: that the
    model represents the task only there; which of the heads is needed; that a whole answer follows.

    Where we differ: number of heads and strength are chosen on validation pairs (published: 10 heads
    or more by model size, strength 1); the comparison with random vectors is at the chosen layer.

    Args:
        tasks: names of shipped sets of word pairs, such as capital,antonym,past; in Python also your
            own pairs by name.
        shots: examples in a prompt. prompts: in-context prompts a task, for the mean head outputs.
        mixed: prompts with mixed-up answers a task, for the indirect effects.
        heads: numbers of heads to try; by default 10 and 20.
        layers: layers to try adding the vector at; by default all.
        strengths: factors of the vector to try.
        random: random vectors of equal norm to compare with.
        most: at most so many pairs a task.
        template: how a pair is asked, with {source} in it.
        seed: of splits, prompts and random vectors.

    Returns: a Report. Table "vector_function", one row a task and condition: zero_shot, in_context (with
        `shots` examples), function_vector, mean_state (the residual stream at the last token replaced by
        its mean over in-context prompts; layer chosen likewise) and random; items, draws, accuracy with
        interval (95 %, bootstrap over items), p_answer, over_zero_shot and over_random (accuracy gained,
        paired by item, with intervals), layer, strength. Table "layers": validation accuracy by task,
        heads, layer and strength. Table "heads": layer, head, aie, sem (its standard error over prompts)
        and the effect on each task (probability). Arrays: "vectors" [tasks d_model], "effects" [tasks
        n_layers n_heads].

    Raises:
        BadInput: unknown task, too few pairs, a layer outside, options out of range. Refused: heads
            that are not seen or whose writes do not add up.

    >>> check_options(tasks="antonym", shots=1)
    Traceback (most recent call last):
    interp.errors.BadInput: shots=1: wanted 2 or more
    """
    check_options(
        tasks=tasks, shots=shots, prompts=prompts, mixed=mixed, heads=heads, strengths=strengths,
        random=random, most=most, template=template,
    )  # fmt: skip
    started = time.perf_counter()
    places = checked_layers(model, layers, SITE)
    with_heads = model.layers_with("z")
    n_heads = sum(len(model.W_O(layer)) for layer in with_heads)
    if not any(model.spec.blocks[layer].direct for layer in with_heads):
        check_writes(model, with_heads)
    if heads is None:
        heads = sorted({min(n, n_heads) for n in HEADS})
    if max(heads) > n_heads:
        raise BadInput(f"heads={max(heads)}: {model.id} has {n_heads}")
    made = {
        name: word_task(model, name, pairs, template=template, most=most, seed=seed)
        for name, pairs in task_names(tasks).items()
    }
    for task in made.values():
        if shots > len(task.train) - 1:
            task.in_context(model, "train", shots=shots)  # says so
    options = {
        "tasks": {name: [len(t.train), len(t.valid), len(t.test)] for name, t in made.items()},
        "shots": shots, "prompts": prompts, "mixed": mixed, "heads": list(heads), "layers": layers,
        "strengths": list(strengths), "random": random, "most": most, "template": template,
    }  # fmt: skip
    meta = provenance(model, options=options, seed=seed)
    pairs = {name: [task.train, task.valid, task.test] for name, task in made.items()}
    key = {"model": meta["model"]["sha256"], "seed": seed, **options, "pairs": pairs}
    kept = Checkpoint(checkpoint, key, resume=resume)
    with Progress(progress) as bars:
        advance = bars.stage("Effects of heads", len(made) * (n_heads + 1))
        found = {
            name: kept.compute(
                f"effects.{name}",
                lambda task=task: _of_heads(model, task, shots, prompts, mixed, seed, advance),
            )
            for name, task in made.items()
        }
        effects = np.stack([found[name]["effects"].mean(0) for name in made])
        aie = effects.mean(0)
        # Tasks are as they are, prompts are drawn: what another draw would change.
        drawn = [found[name]["effects"].var(0, ddof=1) / mixed for name in made]
        sem = np.sqrt(np.sum(drawn, axis=0)) / len(made)
        ranked = best_heads(aie, max(heads))
        advance = bars.stage("Layers and strengths", len(made))
        rows, by_layer, vectors = [], [], []
        for name, task in made.items():
            z, state = _means_of(found[name], "z"), _means_of(found[name], "state")
            candidates = {n: function_vector(model, z, ranked[:n]) for n in heads}
            unit = kept.compute(
                f"tried.{name}",
                lambda task=task, candidates=candidates, state=state: _tried(
                    model, task, candidates, state, places, strengths, random, shots, seed
                ),
            )
            rows += _rows(name, unit)
            by_layer.append(_layer_table(name, unit, heads, places, strengths))
            vectors.append(candidates[int(unit["heads"].item())].cpu().numpy())
            advance(1)
    head_table = pd.DataFrame(
        {"layer": layer, "head": head, "aie": aie[layer, head], "sem": sem[layer, head]}
        | {name: effects[i, layer, head] for i, name in enumerate(made)}
        for layer, head in best_heads(aie, n_heads)
    )
    tables = {
        "vector_function": pd.DataFrame(rows).astype({"layer": "Int64"}),
        "layers": pd.concat(by_layer, ignore_index=True),
        "heads": head_table,
    }
    meta |= {
        "left_out": {name: dict(task.left_out) for name, task in made.items()},
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    arrays = {"vectors": np.stack(vectors), "effects": effects}
    return Report("vector_function", tables, arrays, meta)


def _of_heads(
    model: Model, task: WordTask, shots: int, prompts: int, mixed: int, seed: int, advance: Any
) -> dict[str, np.ndarray]:
    """Mean outputs and states of a task's in-context prompts, and the heads' effects on mixed-up ones."""
    shown = task.in_context(model, "train", shots=shots, n=prompts, seed=seed)
    means = last_means(model, shown.batch)
    z, state = means["z"], means[SITE]
    asked = task.in_context(model, "train", shots=shots, n=mixed, seed=seed + 1, shuffled=True)
    effects = indirect_effects(model, asked, z, progress=advance)
    unit = {f"z.{layer}": value.cpu().numpy() for layer, value in z.items()}
    unit |= {f"state.{layer}": value.cpu().numpy() for layer, value in state.items()}
    return unit | {"effects": effects}


def _means_of(unit: Mapping[str, np.ndarray], name: str) -> dict[int, Tensor]:
    """By layer, what `_of_heads` kept."""
    return {
        int(key.removeprefix(f"{name}.")): torch.from_numpy(value)
        for key, value in unit.items()
        if key.startswith(f"{name}.")
    }


def _tried(
    model: Model,
    task: WordTask,
    candidates: Mapping[int, Tensor],
    state: Mapping[int, Tensor],
    layers: Sequence[int],
    strengths: Sequence[float],
    random: int,
    shots: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Validation accuracies of every setting, and the best one's answers on test pairs beside its controls."""
    valid, test = (task.zero_shot(model, part) for part in ("valid", "test"))
    settings = [(n, at, by) for n in candidates for at in layers for by in strengths]

    def added(n: int, at: int, by: float, vector: Tensor | None = None) -> list[Edit]:
        one = candidates[n] if vector is None else vector
        return [injection(model, one, f"{SITE}.{at}", strength=by)]

    def replaced(at: int) -> list[Edit]:
        return [Edit.patch(f"{SITE}.{at}", state[at])]

    tried = answers_under(
        model,
        valid,
        [added(*setting) for setting in settings] + [replaced(at) for at in layers],
    )
    best = settings[best_setting(tried[: len(settings)])]
    state_at = layers[best_setting(tried[len(settings) :])]
    drawn = random_vectors(candidates[best[0]], random, seed)
    conditions = [[], added(*best), replaced(state_at), *(added(*best, vector=v) for v in drawn)]
    found = answers_under(model, test, conditions)
    found.append(answers_of(model, task.in_context(model, "test", shots=shots, seed=seed + 2)))
    return {
        "valid": np.array([one.right.mean() for one in tried[: len(settings)]]),
        "heads": np.array(best[0]),
        "layer": np.array(best[1]),
        "strength": np.array(best[2]),
        "state_layer": np.array(state_at),
        "right": np.stack([one.right for one in found]),
        "p": np.stack([one.p for one in found]),
    }


def _rows(name: str, unit: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    found = [Answers(right, p) for right, p in zip(unit["right"], unit["p"], strict=True)]
    zero, vector, state, *drawn, shown = found
    best = {"layer": int(unit["layer"].item()), "strength": float(unit["strength"].item())}
    return [
        condition_row(name, condition, answers, drawn, zero, **where)
        for condition, answers, where in (
            ("zero_shot", [zero], {}),
            ("in_context", [shown], {}),
            ("function_vector", [vector], best),
            ("mean_state", [state], {"layer": int(unit["state_layer"].item())}),
            ("random", drawn, best),
        )
    ]


def _layer_table(
    name: str,
    unit: Mapping[str, np.ndarray],
    heads: Sequence[int],
    layers: Sequence[int],
    strengths: Sequence[float],
) -> pd.DataFrame:
    settings = [(n, at, by) for n in heads for at in layers for by in strengths]
    table = pd.DataFrame(settings, columns=["heads", "layer", "strength"])
    table.insert(0, "task", name)
    return table.assign(accuracy=unit["valid"])
