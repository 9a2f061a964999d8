"""Task vectors whose heads are weighted by learning: v = Σ w_lh z̄_lh W_O, w such that the task is done.

Instead of asking of each head alone whether it carries the task, all weights are learned together: the
weighted writes are added to the last token of prompts without examples, and w follows the gradient of the
answers' cross-entropy. The model itself stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from interp.errors import BadInput, at_least
from interp.last_token import Prefix, read_prefix
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.adam import adam, moments
from interp.run.edits import Edit
from interp.run.progress import Progress
from interp.run.resume import Checkpoint
from probes.vectors.answers import Answers, answers_of, answers_under, condition_row
from probes.vectors.function import of_conditions
from probes.vectors.heads import SITE, check_writes, head_writes, last_means
from probes.vectors.in_context import (
    TEMPLATE,
    Asked,
    Pairs,
    WordTask,
    check_template,
    task_names,
    word_task,
)
from probes.vectors.injection import checked_layers, random_vectors

Writes = Mapping[int, Float[Tensor, "n_heads d_model"]]
Weights = Mapping[int, Float[Tensor, " n_heads"]]


def task_vectors(
    writes: Writes, weights: Weights, layer: int | None = None
) -> dict[int, Float[Tensor, " d_model"]]:
    """The weighted sums of heads' writes, by the layer whose output they are added to.

        layer=None: v_l = Σ_h w_lh write_lh at every layer l;   layer=L: one v = Σ_lh w_lh write_lh at L

    >>> found = task_vectors({0: torch.eye(2, 4)}, {0: torch.tensor([1.0, 2.0])})
    >>> found[0].tolist()
    [1.0, 2.0, 0.0, 0.0]
    """
    sums = {at: weights[at] @ write for at, write in writes.items()}
    return sums if layer is None else {layer: torch.stack(list(sums.values())).sum(0)}


def added(vectors: Mapping[int, Float[Tensor, " d_model"]], positions: Any = None) -> list[Edit]:
    """Edits that add each layer's vector to its output."""
    return [Edit.add(f"{SITE}.{at}", vector, positions=positions) for at, vector in vectors.items()]


