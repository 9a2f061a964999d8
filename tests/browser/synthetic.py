"""A made-up heads Report with the shape of a real one, for the page's tests and its benchmark.

Each head is given roles; its attention is a mixture of those roles' ideal patterns, and its scores
are the mixture's weights with noise. Nothing here was measured.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from interp.report import Report

DETECTORS = [
    ("previous_token", "Previous token", "P", 0.4),
    ("fixed_offset", "Fixed offset", "F", 0.4),
    ("current_token", "Current token", "C", 0.4),
    ("first_token_sink", "First-token sink", "S", 0.5),
    ("duplicate_token", "Duplicate token", "D", 0.4),
    ("induction", "Induction", "I", 0.4),
    ("induction_copying", "Induction copying", "O", None),
    ("recency", "Recency", "R", 0.6),
    ("broad", "Broad", "B", 0.8),
]
SHARE = [0.05, 0.02, 0.04, 0.42, 0.03, 0.05, 0.0, 0.06, 0.05]  # of heads that have the role
HOSTILE = [
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\x00", "\x1b[31m",
    "\ud800", "\udfff", '"', "'", "&amp;", "<!--", "]]>", " the", "\n", "\t", "\u202e", "\u200d",
    "", "{{7*7}}", "\u2028", "👩‍🔬", "مرحبا", "${x}", "\\", "`",
]  # fmt: skip
SENTENCE = "the cat sat on a mat when Mary and John went to shop gave an apple"
PLAIN = [*(f" {word}" for word in SENTENCE.split()), ".", ","]


def head_report(
    n_layers: int = 30,
    n_heads: int = 9,
    *,
    lengths: tuple[int, ...] = (64, 64, 64, 64),
    causal: bool = True,
    hostile: bool = True,
    random_patterns: bool = False,
    ov: bool = True,
    model_id: str = "SmolLM2-135M-Instruct",
    seed: int = 0,
) -> Report:
    """A Report of `n_layers` × `n_heads` heads with one evidence prompt per length."""
    rng = np.random.default_rng(seed)
    n = n_layers * n_heads
    has = rng.random((n, len(DETECTORS))) < SHARE
    strength = np.where(has, rng.uniform(0.55, 0.97, has.shape), rng.beta(1, 14, has.shape))
    strength /= np.maximum(1.0, strength.sum(1, keepdims=True))
    heads = _table(rng, strength, n_layers, n_heads)
    words = HOSTILE + PLAIN if hostile else PLAIN
    prompts = [_prompt(rng, words, length, k) for k, length in enumerate(lengths)]
    tables = {"heads": heads}
    if ov:
        tables["ov_tokens"] = _ov_tokens(rng, words, n_layers, n_heads)
    arrays = {}
    if lengths:
        arrays["pattern"] = np.stack(
            [_pattern(rng, strength, n_layers, n_heads, t, max(lengths), causal, random_patterns)
             for t in lengths]
        )  # fmt: skip
    return Report(
        "heads", tables, arrays, _meta(n_layers, n_heads, prompts, causal, model_id, seed)
    )


def _table(
    rng: np.random.Generator, strength: np.ndarray, n_layers: int, n_heads: int
) -> pd.DataFrame:
    n = len(strength)
    columns: dict[str, object] = {
        "layer": np.repeat(np.arange(n_layers), n_heads),
        "head": np.tile(np.arange(n_heads), n_layers),
        "kv_group": np.tile(np.arange(n_heads) // 3, n_layers),
    }
    labels = [[] for _ in range(n)]
    best = np.zeros(n)
    for k, (name, _, _, threshold) in enumerate(DETECTORS):
        score = strength[:, k] if name != "induction_copying" else rng.normal(0, 1.5, n)
        spread = rng.uniform(0.01, 0.06, n)
        null = rng.uniform(0.01, 0.05, n)
        floor = -9.0 if threshold is None else 0.0
        columns |= {
            name: score,
            f"{name}_low": np.maximum(score - spread, floor),
            f"{name}_high": score + spread,
            f"{name}_null": null,
            f"{name}_p": np.where(score > 0.2, 1e-4, rng.random(n)),
        }
        if threshold is None:
            continue
        confidence = np.clip((score - threshold) / spread + 0.5, 0, 1)
        columns[f"{name}_confidence"] = confidence
        for i in np.flatnonzero(score > threshold):
            labels[i].append(name)
            best[i] = max(best[i], confidence[i])
    tested = np.array([bool(own) for own in labels])
    induction = strength[:, 5]
    effect = np.where(tested, 2.5 * induction**3 + rng.normal(0, 0.03, n), np.nan)
    columns |= {
        "labels": [",".join(own) for own in labels],
        "confidence": best,
        "ablation_metric": np.where(tested, "loss on the second half of repeated sequences", ""),
        "ablation_effect": effect, "ablation_low": effect - 0.1, "ablation_high": effect + 0.12,
        "ablation_control": np.where(tested, 0.01, np.nan),
    }  # fmt: skip
    return pd.DataFrame(columns)


def _prompt(rng: np.random.Generator, words: list[str], length: int, k: int) -> dict[str, object]:
    half = [words[i] for i in rng.integers(len(words), size=max(1, (length - 1) // 2))]
    tokens = ["<|im_start|>", *half, *half, " end"][:length]
    return {"title": f"{'Prose' if k % 2 else 'Repeated tokens'} {k + 1}", "tokens": tokens}


def _pattern(
    rng: np.random.Generator,
    strength: np.ndarray,
    n_layers: int,
    n_heads: int,
    t: int,
    padded: int,
    causal: bool,
    random: bool,
) -> np.ndarray:
    query, key = np.indices((t, t))
    lag, half = query - key, max(1, (t - 1) // 2)
    allowed = lag >= 0 if causal else np.ones((t, t), bool)
    ideals = [
        lag == 1, lag == 3, lag == 0, key == 0, lag == half, lag == half - 1, lag < 0,
        np.exp(-np.abs(lag) / 4), np.ones((t, t)),
    ]  # fmt: skip
    mixture = np.concatenate([strength, 0.1 + 0 * strength[:, :1]], axis=1)
    stack = np.stack([_rows(ideal * allowed) for ideal in [*ideals, key == 0]])
    noise = _rows(rng.gamma(0.3, size=(len(strength), t, t)) * allowed)
    a = noise if random else _rows(np.einsum("hd,dqk->hqk", mixture, stack) + 0.15 * noise)
    out = np.zeros((n_layers, n_heads, padded, padded), np.uint8)
    out[:, :, :t, :t] = np.round(255 * np.sqrt(a)).reshape(n_layers, n_heads, t, t)
    return out


def _rows(a: np.ndarray) -> np.ndarray:
    return a / np.maximum(a.sum(-1, keepdims=True), 1e-9)


def _ov_tokens(
    rng: np.random.Generator, words: list[str], n_layers: int, n_heads: int
) -> pd.DataFrame:
    rows = [
        (layer, head, direction, side, rank)
        for layer in range(n_layers) for head in range(n_heads)
        for direction in range(3) for side in ("reads", "writes") for rank in range(5)
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["layer", "head", "direction", "side", "rank"])
    chosen = [words[i] for i in rng.integers(len(words), size=len(table))]
    table["token"] = pd.Series(chosen, dtype=object)  # an Arrow string holds no lone surrogate
    table["score"] = rng.normal(2, 0.5, len(table))
    return table


def _meta(
    n_layers: int,
    n_heads: int,
    prompts: list[dict[str, object]],
    causal: bool,
    model_id: str,
    seed: int,
) -> dict[str, object]:
    return {
        "schema_version": 1, "analysis": "heads", "causal": causal, "seed": seed,
        "model": {
            "id": model_id, "sha256": "0" * 64, "n_layers": n_layers, "n_heads": n_heads,
            "n_kv_heads": 3, "d_model": 576, "d_head": 64, "d_vocab": 49152, "dtype": "float32",
        },
        "options": {"prompts": 32, "detectors": "all"}, "versions": {"torch": "2.13.0"},
        "created": "2026-01-01T00:00:00Z", "wall_time_s": 41.2,
        "detectors": [
            {
                "name": name, "title": title, "letter": letter, "threshold": threshold,
                "margin": 0.1, "unit": "logits" if threshold is None else "attention mass",
                "labels": threshold is not None, "prompts": "repeated",
                "null": "the same positions, with the relation destroyed",
                "description": f"Mean attention of the {title.lower()} kind.", "source": "made up",
            }
            for name, title, letter, threshold in DETECTORS
        ],
        "prompts": prompts, "skipped": {"retrieval": "made-up report"},
        "notes": ["A made-up report."],
    }  # fmt: skip
