"""Massive activations: the few huge numbers in the residual stream that sinks hang on.

In trained models a handful of dimensions of a few tokens (mostly the first) are thousands of times
larger than the rest, from one early layer to nearly the last. Heads that park their attention do it on
those tokens. This looks at the stream, not at heads, and reports the share of sink heads beside it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.attribution import Kept
from circuits.heads.detector import head_table
from circuits.heads.outliers import NEEDED, Place, peaks, writers_table, writes_at, written_to
from interp.data.prompts import lead_notes, lead_token, repeated_tokens, text_windows
from interp.errors import BadInput, Refused
from interp.metrics import loss
from interp.models.model import Model
from interp.registry import analysis, first_rows, leading
from interp.report import Report, provenance
from interp.run.batch import Batch
from interp.run.edits import Edit, Seen
from interp.run.progress import Progress
from interp.run.statistics import Mass

THRESHOLD, RATIO = 100.0, 1000.0
SINK = 0.3
"""A head whose mean attention to the first token is over this is a sink head (Gu et al., epsilon)."""
LENGTH = 64
"""Tokens of a prompt, lead included (Gu et al., T)."""
ZEROED = "set to 0"


def check_options(*, n: int = 8, length: int = LENGTH, **others: Any) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if n < 1:
        raise BadInput(f"n={n}: give at least one prompt")
    if length < 16:
        raise BadInput(f"length={length}: a sink rate of fewer than 16 tokens says little")


@analysis(
    name="massive",
    source="Sun et al. 2024, Massive Activations in Large Language Models; Gu et al. 2024, When Attention "
    "Sink Emerges (sink rate)",
    example="interp massive smollm2-135m",
    figure="layers",
    validate=check_options,
    summary=lambda report: leading(
        first_rows(report), "layer", "dimension", "token", "value", "times_median", "prompts"
    ),
)
def massive(
    model: Model,
    prompts: str | Sequence[str] | None = None,
    *,
    n: int = 8,
    length: int = LENGTH,
    threshold: float = THRESHOLD,
    ratio: float = RATIO,
    intervene: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """Massive activations by layer, dimension and token, and the share of heads that are sinks.

    An entry x of the stream behind a layer is massive if |x| > `threshold` and |x| ≥ `ratio` · the median
    of all |x| of that layer and prompt. A head is a sink if the mean over all rows, the first too, and
    over prompts of A[q, 0] is over 0.3; the sink rate is the share of such heads. The first token is BOS
    (or CLS or EOS) where the tokenizer has one, else the first token of the text.

    With `intervene`, massive entries are set to 0, or to their mean over prompts, as soon as they
    appear, beside a control (as many other entries of the same tokens set to 0): the loss, the sink rate
    and each head's attention to the first token say what hangs on them now. The other way about, z of all
    sink heads is set to 0: what stays of the largest entry does not hang on them. Both speak of the model
    as it is; that heads without use made training grow the entries (Bondarenko et al. 2023) is not shown.

    Args:
        prompts: text or texts; by default windows of English prose (random tokens, with no tokenizer).
        n: how many windows.
        length: tokens of a window, lead included.
        threshold: least size of a massive activation, in units of the stream.
        ratio: least size over the layer's median.
        intervene: whether massive activations are removed to see what hangs on them.
        seed: which windows.
        progress: show progress bars; by default in a terminal or a notebook.

    Returns: a Report. Table "massive", largest first: (layer, dimension, first, token, prompts (how many),
        value (mean), largest |value|, times_median, attn_write and mlp_write: what that layer itself adds
        there). Table "writers": for the largest entry of each of up to four dimensions (layer, dimension,
        token) what adds most to it: writer ("embed", "head", "attn bias", "mlp"), at (its layer), head,
        adds (in units of the stream), share; with the rest they sum to the entry. Table "layers":
        largest, second, third and median |x|, peak (norm of the largest token over the median norm),
        first_peak (the same for the first token), sink_share of its heads. Table "heads": mean attention
        to the first token, and first_token_without, the same with the massive entries set to 0. Table
        "interventions": loss (nats a token), largest |x| behind the layer where it is largest in the
        clean run, sink rate, mean attention to the first token. Means over prompts, in units of the stream.
        meta["sink_rate"]; meta["sink_rate_without_lead"] for the same windows without the lead token.

    Raises:
        BadInput: bad options, an empty prompt.

    >>> report = massive(tiny_model(), n=2, length=16)
    >>> len(report.table), len(report.tables["layers"])
    (0, 2)
    """
    started = time.perf_counter()
    check_options(n=n, length=length)
    batches, notes = _batches(model, prompts, n, length, seed)
    options = {
        "n": n,
        "length": length,
        "threshold": threshold,
        "ratio": ratio,
        "intervene": intervene,
    }
    try:
        model.layers_with("pattern")
        sees_heads = True
    except Refused as refusal:
        sees_heads = False
        notes.append(f"Sinks are not reported: {refusal}")

    def chosen(x: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos d_model"]:
        return massive_entries(x, threshold, ratio)

    with Progress(progress) as bars:
        advance = bars.stage("Reading the stream", len(batches))
        passes = []
        for batch in batches:
            passes.append(_observe(model, batch, chosen, sees_heads))
            advance(1)
        table = _massive_table(model, passes)
        layers = _layer_table(passes)
        tables = {"massive": table, "layers": layers}
        missing = [name for name in NEEDED if name in model.spec.refused]
        if reason := model.spec.not_a_sum or ", ".join(missing):
            notes.append(f"What writes the entries is not taken apart: {reason}")
        elif len(table):
            tables["writers"] = _writers(model, batches, passes, table)
        means = _means(model, passes)
        rate: dict[str, float] = {}
        if sees_heads:
            first = _first_token(passes)
            heads = head_table(first_token=first)
            tables["heads"] = heads.assign(sink=heads["first_token"] > SINK)
            rate["sink_rate"] = float((heads["first_token"].to_numpy() > SINK).mean())
            shares = tables["heads"].groupby("layer").agg(sink_share=("sink", "mean"))
            tables["layers"] = layers.join(shares, on="layer")
            if prompts is None and len(lead_token(model)):
                bare = [Batch.of_ids(batch.ids[:, 1:]) for batch in batches]
                without = _first_token([_observe(model, b, chosen, True) for b in bare])
                without = without[heads["layer"], heads["head"]]
                rate["sink_rate_without_lead"] = float((without > SINK).mean())
        if intervene:
            edits = _edits(chosen, means) if len(table) else {}
            if edits and sees_heads and "z" not in model.spec.refused:
                sinks = tables["heads"].query("sink")[["layer", "head"]].to_numpy().tolist()
                if sinks:
                    off = [(int(layer), int(head)) for layer, head in sinks]
                    edits["z of sink heads set to 0"] = [Edit.zero("z", heads=off)]
            advance = bars.stage("Taking them out", 1 + len(edits))
            peak = int(layers["layer"].to_numpy()[layers["largest"].to_numpy().argmax()])
            rows = []
            for name, edit in {"clean": [], **edits}.items():
                found, first = _effects(model, batches, edit, peak, sees_heads)
                rows.append({"condition": name, **found})
                if name == ZEROED and first is not None:
                    heads = tables["heads"]
                    heads["first_token_without"] = first[heads["layer"], heads["head"]]
                advance(1)
            tables["interventions"] = pd.DataFrame(rows)
    if not len(table):
        notes.append("No activation passes both thresholds on these prompts.")
    meta = provenance(model, options=options, seed=seed) | rate
    meta |= {
        "notes": [*model.notes, *notes],
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    return Report("massive", tables, {}, meta)


def massive_entries(
    x: Float[Tensor, "batch pos d_model"], threshold: float = THRESHOLD, ratio: float = RATIO
) -> Bool[Tensor, "batch pos d_model"]:
    """Which entries are massive: |x| > threshold and |x| ≥ ratio · the prompt's median |x|.

    >>> x = torch.ones(1, 2, 32); x[0, 0, 3] = -2000.0
    >>> massive_entries(x).nonzero().tolist()
    [[0, 0, 3]]
    """
    size = x.abs().float()
    median = size.flatten(1).median(dim=1).values[:, None, None]
    return (size > threshold) & (size >= ratio * median)


def _batches(
    model: Model, prompts: str | Sequence[str] | None, n: int, length: int, seed: int
) -> tuple[list[Batch], list[str]]:
    """Prompts, those of one length together, and what is to be said about them."""
    if prompts is not None:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise BadInput("no prompts: give at least one text, or leave them out")
        return [model.as_batch(text) for text in texts], []
    lead, notes = len(lead_token(model)), lead_notes(model)
    if model.tokenizer is None:
        _, plain = repeated_tokens(model, n, length=-(-(length - lead) // 2), seed=seed)
        notes.append("No tokenizer: prompts are random tokens.")
        return [plain.batch], notes
    return [text_windows(model, n, length=length - lead, seed=seed).batch], notes


@torch.no_grad()
def _observe(model: Model, batch: Batch, chosen, sees_heads: bool) -> dict[str, Any]:
    """What one pass shows: massive entries, sizes by layer, attention to the first token."""
    writes = [name for name in ("attn_write", "mlp_write") if name not in model.spec.refused]
    run = model.run(
        batch,
        capture=["resid_post", *writes],
        statistics={"first": _to_first(batch)} if sees_heads else None,
        logits=False,
    )
    entries, sizes = [], []
    for layer, x in run.cache.by_layer("resid_post").items():
        x = x.float()
        row, place, dimension = chosen(x).nonzero(as_tuple=True)
        found = {
            "layer": np.full(len(row), layer),
            "prompt": row.cpu().numpy(),
            "position": place.cpu().numpy(),
            "dimension": dimension.cpu().numpy(),
            "token_id": batch.ids.to(row.device)[row, place].cpu().numpy(),
            "value": x[row, place, dimension].cpu().numpy(),
        }
        median = x.abs().flatten(1).median(dim=1).values
        found["times_median"] = (x[row, place, dimension].abs() / median[row]).cpu().numpy()
        for name in ("attn_write", "mlp_write"):
            here = run.cache.by_layer(name).get(layer)
            value = None if here is None else here[row, place, dimension].float().cpu().numpy()
            found[name] = np.full(len(row), np.nan) if value is None else value
        entries.append(pd.DataFrame(found))
        norms = x.norm(dim=-1)
        middle = norms.median(dim=1).values.clamp_min(1e-30)
        top = x.abs().flatten(1).topk(3, dim=1).values
        sizes.append(
            torch.stack([*top.T, median, norms.amax(1) / middle, norms[:, 0] / middle], dim=1).cpu()
        )
    return {
        "entries": pd.concat(entries, ignore_index=True),
        "sizes": torch.stack(sizes, dim=1).numpy(),
        "layers": run.cache.layers("resid_post"),
        "first": run.statistics["first"].numpy() if sees_heads else None,
    }


def _to_first(batch: Batch) -> Mass:
    """Mean attention of every row to position 0."""
    return Mass(
        torch.zeros_like(batch.ids)[..., None], torch.ones_like(batch.ids, dtype=torch.bool)
    )


def _first_token(passes: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "n_layers n_heads"]:
    return np.concatenate([seen["first"] for seen in passes]).mean(0)


def _massive_table(model: Model, passes: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Massive entries that prompts share, largest first."""
    start, parts = 0, []
    for seen in passes:
        parts.append(seen["entries"].assign(prompt=seen["entries"]["prompt"] + start))
        start += len(seen["sizes"])
    entries = pd.concat(parts, ignore_index=True)
    entries["first"] = entries["position"] == 0
    entries["size"] = entries["value"].abs()
    table = (
        entries.groupby(["layer", "dimension", "first", "token_id"])
        .agg(
            prompts=("prompt", "nunique"),
            value=("value", "mean"),
            largest=("size", "max"),
            times_median=("times_median", "mean"),
            attn_write=("attn_write", "mean"),
            mlp_write=("mlp_write", "mean"),
        )
        .reset_index()
        .sort_values(["largest", "layer", "dimension"], ascending=[False, True, True])
    )
    table.insert(3, "token", model.tokens(table["token_id"].tolist()))
    return table.reset_index(drop=True)