def learn_weights(
    model: Model,
    train: Asked,
    valid: Asked,
    writes: Writes,
    *,
    layer: int | None = None,
    epochs: int = 12,
    batch_size: int = 32,
    lr: float = 0.05,
    patience: int = 3,
    seed: int = 0,
    kept: Checkpoint | None = None,
    progress: Any = None,
) -> tuple[dict[int, Float[Tensor, " n_heads"]], pd.DataFrame]:
    """Weights of all heads under which the validation answers were likeliest, and the way there.

    Adam on the mean cross-entropy of the answers' first tokens, all weights starting at 0, stopped
    after `patience` epochs without a lower validation loss. Every epoch is kept in `kept`, so that an
    interrupted run goes on to the same weights.

    Args:
        train, valid: prompts without examples, and the tokens that answer them.
        writes: what each head writes on average (`head_writes`), by layer.
        layer: where the one sum is added; None adds each layer's own sum to that layer.

    Returns: weights by layer; a table: epoch, train_loss and valid_loss (nats), valid_accuracy.
    """
    at_least(epochs=(epochs, 1), batch_size=(batch_size, 1), patience=(patience, 1), lr=(lr, 1e-12))
    kept = Checkpoint() if kept is None else kept
    sizes = [len(writes[at]) for at in writes]
    order = np.random.default_rng(seed).permutation(train.batch.size)
    parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches = [_Batch(model, _rows(train, part)) for part in parts]
    held_out = _Batch(model, valid)

    def spread(w: Tensor) -> dict[int, Tensor]:
        return dict(zip(writes, w.split(sizes), strict=True))

    def loss(of: _Batch, w: Tensor) -> tuple[Tensor, Tensor]:
        logits = of.logits(task_vectors(writes, spread(w), layer))
        return cross_entropy(logits.float(), of.asked.answers), logits

    def epoch(number: int, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        w = torch.tensor(state["w"], device=model.device, requires_grad=True)
        optimiser = adam(w, lr, state)
        losses = []
        for i in np.random.default_rng([seed, number]).permutation(len(batches)):
            with torch.enable_grad():
                value, _ = loss(batches[i], w)
                (w.grad,) = torch.autograd.grad(value, w)
            optimiser.step()
            losses.append(float(value.detach()))
        with torch.no_grad():
            value, logits = loss(held_out, w)
        right = (logits.argmax(-1) == valid.answers).float().mean()
        best = float(value) < state["best"].item()
        now = w.detach().cpu().numpy()
        return moments(optimiser, w) | {
            "w": now,
            "best_w": now if best else state["best_w"],
            "best": np.array(min(float(value), state["best"].item())),
            "since": np.array(0 if best else state["since"].item() + 1),
            "row": np.array([np.mean(losses), float(value), float(right)]),
        }

    with torch.no_grad():
        start, logits = loss(held_out, torch.zeros(sum(sizes), device=model.device))
    right = float((logits.argmax(-1) == valid.answers).float().mean())
    zeros = np.zeros(sum(sizes), dtype=np.float32)
    state = {"w": zeros, "best_w": zeros, "best": np.array(float(start))}
    state |= {"since": np.array(0)}
    rows = [(0, float("nan"), float(start), right)]
    for number in range(epochs):
        state = kept.compute(f"epoch.{number}", lambda n=number, s=state: epoch(n, s))
        rows.append((number + 1, *state["row"].tolist()))
        if progress is not None:
            progress(1)
        if state["since"].item() >= patience:
            break
    curve = pd.DataFrame(rows, columns=["epoch", "train_loss", "valid_loss", "valid_accuracy"])
    return spread(torch.from_numpy(state["best_w"])), curve


class _Batch:
    """Prompts read up to their last token, ready to be answered under other vectors."""

    def __init__(self, model: Model, asked: Asked):
        self.model, self.asked = model, asked
        self.prefix: Prefix | None = read_prefix(model, asked.batch)

    def logits(self, vectors: Mapping[int, Tensor]) -> Float[Tensor, "n d_vocab"]:
        """Of the last token, with a gradient where one is wanted."""
        if self.prefix is not None:
            return self.prefix.read(self.model, [added(vectors)], min(vectors))[0]
        end = self.asked.batch.ids.shape[1] - 1
        run = self.model.run(
            self.asked.batch,
            edits=added(vectors, [end]),
            logits=torch.tensor([end]),
            grad=torch.is_grad_enabled(),
        )
        assert run.logits is not None
        return run.logits[:, -1]


def _rows(asked: Asked, rows: np.ndarray) -> Asked:
    """Some of the prompts."""
    index = torch.from_numpy(np.sort(rows)).to(asked.answers.device)
    return Asked(asked.batch.rows(index), asked.answers[index])


# --- the analysis -----------------------------------------------------------------------------------


def check_options(
    *,
    task: object = "capital",
    shots: int = 10,
    prompts: int = 32,
    epochs: int = 12,
    batch_size: int = 32,
    lr: float = 0.05,
    patience: int = 3,
    random: int = 5,
    most: int | None = None,
    template: str = TEMPLATE,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if isinstance(task, (str, Mapping)) and len(task_names(task)) != 1:
        raise BadInput(
            f"vectors are learned for one task at a time, not for {len(task_names(task))}"
        )
    check_template(template)
    at_least(
        shots=(shots, 2), prompts=(prompts, 2), epochs=(epochs, 1), random=(random, 2),
        batch_size=(batch_size, 1), lr=(lr, 1e-12), patience=(patience, 1), most=(most, 14),
    )  # fmt: skip


@analysis(
    name="vector_task",
    source="Saglam et al. 2025, Learning Task Representations from In-Context Learning, arXiv 2502.05390",
    example="interp vector task smollm2-135m antonym",
    figure="accuracy",
    validate=check_options,
    summary=of_conditions,
    takes="text",
)
def vector_task(
    model: Model,
    task: str | Mapping[str, Pairs],
    *,
    shots: int = 10,
    prompts: int = 32,
    layer: int | None = None,
    epochs: int = 12,
    batch_size: int = 32,
    lr: float = 0.05,
    patience: int = 3,
    random: int = 5,
    most: int | None = None,
    template: str = TEMPLATE,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """How far a learned weighted sum of head outputs makes the model do a task without examples.

    Each head's mean write over in-context prompts gets one weight; the weighted sums are added to the
    last token of prompts without examples, at every layer or at one. Weights are learned on training
    pairs (cross-entropy of the answer's first token), stopped early on validation pairs; what is
    reported is measured on test pairs. Beside it: weights learned in the same way from answers that
    have changed places, and random vectors of equal norm at the same layers.

    A weight says what helps together with all others; it does not say what the head does by itself.

    Where we differ: weights start at 0 and are learned on prompts without examples.

    Args:
        task: a shipped set of word pairs, such as antonym; in Python also {name: pairs}.
        shots: examples in a prompt. prompts: in-context prompts for the mean head outputs.
        layer: add one sum of all heads after this block; by default each layer's own after each block.
        epochs: passes over the training pairs, at most. batch_size: prompts a step. lr: of Adam.
        patience: epochs without a lower validation loss before stopping.
        random: random vectors to compare with.
        most: at most so many pairs.
        template: how a pair is asked, with {source} in it.
        seed: of splits, prompts, order and random vectors.

    Returns: a Report. Table "vector_task", one row a condition (zero_shot, in_context, task_vector,
        mixed_up, random) as in `vector_function`. Table "weights": layer, head, weight, norm (of weight
        × write). Table "curve": epoch, train_loss, valid_loss (nats), valid_accuracy. Array "vectors"
        [layers d_model].

    Raises:
        BadInput: more than one task, unknown task, too few pairs, a layer outside, options out of
            range, another run's checkpoint. Refused: heads whose writes do not add up.

    >>> check_options(task="antonym", epochs=0)
    Traceback (most recent call last):
    interp.errors.BadInput: epochs=0: wanted 1 or more
    """
    check_options(
        task=task, shots=shots, prompts=prompts, epochs=epochs, batch_size=batch_size, lr=lr,
        patience=patience, random=random, most=most, template=template,
    )  # fmt: skip
    started = time.perf_counter()
    if layer is not None:
        checked_layers(model, [layer], SITE)
    check_writes(model, model.layers_with("z"))
    ((name, pairs),) = task_names(task).items()
    made = word_task(model, name, pairs, template=template, most=most, seed=seed)
    options = {
        "task": name, "parts": [len(made.train), len(made.valid), len(made.test)], "shots": shots,
        "prompts": prompts, "layer": layer, "epochs": epochs, "batch_size": batch_size, "lr": lr,
        "patience": patience, "random": random, "most": most, "template": template,
    }  # fmt: skip
    meta = provenance(model, options=options, seed=seed)
    split = [made.train, made.valid, made.test]
    key = {"model": meta["model"]["sha256"], "seed": seed, **options, "pairs": split}
    kept = Checkpoint(checkpoint, key, resume=resume)
    shown = made.in_context(model, "train", shots=shots, n=prompts, seed=seed)
    asked = {part: made.zero_shot(model, part) for part in ("train", "valid", "test")}
    how = {"layer": layer, "epochs": epochs, "batch_size": batch_size, "lr": lr}
    how |= {"patience": patience, "seed": seed}
    with Progress(progress) as bars:
        advance = bars.stage("Epochs", 2 * epochs)
        unit = kept.compute("means", lambda: _kept_means(model, shown))
        z = {int(at): torch.from_numpy(value).to(model.device) for at, value in unit.items()}
        writes = head_writes(model, z)
        weights, curve = learn_weights(
            model, asked["train"], asked["valid"], writes, kept=kept.part("task"), progress=advance,
            **how,
        )  # fmt: skip
        mixed, _ = learn_weights(
            model, _mixed_up(asked["train"], seed), _mixed_up(asked["valid"], seed), writes,
            kept=kept.part("mixed_up"), progress=advance, **how,
        )  # fmt: skip
    rows, vectors = _conditions(model, made, asked["test"], writes, weights, mixed, layer, random,
                                shots, seed)  # fmt: skip
    table = pd.DataFrame(
        {
            "layer": at,
            "head": head,
            "weight": float(weights[at][head]),
            "norm": float((weights[at][head].to(write) * write).norm()),
        }
        for at in writes
        for head, write in enumerate(writes[at])
    )
    table = table.sort_values("norm", ascending=False, kind="stable", ignore_index=True)
    meta |= {
        "left_out": dict(made.left_out),
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    tables = {
        "vector_task": pd.DataFrame(rows).astype({"layer": "Int64"}),
        "weights": table,
        "curve": curve,
    }
    arrays = {"vectors": torch.stack(list(vectors.values())).cpu().numpy()}
    return Report("vector_task", tables, arrays, meta)


def _kept_means(model: Model, shown: Asked) -> dict[str, np.ndarray]:
    means = last_means(model, shown.batch, ["z"])["z"]
    return {str(at): value.cpu().numpy() for at, value in means.items()}


def _mixed_up(asked: Asked, seed: int) -> Asked:
    """The same prompts, the answers having changed places."""
    order = np.random.default_rng(seed).permutation(len(asked.answers))
    source = np.empty_like(order)
    source[order] = np.roll(order, 1)
    return Asked(asked.batch, asked.answers[torch.from_numpy(source).to(asked.answers.device)])


@torch.no_grad()
def _conditions(
    model: Model,
    task: WordTask,
    test: Asked,
    writes: Writes,
    weights: Weights,
    mixed: Weights,
    layer: int | None,
    random: int,
    shots: int,
    seed: int,
) -> tuple[list[dict[str, Any]], dict[int, Tensor]]:
    """The rows of the table, and the vectors by layer."""

    def of(some: Weights) -> dict[int, Tensor]:
        return task_vectors(writes, {at: w.to(writes[at]) for at, w in some.items()}, layer)

    vectors = of(weights)
    drawn = [
        {at: random_vectors(v, random, seed + at)[i] for at, v in vectors.items()}
        for i in range(random)
    ]
    conditions: Sequence[list[Edit]] = [[], added(vectors), added(of(mixed)), *map(added, drawn)]
    zero, found, other, *at_random = answers_under(model, test, conditions)
    shown: Answers = answers_of(model, task.in_context(model, "test", shots=shots, seed=seed + 2))
    where = {} if layer is None else {"layer": layer}
    rows = [
        condition_row(task.name, condition, answers, at_random, zero, **place)
        for condition, answers, place in (
            ("zero_shot", [zero], {}),
            ("in_context", [shown], {}),
            ("task_vector", [found], where),
            ("mixed_up", [other], where),
            ("random", at_random, where),
        )
    ]
    return rows, vectors
