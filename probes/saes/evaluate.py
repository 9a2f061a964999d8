"""What an SAE reconstructs, what the model loses by it, and what a control reaches that knows nothing.

A number is shown beside the ones that make it mean something: zero- and mean-ablation for the loss,
an SAE with shuffled weights for reconstruction and probing, single coordinates for probing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.data.activations import Activations, origins, window_batches
from interp.errors import BadInput
from interp.metrics import token_loss
from interp.models.model import Model
from interp.report import Report, provenance
from interp.run.cache import Run
from interp.run.edits import Edit
from interp.run.progress import Progress
from interp.run.store import ActivationStore, Rows
from probes.saes.model import SAE
from probes.saes.sparse import Codes, latent_sums
from probes.saes.splice import lead_spared, splice

DENSE = 0.1
"""A latent that is active in more than this share of rows is called dense."""

HISTOGRAM = (-6.0, 0.0, 24)
"""log10 of density: from, to, bins."""

ROWS = 4096
PROBING = ["task", "representation", "latents", "auc", "positive"]


@torch.no_grad()
def reconstruction(sae: SAE, rows: Rows) -> tuple[dict[str, float], np.ndarray]:
    """How well and how sparsely an SAE reconstructs rows, and how often each latent is active.

        FVU = Σ‖x − x̂‖² / Σ‖x − mean x‖²,   explained variance = 1 − FVU

    Low FVU does not say that latents are meaningful, nor that the model uses what they hold.

    Returns: numbers by name, and the density [d_sae], the share of rows in which a latent is active.
        rows; l0 (active latents a row); fvu; explained_variance; cosine (mean, of x and x̂); norm_ratio
        (mean ‖x̂‖ / mean ‖x‖); dead (share of latents active in no row); dense (share active in more
        than a tenth of them).

    Raises:
        BadInput: the rows have another width than the SAE reads.

    >>> from interp.run.store import MemoryRows
    >>> from probes.saes.model import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=8, d_sae=8, k=8))
    >>> numbers, density = reconstruction(sae, MemoryRows(torch.eye(8)))
    >>> numbers["rows"], density.shape
    (8, (8,))
    """
    if rows.width != sae.config.d_in:
        raise BadInput(f"rows have width {rows.width}, this SAE reads {sae.config.d_in}")
    fired = torch.zeros(sae.config.d_sae, dtype=torch.long)
    total = torch.zeros(rows.width, dtype=torch.double)
    squares = error = cosine = norm_x = norm_made = 0.0
    for x in _chunks(rows):
        codes = sae.codes(x.to(sae.encoder.device))
        made = sae.decode(codes).cpu()
        fired += codes.fired().cpu()
        total += x.double().sum(0)
        squares += float(x.double().square().sum())
        error += float((x - made).double().square().sum())
        cosine += float(torch.cosine_similarity(x, made).sum())
        norm_x += float(x.norm(dim=1).sum())
        norm_made += float(made.norm(dim=1).sum())
    n = rows.n_rows
    variance = squares - float(total.square().sum()) / n
    fvu = error / max(variance, 1e-30)
    density = fired.double() / n
    return {
        "rows": n,
        "l0": float(fired.sum()) / n,
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "cosine": cosine / n,
        "norm_ratio": norm_made / max(norm_x, 1e-30),
        "dead": float((fired == 0).double().mean()),
        "dense": float((density > DENSE).double().mean()),
    }, density.numpy()


def density_histogram(density: np.ndarray) -> pd.DataFrame:
    """How many latents have which density: log10 bins from one row in a million to every row.

    Returns: columns from, to (log10 of the share of rows) and latents; the first row, with from −∞,
        counts the latents that were never active.
    """
    low, high, bins = HISTOGRAM
    edges = np.linspace(low, high, bins + 1)
    alive = density[density > 0]
    counts, _ = np.histogram(np.log10(np.maximum(alive, 10**low)), edges)
    table = pd.DataFrame({"from": edges[:-1], "to": edges[1:], "latents": counts})
    never = pd.DataFrame({"from": [-np.inf], "to": [-np.inf], "latents": [(density == 0).sum()]})
    return pd.concat([never, table], ignore_index=True)


@torch.no_grad()
def loss_recovered(
    model: Model,
    sae: SAE,
    store: ActivationStore,
    *,
    windows: int = 64,
    progress: bool | None = None,
) -> pd.DataFrame:
    """The model's loss with the SAE spliced in, beside no change, zero-ablation and mean-ablation.

        recovered = (L_ablated − L_spliced) / (L_ablated − L_clean)

    Where ablation costs little, a few points of this fraction are noise: look at the losses. The
    mean is the activation's over the store's rows. Lead tokens are left as they are, as none of
    their activations is in a store.

    Args:
        store: held-out activations; its windows are run, the longest `windows` of them.

    Returns: one row for each of "clean", "sae", "zero", "mean": loss (nats a token), increase over
        clean (nats), recovered_vs_zero, recovered_vs_mean (of "sae"; NaN elsewhere), tokens.

    Raises:
        BadInput: the SAE, the model and the store do not belong together.
    """
    site = sae.site(model)
    check_store(sae, store)
    lead, shape = int(store.key["lead"]), store.key["heads"]
    mean = torch.zeros(store.width, dtype=torch.double)
    for x in _chunks(store):
        mean += x.double().sum(0) / store.n_rows
    mean_value = mean.float().reshape(shape, -1) if shape else mean.float()
    sums = dict.fromkeys(("clean", "sae", "zero", "mean"), 0.0)
    n = 0
    batches = list(window_batches(store, windows, tokens_per_forward=1024))
    with Progress(progress) as bars:
        advance = bars.stage("Loss with the SAE spliced in", len(batches))
        for batch in batches:
            where = lead_spared(batch.mask, lead, batch.ids.shape)
            # A logit of a real position behind the lead, with a real token to predict.
            judged = where[:, :-1] & where[:, 1:]
            targets = batch.ids[:, 1:]

            def total(run: Run, judged: Tensor = judged, targets: Tensor = targets) -> float:
                assert run.logits is not None
                losses = token_loss(run.logits[:, :-1], targets)
                return float(losses.cpu()[judged.cpu()].double().sum())

            variants = [
                [splice(sae, model, positions=where)],
                [Edit.zero(site, positions=where)],
                [Edit.mean(site, positions=where, mean={site.layer or 0: mean_value})],
            ]
            run = model.run(batch, capture=[f"resid_pre.{site.layer}"])
            found = [total(run), *model.replay(run, variants, total, tokens_per_forward=1024)]
            for name, value in zip(sums, found, strict=True):
                sums[name] += value
            n += int(judged.sum())
            advance(1)
    if not n:
        raise BadInput("no window has two tokens behind its lead: there is no loss to compare")
    table = pd.DataFrame({"condition": list(sums), "loss": [total / n for total in sums.values()]})
    loss = {name: total / n for name, total in sums.items()}
    table["increase"] = table["loss"] - loss["clean"]
    for name in ("zero", "mean"):
        gap = loss[name] - loss["clean"]
        fraction = (loss[name] - loss["sae"]) / gap if gap else np.nan
        table[f"recovered_vs_{name}"] = [np.nan, fraction, np.nan, np.nan]
    return table.assign(tokens=n)


def shuffled(sae: SAE, *, seed: int = 0) -> SAE:
    """A control: every latent's weights in an order of their own, the same in encoder and decoder.

    Norms, biases, sparsity and the fit of encoder to decoder stay; what the directions have to do
    with the data does not.
    """
    control = SAE(sae.config)
    control.load_state_dict(sae.state_dict())
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(sae.W_dec.shape, generator=generator).argsort(1).to(sae.W_dec.device)
    with torch.no_grad():
        control.W_dec.copy_(sae.W_dec.gather(1, order))
        control.encoder.copy_(sae.encoder.gather(1, order))
    return control.eval()


@torch.no_grad()
def sparse_probing(
    sae: SAE,
    train: ActivationStore,
    held_out: ActivationStore,
    *,
    tasks: int = 16,
    latents: tuple[int, ...] = (1, 8),
    rows: int = 8192,
    seed: int = 0,
) -> pd.DataFrame:
    """How well one latent, or a few, tell which token is or was there; beside controls.

    A task is one frequent token as the current or as the previous one. The latents whose mean
    differs most, in standard deviations, are chosen on training rows and weighted by least squares;
    the AUC is measured on held-out documents. Controls: coordinates of the activation itself, and
    the same SAE with shuffled weights.

    Which token it is can be read off many sites; a high AUC says that single latents are aligned
    with it, no more.

    Returns: one row a (task, representation, number of latents): auc from 0.5 (nothing) to 1, and
        the share of rows that are positive. No rows where no token stands ten times on both sides.
    """
    found = []
    parts = {
        name: _labelled(store, rows, seed) for name, store in (("train", train), ("test", held_out))
    }
    names, labels = _tasks(parts, tasks)
    if not names:
        return pd.DataFrame(columns=PROBING)
    representations = {
        "sae": sae.codes,
        "activation": lambda x: Codes.of_dense(x),
        "shuffled sae": shuffled(sae, seed=seed).codes,
    }
    for representation, encode in representations.items():
        codes = {part: encode(x) for part, (x, _) in parts.items()}
        dense_means = _differences(codes["train"], labels["train"])
        for task, (relation, token) in enumerate(names):
            order = dense_means[:, task].abs().argsort(descending=True)
            for n in latents:
                columns = {part: _columns(code, order[:n]) for part, code in codes.items()}
                y = labels["train"][:, task].float()
                solution = torch.linalg.lstsq(_with_one(columns["train"]), y[:, None]).solution
                score = (_with_one(columns["test"]) @ solution)[:, 0]
                found.append(
                    {
                        "task": f"{relation} token {token}",
                        "representation": representation,
                        "latents": n,
                        "auc": auc(score, labels["test"][:, task]),
                        "positive": float(labels["test"][:, task].float().mean()),
                    }
                )
    return pd.DataFrame(found, columns=PROBING)


def auc(score: Float[Tensor, " rows"], label: Bool[Tensor, " rows"]) -> float:
    """Chance that a positive row scores above a negative one; ties count half.

    >>> auc(torch.tensor([0.1, 0.9, 0.9, 0.3]), torch.tensor([False, True, False, False]))
    0.8333333333333334
    """
    _, inverse, counts = score.unique(return_inverse=True, return_counts=True)
    below = counts.cumsum(0) - counts
    rank = below.double() + (counts.double() + 1) / 2
    positive, negative = int(label.sum()), int((~label).sum())
    if not positive or not negative:
        return float("nan")
    total = float(rank[inverse][label].sum())
    return (total - positive * (positive + 1) / 2) / (positive * negative)


def evaluate_sae(
    model: Model,
    sae: SAE,
    data: Activations,
    *,
    windows: int = 64,
    tasks: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """Everything an SAE is judged by, on held-out documents, each number beside its controls.

    Args:
        data: what `collect_activations` returned for this model and site.
        windows: how many windows the loss is measured on.
        tasks: how many tokens are probed for.
        seed: of the shuffled control and of the rows that are probed.
        progress: show a progress bar.

    Returns: a Report with table "sae_eval" (`reconstruction`, of the SAE and of its shuffled
        control), "loss" (`loss_recovered`, nats), "probing" (`sparse_probing`, AUC), "histogram"
        (`density_histogram`), and array "density" [d_sae].

    Raises:
        BadInput: SAE, model and activations do not belong together.
    """
    started = time.perf_counter()
    site = sae.site(model)
    for store in (data.train, data.held_out):
        check_store(sae, store)
    numbers, density = reconstruction(sae, data.held_out)
    control, _ = reconstruction(shuffled(sae, seed=seed), data.held_out)
    table = pd.DataFrame([{"of": "sae", **numbers}, {"of": "shuffled weights", **control}])
    loss = loss_recovered(model, sae, data.held_out, windows=windows, progress=progress)
    probing = sparse_probing(sae, data.train, data.held_out, tasks=tasks, seed=seed)
    options = {"windows": windows, "tasks": tasks, "site": str(site)}
    meta: dict[str, Any] = provenance(model, options=options, seed=seed)
    meta["sae"] = asdict(sae.config)
    meta["text"] = data.held_out.key["text"]
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    tables = {
        "sae_eval": table,
        "loss": loss,
        "probing": probing,
        "histogram": density_histogram(density).replace(-np.inf, -99.0),
    }
    return Report("sae_eval", tables, {"density": density}, meta)


# --- parts -----------------------------------------------------------------------------------------


def _chunks(rows: Rows) -> Iterator[Tensor]:
    """All rows in order, some at a time."""
    for start in range(0, rows.n_rows, ROWS):
        yield rows.rows(torch.arange(start, min(start + ROWS, rows.n_rows)))


def check_store(sae: SAE, store: ActivationStore) -> None:
    c = sae.config
    for name, mine, theirs in (
        ("width", c.d_in, store.width),
        ("site", c.site, store.key["site"]),
        ("weights", c.sha256, store.key["model"]["sha256"]),
    ):
        if mine != theirs and mine != "":
            raise BadInput(
                f"this SAE has {name} {mine}, the activations in {store.folder} have {theirs}: collect "
                "activations of its own site and model"
            )


def _labelled(store: ActivationStore, rows: int, seed: int) -> tuple[Tensor, pd.DataFrame]:
    """Some rows and, of each, the current and the previous token."""
    generator = torch.Generator().manual_seed(seed)
    where = torch.randperm(store.n_rows, generator=generator)[:rows].sort().values
    table = origins(store, where)
    window = torch.tensor(table["window"].tolist())
    before = torch.tensor((table["position"] - 1).clip(lower=0).tolist())
    previous = store.extras["ids"][window, before]
    return store.rows(where), table.assign(previous=previous.numpy())


def _tasks(
    parts: dict[str, tuple[Tensor, pd.DataFrame]], tasks: int
) -> tuple[list[tuple[str, int]], dict[str, Tensor]]:
    """The most frequent tokens as current and as previous, that both parts have ten times or more."""
    names: list[tuple[str, int]] = []
    for relation, column in (("current", "token_id"), ("previous", "previous")):
        counts = [Counter(table[column].tolist()) for _, table in parts.values()]
        both = [t for t, n in counts[0].most_common() if n >= 10 and counts[1][t] >= 10]
        names += [(relation, token) for token in both[: tasks // 2]]
    if not names:
        return [], {}
    columns = {"current": "token_id", "previous": "previous"}
    labels = {
        part: torch.stack(
            [torch.tensor((table[columns[r]] == t).to_numpy()) for r, t in names]
            or [torch.empty(0)],
            dim=-1,
        )
        for part, (_, table) in parts.items()
    }
    return names, labels


def _differences(codes: Codes, labels: Tensor) -> Float[Tensor, "d_sae tasks"]:
    """Mean of each latent over positive rows minus over the others, in its standard deviations."""
    n = codes.n_rows
    y = labels.float()
    one = torch.ones(n, 1)
    sums = latent_sums(codes, torch.cat([y, one], dim=1))
    squares = latent_sums(codes.with_value(codes.value.square()), one)[:, 0]
    spread = (squares / n - (sums[:, -1] / n).square()).clamp_min(1e-12).sqrt()
    positive = y.sum(0)
    inside = sums[:, :-1] / positive
    outside = (sums[:, -1:] - sums[:, :-1]) / (n - positive)
    # A latent active in a row or two has no spread to speak of: chosen, it would be noise.
    seen = torch.bincount(codes.latent, minlength=codes.d_sae) >= 5
    return ((inside - outside) / spread[:, None]) * seen[:, None]


def _columns(codes: Codes, latents: Tensor) -> Float[Tensor, "rows n"]:
    """A few latents of all rows, zeros included."""
    place = torch.full((codes.d_sae,), -1)
    place[latents] = torch.arange(len(latents))
    keep = place[codes.latent] >= 0
    out = torch.zeros(codes.n_rows, len(latents))
    out[codes.row[keep], place[codes.latent[keep]]] = codes.value[keep]
    return out


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1)], dim=1)
