"""Retrieval heads: heads that look at the token of a far-off sentence which is just being repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float

from circuits.heads.ablation import matched_heads
from circuits.heads.claims import INTERVAL, MIN_PROMPTS
from circuits.heads.detector import Detector
from circuits.heads.needle import NEEDLES, NeedleRun, needle_runs
from circuits.heads.needle_decoding import Decoded, batches, decode
from interp.errors import BadInput
from interp.models.model import Model
from interp.run.cache import Run
from interp.run.edits import Edit

Head = tuple[int, int]

THRESHOLD = 0.1
"""As published: from this score on a head is a retrieval head."""

MASKED, DRAWS, ABLATION_RUNS = 10, 10, 4
"""Heads masked together (at most 5 % of all), random draws beside them, and held-out runs for both."""


def copied(found: Decoded, start: int | None = None) -> Bool[np.ndarray, "n_layers n_heads width"]:
    """Which tokens of a span each head copied: its most attended key is one, and it is generated there.

    Args:
        start: of the span; by default that of what is asked for, else for example the control span's.
    """
    run, (_, n_layers, n_heads) = found.run, found.top.shape
    start = run.start if start is None else start
    ids = run.ids.cpu().numpy()
    out = np.zeros((n_layers, n_heads, run.width), dtype=bool)
    for token, key in zip(found.tokens, found.top, strict=True):
        inside = (key >= start) & (key < start + run.width)
        layer, head = np.nonzero(inside & (ids[key.clip(0, len(ids) - 1)] == token))
        out[layer, head, key[layer, head] - start] = True
    return out


def retrieval_scores(
    found: Sequence[Decoded],
) -> dict[str, Float[np.ndarray, "n n_layers n_heads"]]:
    """Share of the tokens asked for that each head copies in each run, with the attention-mass version.

    score = |tokens asked for that the head copied| / |tokens asked for|, told apart by position, so that it
    cannot exceed 1. What the needle shares with the question does not count: it can be repeated without
    the needle. It does not show that the head causes the answer.

    Args:
        found: runs of `decode`; leave out those that failed.

    Returns: "score"; "null", the same of a span of equal length elsewhere in the haystack; "mass" and
        "mass_null", the mean attention on both over the steps at which a token asked for is generated
        (over all steps where none is). NaN where a layer has no attention.
    """
    parts: dict[str, list[np.ndarray]] = {"score": [], "null": [], "mass": [], "mass_null": []}
    for one in found:
        missing = one.top[0] < 0
        telling = np.isin(one.tokens, one.run.answer.cpu().numpy())
        steps = telling if telling.any() else (one.top >= 0).any((1, 2))
        values = {
            "score": copied(one).mean(-1),
            "null": copied(one, one.run.control).mean(-1),
            "mass": one.mass[steps].mean(0),
            "mass_null": one.mass_control[steps].mean(0),
        }
        for name, value in values.items():
            parts[name].append(np.where(missing, np.nan, value))
    return {name: np.stack(values) for name, values in parts.items()}


# --- the causal claim --------------------------------------------------------------------------


def retrieval_ablation(
    model: Model,
    runs: Sequence[NeedleRun],
    heads: Sequence[Head],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """Probability and recall of what is asked for with heads masked, beside as many random heads of their layers.

    A masked head's queries are zeroed at all positions, as in the published code: it then attends evenly
    to all it sees (but for a sink logit or a position bias, where the model has one). The needle follows
    the prompt (teacher forcing), so that recall is the share of the tokens asked for that are most likely given
    those before: an upper bound of what free decoding would give. Only blocks from the first masked
    layer on are computed again.

    Args:
        runs: prompts that the model answers; better not those that `heads` were chosen on.
        heads: (layer, head) pairs.
        draws: of random heads: in every layer as many as are masked there, of the others, or as many as
            there are.

    Returns: a row for each masking and run: "masked" ("nothing", "heads", "random"), "draw", "run", "log_p"
        (nats a token), "recall" (0 to 1).

    Raises:
        BadInput: no runs or no heads.
    """
    if not runs or not heads:
        raise BadInput(
            f"{len(runs)} runs and {len(heads)} heads: masking needs at least one of each"
        )
    log_p, recall = masked_recall(model, runs, [heads, *random_heads(model, heads, draws, seed)])
    return _ablation_table(log_p, recall)


def random_heads(model: Model, heads: Sequence[Head], draws: int, seed: int) -> list[list[Head]]:
    """As many other heads of the same layers, drawn `draws` times; empty where no layer has others."""
    generator = np.random.default_rng(seed)
    drawn = [matched_heads(model.spec.heads, heads, generator) for _ in range(draws)]
    return [found for found in drawn if found]


def masked_recall(
    model: Model, runs: Sequence[NeedleRun], variants: Sequence[Sequence[Head]]
) -> tuple[Float[np.ndarray, "variants+1 n"], Float[np.ndarray, "variants+1 n"]]:
    """Mean log p of the tokens asked for and the share that is most likely; the first row has no head masked."""
    shape = (len(variants) + 1, len(runs))
    log_p, recall = np.empty(shape), np.empty(shape)
    edits = [[mask_heads(heads)] for heads in variants]
    starts = {min(layer for layer, _ in heads) for heads in variants}
    for places in batches(runs):
        length = runs[places[0]].length
        width = max(len(runs[i].whole) for i in places)
        answers = torch.stack([_filled(runs[i], width) for i in places])
        steps = torch.arange(width)
        asked = [(steps >= runs[i].lead) & (steps < len(runs[i].whole)) for i in places]
        real = torch.stack(asked)
        ids = torch.cat([torch.stack([runs[i].ids for i in places]), answers[:, :-1]], dim=1)
        read = torch.arange(length - 1, length - 1 + width)

        def measure(
            run: Run, answers: torch.Tensor = answers, real: torch.Tensor = real
        ) -> tuple[np.ndarray, np.ndarray]:
            assert run.logits is not None
            found = run.logits.float().log_softmax(-1).cpu()
            p = found.gather(-1, answers[..., None])[..., 0]
            hit = found.argmax(-1) == answers
            share = real / real.sum(1, keepdim=True)
            return (p * share).sum(1).numpy(), (hit * share).sum(1).numpy()

        clean = model.run(ids, capture=[f"resid_pre.{k}" for k in starts], logits=read)
        found = [measure(clean), *model.replay(clean, edits, measure, logits=read)]
        for row, (p, hit) in enumerate(found):
            log_p[row, places], recall[row, places] = p, hit
    return log_p, recall


def mask_heads(heads: Sequence[Head], positions: Sequence[int] | None = None) -> Edit:
    """The published masking of retrieval heads: zeroed queries, hence even attention to all visible keys."""
    return Edit.zero("q", heads=heads, positions=positions)


def _filled(run: NeedleRun, width: int) -> torch.Tensor:
    """The needle up to the answer's end, its last token repeated up to `width`: that changes nothing before."""
    said = run.whole
    return torch.cat([said, said[-1:].expand(width - len(said))])