def _layer_table(passes: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    sizes = np.concatenate([seen["sizes"] for seen in passes]).mean(0)
    names = ("largest", "second", "third", "median", "peak", "first_peak")
    columns = {name: sizes[:, place] for place, name in enumerate(names)}
    return pd.DataFrame({"layer": passes[0]["layers"], **columns})


def _means(model: Model, passes: Sequence[Mapping[str, Any]]) -> Float[Tensor, "n_layers d_model"]:
    """Mean over prompts of the massive values of every layer and dimension; 0 where there are none."""
    entries = pd.concat([seen["entries"] for seen in passes], ignore_index=True)
    means = torch.zeros(model.n_layers, model.spec.d_model)
    found = entries.groupby(["layer", "dimension"]).agg(value=("value", "mean")).reset_index()
    for row in found.to_dict("records"):
        means[row["layer"], row["dimension"]] = row["value"]
    return means


def _edits(chosen, means: Float[Tensor, "n_layers d_model"]) -> dict[str, list[Edit]]:
    """What is put in place of massive entries, wherever they appear."""

    def zero(x: Tensor, seen: Seen) -> Tensor:
        return x.masked_fill(chosen(x), 0.0)

    def mean(x: Tensor, seen: Seen) -> Tensor:
        return torch.where(chosen(x), means[seen.layer].to(x), x)

    def others(x: Tensor, seen: Seen) -> Tensor:
        # As many entries of the same tokens, half the stream away.
        elsewhere = chosen(x).roll(x.shape[-1] // 2, dims=-1) & ~chosen(x)
        return x.masked_fill(elsewhere, 0.0)

    changes = {ZEROED: zero, "set to their mean": mean, "others set to 0": others}
    return {name: [Edit.apply("resid_post", change)] for name, change in changes.items()}


@torch.no_grad()
def _effects(
    model: Model, batches: Sequence[Batch], edits: Sequence[Edit], layer: int, sees_heads: bool
) -> tuple[dict[str, float], Float[np.ndarray, "n_layers n_heads"] | None]:
    """Loss, largest entry behind `layer`, sink rate and attention to the first token; the last also by head."""
    losses, largest, first = [], [], []
    speaks = model.spec.causal and model.spec.unembedding is not None

    def size(x: Tensor, seen: Seen) -> Tensor:
        largest.append(x.abs().flatten(1).amax(1).float().cpu())
        return x

    for batch in batches:
        wanted = {"first": _to_first(batch)} if sees_heads else None
        sized = [*edits, Edit.apply(f"resid_post.{layer}", size)]
        run = model.run(batch, edits=sized, statistics=wanted, logits=speaks)
        if speaks and batch.ids.shape[1] > 1:
            assert run.logits is not None
            losses.append(loss(run.logits[:, :-1], batch.ids[:, 1:]).cpu())
        if sees_heads:
            first.append(run.statistics["first"])
    found = {
        "loss": float(torch.cat(losses).mean()) if losses else float("nan"),
        "largest": float(torch.cat(largest).mean()),
    }
    if not sees_heads:
        return found, None
    of_head = torch.cat(first).mean(0)
    there = of_head[~of_head.isnan()]
    found["sink_rate"] = float((there > SINK).float().mean())
    found["first_token"] = float(there.mean())
    return found, of_head.cpu().numpy()


def _writers(
    model: Model,
    batches: Sequence[Batch],
    passes: Sequence[Mapping[str, Any]],
    massive: pd.DataFrame,
) -> pd.DataFrame:
    """What adds to the largest entry of each dimension (`written_to`), one below the other."""

    @cache
    def writes(number: int, positions: tuple[int, ...]) -> Kept:
        return writes_at(model, batches[number], torch.tensor(positions))

    tables = []
    for peak in peaks(massive).to_dict("records"):
        layer, dimension = int(peak["layer"]), int(peak["dimension"])
        places: list[Place] = []
        for number, seen in enumerate(passes):
            here = seen["entries"].query(
                "layer == @layer and dimension == @dimension and token_id == @peak['token_id']"
            )
            here = here[(here["position"] == 0) == peak["first"]].drop_duplicates("prompt")
            if len(here):
                at = dict(zip(here["prompt"], here["position"], strict=True))
                positions = tuple(at.get(row, 0) for row in range(batches[number].size))
                places.append((writes(number, positions), list(at)))
        table = writers_table(*written_to(model, places, layer, dimension))
        told = {"layer": layer, "dimension": dimension, "token": peak["token"]}
        tables.append(table.assign(**told)[[*told, *table.columns]])
    return pd.concat(tables, ignore_index=True)
