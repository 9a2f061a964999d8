"""Does one token know the whole map? Every connection of a maze is decoded from the last token, layer by layer.

Mazes are spanning trees of a small lattice, written as a list of connected pairs in random order. The last
token is the same in all of them; what its residual stream holds of the maze was carried there.
"""

from __future__ import annotations

import string
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from interp.errors import BadInput
from interp.models.model import Model
from interp.registry import analysis, intervals
from interp.report import Report, provenance
from interp.resampling import INTERVAL, draw_counts
from interp.run.batch import Batch
from interp.run.progress import Progress
from interp.sites import Site
from probes.controls import random_weights

TOKENS_PER_FORWARD = 1024
STRENGTHS = np.logspace(-4, 3, 15)
"""Ridge penalties tried, in units of the mean eigenvalue of the training kernel."""

RESAMPLES = 500
NAMES = string.ascii_uppercase
FEWEST = 40


class Lattice(NamedTuple):
    """A rectangle of cells, named A, B, C, … row by row."""

    rows: int
    cols: int

    @property
    def edges(self) -> list[tuple[int, int]]:
        """Every pair of neighbours: those that a maze connects or does not."""
        cells = np.arange(self.rows * self.cols).reshape(self.rows, self.cols)
        across = zip(cells[:, :-1].ravel(), cells[:, 1:].ravel(), strict=True)
        down = zip(cells[:-1].ravel(), cells[1:].ravel(), strict=True)
        return sorted((int(a), int(b)) for a, b in [*across, *down])

    @property
    def trees(self) -> int:
        """How many mazes there are: any cofactor of the Laplacian (Kirchhoff).

        >>> Lattice(2, 2).trees, Lattice(3, 3).trees
        (4, 192)
        """
        laplacian = np.zeros((self.rows * self.cols,) * 2)
        for a, b in self.edges:
            laplacian[[a, b], [b, a]] -= 1
            laplacian[[a, b], [a, b]] += 1
        return round(float(np.linalg.det(laplacian[1:, 1:])))


def mazes(lattice: Lattice, n: int, seed: int) -> Bool[np.ndarray, "n edges"]:
    """Which edges each of n different mazes connects; a maze has one path between any two cells.

    >>> drawn = mazes(Lattice(2, 3), 10, seed=0)
    >>> drawn.shape, set(drawn.sum(1).tolist()), len(np.unique(drawn, axis=0))
    ((10, 7), {5}, 10)
    """
    rng, edges = np.random.default_rng(seed), lattice.edges
    found: dict[bytes, np.ndarray] = {}
    while len(found) < n:
        drawn = np.zeros(len(edges), dtype=bool)
        part = np.arange(lattice.rows * lattice.cols)
        for e in rng.permutation(len(edges)):
            a, b = part[list(edges[e])]
            if a != b:
                drawn[e] = True
                part[part == b] = a
        found.setdefault(drawn.tobytes(), drawn)
    return np.stack(list(found.values()))


def named(
    lattice: Lattice, drawn: Bool[np.ndarray, "n edges"], *, walls: bool = False
) -> Float[np.ndarray, "n cells"]:
    """How often each maze's list names each cell: what the list says if its order is lost."""
    ends = np.zeros((len(lattice.edges), lattice.rows * lattice.cols))
    for e, edge in enumerate(lattice.edges):
        ends[e, list(edge)] = 1
    return (drawn | walls) @ ends


