"""Which head looks at which related word, and can a sentence be parsed from attention alone?

A head is chosen for a relation on one half of the sentences and judged on the other. Beside its accuracy
stands what needs no head or no training: the best fixed distance (chosen on the same half), the
best head of a model with random weights, the next word, and chance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from interp.data.arcs import ARCS, Arcs, Sentence, read_arcs
from interp.errors import BadInput, unknown
from interp.models.model import Model
from interp.registry import analysis, intervals
from interp.report import Report, provenance
from interp.resampling import INTERVAL, draw_counts
from interp.run.progress import Progress
from probes.attention_parser import (
    Choices,
    attention_choices,
    dependents,
    distance_choices,
    fit_chosen,
    hits,
    right_branching_hits,
)
from probes.controls import random_weights
from probes.word_attention import WordAttention, read_word_attention, readable

RESAMPLES = 1000

PLACES = ("next word", "previous word", "punctuation")
"""Rows that need no annotation: the word after, the word before, any punctuation mark."""


class Item(NamedTuple):
    """One question to a head: of `sentence`, is the word that `query` attends to most in `targets`?"""

    sentence: int
    query: int
    targets: frozenset[int]


@dataclass(frozen=True)
class Row:
    """A relation seen from one side.

    Attributes:
        looks_from: "dependent" (towards its head), "head" (towards its dependent), or "word".
        visible: questions whose answer the model can see. total: all questions.
    """

    relation: str
    looks_from: str
    visible: tuple[Item, ...]
    total: int


def rows_of(sentences: Sequence[Sentence], *, causal: bool) -> list[Row]:
    """Every relation from both sides, then the rows of PLACES; most frequent relations first.

    A causal model's word sees earlier words only: of an arc, one side sees the other. A question is
    visible if any of its targets is.
    """
    asked: dict[tuple[str, str], list[Item]] = {}

    def ask(relation: str, looks_from: str, sentence: int, query: int, targets: set[int]) -> None:
        item = Item(sentence, query, frozenset(targets))
        asked.setdefault((relation, looks_from), []).append(item)

    for s, sentence in enumerate(sentences):
        for arc in sentence.arcs:
            ask(arc.relation, "dependent", s, arc.dependent, {arc.head})
            ask(arc.relation, "head", s, arc.head, {arc.dependent})
    asked = dict(sorted(asked.items(), key=lambda entry: (-len(entry[1]), entry[0])))
    for s, sentence in enumerate(sentences):
        marks = {i for i, word in enumerate(sentence.words) if not any(map(str.isalnum, word))}
        for query in range(len(sentence)):
            if query + 1 < len(sentence):
                ask("next word", "word", s, query, {query + 1})
            if query:
                ask("previous word", "word", s, query, {query - 1})
            if marks and query not in marks:
                ask("punctuation", "word", s, query, marks)
    found = []
    for (relation, looks_from), items in asked.items():
        visible = tuple(
            item._replace(targets=targets)
            for item in items
            if (targets := frozenset(t for t in item.targets if not causal or t < item.query))
        )
        found.append(Row(relation, looks_from, visible, len(items)))
    return found


def most_attended(
    pattern: Float[np.ndarray, "heads words words"], *, causal: bool
) -> Int[np.ndarray, "heads words"]:
    """The word that each head attends to most from every word: not to itself, nor to words it cannot see.

    >>> pattern = np.array([[[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [0.1, 0.3, 0.6]]])
    >>> most_attended(pattern, causal=True)[0, 1:].tolist()
    [0, 1]
    """
    words = pattern.shape[-1]
    barred = ~np.tri(words, k=-1, dtype=bool) if causal else np.eye(words, dtype=bool)
    return np.where(barred, -1.0, pattern).argmax(-1)


def head_hits(
    items: Sequence[Item], attended: Sequence[Int[np.ndarray, "heads words"]]
) -> Bool[np.ndarray, "items heads"]:
    """Whether each head's most attended word is a right answer to each question."""
    return np.stack(
        [np.isin(attended[item.sentence][:, item.query], sorted(item.targets)) for item in items]
    )


def offset_hits(items: Sequence[Item], offset: int) -> Bool[np.ndarray, " items"]:
    """Whether the word `offset` places on is a right answer to each question."""
    return np.array([item.query + offset in item.targets for item in items])


def best_offset(items: Sequence[Item]) -> int:
    """The distance that answers most questions; of equals the shorter, then the one to the left."""
    reach = max(abs(t - item.query) for item in items for t in item.targets)
    offsets = sorted((o for o in range(-reach, reach + 1) if o), key=lambda o: (abs(o), o))
    return max(offsets, key=lambda o: offset_hits(items, o).sum())


def resampled_means(
    values: Float[np.ndarray, "columns items"], sentence: Int[np.ndarray, " items"], seed: int
) -> Float[np.ndarray, "columns resamples"]:
    """Means over the items of sentences drawn with replacement."""
    _, of_item = np.unique(sentence, return_inverse=True)
    count = int(of_item.max()) + 1
    draws = draw_counts(count, RESAMPLES, seed)
    sums = np.stack([np.bincount(of_item, column, count) for column in values.astype(float)])
    return sums @ draws.T / (np.bincount(of_item, minlength=count) @ draws.T)


def check_options(
    *,
    data: Any = "english",
    relations: Sequence[str] | None = None,
    n: int = 300,
    least: int = 10,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if n < 4:
        raise BadInput(
            f"n={n}: give at least 4 sentences, two to choose heads and two to judge them"
        )
    if least < 4:
        raise BadInput(f"least={least}: an accuracy needs at least 4 arcs")
    if relations is not None and not list(relations):
        raise BadInput("relations names none: leave it out for all")
    known = read_arcs(data) if isinstance(data, (str, Path)) else data
    if not isinstance(known, Arcs):
        raise BadInput(
            f"data is a {type(known).__name__}; wanted Arcs, a .conllu file, or one of {', '.join(ARCS)}"
        )
    for relation in relations or ():
        if relation not in known.relations and relation not in PLACES:
            raise unknown(f"relation in {known.name}", relation, [*known.relations, *PLACES])
    if len(known) < 4:
        raise BadInput(f"{known.name} has {len(known)} sentences: give at least 4")


def summary(report: Report) -> pd.DataFrame:
    """Every relation's head and its baselines."""
    table = report.table
    names = {"judged": "arcs", "offset_accuracy": "offset", "random_accuracy": "random"}
    columns = ["relation", "judged", "accuracy", "offset_accuracy", "random_accuracy", "gain"]
    shown = pd.DataFrame(table, columns=columns).rename(columns=names)
    head = [f"L{layer}H{head}" for layer, head in zip(table["layer"], table["head"], strict=True)]
    shown.insert(2, "head", head)
    shown["95 %"] = intervals(table, "gain")
    return shown


@analysis(
    name="probe_attention",
    source="Clark, Khandelwal, Levy & Manning 2019, What Does BERT Look At?, arXiv 1906.04341, §4 and §5",
    example="interp probe-attention smollm2-135m",
    figure="relations",
    validate=check_options,
    summary=summary,
    takes="text",
)
def probe_attention(
    model: Model,
    data: Arcs | str | Path = "english",
    *,
    relations: Sequence[str] | None = None,
    n: int = 300,
    least: int = 10,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """The head that best finds each related word, judged on sentences it was not chosen on.

    A head answers for a word with the word it attends to most, argmax_w A[v, w]; attention to a word is
    the sum over its tokens, from a word the mean. Words do not answer with themselves, and special tokens
    are no words. In a causal model only earlier words are answers, so an arc is a question to its later
    word: `visible_share` says how many are. Then a parser is trained that sees attention alone,
    p(head of j is i) ∝ exp Σ_k (w_k α^k_ij + u_k α^k_ji).

    High accuracy does not show that the model uses the relation: a head may follow position or word type
    (read `gain`), and no head is ablated here. Of the many rows some exceed a baseline by luck; the intervals
    are one row's own.

    Args:
        data: english, dependencies or coreference (shipped), a .conllu file, or Arcs.
        relations: only these; all by default, and next word, previous word and punctuation.
        n: sentences at most, drawn at random where there are more.
        least: relations with fewer visible arcs, or fewer than a third of it in either half, are left out.
        seed: of the halves, the draws and the random weights.
        progress: show a progress bar; by default in a terminal or a notebook.

    Returns: a Report. Table "probe_attention", one row a relation and side: arcs, visible_share, judged
        (arcs in the judging half); layer, head, accuracy (share) with low and high from a bootstrap over
        sentences (95 %); offset and offset_accuracy (best distance chosen on the same half);
        random_accuracy (the best head of random weights, chosen in the same way) and same_head_random (this head
        there); right_branching (the head is the next word; 0 where the model cannot see that); chance (a
        random visible word); gain over the better of offset and random weights, with gain_low and
        gain_high. Table "parse": uas (share of words whose head is found) of the attention parser and its
        baselines. Array "accuracy" [rows layers heads]: every head in the judging half, NaN where a layer
        has no such head; "accuracy_chosen": in the other half.

    Raises:
        BadInput: unknown relation or set, a damaged file, no tokenizer, too few arcs in every relation.
        Refused: the model's patterns cannot be seen, or its weights cannot be drawn anew.

    >>> probe_attention(tiny_model(), "english")
    Traceback (most recent call last):
    interp.errors.BadInput: tiny was loaded without a tokenizer: arcs are between words; load it with tokenizer=
    """
    started = time.perf_counter()
    check_options(data=data, relations=relations, n=n, least=least)
    model.layers_with("pattern")
    known = read_arcs(data) if isinstance(data, (str, Path)) else data
    rng = np.random.default_rng(seed)
    if len(known) > n:
        chosen = np.sort(rng.permutation(len(known))[:n])
        known = Arcs(known.name, tuple(known.sentences[i] for i in chosen))
    found, _ = readable(model, known)
    known = Arcs(known.name, tuple(s for s, a in zip(known.sentences, found, strict=True) if a))
    halves = rng.permutation(len(known)) % 2 == 0
    rows = rows_of(known.sentences, causal=model.spec.causal)
    if relations is not None:
        rows = [row for row in rows if row.relation in relations]
    rows, few = _enough(rows, halves, least)
    blank_model = random_weights(model, seed)
    left_out = {"sentences": len(found) - len(known), "relations": few}
    with Progress(progress) as bars:
        trained = read_word_attention(
            model, known, advance=bars.stage("Reading attention", len(known))
        )
        blank = read_word_attention(
            blank_model, known, advance=bars.stage("Reading random weights", len(known))
        )
        advance = bars.stage("Judging relations", len(rows))
        table, accuracy = _judged(rows, trained, blank, halves, model.spec.causal, seed, advance)
        parse = _parsed(trained, blank, halves, seed, bars.stage("Training parsers", 3))
    options = {
        "data": known.name,
        "relations": relations and list(relations),
        "n": n,
        "least": least,
    }
    meta = provenance(model, options=options, seed=seed)
    meta |= {
        "causal": model.spec.causal,
        "sentences": {"chosen_on": int(halves.sum()), "judged_on": int((~halves).sum())},
        "left_out": left_out,
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    shaped = {name: _by_layer(trained, values) for name, values in accuracy.items()}
    return Report("probe_attention", {"probe_attention": table, "parse": parse}, shaped, meta)


def _enough(
    rows: Sequence[Row], halves: Bool[np.ndarray, " sentences"], least: int
) -> tuple[list[Row], dict[str, int]]:
    """Rows with enough visible arcs in both halves; of the others how many they have."""
    kept, few = [], {}
    for row in rows:
        choosing = sum(bool(halves[item.sentence]) for item in row.visible)
        judging = len(row.visible) - choosing
        if len(row.visible) >= least and 3 * min(choosing, judging) >= least:
            kept.append(row)
        else:
            few[f"{row.relation}, from the {row.looks_from}"] = len(row.visible)
    if not kept:
        most = max(few, key=lambda name: few[name], default="none")
        raise BadInput(
            f"no relation has {least} arcs that the model can see, a third of them in each half (most has "
            f"{most}: {few.get(most, 0)}): give more sentences, or a smaller least="
        )
    return kept, few


def _judged(
    rows: Sequence[Row],
    trained: WordAttention,
    blank: WordAttention,
    halves: Bool[np.ndarray, " sentences"],
    causal: bool,
    seed: int,
    advance: Callable[[int], None],
) -> tuple[pd.DataFrame, dict[str, Float[np.ndarray, "rows heads"]]]:
    attended = [most_attended(pattern, causal=causal) for pattern in trained.patterns]
    attended_blank = [most_attended(pattern, causal=causal) for pattern in blank.patterns]
    records, judged_half, chosen_half = [], [], []
    for row in rows:
        choosing = [item for item in row.visible if halves[item.sentence]]
        judging = [item for item in row.visible if not halves[item.sentence]]
        chosen = head_hits(choosing, attended).mean(0)
        judged = head_hits(judging, attended)
        best = int(chosen.argmax())
        blank_best = int(head_hits(choosing, attended_blank).mean(0).argmax())
        blank_judged = head_hits(judging, attended_blank)
        offset = best_offset(choosing)
        values = np.stack(
            [judged[:, best], offset_hits(judging, offset), blank_judged[:, blank_best]]
        )
        drawn = resampled_means(values, np.array([item.sentence for item in judging]), seed)
        accuracy, by_offset, by_blank = (float(x) for x in values.mean(1))
        strongest = 1 if by_offset >= by_blank else 2
        low, high = np.quantile(drawn[0], INTERVAL)
        gain_low, gain_high = np.quantile(drawn[0] - drawn[strongest], INTERVAL)
        layer, head = trained.heads[best]
        records.append(
            {
                "relation": row.relation,
                "looks_from": row.looks_from,
                "arcs": row.total,
                "visible_share": len(row.visible) / row.total,
                "judged": len(judging),
                "layer": layer,
                "head": head,
                "accuracy": accuracy,
                "low": low,
                "high": high,
                "offset": offset,
                "offset_accuracy": by_offset,
                "random_accuracy": by_blank,
                "same_head_random": float(blank_judged[:, best].mean()),
                "right_branching": float(
                    offset_hits(judging, -1 if row.looks_from == "head" else 1).mean()
                ),
                "chance": float(np.mean([_chance(item, trained, causal) for item in judging])),
                "gain": accuracy - max(by_offset, by_blank),
                "gain_low": gain_low,
                "gain_high": gain_high,
            }
        )
        judged_half.append(judged.mean(0))
        chosen_half.append(chosen)
        advance(1)
    arrays = {"accuracy": np.stack(judged_half), "accuracy_chosen": np.stack(chosen_half)}
    return pd.DataFrame(records), arrays


def _chance(item: Item, read: WordAttention, causal: bool) -> float:
    others = item.query if causal else len(read.sentences[item.sentence]) - 1
    return len(item.targets) / others


def _parsed(
    trained: WordAttention,
    blank: WordAttention,
    halves: Bool[np.ndarray, " sentences"],
    seed: int,
    advance: Callable[[int], None],
) -> pd.DataFrame:
    """The attention parser and its baselines; an empty table where there are too few trees."""
    columns = ["parser", "uas", "low", "high", "words", "strength", "gain", "gain_low", "gain_high"]
    trees = [s for s, text in enumerate(trained.sentences) if dependents(text)]
    learning = [s for s in trees if halves[s]]
    judging = [s for s in trees if not halves[s]]
    if min(len(learning), len(judging)) < 3:
        return pd.DataFrame({name: pd.Series(dtype=float) for name in columns})
    judged: dict[str, np.ndarray] = {}
    strengths: dict[str, float] = {}
    sources: dict[str, Callable[[], Choices]] = {
        "attention": lambda: attention_choices(trained.sentences, trained.patterns),
        "attention, random weights": lambda: attention_choices(blank.sentences, blank.patterns),
        "distance": lambda: distance_choices(trained.sentences),
    }
    held = None
    for name, make in sources.items():
        choices = make()
        weights, strengths[name] = fit_chosen(choices.of_sentences(learning))
        held = choices.of_sentences(judging)
        judged[name] = hits(held, weights)
        advance(1)
    assert held is not None
    judged["right-branching"] = right_branching_hits(held)
    values = np.stack(list(judged.values()))
    drawn = resampled_means(values, held.sentence.numpy(), seed)
    means = values.mean(1)
    low, high = np.quantile(drawn, INTERVAL, axis=1)
    table = pd.DataFrame({"parser": list(judged), "uas": means, "low": low, "high": high})
    table["words"] = values.shape[1]
    table["strength"] = [strengths.get(name, np.nan) for name in judged]
    strongest = 1 + int(means[1:].argmax())
    gain = [means[0] - means[strongest], *np.quantile(drawn[0] - drawn[strongest], INTERVAL)]
    for column, value in zip(("gain", "gain_low", "gain_high"), gain, strict=True):
        table[column] = [value] + [np.nan] * (len(table) - 1)  # baselines claim no gain
    return pd.DataFrame(table, columns=columns)


def _by_layer(
    read: WordAttention, values: Float[np.ndarray, "rows heads"]
) -> Float[np.ndarray, "rows layers heads"]:
    layers, heads = np.array(read.heads).T
    found = np.full((len(values), layers.max() + 1, heads.max() + 1), np.nan, dtype=np.float32)
    found[:, layers, heads] = values
    return found
