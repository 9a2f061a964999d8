"""What features do: ablated, steered and patched in a run, and followed from one SAE's features to another's.

Every change is of latents alone: what the SAE does not reconstruct stays as it was in that run, so with
no latent changed no logit changes. Patching takes values from the corrupted prompts of a task into its
clean ones; all features are estimated to first order from one backward pass, and the largest are then
run exactly, many in one forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.data.pairs import Pairs
from interp.errors import BadInput, unknown
from interp.metrics import logit_diff
from interp.models.model import Model
from interp.report import Report, provenance
from interp.run.cache import Cache, Run
from interp.run.edits import Edit, Positions, Seen
from interp.run.progress import Progress
from interp.sites import Site
from probes.saes.attention import Place, attention_of, feature_ids, rows_of, write_sites
from probes.saes.model import SAE
from probes.saes.splice import splice

Metric = Callable[[Tensor, Pairs], Tensor]
"""(logits of the last position [n d_vocab], pairs) → [n]."""

COLUMNS = [
    "part", "feature", "position", "clean", "corrupted", "prompts", "first_order", "effect", "sem", "share",
]  # fmt: skip

EVERYWHERE = "all"
"""The name of all positions together, where positions are named."""


# --- edits ------------------------------------------------------------------------------------------


def patch_features(
    sae: SAE,
    model: Model,
    features: Sequence[int] | Tensor,
    values: float | Tensor,
    *,
    positions: Positions = None,
) -> Edit:
    """An edit that gives features these activations: x + Σ_i (values_i − f_i) W_dec[i].

    The error is kept, so with values = f it changes nothing. Whether the SAE could make these values
    at once (under TopK) is not asked.

    Args:
        values: a number; or a tensor that broadcasts to [batch pos n], one a feature.
        positions: as in `Edit.apply`.

    Raises:
        BadInput: no such feature, values that do not fit, an SAE of another model or site.

    >>> from probes.saes.model import SAEConfig
    >>> model, ids = tiny_model(), torch.tensor([[5, 6, 7]])
    >>> sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4))
    >>> f = sae.encode(model.run(ids, capture=["z.1"]).cache["z.1"].flatten(2))
    >>> same = model.run(ids, edits=[patch_features(sae, model, [3, 9], f[..., [3, 9]])]).logits
    >>> float((same - model.run(ids).logits).abs().max()) < 1e-5
    True
    """
    chosen = feature_ids(sae, features)

    def change(f: Tensor, seen: Seen) -> Tensor:
        new = torch.as_tensor(values, dtype=f.dtype, device=f.device)
        wanted = (*f.shape[:2], len(chosen))
        try:
            new = new.expand(wanted)
        except RuntimeError as error:
            raise BadInput(
                f"values of shape {list(new.shape)} for {len(chosen)} features: wanted something that "
                f"broadcasts to {list(wanted)} [batch pos feature]"
            ) from error
        return f.index_copy(-1, chosen.to(f.device), new)

    return splice(sae, model, change=change, keep_error=True, positions=positions)


def zero_features(
    sae: SAE, model: Model, features: Sequence[int] | Tensor, *, positions: Positions = None
) -> Edit:
    """An edit that takes features away: x − Σ_i f_i W_dec[i], the error kept.

    >>> from probes.saes.model import SAEConfig
    >>> model, ids = tiny_model(), torch.tensor([[5, 6, 7]])
    >>> sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4))
    >>> logits = model.run(ids, edits=[zero_features(sae, model, range(64))]).logits
    """
    return patch_features(sae, model, features, 0.0, positions=positions)


def steer(
    sae: SAE, model: Model, feature: int, amount: float, *, positions: Positions = None
) -> Edit:
    """An edit that adds `amount` units of a feature, active or not: x + amount · W_dec[i].

    A unit is one of the feature's activation; look at what it reaches on text before choosing. A
    negative amount takes away beyond zero, where no SAE goes.

    >>> from probes.saes.model import SAEConfig
    >>> model, ids = tiny_model(), torch.tensor([[5, 6, 7]])
    >>> sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.1", heads=4))
    >>> logits = model.run(ids, edits=[steer(sae, model, 3, 2.0)]).logits
    """
    chosen = feature_ids(sae, [feature])

    def change(f: Tensor, seen: Seen) -> Tensor:
        return f.index_add(-1, chosen.to(f.device), torch.full_like(f[..., :1], amount))

    return splice(sae, model, change=change, keep_error=True, positions=positions)


# --- patching ---------------------------------------------------------------------------------------


def end_logit_diff(logits: Float[Tensor, "n d_vocab"], pairs: Pairs) -> Float[Tensor, " n"]:
    """Logit of the answer minus that of the wrong one, in logits."""
    return logit_diff(logits, pairs.answers, pairs.wrong)


@torch.no_grad()
def feature_patching(
    model: Model,
    sae: SAE,
    pairs: Pairs,
    *,
    positions: Sequence[str] = ("end",),
    features: Sequence[int] | Tensor | None = None,
    metric: Metric = end_logit_diff,
    confirm: int = 32,
    progress: bool | None = None,
) -> Report:
    """Effect on the metric of giving each feature its corrupted activation in the clean run.

        effect_i = m(z + Δf_i W_dec[i]) − m(z),   first order: Δf_i W_dec[i] · ∂m/∂z,   Δf = f_corrupted − f

    at one named position at a time. Every feature that differs anywhere gets its first-order estimate, from
    one backward pass; the `confirm` largest of all are run exactly, from the SAE's layer on. Beside them:
    all features together, the error (what the SAE does not reconstruct), and the site as a whole.

    The estimate can miss a feature whose effect is not near linear (a saturated pattern downstream):
    compare the two columns. An effect is on this task and corruption alone, and includes everything later
    layers do with the feature.

    Args:
        sae: of any site. pairs: the task.
        positions: names of positions of the task, or "all": every position together.
        features: only these. metric: (last-position logits [n d_vocab], pairs) → [n], differentiable.
        confirm: how many (feature, position) pairs to run exactly.

    Returns: a Report. Table "sae_patching", largest estimates first: part ("feature", "features", "error",
        "site"), feature, position, clean and corrupted (mean activation), prompts (in how many it
        differs), first_order and effect (metric's unit, means over prompts; effect missing where not
        run), sem (standard error of the effect), share (effect over the site's at that position).
        meta: "clean" and "corrupted", the metric's means.

    Raises:
        BadInput: an SAE of another model, no such feature or position.

    Source: Kissane et al. 2024 (features patched on IOI); Nanda 2023 for the first-order estimate.

    >>> from probes.saes.model import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4, site="z.0", heads=4))
    >>> pairs = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4], positions={"name": [1]})
    >>> report = feature_patching(tiny_model(), sae, pairs, positions=["name"], progress=False)
    >>> report.table["part"].tolist()[-3:]
    ['features', 'error', 'site']
    """
    started = time.perf_counter()
    site = sae.site(model)
    names = _position_names(pairs, positions)
    if confirm < 0:
        raise BadInput(f"confirm={confirm}: wanted 0 (only estimates) or more")
    chosen = torch.arange(sae.config.d_sae) if features is None else feature_ids(sae, features)
    clean, gradient = _gradient(model, pairs, site, metric)
    start = model.run(pairs.clean_batch, capture=[site, _resume(site)], logits=False)
    other = model.run(pairs.corrupted_batch, capture=[site], logits=False)
    x, corrupted = (rows_of(run.cache, site).to(sae.encoder) for run in (start, other))
    single: list[_Entry] = []
    rest: list[_Entry] = []
    for name in names:
        of_features, others = _entries(sae, pairs, name, x, corrupted, gradient, chosen)
        single, rest = single + of_features, rest + others
    single.sort(key=lambda entry: -abs(entry.columns["first_order"]))
    run_exactly = single[:confirm] + rest
    with Progress(progress) as bars:
        advance = bars.stage("Patching features", len(run_exactly))
        found = model.replay(
            start,
            [[_added(site, start.cache, entry.moved())] for entry in run_exactly],
            lambda run: metric(_last(run), pairs) - clean,
            logits=torch.tensor([pairs.end]),
            progress=advance,
        )
    for entry, effect in zip(run_exactly, found, strict=True):
        entry.effect = effect
    table = _table(single + rest)
    ends = model.run(pairs.corrupted_batch, logits=torch.tensor([pairs.end]))
    options = {"positions": names, "confirm": confirm, "metric": getattr(metric, "__name__", "?")}
    meta = provenance(model, options=options, seed=0) | {
        "task": pairs.name,
        "site": str(site),
        "prompts": len(pairs),
        "clean": float(clean.mean()),
        "corrupted": float(metric(_last(ends), pairs).mean()),
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    return Report("sae_patching", {"sae_patching": table}, {}, meta)


@torch.no_grad()
def feature_paths(
    model: Model,
    sender: SAE,
    receiver: SAE,
    pairs: Pairs,
    *,
    senders: Sequence[int] | Tensor,
    sender_position: str = EVERYWHERE,
    receiver_position: str = "end",
    metric: Metric = end_logit_diff,
    confirm: int = 32,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Effect of each sender feature through each later feature, along the residual stream alone.

    Path patching (sender feature i at layer L → receiver feature j at layer M > L → metric):
    1. the sender's corrupted activation is put in the clean run, and what its attention then writes
       reaches the input of layer M directly, every block between as in the clean run;
    2. receiver j takes the activation it has there, f_j + Δ_ij, everything else clean, and the rest of
       the model runs.

    The receiver's q, k and v all see the sender (unlike in `recursive_attribution`, where patterns are
    held). Paths through blocks between L and M, the MLP of layer L among them, are left out.

    Args:
        sender, receiver: SAEs of z, of an earlier and a later layer. senders: features of the first.
        sender_position, receiver_position: names of positions of the task, or "all".
        metric, confirm: as in `feature_patching`; `confirm` (sender, receiver) pairs are run exactly.

    Returns: one row for each sender and receiver whose activation changes, largest estimates first:
        sender, receiver, change (mean Δ_ij over prompts and positions, in activation), first_order and
        effect (metric's unit, means over prompts; effect missing where not run), sem.

    Raises:
        BadInput: SAEs of other sites or in the wrong order, no such feature or position. Refused: what
        this model's attention writes was not verified.

    Source: Goldowsky-Dill et al. 2023 and Wang et al. 2022 for path patching; Kissane et al. 2024 for
        features as its nodes.

    >>> from probes.saes.model import SAEConfig
    >>> early, late = (SAE(SAEConfig(32, 64, k=4, site=f"z.{i}", heads=4), seed=i) for i in (0, 1))
    >>> pairs = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4])
    >>> table = feature_paths(tiny_model(), early, late, pairs, senders=range(64), progress=False)
    >>> list(table.columns)
    ['sender', 'receiver', 'change', 'first_order', 'effect', 'sem']
    """
    place, (last, _) = attention_of(sender, model), attention_of(receiver, model)
    first = place[0]
    if first >= last:
        raise BadInput(
            f"the sender is of layer {first}, the receiver of layer {last}: a path leads to a later layer"
        )
    chosen = feature_ids(sender, senders)
    for name in (sender_position, receiver_position):
        _position_names(pairs, [name])
    site, to = (Site.parse(sae.config.site) for sae in (sender, receiver))
    clean, gradient = _gradient(model, pairs, to, metric)
    sites = [site, to, _resume(to), *write_sites(model, first)]
    start = model.run(pairs.clean_batch, capture=sites, logits=False)
    other = model.run(pairs.corrupted_batch, capture=[site], logits=False)
    x, corrupted = (rows_of(run.cache, site).to(sender.encoder) for run in (start, other))
    where = _mask(pairs, sender_position)
    moved = (sender.encode(corrupted) - sender.encode(x))[..., chosen] * where
    active = moved.abs().amax((0, 1)) > 0
    chosen, moved = chosen[active.cpu()], moved[..., active]
    writes = [
        _written(model, start.cache, place, moved[..., i, None] * sender.W_dec[feature])
        for i, feature in enumerate(chosen.tolist())
    ]
    f = receiver.encode(rows_of(start.cache, to).to(receiver.encoder))
    read = _mask(pairs, receiver_position).to(f.device)
    # The effect of a unit of every receiver, at every position: [n pos d_sae].
    slope = gradient.to(receiver.encoder) @ receiver.W_dec.T

    def changed(run: Run) -> tuple[Tensor, Tensor, Tensor]:
        """Receivers that change, where and how much: prompt-position rows stay sparse."""
        delta = (receiver.encode(rows_of(run.cache, to).to(receiver.encoder)) - f) * read
        own = (delta.abs().amax((0, 1)) > 0).nonzero()[:, 0]
        delta = delta[..., own]
        return own, delta, (delta * slope[..., own]).sum(1).mean(0)

    with Progress(progress) as bars:
        received = model.replay(
            start,
            [[Edit.add(_resume(to), write)] for write in writes],
            changed,
            logits=False,
            capture=[to],
            progress=bars.stage("Senders to receivers", len(writes)),
        )
        rows = [
            (abs(estimate), i, j, column, estimate)
            for i, (own, _, first_order) in enumerate(received)
            for column, (j, estimate) in enumerate(
                zip(own.tolist(), first_order.tolist(), strict=True)
            )
        ]
        rows.sort(key=lambda row: (-row[0], row[1], row[2]))
        exact = rows[:confirm]
        effects = model.replay(
            start,
            [[_added(to, start.cache, received[i][1][..., column, None] * receiver.W_dec[j])]
             for _, i, j, column, _ in exact],
            lambda run: metric(_last(run), pairs) - clean,
            logits=torch.tensor([pairs.end]),
            progress=bars.stage("Receivers to the metric", len(exact)),
        )  # fmt: skip
    counted = float(read.sum())
    table = [
        (int(chosen[i]), j, float(received[i][1][..., column].sum()) / counted, estimate)
        + (_mean(effects[place]) if place < len(exact) else (float("nan"), float("nan")))
        for place, (_, i, j, column, estimate) in enumerate(rows)
    ]
    return pd.DataFrame(
        table, columns=["sender", "receiver", "change", "first_order", "effect", "sem"]
    )