def maze_batch(
    model: Model,
    lattice: Lattice,
    drawn: Bool[np.ndarray, "n edges"],
    seed: int,
    *,
    walls: bool = False,
) -> Batch:
    """The mazes as prompts: "A to B, E to D, … F to C.", pairs in random order and either way round.

    With walls, pairs that are not connected are listed as well ("A not B"): then every list names the
    same cells. For a model without a tokenizer a cell is a token id from 2 on; 1 follows a connected pair,
    the id after the cells' a wall, and 0 ends the prompt.
    """
    rng = np.random.default_rng(seed)
    lists: list[list[tuple[int, int, bool]]] = []
    for row in drawn:
        listed = rng.permutation(len(row) if walls else np.flatnonzero(row))
        pairs = [(lattice.edges[e][:: rng.choice([1, -1])], bool(row[e])) for e in listed]
        lists.append([(a, b, there) for (a, b), there in pairs])
    if model.tokenizer is not None:
        link = {True: "to", False: "not"}
        batch = model.tokenize(
            [
                ", ".join(f"{NAMES[a]} {link[c]} {NAMES[b]}" for a, b, c in row) + "."
                for row in lists
            ]
        )
    else:
        mark = {True: 1, False: lattice.rows * lattice.cols + 2}
        ids = [[i for a, b, c in row for i in (a + 2, b + 2, mark[c])] for row in lists]
        batch = Batch.of_ids(torch.tensor([[*row, 0] for row in ids]))
    n_ctx = model.spec.n_ctx
    if n_ctx is not None and batch.ids.shape[1] > n_ctx:
        raise BadInput(
            f"a maze of {lattice.rows} × {lattice.cols} cells is {batch.ids.shape[1]} tokens, {model.id} "
            f"reads at most {n_ctx} (n_ctx): give fewer rows or cols, or leave out the walls"
        )
    return model.as_batch(batch)


