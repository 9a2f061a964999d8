"""What is measured of one checkpoint: heads, loss, in-context learning, repeats, entropy, massive activations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.emergence.syntax import syntax_scores
from circuits.heads.detector import Detector, visible_keys
from circuits.heads.massive import massive_entries
from circuits.heads.scan import TOKENS_PER_PASS, prompt_sets, scan
from interp.data.prompts import Prompts, lead_token, repeated_tokens, text_windows
from interp.errors import BadInput
from interp.metrics import token_loss
from interp.models.model import Model
from interp.report import provenance
from interp.run.resume import Checkpoint
from interp.run.statistics import Entropy, Mass

EARLY, LATE = (0.05, 0.15), (0.9, 1.0)
"""Parts of the context that the in-context-learning score compares. Olsson et al. take tokens 50 and 500 of
512, over many texts; a tenth about the first and the last needs fewer."""
SHORTEST_TEXT = 16


def lines_of(model: Model, text: str) -> Prompts:
    """Every line as a prompt, all cut to the shortest one and to n_ctx.

    Raises:
        BadInput: no tokenizer; fewer than four lines, or one of fewer than 16 tokens.
    """
    if model.tokenizer is None:
        raise BadInput(f"{model.id} has no tokenizer: text cannot be read")
    lines = [line for line in text.split("\n") if line]
    rows = [model.tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    width = min(map(len, rows), default=0)
    if len(rows) < 4 or width < SHORTEST_TEXT:
        raise BadInput(
            f"the text has {len(rows)} lines, the shortest of {width} tokens; wanted at least 4 lines of "
            f"{SHORTEST_TEXT} tokens"
        )
    lead = lead_token(model)
    width = min(width, (model.spec.n_ctx or width + 1) - len(lead))
    ids = torch.stack([torch.cat([lead, torch.tensor(row[:width])]) for row in rows])
    return Prompts("text", ids, len(lead), 0, model.spec.causal)


def in_context_score(
    losses: Float[Tensor, "batch pos"],
) -> Float[Tensor, " batch"]:
    """Loss late in the context minus loss early in it, in nats a token: negative where context helps.

    >>> in_context_score(torch.linspace(4, 2, 40)[None]).item() < -1
    True
    """
    length = losses.shape[1]
    early, late = (
        losses[:, round(low * length) : max(round(high * length), round(low * length) + 1)]
        for low, high in (EARLY, LATE)
    )
    return late.mean(1) - early.mean(1)


def measure(
    model: Model,
    detectors: Sequence[Detector],
    *,
    prompts: int,
    tokens: int,
    text: str | None,
    seed: int,
    syntax: bool = False,
) -> dict[str, np.ndarray]:
    """Everything about one open model, by prompt.

    Returns: `<detector>.score` and `<detector>.null` [n n_layers n_heads]; accuracy (share) and
        loss_repeated (nats a token) on the second copy of repeated tokens [n]; with a tokenizer, loss
        and icl of the text [m]; of the text, or of random tokens, entropy (share of the largest possible)
        and first_token (attention mass) [m n_layers n_heads], largest (|x| of the stream), times_median and
        massive (how many entries `circuits.heads.massive` calls so) [m n_layers]; with `syntax`, uas and
        uas_distance (shares of arcs) [sentences]; "meta", JSON as bytes.
    """
    sets = prompt_sets(model, detectors, prompts, seed, tokens)
    found: dict[str, np.ndarray] = {}
    for scores in scan(model, detectors, sets, prompts, seed, Checkpoint()):
        found[f"{scores.detector.name}.score"] = scores.score
        found[f"{scores.detector.name}.null"] = scores.null
    repeated, fresh = repeated_tokens(model, prompts, length=tokens // 2, seed=seed)
    # The first token of the second copy cannot be foretold.
    judged = repeated.judged[1:]
    found |= _in_parts(repeated, lambda part: _copied(model, part, judged))
    window = fresh
    if text is not None and model.tokenizer is not None:
        window = lines_of(model, text)
    elif model.tokenizer is not None:
        window = text_windows(model, prompts, length=tokens, seed=seed)
    read = _in_parts(window, lambda part: _read(model, part))
    if window is fresh:  # of random tokens neither says anything
        del read["loss"], read["icl"]
    found |= read
    if syntax:
        found |= syntax_scores(model)
    meta = provenance(model, options={}, seed=seed)["model"] | {"heads": model.spec.heads}
    meta["kv_groups"] = [model.spec.kv_group(*head) for head in model.spec.heads]
    found["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    return found


def _in_parts(
    prompts: Prompts, measure: Callable[[Prompts], dict[str, Tensor]]
) -> dict[str, np.ndarray]:
    """What `measure` finds of each prompt, a few at a time: logits of all at once may be large."""
    size = max(1, TOKENS_PER_PASS // prompts.length)
    parts = [
        measure(prompts.rows(slice(start, start + size))) for start in range(0, len(prompts), size)
    ]
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


def _copied(model: Model, repeated: Prompts, judged: Tensor) -> dict[str, Tensor]:
    """Accuracy and loss where the second copy stands."""
    logits = model.run(repeated.batch, logits=judged).logits
    assert logits is not None
    targets = repeated.ids[:, judged + 1].to(logits.device)
    right = (logits.argmax(-1) == targets).cpu().double()
    return {"accuracy": right.mean(1), "loss_repeated": token_loss(logits, targets).mean(1)}


def _read(model: Model, window: Prompts) -> dict[str, Tensor]:
    """Loss, in-context-learning score, every head's entropy and attention to the first token, and the
    largest entries of the stream behind every layer, on a text."""
    first = max(window.lead, 1)
    every = torch.ones_like(window.ids, dtype=torch.bool)
    wanted = {
        "entropy": Entropy(window.positions >= first, visible_keys(window)),
        "first_token": Mass(torch.zeros_like(window.ids)[..., None], every),
    }
    run = model.run(window.batch, capture=["resid_post"], statistics=wanted)
    assert run.logits is not None
    losses = token_loss(run.logits[:, first - 1 : -1], window.ids[:, first:])
    stream = [x.abs().float() for x in run.cache.by_layer("resid_post").values()]
    largest = torch.stack([x.flatten(1).amax(1) for x in stream], 1)
    median = torch.stack([x.flatten(1).median(1).values for x in stream], 1)
    entries = torch.stack([massive_entries(x).flatten(1).sum(1) for x in stream], 1)
    return {
        "loss": losses.mean(1),
        "icl": in_context_score(losses),
        "largest": largest,
        "times_median": largest / median.clamp_min(1e-30),
        "massive": entries.cpu().double(),
        **run.statistics,
    }


def meta_of(unit: dict[str, np.ndarray]) -> dict[str, Any]:
    """What `measure` noted of the model."""
    return json.loads(unit["meta"].tobytes())