# --- parts ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Entry:
    """One thing to patch at one position: its columns of the table, what it adds to the site, its effect."""

    columns: dict[str, Any]
    moved: Callable[[], Float[Tensor, "n pos d_in"]]
    effect: Float[Tensor, " n"] | None = None


def _entries(
    sae: SAE, pairs: Pairs, name: str, x: Tensor, corrupted: Tensor, gradient: Tensor,
    chosen: Int[Tensor, " feature"],
) -> tuple[list[_Entry], list[_Entry]]:  # fmt: skip
    """Every feature that differs at a named position, and what they are compared with."""
    mask = _mask(pairs, name).to(x)
    f, g = sae.encode(x), sae.encode(corrupted)
    change = (g - f) * mask
    slope = gradient.to(x) @ sae.W_dec.T
    columns = pd.DataFrame(
        {
            "part": "feature",
            "feature": range(sae.config.d_sae),
            "position": name,
            "clean": ((f * mask).sum((0, 1)) / mask.sum()).cpu(),
            "corrupted": ((g * mask).sum((0, 1)) / mask.sum()).cpu(),
            "prompts": (change != 0).any(1).sum(0).cpu(),
            "first_order": (change * slope).sum(1).mean(0).cpu(),
        }
    )
    wanted = columns.loc[chosen.tolist()].query("prompts > 0")
    single = [
        _Entry(row, lambda i=row["feature"]: change[..., i, None] * sae.W_dec[i])
        for row in wanted.to_dict("records")
    ]
    whole = (corrupted - x) * mask
    of_features = change @ sae.W_dec
    rest = []
    for part, moved in (("features", of_features), ("error", whole - of_features), ("site", whole)):
        first_order = float((moved * gradient.to(x)).sum((1, 2)).mean())
        row = {"part": part, "position": name, "prompts": len(pairs), "first_order": first_order}
        rest.append(_Entry(row, lambda moved=moved: moved))
    return single, rest


