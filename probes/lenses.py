"""Learned lenses: what a block's input or one head's output says of the final prediction.

Tuned lens: per block an affine map of its input to the final residual. Attention Lens: per head an
affine map of its z. Both are started from least squares and trained on the KL to the model's own
prediction (`probes.lens_training`), and are judged on documents they have not seen, beside the logit
lens and the least-squares one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from interp.affine_lens import FORMAT, AffineLens, lens_path
from interp.data.texts import documents
from interp.errors import BadInput, unknown
from interp.lens_text import Parts, evenly, parts_of
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.ridge_lens import check_layers
from interp.run.progress import Progress
from interp.unembedding import Unembedding
from probes.head_lens import HeadLens
from probes.lens_inputs import Inputs, Maps
from probes.lens_rows import Rows, judged
from probes.lens_start import observed, own_ridge_lens, read_start, write_start
from probes.lens_training import OPTIMISERS, Options, Training

KINDS = ("layers", "heads")
BATCH = {"layers": 256, "heads": 64}
ADAM_LR, SGD_LR = 0.012, 0.1
"""Highest learning rates; Adam's is over √(numbers that a map adds up), so that steps which are noise
move a prediction equally whatever its width: 5e-4 for the default model's 576, 1.5e-3 for a head's 64."""

CHOOSING_ROWS = {"layers": 256, "heads": 64}
TESTING_ROWS = {"layers": 320, "heads": 80}
"""By kind of lens: what is exact over the vocabulary is done for nine times as many heads as layers."""

EACH = 16
"""Held-out positions of a window."""

START, LENS = "start.safetensors", "lens.safetensors"


def check_tuning(
    *,
    kind: str = "layers",
    rank: int | None = None,
    steps: int = 96,
    batch_size: int | None = None,
    vocabulary: int = 2048,
    optimiser: str = "adam",
    lr: float | None = None,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    checks: int = 4,
    patience: int = 2,
    window: int = 128,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if kind not in KINDS:
        raise unknown("kind of lens", kind, KINDS)
    if optimiser not in OPTIMISERS:
        raise unknown("optimiser", optimiser, OPTIMISERS)
    if rank is not None and rank < 1:
        raise BadInput(f"rank={rank}: give at least 1, or leave it out for whole matrices")
    if steps < 0 or weight_decay < 0:
        raise BadInput(f"steps={steps}, weight_decay={weight_decay}: neither may be below 0")
    for name, value in (("batch_size", batch_size), ("checks", checks), ("patience", patience)):
        if value is not None and value < 1:
            raise BadInput(f"{name}={value}: give at least 1")
    if vocabulary < 0:
        raise BadInput(f"vocabulary={vocabulary}: give a number of tokens, or 0 for all of them")
    if (lr is not None and lr <= 0) or clip <= 0:
        raise BadInput(f"lr={lr}, clip={clip}: both must be above 0")
    if window < 3:
        raise BadInput(f"window={window}: wanted 3 or more tokens")


def by_layer(report: Report) -> pd.DataFrame:
    """KL of each lens by layer, means over kinds of text and heads."""
    table = report.table.pivot_table(index="layer", columns="lens", values="kl", sort=False)
    names = [name for name in ("logit", "ridge", "tuned") if name in table]
    return table[names].add_prefix("KL ").reset_index()


@analysis(
    name="tune_lens",
    source="Belrose et al. 2023, arXiv 2303.08112 (tuned lens); Sakarvadia et al. 2023, arXiv "
    "2310.16270 (Attention Lens)",
    example="interp tune-lens smollm2-135m --out tuned",
    figure="curves",
    validate=check_tuning,
    summary=by_layer,
)
def tune_lens(
    model: Model,
    text: str | Path | Sequence[str] | Tensor | None = None,
    *,
    kind: str = "layers",
    rank: int | None = None,
    layers: Sequence[int] | None = None,
    steps: int = 96,
    batch_size: int | None = None,
    vocabulary: int = 2048,
    optimiser: str = "adam",
    lr: float | None = None,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    checks: int = 4,
    patience: int = 2,
    window: int = 128,
    field: str = "text",
    keep: bool = True,
    seed: int = 0,
    out: Path | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Report:
    """How far each layer's (or head's) best affine reading is from the final prediction, on held-out text.

    For the input h of every block, or the z of every head, an affine map to the final residual stream
    is trained to lower

        KL(p ‖ q),  p the model's prediction, q = softmax(unembed(h A + b))

    It starts from the ridge lens (least squares, shrunk towards the logit lens: A = I, or the head's
    slice of W_O), and of every unit the maps of its best check on text held out for choosing are kept:
    no unit is worse there than it began. All units learn from the same forwards. Steps look at a part
    of the vocabulary, see `vocabulary`; every KL that is reported is exact.

    A low KL says that the prediction can be read off there by an affine map, not that the model reads
    it so. A head's lens is trained on that head alone: what heads say does not add up, and a head whose
    lens is no better than any other's predicts what is likely everywhere.

    Args:
        text: what to train, choose and judge on: a .txt, .jsonl or .parquet file, a folder of such
            files, "wikipedia", or the name of a Hugging Face dataset; in Python also texts, or token
            ids. By default the English at hand, of several kinds, whole documents held out.
        kind: "layers" (tuned lens) or "heads" (Attention Lens).
        rank: of A − I (layers) or A (heads), which then starts as what of the ridge lens moves a
            sample of the text most; by default whole matrices.
        layers: only these; for kind "layers" the others are left to the logit lens.
        steps: optimiser steps. 0: the ridge lens itself.
        batch_size: positions of a step, the same for every unit; by default 256 for layers, 64 for
            heads. Several steps share a forward of about a thousand tokens.
        vocabulary: about how many tokens a step's KL is over: the likeliest of every position, and a
            weighted sample of the rest; 0: all. (Of the default model's 49,152, 2048 give a loss 1 %
            too small, and a gradient whose cosine with the exact one is 0.99.)
        optimiser: "adam", or "sgd" with Nesterov momentum 0.9. (Of 32 steps at layer 20 of the default
            model, Adam took 10 % off the held-out KL of the start, gradient descent 2 %.)
        lr: highest learning rate, in units of the coordinates' own deviations; falls linearly to
            zero. By default 0.012 / √width for adam (the width of what is read, or the rank), 0.1
            for sgd.
        weight_decay: pull of each step towards the start, times the learning rate.
        clip: largest norm of one unit's gradient.
        checks: how often held-out KL is measured and a checkpoint written.
        patience: a unit that got no better in so many checks is trained no further.
        window: tokens in one context.
        field: which field of .jsonl, .parquet or a dataset holds the text.
        keep: put a lens of all layers into the cache, where `interp lens --lens tuned` (or best)
            finds a tuned lens; `HeadLens.load` reads one of heads.
        seed: of the order of the text and of the vocabulary's sample.
        out: folder that also gets the lens, as lens.safetensors.
        checkpoint: folder that keeps the state of training.
        resume: go on from the checkpoint there.
        progress: show a progress bar with the held-out KL.

    Returns: a Report with table "tune_lens", one row a (text, layer, head, lens): kl (nats), bits
        (cross-entropy of the next token, bits a token), agreement (share of positions with the final
        top token), positions. lens is "logit", "ridge" or "tuned"; head is −1 for layers; layer
        n_layers is the final residual, which every lens reads as the model does. Table "curve": one
        row a (check, unit) with the held-out KL (nats) on the text to choose on. Meta "saved": the
        lens's files, to be opened with `AffineLens.load`, or `HeadLens.load` for heads.

    Raises:
        BadInput: unknown options, a rank above the width, a layer that is not there, too little
            text, a checkpoint of something else. Refused: no unembedding, or no heads of its own.
            Diverged: a loss that is not a number; the last good checkpoint is kept.

    Source: Belrose et al. 2023, arXiv 2303.08112: there SGD with Nesterov momentum from A = I.
    Sakarvadia et al. 2023, arXiv 2310.16270: there a map from each head to the vocabulary, 7.6
    billion numbers for the default model; here to the final residual, 10 million.

    >>> ids = torch.randint(97, (1500,), generator=torch.Generator().manual_seed(0))
    >>> report = tune_lens(tiny_model(), ids, steps=4, window=32, keep=False, progress=False)
    >>> report.table.groupby("layer")["lens"].agg(list).tolist()[0], len(report.table)
    (['logit', 'ridge', 'tuned'], 9)
    """
    started = time.perf_counter()
    given: dict[str, Any] = {
        "kind": kind, "rank": rank, "steps": steps, "batch_size": batch_size,
        "vocabulary": vocabulary, "optimiser": optimiser, "lr": lr, "weight_decay": weight_decay,
        "clip": clip, "checks": checks, "patience": patience, "window": window,
    }  # fmt: skip
    check_tuning(**given)
    unembed = Unembedding(model)
    chosen = check_layers(model, layers)
    inputs = Inputs.of(model, kind, range(model.n_layers) if kind == "layers" else chosen)
    _check_rank(inputs, rank)
    content, name = _content(text, field)
    parts, shown = parts_of(model, content, name, window)
    options = Options(
        kind=kind, rank=rank, steps=steps, batch_size=batch_size or BATCH[kind],
        vocabulary=vocabulary, optimiser=optimiser, lr=lr or _default_lr(inputs, optimiser, rank),
        weight_decay=weight_decay, clip=clip, checks=checks, patience=patience, seed=seed,
    )  # fmt: skip
    asked = {**given, "layers": layers and list(layers), "batch_size": options.batch_size}
    meta = provenance(model, options=asked | {"lr": options.lr}, seed=seed)
    sha256 = meta["model"]["sha256"]
    key = {"sha256": sha256, "text": shown["sha256"], "window": window, "layers": chosen}
    train = [place for place, layer in enumerate(inputs.layers) if layer in chosen]
    begun = {**key, "kind": kind, "rank": rank}
    path = None if checkpoint is None else checkpoint / START
    kept = path is not None and resume and path.exists()
    ridge = None
    if not kept and kind == "layers":
        ridge = own_ridge_lens(model, content, name, chosen, key, progress)
    with Progress(progress) as bars:
        if path is not None and kept:
            start, simple = read_start(path, begun)
        else:
            start, simple = observed(inputs, rank, parts, ridge, bars)
        if path is not None and not kept:
            write_start(path, begun, start, simple)
        choose = {
            kind_of_text: Rows.of(
                inputs, evenly(rows, CHOOSING_ROWS[kind] // len(parts.choose)), EACH
            )
            for kind_of_text, rows in parts.choose.items()
        }
        training = Training(
            inputs, options, start, parts, choose,
            train=train, key=key, folder=checkpoint, resume=resume,
        )  # fmt: skip
        training.run(bars)
        table = _judge(
            inputs, unembed, {"ridge": simple, "tuned": training.best}, parts, train, bars
        )
    about = _about(training, table, meta, shown, chosen, window, started)
    lens = _lens(inputs, training.best, about)
    places = [] if out is None else [out / LENS]
    if keep and len(chosen) == model.n_layers:
        places.append(lens_path(sha256, shown["recipe"] or shown["sha256"], about["kind"]))
    for place in places:
        lens.save(place)
    shown_about = {name: value for name, value in about.items() if name != "held_out"}
    meta |= {
        "lens": shown_about,
        "kl": "KL(final ‖ lens), nats",
        "saved": [str(place) for place in places],
        "notes": [*model.notes, *_notes(table, inputs), *_kept(places)],
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    return Report("tune_lens", {"tune_lens": table, "curve": training.curve}, {}, meta)


def _check_rank(inputs: Inputs, rank: int | None) -> None:
    most = min(inputs.d_in, inputs.model.spec.d_model)
    if rank is not None and rank > most:
        what = "d_model" if inputs.kind == "layers" else "d_head"
        raise BadInput(f"rank={rank} is above {what}={most}: give at most that, or leave it out")


def _default_lr(inputs: Inputs, optimiser: str, rank: int | None) -> float:
    return SGD_LR if optimiser == "sgd" else ADAM_LR / math.sqrt(rank or inputs.d_in)


def _content(
    text: str | Path | Sequence[str] | Tensor | None, field: str
) -> tuple[str | Tensor | None, str]:
    """(text or ids as a ridge lens takes them, what to call it)."""
    if text is None or isinstance(text, Tensor):
        return text, ""
    name = str(text) if isinstance(text, (str, Path)) else "texts of the caller"
    return "\n\n".join(documents(text, field=field)), name


# --- what it is worth --------------------------------------------------------------------------------------


@torch.no_grad()
def _judge(
    inputs: Inputs,
    unembed: Unembedding,
    lenses: Mapping[str, Maps],
    parts: Parts,
    train: Sequence[int],
    bars: Progress,
) -> pd.DataFrame:
    """One row a (text, layer, head, lens) on the documents that nothing was fitted or chosen on."""
    windows = {
        kind: evenly(rows, max(EACH, TESTING_ROWS[inputs.kind] // len(parts.test)))
        for kind, rows in parts.test.items()
    }
    advance = bars.stage("Judging on held-out text", len(windows))
    found: list[dict[str, Any]] = []
    causal = inputs.model.spec.causal

    for kind, ids in windows.items():
        rows = Rows.of(inputs, ids, EACH)
        read: dict[tuple[int, int, str], Tensor] = {}
        for place in train:
            x, layer = rows.x[place], inputs.layers[place]
            by_lens = {"logit": inputs.plainly(place, x)} | {
                name: inputs.translated(maps, place, x) for name, maps in lenses.items()
            }
            for unit in range(inputs.units):
                head = -1 if inputs.kind == "layers" else unit
                read |= {(layer, head, name): value[unit] for name, value in by_lens.items()}
        if inputs.kind == "layers":
            end = inputs.model.n_layers
            read |= {(end, -1, name): rows.final.float() for name in ("logit", *lenses)}
        numbers = judged(unembed, torch.stack(list(read.values())), rows.final, rows.following)
        columns = {name: value.tolist() for name, value in numbers.items()}
        for i, (layer, head, lens) in enumerate(read):
            bits = columns["loss"][i] / math.log(2) if causal else math.nan
            found.append(
                {"text": kind, "layer": layer, "head": head, "lens": lens}
                | {"kl": columns["kl"][i], "bits": bits, "agreement": columns["agreement"][i]}
                | {"positions": len(rows.final)}
            )
        advance(1)
    return pd.DataFrame(found)


def _about(
    training: Training,
    table: pd.DataFrame,
    meta: Mapping[str, Any],
    shown: Mapping[str, Any],
    chosen: list[int],
    window: int,
    started: float,
) -> dict[str, Any]:
    """What is known about the lens, as its file keeps it."""
    inputs, o = training.inputs, training.options
    wide = table.pivot_table(
        index=["text", "layer", "head"], columns="lens", values="kl", sort=False
    ).add_prefix("kl_")
    held_out = wide.reset_index().query("layer < @inputs.model.n_layers")
    if inputs.kind == "layers":
        held_out = held_out.drop(columns="head")
    return {
        "format": FORMAT,
        "kind": "tuned" if inputs.kind == "layers" else "attention",
        "layers": chosen if inputs.kind == "layers" else list(inputs.layers),
        "rank": o.rank,
        "model": {"id": inputs.model.id, "sha256": meta["model"]["sha256"]},
        "text": dict(shown),
        "window": window,
        "training": asdict(o) | {"steps_done": training.done},
        "best_step": training.best_step[training.trained].tolist(),
        "held_out": held_out.to_dict("records"),
        "versions": {"torch": torch.__version__},
        "created": meta["created"],
        "wall_time_s": round(time.perf_counter() - started, 1),
    }


def _lens(inputs: Inputs, maps: Maps, about: dict[str, Any]) -> AffineLens | HeadLens:
    if inputs.kind == "heads":
        return HeadLens(maps.get("A"), maps["b"], about, maps.get("U"), maps.get("V"))
    flat = {name: value[:, 0].contiguous() for name, value in maps.items()}
    return AffineLens(flat.get("A"), flat["b"], about, flat.get("U"), flat.get("V"))


def _kept(places: list[Path]) -> list[str]:
    """Where the lens is, in at most one note."""
    return [f"the lens is {' and '.join(map(str, places))}"] if places else []


def _notes(table: pd.DataFrame, inputs: Inputs) -> list[str]:
    """Where the trained lens is no better than simpler ones on the held-out text, in at most one note."""
    kl: Any = table.pivot_table(index=["layer", "head"], columns="lens", values="kl")
    kl = kl[kl.index.get_level_values("layer") < inputs.model.n_layers]
    what = "layers" if inputs.kind == "layers" else "heads"
    worse = {simple: int((kl["tuned"] > kl[simple]).sum()) for simple in ("logit", "ridge")}
    told = [f"the {simple} lens in {n}" for simple, n in worse.items() if n]
    if not told:
        return []
    than = " and than ".join(told)
    return [f"the trained lens has a higher held-out KL than {than} of {len(kl)} {what}"]
