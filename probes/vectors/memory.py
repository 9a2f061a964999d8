"""Memories injected into attention: the word that a two-hop prompt leaves unsaid, added where heads write.

"The capital of the country where the Eiffel Tower stands is" takes two facts. Where the model does not get
from the first to the second, the word in between ("France") can be put into the residual stream: the
tokens' rows of the unembedding, scaled, added to what one layer's attention writes at the last token.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.data.answers import begun
from interp.data.two_hop import OTHER_WORDS, TWO_HOP, TwoHop
from interp.errors import BadInput
from interp.last_token import replay_last
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.edits import Edit
from interp.run.progress import Progress
from probes.vectors.answers import interval
from probes.vectors.injection import checked_layers, injection, random_vectors

SITE = "attn_write"
LEAST = 4
COLUMNS = ["prompt", "memory", "answer"]


def memory_vector(model: Model, text: str | Sequence[int]) -> Float[Tensor, " d_model"]:
    """The sum of the unembedding's columns of a text's tokens: B = Σ_t W_U[:, t].

    Added to the final residual stream, B raises a token's logit by W_U · B over the final norm's scale:
    its own by the square of its length, others by how alike they are.

    Args:
        text: a word as it stands in a sentence, with its space (" France"), or token ids.

    Raises:
        BadInput: no tokens, ids outside the vocabulary, text without a tokenizer. Refused: a model
            without an unembedding.

    Source: Sakarvadia et al. 2023, arXiv 2309.05605.

    >>> memory_vector(tiny_model(), [3, 4]).shape
    torch.Size([32])
    """
    if isinstance(text, str):
        if model.tokenizer is None:
            raise BadInput(f"{model.id} was loaded without a tokenizer: give token ids")
        ids = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        ids = list(text)
    if not ids:
        raise BadInput(f"a memory of no tokens ({text!r}): give at least one word")
    chosen = [model.token_id(int(i)) for i in ids]
    return model.W_U[:, chosen].float().sum(-1)


def two_hop_prompts(data: str | Path | Sequence[Sequence[str]]) -> list[TwoHop]:
    """The shipped prompts ("two_hop"), those of a .csv with columns prompt, memory, answer, or your own.

    >>> two_hop_prompts("two_hop")[0].memory
    'France'
    """
    if isinstance(data, (str, Path)):
        if str(data) == "two_hop":
            return list(TWO_HOP)
        path = Path(data).expanduser()
        if path.suffix.lower() != ".csv" or not path.is_file():
            raise BadInput(f"no prompts '{data}': write two_hop, or a .csv file with {COLUMNS}")
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or [])]:
                raise BadInput(f"{path} has no column '{missing[0]}'; wanted {', '.join(COLUMNS)}")
            found = [TwoHop(*(row[name] for name in COLUMNS)) for row in reader]
    else:
        found = [TwoHop(*row) for row in data]
    if len(found) < LEAST:
        raise BadInput(f"{len(found)} two-hop prompts: settings are chosen on half of them; wanted "
                       f"{LEAST} or more")  # fmt: skip
    for i, row in enumerate(found):
        if not all(isinstance(part, str) and part.strip() for part in row):
            raise BadInput(f"two-hop prompt {i} has an empty prompt, memory or answer: {row}")
    return found


def check_options(
    *,
    prompts: object = "two_hop",
    strengths: Sequence[float] = (1.0,),
    random: int = 2,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if isinstance(prompts, (str, Path)):
        two_hop_prompts(prompts)
    if not strengths or not all(np.isfinite(strengths)):
        raise BadInput(f"strengths={list(strengths)}: wanted one or more finite numbers")
    if random < 1:
        raise BadInput(f"random={random}: wanted 1 or more")


def held_out(report: Report) -> pd.DataFrame:
    """The setting chosen for each kind of vector, and its gain on the other half of the prompts."""
    return report.tables["chosen"]


@analysis(
    name="vector_inject",
    source="Sakarvadia et al. 2023, Memory Injections, arXiv 2309.05605",
    example="interp vector inject smollm2-135m two_hop",
    figure="map",
    validate=check_options,
    summary=held_out,
    takes="text",
)
@torch.no_grad()
def vector_inject(
    model: Model,
    prompts: str | Sequence[Sequence[str]],
    *,
    layers: Sequence[int] | None = None,
    strengths: Sequence[float] = (1.0, 4.0, 16.0, 64.0),
    others: Sequence[str] = OTHER_WORDS,
    random: int = 2,
    template: str = " {word}",
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """How much more probable an answer becomes when the unsaid word between two hops is injected.

        attn_write_l ← attn_write_l + τ B,   B = Σ_t W_U[:, t] over the memory's tokens,   at the last token

    for every layer l and strength τ, beside injections of other words of the same kind and of random
    vectors as long as B. A gain says that the word, put there, helps; not that the model lacked it, nor
    that its own heads would put it there. The injected word may also raise the answer by being close to
    it in the unembedding (France and Paris), whatever the prompt asks: `other` words do not rule that out.

    Where we differ: the gain is a mean of log-ratios (a percentage is dominated by prompts with
    p near 0; it is given beside); layer and strength are chosen on every second prompt and reported on
    the others, for the controls too.

    Args:
        prompts: "two_hop", or a .csv file with columns prompt, memory, answer; in Python also rows.
        layers: layers to inject at; by default all.
        strengths: values of τ.
        others: words to inject instead; each prompt gets `random` of them.
        random: other words, and random vectors, for each prompt.
        template: how a word stands in a sentence, with {word} in it.
        seed: of other words and random vectors.

    Returns: a Report. Table "vector_inject", one row a layer, strength and vector ("memory", "other",
        "random"): gain (mean over prompts and draws of log p(answer) after − before, nats), gain_low,
        gain_high (95 %, bootstrap over prompts), percent (mean change of p, %), p_before, p_after,
        prompts. Table "chosen": for each vector the layer and strength with the largest gain on half of
        the prompts; on the other half the gain there, and `same`, the gain at the memory's setting, with
        their intervals. Table "prompts": each prompt with p_before and the
        gain at the memory's chosen setting. Array "gain" [vectors layers strengths prompts].

    Raises:
        BadInput: too few prompts, an answer whose tokens do not follow the prompt's, a layer outside,
            options out of range. Refused: what attention writes is not seen, or no unembedding.

    >>> check_options(strengths=[])
    Traceback (most recent call last):
    interp.errors.BadInput: strengths=[]: wanted one or more finite numbers
    """
    check_options(strengths=strengths, random=random)
    started = time.perf_counter()
    asked = two_hop_prompts(prompts)
    places = checked_layers(model, layers, SITE)
    if "{word}" not in template:
        raise BadInput(f"template {template!r} must contain {{word}}")
    if len(others) < random:
        raise BadInput(f"{len(others)} other words for {random} of them a prompt: give more")
    answers = torch.tensor([first_token(model, row.prompt, row.answer) for row in asked])
    batch = model.as_batch(model.tokenize([row.prompt for row in asked], padding_side="left"))
    answers = answers.to(batch.ids.device)
    vectors = _vectors(model, asked, others, random, template, seed)
    settings = [(kind, at, by) for kind in vectors for at in places for by in strengths]
    variants: list[list[Edit]] = [[]]
    for kind, at, by in settings:
        variants += [
            [injection(model, vector[:, None], f"{SITE}.{at}", strength=by)]
            for vector in vectors[kind]
        ]
    with Progress(progress) as bars:
        found = replay_last(
            model,
            batch,
            variants,
            lambda logits: (
                logits.float().log_softmax(-1).gather(-1, answers[:, None])[:, 0].cpu().numpy()
            ),
            progress=bars.stage("Injections", len(variants)),
        )
    before, after = found[0], iter(found[1:])
    gains: dict[tuple[str, int, float], np.ndarray] = {}
    rows = []
    for kind, at, by in settings:
        draws = np.stack([next(after) for _ in vectors[kind]])
        gain = (draws - before).mean(0)
        gains[kind, at, by] = gain
        low, high = interval(gain, seed)
        p = np.exp(draws)
        rows.append(
            {
                "vector": kind, "layer": at, "strength": by, "prompts": len(asked),
                "gain": gain.mean(), "gain_low": low, "gain_high": high,
                "percent": 100 * float(np.mean(p / np.exp(before) - 1)),
                "p_before": float(np.exp(before).mean()), "p_after": float(p.mean()),
            }
        )  # fmt: skip
    chosen, best = _chosen(gains, seed)
    of_prompts = pd.DataFrame(asked, columns=COLUMNS).assign(
        p_before=np.exp(before), gain=gains["memory", *best]
    )
    options = {
        "prompts": prompts if isinstance(prompts, str) else "yours", "layers": layers,
        "strengths": list(strengths), "random": random, "template": template,
    }  # fmt: skip
    meta = provenance(model, options=options, seed=seed)
    meta |= {"layers": places, "wall_time_s": round(time.perf_counter() - started, 2)}
    stacked = np.stack([gains[setting] for setting in settings])
    shape = (len(vectors), len(places), len(strengths), len(asked))
    tables = {"vector_inject": pd.DataFrame(rows), "chosen": chosen, "prompts": of_prompts}
    return Report("vector_inject", tables, {"gain": stacked.reshape(shape)}, meta)


def first_token(model: Model, prompt: str, answer: str) -> int:
    """The token that an answer begins with after the prompt; BadInput where there is none."""
    found = begun(model, prompt, answer)
    if found.token is None:
        raise BadInput(
            f"{answer!r} after {prompt!r} in {model.id}: {found.why}; put the prompt or the answer in "
            "other words"
        )
    return found.token


def _vectors(
    model: Model,
    asked: Sequence[TwoHop],
    others: Sequence[str],
    random: int,
    template: str,
    seed: int,
) -> dict[str, list[Float[Tensor, "prompts d_model"]]]:
    """What is injected: each prompt's memory, other words, random vectors as long as the memory."""

    def of(word: str) -> Tensor:
        return memory_vector(model, template.replace("{word}", word))

    memory = torch.stack([of(row.memory) for row in asked])
    draw = np.random.default_rng(seed)
    picked = np.stack([draw.choice(len(others), random, replace=False) for _ in asked])
    known = {i: of(others[i]) for i in sorted(set(picked.flatten().tolist()))}
    other = [torch.stack([known[int(i)] for i in picked[:, j]]) for j in range(random)]
    drawn = [random_vectors(v, random, seed + i) for i, v in enumerate(memory)]
    at_random = [torch.stack([vectors[j] for vectors in drawn]) for j in range(random)]
    return {"memory": [memory], "other": other, "random": at_random}


def _chosen(
    gains: dict[tuple[str, int, float], np.ndarray], seed: int
) -> tuple[pd.DataFrame, tuple[int, float]]:
    """For each kind the best setting of every second prompt, and what it gains on the others."""
    best = {}
    for kind in dict.fromkeys(kind for kind, _, _ in gains):
        mine = {(at, by): gain for (name, at, by), gain in gains.items() if name == kind}
        best[kind] = max(mine, key=lambda setting: mine[setting][::2].mean())
    rows = []
    for kind, (at, by) in best.items():
        row: dict[str, Any] = {"vector": kind, "layer": at, "strength": by}
        for name, setting in (("gain", (at, by)), ("same", best["memory"])):
            rest = gains[kind, *setting][1::2]
            low, high = interval(rest, seed)
            row |= {"prompts": len(rest), name: rest.mean()}
            row |= {f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows), best["memory"]