@torch.no_grad()
def last_residuals(
    model: Model, batch: Batch, *, advance: Callable[[int], None] = lambda prompts: None
) -> dict[str, Float[np.ndarray, "n d_model"]]:
    """The residual stream at each prompt's last token: before the first block, then after every block.

    >>> found = last_residuals(tiny_model(), Batch.of_ids(torch.tensor([[5, 6], [7, 8]])))
    >>> {site: x.shape for site, x in found.items()}
    {'resid_pre.0': (2, 32), 'resid_post.0': (2, 32), 'resid_post.1': (2, 32)}
    """
    sites = [Site("resid_pre", 0), *(Site("resid_post", n) for n in range(model.n_layers))]
    rows = max(1, TOKENS_PER_FORWARD // batch.ids.shape[1])
    found: dict[str, list[np.ndarray]] = {str(site): [] for site in sites}
    for start in range(0, batch.size, rows):
        part = batch.rows(slice(start, start + rows))
        run = model.run(part, capture=sites, logits=False)
        length = part.ids.shape[1]
        last = torch.full((part.size,), length - 1)
        if part.mask is not None:
            last = length - 1 - part.mask.cpu().int().flip(-1).argmax(-1)
        for site in sites:
            x = run.cache[site]
            read = x[torch.arange(part.size, device=x.device), last.to(x.device)]
            found[str(site)].append(read.float().cpu().numpy())
        advance(part.size)
    return {site: np.concatenate(parts) for site, parts in found.items()}


class Decoded(NamedTuple):
    """What a joint probe says of the held-out items, and how well it did on the others.

    `scores`: above 0 is a connection. `left_out`: of the training items' variance, the share that is not
    explained when each is left out in turn; `strength`: the penalty that made it least.
    """

    scores: Float[np.ndarray, "labellings held_out edges"]
    left_out: Float[np.ndarray, " labellings"]
    strength: Float[np.ndarray, " labellings"]


def joint_ridge(
    x: Float[np.ndarray, "items width"],
    targets: Float[np.ndarray, "labellings items edges"],
    train: Bool[np.ndarray, " items"],
) -> Decoded:
    """Ridge probes of all edges and labellings from one decomposition of the training kernel.

    min Σ_train |y − b − βᵀx̃|² + α|β|², with x̃ standardised on the training items and one α for all edges of a
    labelling. K = X̃X̃ᵀ = UΛUᵀ gives every α: the fit is ȳ + UΛ(Λ + α)⁻¹Uᵀy, and the residual with an
    item left out is its residual over 1 − H_ii, so α is chosen without another fit.

    Args:
        targets: ±1. Constant features are ignored.

    >>> rng = np.random.default_rng(0)
    >>> y = rng.choice([-1.0, 1.0], size=(1, 60, 3))
    >>> x = y[0] @ rng.normal(size=(3, 20)) + 0.1 * rng.normal(size=(60, 20))
    >>> found = joint_ridge(x, y, np.arange(60) < 40)
    >>> bool(((found.scores > 0) == (y[:, 40:] > 0)).all()), bool(found.left_out[0] < 0.1)
    (True, True)
    """
    x = x.astype(np.float64)
    mean, scale = x[train].mean(0), x[train].std(0)
    # What differs by float rounding alone is constant: dividing by it would make noise a feature.
    varies = scale > 1e-6 * np.abs(x[train]).max(0, initial=0.0)
    standard = (x - mean)[:, varies] / scale[varies]
    kernel = standard @ standard[train].T
    values, U = np.linalg.eigh(kernel[train])
    values = values.clip(0)
    unit = values.mean() or 1.0
    y = targets[:, train]
    center = y.mean(1, keepdims=True)
    rotated = U.T @ (y - center)
    n = int(train.sum())
    errors = []
    for strength in STRENGTHS:
        shrunk = values / (values + strength * unit)
        leverage = 1 / n + (U**2) @ shrunk
        residual = (y - center - U @ (shrunk[:, None] * rotated)) / (1 - leverage)[:, None]
        errors.append((residual**2).sum((1, 2)))
    best = np.argmin(errors, axis=0)
    penalty = STRENGTHS[best][:, None] * unit
    weights = U @ (rotated / (values + penalty)[..., None])
    total = ((y - center) ** 2).sum((1, 2))
    return Decoded(kernel[~train] @ weights + center, np.min(errors, 0) / total, STRENGTHS[best])


def area_under_curve(
    scores: Float[np.ndarray, "items edges"],
    connected: Bool[np.ndarray, "items edges"],
    weights: Float[np.ndarray, "draws items"],
) -> Float[np.ndarray, " draws"]:
    """Mean over edges of P(a maze with the edge scores above one without it), ties counting half.

    Edges that all items have, or none, are left out of a draw; where that is all of them it is NaN.

    >>> y = np.array([[True], [False], [True]])
    >>> area_under_curve(np.array([[2.0], [1.0], [0.0]]), y, np.ones((1, 3)))
    array([0.5])
    """
    total, count = np.zeros(len(weights)), np.zeros(len(weights))
    for score, has in zip(scores.T, connected.T, strict=True):
        above, below = score[has, None], score[None, ~has]
        wins = (above > below) + 0.5 * (above == below)
        with_it, without = weights[:, has], weights[:, ~has]
        pairs = with_it.sum(1) * without.sum(1)
        sums = ((with_it @ wins) * without).sum(1)
        total += np.divide(sums, pairs, out=np.zeros(len(pairs)), where=pairs > 0)
        count += pairs > 0
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def check_options(
    *, rows: int = 3, cols: int = 4, n: int = 400, held_out: float = 0.3, **_: Any
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if rows < 2 or cols < 2 or rows * cols > len(NAMES):
        raise BadInput(
            f"rows={rows}, cols={cols}: wanted 2 or more of each and at most {len(NAMES)} cells, one letter a cell"
        )
    if n < FEWEST:
        raise BadInput(f"n={n}: give at least {FEWEST} mazes")
    if n > (trees := Lattice(rows, cols).trees):
        raise BadInput(
            f"n={n}: a lattice of {rows} × {cols} has {trees} different mazes, and none is drawn twice; "
            "give more rows or cols"
        )
    if not 0.1 <= held_out <= 0.9:
        raise BadInput(f"held_out={held_out}: wanted a share of the mazes from 0.1 to 0.9")


def summary(report: Report) -> pd.DataFrame:
    """Every site beside its controls."""
    table = report.table
    columns = ["site", "auc", "random_auc", "counted_auc", "shuffled_auc", "gain"]
    shown = pd.DataFrame(table, columns=columns)
    shown.columns = [name.removesuffix("_auc") for name in shown.columns]
    shown["95 %"] = intervals(table, "gain")
    return shown


@analysis(
    name="probe_structure",
    source="Ivanitskiy et al. 2023, Structured World Representations in Maze-Solving Transformers, arXiv 2312.02566",
    example="interp probe-structure smollm2-135m",
    figure="layers",
    validate=check_options,
    summary=summary,
    takes="text",
)
def probe_structure(
    model: Model,
    *,
    rows: int = 3,
    cols: int = 4,
    n: int = 400,
    held_out: float = 0.3,
    walls: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """How well every connection of a maze is decoded from its last token's residual stream, by layer.

    One ridge probe a site reads all edges at once; mazes are all different, some are held out, and the
    last token is the same in every prompt, so that before the first block nothing is to be found (AUC 0.5).
    We differ from the source in taking language models as they are, not trained on mazes, and in reading
    the list's end rather than a path's start.

    What is decoded need not be used. Much of a maze follows from how often each cell is named
    (`counted_auc`), which attention spread evenly carries to the last token: a model with random weights does.
    Only what is beyond both is a map that training taught.

    Args:
        rows, cols: of the lattice; 3 × 4 has 17 edges, of which a maze connects 11.
        n: mazes. held_out: the share of them that the probe is judged on.
        walls: list pairs that are not connected as well, as walls, so that counting how often a cell is
            named tells nothing; without (as published) it tells nearly all, and `counted_auc` how much.
        seed: of the mazes, the order of their pairs, the split, the draws and the random weights.
        progress: show a progress bar; by default in a terminal or a notebook.

    Returns: a Report. Table "probe_structure", one row a site: auc (mean over edges, on held-out mazes; 0.5
        is chance) and accuracy (share of edges), both with a 95 % interval from a bootstrap over held-out
        mazes; shuffled_auc and shuffled_accuracy (fitted on labels permuted between mazes); random_auc and
        random_accuracy (the same site of random weights); counted_auc and counted_accuracy (fitted on how
        often each cell is named, no model); majority_accuracy (each edge's commoner state); gain of auc over
        the better of random_auc and counted_auc, with gain_low and gain_high; left_out (share of variance
        not explained in training mazes left out in turn), random_left_out; chosen: the site with the
        least left_out, which is chosen without the held-out mazes. Table "edges": every edge at the
        chosen site. Array "scores": held-out mazes at that site; "connected": what is true of them.

    Raises:
        BadInput: more mazes than there are; a lattice too large for letters or for n_ctx. Refused:
            weights that cannot be drawn anew.

    >>> report = probe_structure(tiny_model(), rows=3, cols=3, n=60, progress=False)
    >>> report.table["site"].tolist(), float(report.table["auc"][0])
    (['resid_pre.0', 'resid_post.0', 'resid_post.1'], 0.5)
    """
    started = time.perf_counter()
    check_options(rows=rows, cols=cols, n=n, held_out=held_out)
    lattice = Lattice(rows, cols)
    d_vocab = model.spec.d_vocab
    if model.tokenizer is None and d_vocab is not None and d_vocab < rows * cols + 3:
        raise BadInput(
            f"{model.id} has {d_vocab} token ids and no tokenizer; a maze of {rows * cols} cells needs "
            f"{rows * cols + 3}: give fewer rows or cols"
        )
    connected = mazes(lattice, n, seed)
    batch = maze_batch(model, lattice, connected, seed, walls=walls)
    rng = np.random.default_rng(seed)
    train = rng.permutation(n) >= round(held_out * n)
    shuffled = connected.copy()
    shuffled[train] = connected[train][rng.permutation(int(train.sum()))]
    targets = np.where(np.stack([connected, shuffled]), 1.0, -1.0)
    blank_model = random_weights(model, seed)
    with Progress(progress) as bars:
        trained = last_residuals(model, batch, advance=bars.stage("Reading mazes", n))
        blank = last_residuals(
            blank_model, batch, advance=bars.stage("Reading with random weights", n)
        )
        advance = bars.stage("Probing", len(trained))
        true = connected[~train]
        draws = draw_counts(len(true), RESAMPLES, seed)
        majority = connected[train].mean(0) > 0.5
        counted = joint_ridge(named(lattice, connected, walls=walls), targets[:1], train)
        most_are_right = {"majority_accuracy": float((majority == true).mean())}
        records, scores = [], []
        for site in trained:
            found = joint_ridge(trained[site], targets, train)
            random = joint_ridge(blank[site], targets[:1], train)
            records.append(_record(site, found, random, counted, true, draws) | most_are_right)
            scores.append(found.scores[0])
            advance(1)
    table = pd.DataFrame(records)
    best = int(table["left_out"].to_numpy().argmin())
    table["chosen"] = np.arange(len(table)) == best
    everything = np.ones((1, len(true)))
    edges = pd.DataFrame(
        {
            "edge": [f"{NAMES[a]}–{NAMES[b]}" for a, b in lattice.edges],
            "connected": true.mean(0),
            "auc": [
                float(area_under_curve(scores[best][:, [e]], true[:, [e]], everything)[0])
                for e in range(true.shape[1])
            ],
            "accuracy": ((scores[best] > 0) == true).mean(0),
            "majority_accuracy": (majority == true).mean(0),
        }
    )
    options = {"rows": rows, "cols": cols, "n": n, "held_out": held_out, "walls": walls}
    meta = provenance(model, options=options, seed=seed) | {
        "chosen_site": records[best]["site"],
        "mazes": {"trained_on": int(train.sum()), "judged_on": len(true)},
        "prompt_tokens": int(batch.ids.shape[1]),
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    arrays = {"scores": scores[best].astype(np.float32), "connected": true}
    return Report("probe_structure", {"probe_structure": table, "edges": edges}, arrays, meta)


def _record(
    site: str,
    found: Decoded,
    random: Decoded,
    counted: Decoded,
    true: Bool[np.ndarray, "held_out edges"],
    draws: Int[np.ndarray, "draws held_out"],
) -> dict[str, Any]:
    """One site's row: the probe, its controls, and what it gains over the better of two of them."""
    weights = np.concatenate([np.ones((1, len(true))), draws])  # all once, then the resamples
    auc, by_random, by_counted, shuffled = (
        area_under_curve(scores, true, weights)
        for scores in (found.scores[0], random.scores[0], counted.scores[0], found.scores[1])
    )
    right = ((found.scores > 0) == true).mean(-1)
    accuracy = weights @ right[0] / len(true)
    gain = auc - (by_random if by_random[0] > by_counted[0] else by_counted)
    record: dict[str, Any] = {"site": site, "layer": int(site.split(".")[1])}
    for name, values in (("auc", auc), ("accuracy", accuracy), ("gain", gain)):
        low, high = np.nanquantile(values[1:], INTERVAL)
        record |= {name: float(values[0]), f"{name}_low": low, f"{name}_high": high}
    return record | {
        "shuffled_auc": float(shuffled[0]),
        "shuffled_accuracy": float(right[1].mean()),
        "random_auc": float(by_random[0]),
        "random_accuracy": float(((random.scores[0] > 0) == true).mean()),
        "counted_auc": float(by_counted[0]),
        "counted_accuracy": float(((counted.scores[0] > 0) == true).mean()),
        "left_out": float(found.left_out[0]),
        "random_left_out": float(random.left_out[0]),
    }
