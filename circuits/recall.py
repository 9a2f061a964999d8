"""Factual recall: how "The capital of France is" becomes "Paris" between the subject and the last layer.

Three questions of Lv et al. 2024, each answered on facts that the model knows, with an interval over
facts and a control: which heads carry the subject to the last position, what each MLP adds there, and
whether the last layers take the answer back (anti-overconfidence). A fact's counterfactual is another
fact of the same template, so patching from it is patching from another row of the same run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from circuits.attribution import Contributions, direct_contributions
from circuits.recall_end import final_table, lens_table, mlp_tables, spoken_by_layer
from circuits.recall_facts import (
    ALPHA,
    MIN_FACTS,
    Asked,
    ask,
    clean_run,
    corrected_p,
    fact_row,
    log_odds,
    log_p,
    parsed,
)
from interp.data import facts as shipped
from interp.data.facts import RELATIONS, check_template, fact_prompts
from interp.errors import BadInput, Refused, at_least, unknown
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.cache import Run
from interp.run.edits import Edit

ATTENTION = 0.1
"""A mover's least mean attention from the last position to the subject."""
EFFECT = 0.02
"""A mover's least causal effect, as a share of the clean logit difference."""


def check_options(
    *,
    relation: str = "capital",
    facts: Sequence[str] | None = None,
    template: str | None = None,
    n: int = 32,
    exact: int = 24,
    controls: int = 8,
    known_rank: int = 0,
    final_layers: int | None = None,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if relation not in RELATIONS:
        raise unknown("relation", relation, RELATIONS)
    if template is not None:
        check_template(template)
    if facts is not None:
        parsed(facts)
    if n < MIN_FACTS:
        raise BadInput(f"n={n}: intervals over facts need at least {MIN_FACTS} of them")
    at_least(
        exact=(exact, 1),
        controls=(controls, 2),
        known_rank=(known_rank, 0),
        final_layers=(final_layers, 1),
    )


def movers(report: Report) -> pd.DataFrame:
    """The heads with the largest tested effect."""
    columns = ["layer", "head", "label", "attention", "effect", "effect_low", "effect_high"]
    found = report.table.sort_values("effect", ascending=False, na_position="last")
    return found.loc[:, [*columns, "contribution"]].head(10)


@analysis(
    name="recall",
    source="Lv et al. 2024, Interpreting Key Mechanisms of Factual Recall, arXiv 2403.19521",
    example="interp recall smollm2-135m --relation capital",
    figure="overview",
    validate=check_options,
    summary=movers,
    takes="text",
)
def recall(
    model: Model,
    *,
    relation: str = "capital",
    facts: Sequence[str] | None = None,
    template: str | None = None,
    n: int = 32,
    exact: int = 24,
    controls: int = 8,
    known_rank: int = 0,
    final_layers: int | None = None,
    seed: int = 0,
) -> Report:
    """Which heads carry the subject to the answer, what MLPs add, what the last layers take back.

    Everything is measured at the last position of n facts, on m = logit[answer] − logit[answer of the
    counterfactual], the counterfactual another of the n facts:

    - effect of a head: m less m with the head's z at the end patched from the counterfactual's run.
      First estimated for all heads by (z − z') · ∂m/∂z, then computed for the `exact` largest, and for
      `controls` heads drawn from the rest. A head is a "mover" if it attends to the subject (mean
      weight 0.1 or more), its effect is at least 2 % of m and larger than every control's, and is
      significant (t-test over facts, corrected over the tested heads); a "negative mover" if its effect
      is below 0 instead.
    - contribution: direct logit attribution of m to heads, to their reading of the subject's tokens, and
      to MLPs. `_shuffled` is the same with another fact's m.
    - mlp_weight: an MLP's write fitted as Σ_h w_h · (what head h of its layer writes) + w · resid_pre +
      intercept: w_h > 0 amplifies the head's write, w_h = −1 erases it. Held-out share of variance
      explained, with heads of shuffled facts as control.
    - suppressor: a head or MLP of the last layers whose zero-ablation at the end raises log p(answer), by
      0.05 nats or more and significantly.

    What it does not show: which of a head's inputs matters (patching z joins them); effects at other
    positions than the last; that a head with a small estimate has a small effect, where it was not
    tested; that facts asked in other words are recalled in this way. Facts are chosen because the final
    layer has them right, which favours it in the lens; suppressors are ablated together on the facts
    that they were found on.

    Where we differ: the paper works on templates of its own and reads an MLP that follows its heads; we
    fit every layer's MLP by least squares, with an intercept shared by the facts (`common` says whether
    it points to the answers at all), and take a head's attention to the subject as part of the label.

    Args:
        relation: capital, language, currency, continent, country, past, plural or opposite.
        facts: facts of your own in place of the shipped ones, each "subject=answer".
        template: a prompt with {subject}, in place of the relation's.
        n: at most this many facts, drawn from those that align and that the model knows.
        exact: how many heads to patch exactly; controls: how many others beside them.
        known_rank: a fact is known where the answer's rank is at most this (0: the top token).
        final_layers: how many last layers to search for suppressors; by default a tenth, at least one.
        seed: of the draw of facts, counterfactuals, controls and the bootstrap.

    Returns: a Report. Every mean has a bootstrap interval over facts, `_low` and `_high` (95 %).
        Table "recall", one row a head, the largest effects first: attention (to the subject, 0 to 1), contribution and
        subject_contribution (logits), effect_estimate, effect (logits; NaN where not tested), effect_p,
        tested ("top", "control" or ""), mlp_weight, label. Table "mlps", one row a layer: contribution
        (logits), log_p_change (nats, from resid_mid to resid_post by the logit lens), common (logits it
        gives all answers alike, above the vocabulary's mean), explained (share of variance). Table
        "final", one row a component: zero_effect and mean_effect (nats of log p(answer) gained by
        ablation), contribution and frequent (logits to the answer and to frequent tokens, above the
        vocabulary's mean), similarity (mean cosine of its writes on two facts), raises, lowers, label;
        rows "suppressors" and "control" ablate several together. Table "lens": the answer's probability,
        log-probability and rank after each layer. Table "facts": every fact, and what became of it.

    Raises:
        BadInput: unknown relation, a bad template, no tokenizer, fewer than 8 facts known, fewer than
        3 different answers. Refused: a model that reads both ways, or whose writes were not verified.

    >>> recall(tiny_model())
    Traceback (most recent call last):
    ...
    interp.errors.BadInput: tiny was loaded without a tokenizer: answers are words; load it with tokenizer=

    Source: Lv et al. 2024, arXiv 2403.19521; effects are estimated by attribution patching (Nanda 2023).
    """
    started = time.perf_counter()
    options = {
        "relation": relation,
        "facts": None if facts is None else list(facts),
        "template": template,
        "n": n,
        "exact": exact,
        "controls": controls,
        "known_rank": known_rank,
        "final_layers": final_layers,
    }
    check_options(**options)
    model.layers_with("pattern")
    for layer in range(model.n_layers):
        if why := model.spec.refused.get(f"attn_write.{layer}"):
            raise Refused(f"what layer {layer} of {model.id} writes is not known: {why}")
    if not model.spec.causal:
        raise Refused(
            f"{model.id} reads both ways: it has no last position that predicts an answer"
        )
    known = shipped.facts(relation) if facts is None else parsed(facts)
    template = RELATIONS[relation] if template is None else template
    candidates, left_out = fact_prompts(model, known, template)
    asked, about = ask(model, candidates, template, n=n, known_rank=known_rank, seed=seed)
    run = clean_run(model, asked)
    own, shuffled = _contributions(model, asked)
    spoken = spoken_by_layer(model, run, asked)
    heads, about_controls = _heads(
        model, run, asked, own, shuffled, exact=exact, controls=controls, seed=seed
    )
    mlps, weights = mlp_tables(model, run, asked, own, shuffled, spoken)
    last = min(final_layers or max(1, model.n_layers // 10), model.n_layers)
    final = final_table(model, run, asked, range(model.n_layers - last, model.n_layers), seed)
    lens, peak = lens_table(asked, spoken)
    for fact, reason in left_out.items():
        about.append(fact_row(fact, template, "does not align", reason=reason))
    tables = {
        "recall": heads.merge(weights, on=["layer", "head"], how="left"),
        "mlps": mlps,
        "final": final,
        "lens": lens,
        "facts": pd.DataFrame(about),
    }
    meta = provenance(model, options=options, seed=seed) | {
        "template": template,
        "facts": dict(Counter(str(row["status"]) for row in about)),
        "clean": asked.named("logit_diff", log_odds(run, asked))
        | asked.named("probability", log_p(run, asked).exp()),
        "controls": about_controls,
        "lens": peak,
        "notes": list(model.notes),
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    return Report("recall", tables, {}, meta)


def _contributions(model: Model, asked: Asked) -> tuple[Contributions, Contributions]:
    """Direct contributions to m, by source position; and to the m of the shuffled row."""
    answers, others = asked.answers, asked.answers[asked.other]
    pick = asked.shuffled
    return (
        direct_contributions(model, asked.batch, answer=answers, instead=others, sources=True),
        direct_contributions(model, asked.batch, answer=answers[pick], instead=others[pick]),
    )


# --- heads ---------------------------------------------------------------------------------------


def _heads(
    model: Model,
    run: Run,
    asked: Asked,
    own: Contributions,
    shuffled: Contributions,
    *,
    exact: int,
    controls: int,
    seed: int,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """One row a head without its MLP weight; and what the control heads gave."""
    estimates = _estimates(model, asked)
    places = [(layer, head) for layer in estimates for head in range(estimates[layer].shape[1])]
    sizes = np.array([abs(estimates[layer][:, head].mean()) for layer, head in places])
    largest_first = np.argsort(-sizes, kind="stable")
    drawn = np.random.default_rng(seed).permutation(largest_first[exact:])[:controls]
    tested = {places[i]: "top" for i in largest_first[:exact]} | {
        places[i]: "control" for i in drawn
    }
    effects = dict(zip(tested, _effects(model, run, asked, list(tested)), strict=True))
    corrected = corrected_p(np.stack(list(effects.values()), 1), sides=2)
    p = dict(zip(tested, corrected, strict=True))
    found = [effects[places[i]].mean() for i in drawn]
    largest = float(np.abs(found).max(initial=0.0))
    least = max(EFFECT * float(log_odds(run, asked).mean()), largest)
    subject, nothing = list(asked.prompts.subject), np.full(len(asked.answers), np.nan)
    rows = []
    for layer, head in places:
        place = layer, head
        row: dict[str, Any] = {"layer": layer, "head": head, "label": ""}
        row |= asked.named("attention", own.weights[layer][:, head, subject].sum(-1))
        row["effect_estimate"] = float(estimates[layer][:, head].mean())
        row |= asked.named("effect", effects.get(place, nothing))
        row["effect_p"] = p.get(place, np.nan)
        row["tested"] = tested.get(place, "")
        row |= asked.named("contribution", own.heads[:, layer, head])
        row["contribution_shuffled"] = float(shuffled.heads[:, layer, head].mean())
        row |= asked.named("subject_contribution", own.sources[layer][:, head, subject].sum(-1))
        attends = row["attention"] >= ATTENTION
        if tested.get(place) == "top" and attends and p[place] <= ALPHA:
            if abs(row["effect"]) > least:
                row["label"] = "mover" if row["effect"] > 0 else "negative mover"
        rows.append(row)
    about = {"heads": len(found), "mean": float(np.mean(found)) if found else 0.0}
    table = pd.DataFrame(rows)
    # Tested heads first, the largest effect leading; then by estimate.
    order = ["effect", "effect_estimate"]
    table = table.sort_values(order, key=np.abs, ascending=False, kind="stable", ignore_index=True)
    return table, about | {"largest": largest, "least_effect": least}


def _estimates(model: Model, asked: Asked) -> dict[int, np.ndarray]:
    """First-order effect of patching each head's z at the end, by layer [n n_heads], logits."""
    end = asked.prompts.end
    run = model.run(asked.batch, capture=["z"], logits=torch.tensor([end]), grad=True)
    z = run.cache.by_layer("z")
    slopes = torch.autograd.grad(log_odds(run, asked).sum(), list(z.values()))
    found = {}
    for layer, slope in zip(z, slopes, strict=True):
        here = z[layer].detach()[:, end].float()
        change = here - here[asked.other]
        found[layer] = (change * slope[:, end].float()).sum(-1).cpu().numpy()
    return found


def _effects(
    model: Model, run: Run, asked: Asked, places: Sequence[tuple[int, int]]
) -> list[Float[np.ndarray, " n"]]:
    """m less m with one head's z at the end from the counterfactual's run, logits."""
    value = {layer: z[asked.other] for layer, z in run.cache.by_layer("z").items()}
    end, clean = asked.prompts.end, log_odds(run, asked)
    return model.replay(
        run,
        [[Edit.patch("z", value, heads=[place], positions=[end])] for place in places],
        lambda variant: (clean - log_odds(variant, asked)).numpy(),
        logits=torch.tensor([end]),
    )