def _ablation_table(log_p: np.ndarray, recall: np.ndarray) -> pd.DataFrame:
    n_rows, n_runs = log_p.shape
    row, run = np.divmod(np.arange(n_rows * n_runs), max(n_runs, 1))
    return pd.DataFrame(
        {
            "masked": np.array(["nothing", "heads", "random"])[row.clip(0, 2)],
            "draw": np.maximum(row - 2, 0),
            "run": run,
            "log_p": log_p.ravel(),
            "recall": recall.ravel(),
        }
    )


# --- the detector ------------------------------------------------------------------------------


def top_heads(
    score: Float[np.ndarray, "n_layers n_heads"], share: float = 0.05, at_most: int | None = None
) -> list[Head]:
    """The `share` of heads with the highest score, at least one, strongest first.

    >>> top_heads(np.array([[0.1, 0.9], [0.5, np.nan]]), share=0.5)
    [(0, 1), (1, 0)]
    """
    flat = np.nan_to_num(score, nan=-np.inf).ravel()
    n = max(1, round(share * int(np.isfinite(flat).sum())))
    order = np.argsort(-flat, kind="stable")[: n if at_most is None else min(n, at_most)]
    return [(int(i) // score.shape[1], int(i) % score.shape[1]) for i in order]


def _observe(model: Model, n: int, seed: int) -> dict[str, np.ndarray]:
    found = decode(model, needle_runs(model, n, seed=seed))
    seen = {
        "run_needle": np.array([one.run.needle for one in found]),
        "run_length": np.array([one.run.length for one in found]),
        "run_depth": np.array([one.run.depth for one in found]),
        "run_recall": np.array([one.recall for one in found]),
        "run_success": np.array([one.succeeded for one in found]),
    }
    good = [one for one in found if one.succeeded]
    if len(good) < MIN_PROMPTS:
        nothing = np.full((len(found), model.n_layers, model.spec.n_heads), np.nan)
        return seen | dict.fromkeys(("score", "null", "mass", "mass_null"), nothing)
    seen |= retrieval_scores(good)
    # Heads are chosen on every other run and masked in the rest, the shortest of them.
    heads = top_heads(seen["score"][::2].mean(0), at_most=MASKED)
    held_out = sorted((one.run for one in good[1::2]), key=lambda run: run.length)[:ABLATION_RUNS]
    log_p, recall = masked_recall(
        model, held_out, [heads, *random_heads(model, heads, DRAWS, seed)]
    )
    return seen | {
        "masked_heads": np.array(heads),
        "masked_log_p": log_p,
        "masked_recall": recall,
    }


def _tables(seen: Mapping[str, np.ndarray]) -> dict[str, pd.DataFrame]:
    runs = pd.DataFrame(
        {
            "needle": [NEEDLES[i].sentence for i in seen["run_needle"]],
            "length": seen["run_length"],
            "depth": seen["run_depth"],
            "recall": seen["run_recall"],
            "success": seen["run_success"].astype(bool),
        }
    )
    if "masked_heads" not in seen:
        return {"retrieval_runs": runs}
    layer, head = np.nonzero(np.isfinite(seen["score"][0]))
    columns = {name: seen[name].mean(0)[layer, head] for name in ("score", "mass", "mass_null")}
    heads = pd.DataFrame(
        {"layer": layer, "head": head, **columns, "active": _activity(seen)[layer, head]}
    )
    return {
        "retrieval": heads,
        "retrieval_runs": runs,
        "retrieval_ablation": _ablation_table(seen["masked_log_p"], seen["masked_recall"]),
    }


def _activity(seen: Mapping[str, np.ndarray]) -> Float[np.ndarray, "n_layers n_heads"]:
    """Share of runs in which a head copies at least one token: how often it is active."""
    return (seen["score"] > 0).mean(0)


def _notes(seen: Mapping[str, np.ndarray]) -> list[str]:
    n, good = len(seen["run_success"]), int(seen["run_success"].sum())
    lengths = f"{seen['run_length'].min()} to {seen['run_length'].max()} tokens"
    if good < MIN_PROMPTS:
        return [
            f"Retrieval: the model repeated the needle in {good} of {n} runs ({lengths}), fewer than the "
            f"{MIN_PROMPTS} that a claim needs: nothing is said about retrieval heads."
        ]
    used = f"Retrieval: the model repeated the needle in {good} of {n} runs ({lengths})"
    used += "; only these are used." if good < n else "."
    score, active = seen["score"].mean(0), _activity(seen)
    strong = score >= THRESHOLD
    always = int((strong & (active >= 0.9)).sum())
    dynamic = (
        f"Of {int(strong.sum())} heads with a retrieval score of {THRESHOLD} or more, {always} copy a "
        "token in at least 90 % of the contexts; the others depend on the context."
    )
    return [used, dynamic, _claim(seen)]


def _claim(seen: Mapping[str, np.ndarray]) -> str:
    """What masking did, in a sentence."""
    p, recall = seen["masked_log_p"].mean(1), seen["masked_recall"].mean(1)
    said = (
        f"Masking the {len(seen['masked_heads'])} strongest (chosen on other runs) takes the needle's log p from "
        f"{p[0]:.2f} to {p[1]:.2f} nats a token and recall from {recall[0]:.2f} to {recall[1]:.2f}"
    )
    if len(p) == 2:
        return said + "; their layers have no other heads to compare with."
    low, high = np.quantile(p[2:], INTERVAL)
    return (
        f"{said}; as many random heads of the same layers, {len(p) - 2} draws: {np.mean(p[2:]):.2f} "
        f"({low:.2f} to {high:.2f}) and {np.mean(recall[2:]):.2f}."
    )


RETRIEVAL = Detector(
    name="retrieval",
    title="Retrieval",
    letter="V",
    description="Share of the tokens that the head copies of what is asked for, in a sentence planted in a long "
    "text, while the model says it: its most attended key is that token, and that token is generated. Runs in "
    "which the model fails are counted and left out. It shows where a head looks; table retrieval_ablation "
    "shows whether it matters.",
    source="Wu et al. 2024, Retrieval Head Mechanistically Explains Long-Context Factuality, §2. Differs: "
    "tokens are counted once each (the published sum can exceed 1); own needles, in a novel; "
    "contexts of 256 and 512 tokens",
    reads=None,
    null="the same for a span of the same length elsewhere in the haystack",
    threshold=THRESHOLD,
    margin=0.05,
    rank=6,
    unit="share of the answer",
    observe=_observe,
    tables=_tables,
    notes=_notes,
    slow=True,
    needs_text=True,
    needs_logits=True,
    causal_only=True,
)