def _table(entries: list[_Entry]) -> pd.DataFrame:
    """The columns of all entries with their effects."""
    rows = []
    for entry in entries:
        effect, sem = (float("nan"), float("nan")) if entry.effect is None else _mean(entry.effect)
        rows.append(entry.columns | {"effect": effect, "sem": sem})
    table = pd.DataFrame(rows).reindex(columns=COLUMNS[:-1]).astype({"feature": "Int64"})
    sites = table.loc[table["part"] == "site"].set_index("position")["effect"]
    table[COLUMNS[-1]] = table["effect"] / table["position"].map(sites)
    return table


def _gradient(
    model: Model, pairs: Pairs, site: Site, metric: Metric
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n pos d_in"]]:
    """The metric of the clean run, and its gradient at a site."""
    run = model.run(pairs.clean_batch, capture=[site], logits=torch.tensor([pairs.end]), grad=True)
    with torch.enable_grad():
        value = metric(_last(run), pairs)
        gradient = run.gradients(value.sum(), str(site)).flatten(2)
    return value.detach(), gradient.detach()


def _written(
    model: Model, cache: Cache, place: Place, moved: Float[Tensor, "n pos d_in"]
) -> Float[Tensor, "n pos d_model"]:
    """What a layer's attention writes more when its z (of the SAE's heads) moves by this much."""
    layer, heads = place
    block = model.spec.blocks[layer]
    assert block.attn_write is not None
    W_O = model.W_O(layer)[list(heads)].float().flatten(0, 1)
    out = moved.to(W_O) @ W_O
    if not block.direct:
        norm = model.module.get_submodule(block.attn_write.module)
        before = cache[f"attn_out.{layer}"]
        out = (norm(before + out.to(before)) - norm(before)).float()
    return out * block.attn_write.scale


def _added(site: Site, cache: Cache, moved: Float[Tensor, "n pos d_in"]) -> Edit:
    """An edit that adds to a site what an SAE of it would: heads side by side, or one head's."""
    shape = cache[site].shape
    vector = moved.reshape(shape) if site.head is None else moved.reshape(shape)[:, :, None]
    return Edit.add(site, vector)


def _resume(site: Site) -> str:
    """What a replay of edits at a site starts from."""
    return f"resid_pre.{site.layer}"


def _mask(pairs: Pairs, name: str) -> Float[Tensor, "n pos 1"]:
    """1 where a named position is."""
    mask = torch.ones(len(pairs), pairs.length, 1)
    if name != EVERYWHERE:
        mask.zero_()
        mask[torch.arange(len(pairs)), pairs.position(name)] = 1.0
    return mask


def _position_names(pairs: Pairs, names: Sequence[str]) -> list[str]:
    """The names, checked."""
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise BadInput(f"no positions were given: name some of {', '.join(pairs.positions)}")
    known = [*pairs.positions, EVERYWHERE]
    for name in names:
        if name not in known:
            raise unknown(f"position of task '{pairs.name}'", name, known)
    return names


def _last(run: Run) -> Float[Tensor, "n d_vocab"]:
    """Logits of the last position."""
    assert run.logits is not None
    return run.logits[:, -1].float()


def _mean(effect: Float[Tensor, " n"]) -> tuple[float, float]:
    """Mean over prompts, and its standard error (NaN of one)."""
    deviation = float(effect.std()) if len(effect) > 1 else float("nan")
    return float(effect.mean()), deviation / len(effect) ** 0.5
