"""Retrieval and streaming heads: which heads need the whole context, and what a KV cache saves on the others.

A streaming head sees the first tokens (the sink) and the most recent ones only, so that its share of a KV
cache stops growing. Every head gets a gate α and attends with

    α · full attention + (1 − α) · streaming attention,

and the gates are optimised, weights frozen, to keep the model's last hidden states where it answers with
far-off passkeys, at a price for each open gate. A head whose gate closes can stream.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from circuits.heads.detector import head_table
from circuits.heads.gates import Gates, Units, optimise_gates
from circuits.heads.passkeys import CUE, Passkeys, passkeys
from circuits.heads.streaming import cache_bytes, far_mass, streaming_losses, token_bytes
from interp.data.prompts import text_windows
from interp.errors import BadInput, Refused, unknown
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.progress import Progress
from interp.run.resume import Checkpoint

UNITS = ("kv", "head")


def check_options(
    *,
    unit: str = "kv",
    steps: int = 30,
    learning_rate: float = 0.1,
    weight: float = 0.002,
    prompts: int = 16,
    batch: int = 1,
    length: int = 128,
    keys: int = 2,
    width: int = 8,
    sink: int = 4,
    recent: int = 16,
    threshold: float = 0.5,
    held_out: int = 4,
    points: int = 5,
    draws: int = 2,
    max_loss_increase: float = 0.3,
    context: int | None = None,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if unit not in UNITS:
        raise unknown("unit", unit, UNITS)
    for name, value, least in (
        ("steps", steps, 1),
        ("prompts", prompts, 1),
        ("batch", batch, 1),
        ("keys", keys, 1),
        ("width", width, CUE + 1),
        ("sink", sink, 0),
        ("recent", recent, 1),
        ("held_out", held_out, 1),
        ("points", points, 2),
        ("draws", draws, 1),
        ("context", 1 if context is None else context, 1),
    ):
        if value < least:
            raise BadInput(f"{name}={value}: give at least {least}")
    if not 0 < threshold < 1:
        raise BadInput(f"threshold={threshold}: give a gate between 0 and 1")
    for name, number in (("learning_rate", learning_rate), ("weight", weight)):
        if not number > 0:
            raise BadInput(f"{name}={number}: give a number above 0")
    if not max_loss_increase >= 0:
        raise BadInput(f"max_loss_increase={max_loss_increase}: give nats a token, 0 or more")
    if sink + recent >= length:
        raise BadInput(
            f"sink={sink} and recent={recent} cover all {length} tokens of a prompt: a streaming head would "
            "miss nothing; give fewer, or longer prompts"
        )


def largest_gates(report: Report) -> pd.DataFrame:
    """The gates that keep most of the whole context, beside the second seed and the null."""
    table = report.table.sort_values("gate", ascending=False).head(15)
    shown = pd.DataFrame(table, columns=["layer", "kv_head", "heads", "gate"])
    return shown.assign(again=table["gate_again"], null=table["gate_null"], label=table["label"])


@analysis(
    name="duo_attention",
    source="Xiao et al. 2024, DuoAttention, §2.2-2.3 (arXiv 2410.10819)",
    example="interp duo-attention smollm2-135m",
    figure="gates",
    validate=check_options,
    summary=largest_gates,
    takes="text",
)
def duo_attention(
    model: Model,
    *,
    unit: str = "kv",
    steps: int = 30,
    learning_rate: float = 0.1,
    weight: float = 0.002,
    prompts: int = 16,
    batch: int = 1,
    length: int = 128,
    keys: int = 2,
    width: int = 8,
    sink: int = 4,
    recent: int = 16,
    threshold: float = 0.5,
    held_out: int = 4,
    points: int = 5,
    draws: int = 2,
    max_loss_increase: float = 0.3,
    context: int | None = None,
    text: str | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """Which heads need the whole context (retrieval) and which the sink and the last tokens only (streaming).

    A gate α for every kv head mixes full and streaming attention; gates minimise mean (h_gated − h_full)² /
    mean h_full² + weight · Σ |α| where the model repeats far-off passkeys (see `optimise_gates`). Beside
    them: gates of a second seed (other passkeys, other text), and of a null in which every passkey stands right before
    it is asked for. Then heads stream for real, their masked keys gone, as many staying full as `points`
    says: chosen by gate, by their far attention, and at random.

    A closed gate says that a head is not needed for far-off passkeys of this length, not that it never looks
    far; open gates depend on `weight`, and the number of retrieval heads with them. What is said of memory
    counts cache entries; nothing is run with a smaller cache. A layer that has a sliding window of its
    own is counted as if it had none.

    Args:
        model: from `interp.load`; it has to read left to right.
        unit: "kv", a gate a kv head (as published: what a cache can drop), or "head", one a query head.
        steps: of AdamW.
        learning_rate: of the gates.
        weight: price of an open gate, as a share of the squared hidden state.
        prompts: passkey prompts that gates are optimised on.
        batch: prompts a step.
        length: tokens of a prompt.
        keys: passkeys in a prompt.
        width: tokens of a passkey; the first two are given when it is asked for.
        sink: first tokens that a streaming head sees.
        recent: last tokens that it sees, its own included.
        threshold: heads with a gate above are retrieval heads.
        held_out: passkey prompts, and windows of prose, that streaming is judged on.
        points: numbers of full heads tried, from none to all, closer together at few; beside them, as many
            as are labelled retrieval.
        draws: random choices of full heads at each number.
        max_loss_increase: nats a token that streaming may cost, on passkeys and on prose, where memory
            saved is reported.
        context: tokens in the KV cache that is counted; by default what the model reads at most (n_ctx).
        text: what passkeys are planted in; by default the shipped novel (random tokens, with no tokenizer).
        seed: of prompts, their order, and random choices.
        checkpoint: folder for finished steps, so that an interrupted call can be resumed.
        resume: go on from what is there.
        progress: show progress bars.

    Returns: a Report. Table "duo_attention", a row a gate: layer, kv_head, heads (that share it), gate,
        gate_again (second seed), gate_null, far_mass (mean attention of its heads to what streaming hides,
        0 to 1), label, stable (the second seed gives the same label). "heads": the same by query head.
        "tradeoff": by (chosen_by, draw, full): passkey_loss and text_loss (nats a token; text_loss on tokens
        that have something hidden), passkey_recall, cache_bytes, saved (share of the full cache). "training": the
        curves. meta["duo"]: losses without streaming, the chosen point, agreement between seeds.

    Raises:
        BadInput: options; prompts that do not fit n_ctx or the text. Refused: a model that reads in both
            directions, predicts no next token, or whose attention is not seen.

    >>> small = {"length": 48, "keys": 1, "width": 6, "sink": 1, "recent": 12, "prompts": 2, "steps": 2}
    >>> report = duo_attention(tiny_model(), **small, held_out=2, points=3, progress=False)
    >>> report.table[["layer", "kv_head", "heads"]].values.tolist()
    [[0, 0, '0,1'], [0, 1, '2,3'], [1, 0, '0,1'], [1, 1, '2,3']]

    Source: Xiao et al. 2024, DuoAttention. Differs: shorter prompts and passkeys, random tokens of the text in
        place of random words; plain copying, no question; the distillation loss is a share of the hidden
        states' own size, so that one `weight` serves models of any scale; 30 steps in place of 2,000, at
        a higher learning rate; hidden states are compared where an answer's tokens are predicted.
    """
    started = time.perf_counter()
    options = {name: value for name, value in locals().items() if name in _OPTIONS}
    check_options(**options)
    _check_model(model)
    form = {k: options[k] for k in ("length", "keys", "width", "sink", "recent", "text")}
    jobs = {
        "gate": passkeys(model, prompts, **form, seed=_seed(seed, 0)),
        "gate_again": passkeys(model, prompts, **form, seed=_seed(seed, 1)),
        "gate_null": passkeys(model, prompts, **form, seed=_seed(seed, 0), near=True),
    }
    tests = _tests(model, held_out, form, _seed(seed, 2))
    context = context or model.spec.n_ctx or length
    units = Units.of_model(model, unit)
    meta = provenance(model, options=options, seed=seed)
    done = Checkpoint(
        checkpoint, {"model": meta["model"], "options": options, "seed": seed}, resume=resume
    )
    gates: dict[str, Gates] = {}
    reach = {"sink": sink, "recent": recent}
    with Progress(progress) as bars:
        for name, job in jobs.items():
            gates[name] = optimise_gates(
                model,
                job,
                units,
                **reach,
                steps=steps,
                learning_rate=learning_rate,
                weight=weight,
                batch=batch,
                seed=_seed(seed, 3 + (name == "gate_again")),
                checkpoint=done.part(name),
                advance=bars.stage(_STAGES[name], steps),
            )
        far = far_mass(model, tests["passkey"], sink, recent)
        unit_far = np.array([far[layer, list(heads)].mean() for layer, heads in units.heads])
        counts = _counts(gates["gate"].value, points, threshold)
        chosen = _choices(gates["gate"].value, unit_far, counts, draws, _seed(seed, 5))
        variants = [units.streams(full, model) for _, _, full in chosen]
        advance = bars.stage("Streaming for real", len(tests) * len(variants))

        def judge(name: str) -> dict[str, np.ndarray]:
            test = tests[name]
            found = streaming_losses(
                model, test.ids, test.judged, variants, **reach, advance=advance
            )
            return dict(zip(("loss", "hit"), found, strict=True))

        judged = {
            name: done.compute(f"judged.{name}", lambda name=name: judge(name)) for name in tests
        }
    sizes = token_bytes(model)
    tradeoff = _tradeoff(chosen, judged, units, sizes, context, sink, recent)
    table = _unit_table(units, gates, unit_far, threshold)
    heads = _head_table(model, units, gates, far, threshold)
    training = pd.concat(
        [
            pd.DataFrame(found.curve, columns=["distillation", "mean_gate"]).assign(
                gates=name, step=np.arange(1, steps + 1)
            )
            for name, found in gates.items()
        ],
        ignore_index=True,
    )[["gates", "step", "distillation", "mean_gate"]]
    meta["duo"] = _figures(table, tradeoff, threshold, max_loss_increase, context)
    meta["notes"] = [*model.notes, *_notes(table, meta["duo"], max_loss_increase, length)]
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    tables = {"duo_attention": table, "heads": heads, "tradeoff": tradeoff, "training": training}
    return Report("duo_attention", tables, {}, meta)


_OPTIONS = frozenset(inspect.signature(check_options).parameters) - {"_"} | {"text"}
_STAGES = {
    "gate": "Optimising gates",
    "gate_again": "Again, other prompts",
    "gate_null": "Null: nothing far off",
}


def _seed(seed: int, part: int) -> int:
    """A seed of its own for each part of the computation."""
    return int(np.random.SeedSequence([seed, part]).generate_state(1)[0])


def _check_model(model: Model) -> None:
    model.layers_with("pattern")
    if not model.spec.causal:
        raise Refused(
            f"{model.id} reads in both directions: it keeps no KV cache, and no head of it streams"
        )
    if model.spec.unembedding is None:
        raise Refused(f"{model.id} predicts no next token: it has no answer to judge heads by")


def _tests(model: Model, n: int, form: Mapping[str, Any], seed: int) -> dict[str, Passkeys]:
    """Held-out passkeys, and prose (random tokens, with no tokenizer) judged where streaming hides something."""
    tests = {"passkey": passkeys(model, n, **form, seed=seed)}
    if model.tokenizer is None:
        return tests
    windows = text_windows(model, n, length=form["length"] - 1, seed=seed, text=form["text"])
    judged = windows.judged[windows.judged >= form["sink"] + form["recent"]]
    tests["text"] = Passkeys(windows.ids, judged, windows.ids[:, :0])
    return tests


def _counts(gate: np.ndarray, points: int, threshold: float) -> list[int]:
    """Numbers of full heads to try: from none to all, and as many as are labelled retrieval."""
    n = len(gate)
    spread = {round(n * share**2) for share in np.linspace(0, 1, points)}
    return sorted(spread | {int((gate > threshold).sum())})


def _choices(
    gate: np.ndarray, far: np.ndarray, counts: Sequence[int], draws: int, seed: int
) -> list[tuple[str, int, np.ndarray]]:
    """(chosen by, draw, which units stay full): none and all once, numbers in between by every order.

    Equal gates, as clamping makes them, are ordered by far attention.
    """
    n = len(gate)
    generator = np.random.default_rng(seed)
    orders = [
        ("gate", 0, np.lexsort((-far, -gate))),
        ("far_mass", 0, np.argsort(-far, kind="stable")),
    ]
    orders += [("random", draw, generator.permutation(n)) for draw in range(draws)]
    out = []
    for count in counts:
        for name, draw, order in orders if 0 < count < n else [("any", 0, orders[0][2])]:
            full = np.zeros(n, dtype=bool)
            full[order[:count]] = True
            out.append((name, draw, full))
    return out


def _tradeoff(
    chosen: Sequence[tuple[str, int, np.ndarray]],
    judged: Mapping[str, Mapping[str, np.ndarray]],
    units: Units,
    sizes: Mapping[tuple[int, int], int],
    context: int,
    sink: int,
    recent: int,
) -> pd.DataFrame:
    """A row for each choice of full heads: what it costs and what it saves."""
    places = sorted(sizes)
    per_token = np.array([sizes[place] for place in places])
    # A kv head's entries can go only when every head that reads them streams.
    reads = np.array([[place == mine for place in places] for mine in units.kv_heads])
    kept = np.array([reads[full].any(0) for _, _, full in chosen])
    total = cache_bytes(per_token, kept, context, sink, recent)
    whole = int(per_token.sum()) * context
    rows = {
        "chosen_by": [name for name, _, _ in chosen],
        "draw": [draw for _, draw, _ in chosen],
        "full": [int(full.sum()) for _, _, full in chosen],
        "share_full": [float(full.mean()) for _, _, full in chosen],
        "passkey_loss": judged["passkey"]["loss"].mean(1),
        "passkey_recall": judged["passkey"]["hit"].mean(1),
    }
    if "text" in judged:
        rows["text_loss"] = judged["text"]["loss"].mean(1)
    return pd.DataFrame(rows | {"cache_bytes": total, "saved": 1 - total / whole})


def _unit_table(
    units: Units, gates: Mapping[str, Gates], far: np.ndarray, threshold: float
) -> pd.DataFrame:
    table = pd.DataFrame(units.kv_heads, columns=["layer", "kv_head"])
    table["heads"] = [",".join(map(str, heads)) for _, heads in units.heads]
    for name, found in gates.items():
        table[name] = found.value.astype(float)
    table["far_mass"] = far
    table["label"] = _labels(table["gate"].to_numpy(), threshold)
    table["stable"] = (table["gate"] > threshold) == (table["gate_again"] > threshold)
    return table


def _head_table(
    model: Model, units: Units, gates: Mapping[str, Gates], far: np.ndarray, threshold: float
) -> pd.DataFrame:
    """A row a query head: the gate it shares, and its own far attention."""
    columns = {"far_mass": far} | {name: np.full_like(far, np.nan) for name in gates}
    kv_head = np.full_like(far, np.nan)
    for layer, numbers in units.of.items():
        for head, number in enumerate(numbers.tolist()):
            kv_head[layer, head] = units.kv_heads[number][1]
            for name, found in gates.items():
                columns[name][layer, head] = found.value[number]
    table = head_table(kv_head=kv_head, **columns).astype({"kv_head": int})
    table["label"] = _labels(table["gate"].to_numpy(), threshold)
    return table


def _labels(gate: np.ndarray, threshold: float) -> np.ndarray:
    return np.where(gate > threshold, "retrieval", "streaming")


def _figures(
    table: Any, tradeoff: Any, threshold: float, allowed: float, context: int
) -> dict[str, Any]:
    """What the notes and the figures say in numbers."""
    everything = tradeoff.loc[tradeoff["full"].idxmax()]
    nothing = tradeoff.loc[tradeoff["full"].idxmin()]
    losses = [name for name in ("passkey_loss", "text_loss") if name in tradeoff]
    more = (tradeoff[losses] - everything[losses].astype(float)).max(axis=1)
    saving = {}
    for order in ("gate", "far_mass", "random"):
        mine = tradeoff["chosen_by"].isin([order, "any"])
        by_count = more[mine].groupby(tradeoff.loc[mine, "full"]).mean()
        # The fewest from which on no more costs too much; all heads full cost nothing.
        over = by_count.index[by_count > allowed]
        count = int(by_count.index[by_count.index > max(over, default=-1)].min())
        row = tradeoff.loc[mine & (tradeoff["full"] == count), ["saved", "cache_bytes"]].mean()
        saving[order] = {
            "full": count,
            "saved": float(row["saved"]),
            "cache_bytes": int(row["cache_bytes"]),
            "loss_increase": float(by_count[count]),
        }
    return {
        "context": context,
        "full_cache_bytes": int(everything["cache_bytes"]),
        "full": {name: float(everything[name]) for name in [*losses, "passkey_recall"]},
        "streaming": {name: float(nothing[name]) for name in [*losses, "passkey_recall"]},
        "saving": saving,
        "retrieval": int((table["label"] == "retrieval").sum()),
        "also_in_null": int(
            ((table["label"] == "retrieval") & (table["gate_null"] > threshold)).sum()
        ),
        "agreement": float(table["stable"].mean()),
        "mean_gate": {
            name: float(table[name].mean()) for name in ("gate", "gate_again", "gate_null")
        },
    }


def _notes(table: pd.DataFrame, told: Mapping[str, Any], allowed: float, length: int) -> list[str]:
    mean, full, none = told["mean_gate"], told["full"], told["streaming"]
    notes = [
        f"Passkeys are answered with recall {full['passkey_recall']:.2f} and {full['passkey_loss']:.2f} nats a "
        f"token; with every head streaming {none['passkey_recall']:.2f} and "
        f"{none['passkey_loss']:.2f}.",
        f"{told['retrieval']} of {len(table)} gates are above the threshold; {told['agreement']:.0%} of labels "
        f"are the same with other prompts. Mean gate {mean['gate']:.3f}, {mean['gate_again']:.3f} with other "
        f"prompts, {mean['gate_null']:.3f} where no passkey is far off; "
        f"{told['also_in_null']} of those above the threshold are above it there too.",
    ]
    if full["passkey_loss"] > none["passkey_loss"] - 0.1:
        notes.append(
            "The model hardly answers better with the far context than without: gates say little about it."
        )
    judged_on = "passkeys and on prose" if "text_loss" in full else "passkeys"
    saved = "; ".join(
        f"{told['saving'][order]['full']} chosen by {name} ({told['saving'][order]['saved']:.0%} saved)"
        for order, name in (("gate", "gate"), ("far_mass", "far attention"), ("random", "chance"))
    )
    notes.append(
        f"Full gates needed, of the numbers tried, for at most {allowed:g} nats a token more on {judged_on} of "
        f"{length} tokens: {saved}, of a cache of {told['full_cache_bytes'] / 2**20:.1f} MiB at "
        f"{told['context']} tokens."
    )
    return notes
