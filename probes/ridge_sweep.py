"""Ridge probes of many sites, labels, folds and strengths at once, exactly as scikit-learn fits them one by one.

A probe of one training set T, with features standardised on T and class weights w_i = n / (K n_k),
minimises Σ_T w_i (y_i − b − x_i·β)² + α ‖β‖². Two forms of its solution are used, whichever is smaller:

- width < items: moments M = Σ x̃ x̃ᵀ of x̃ = (1, x) are summed once a site, by fold and class. Any training
  set, any class weights and any standardisation are sums and rescalings of these, so that a fold is
  *down-dated* rather than computed again, and one Cholesky of [width + 1] gives the probe.
- items ≤ width: with A = X Xᵀ + α W⁻¹ and P = A⁻¹ − A⁻¹11ᵀA⁻¹ / 1ᵀA⁻¹1, the probe is a = P y, β = Xᵀa.
  Leaving out a block g of T changes its residuals to (P_gg)⁻¹ (P y)_g: no second decomposition.

The strength α is chosen inside T: the one with the smallest weighted squared error when each of the other
folds is left out of T in turn (T's standardisation and class weights are kept while it is). A control is
the same probe on other labels, so it gets the α of the labels that it is a control of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import BadInput

ALPHAS = (10.0, 300.0, 10_000.0)
"""Strengths tried, for standardised features and weights of mean 1: of some hundred items, from near
least squares to near the difference of means."""

NO_INNER_FOLDS = (
    "outside of a fold there is one fold only, of which none can be left out to choose the penalty's "
    "strength; give folds=3 or more, or one strength, such as alphas=[300.0]"
)

BYTES = 1 << 25
"""Memory of one chunk of sites in the moment form."""


@dataclass(frozen=True)
class RidgeSweep:
    """Out-of-fold scores of every probe, and the probes fitted on all items.

    Attributes:
        scores: b + x·β of the probe that was fitted without the item's fold; above 0 (or the largest,
            where there are more than two classes) is the prediction. Two classes have one output.
        alpha: the strength that every fold's training set chose, or was given.
        directions, intercepts: of the first labelling's probe fitted on all items, in the features' own
            units: score = intercept + x·direction. Zeros where `refit` is False.
    """

    scores: Float[np.ndarray, "sites labellings items outputs"]
    alpha: Float[np.ndarray, "sites folds"]
    directions: Float[np.ndarray, "sites outputs width"]
    intercepts: Float[np.ndarray, "sites outputs"]

    @property
    def predicted(self) -> Int[np.ndarray, "sites labellings items"]:
        """The predicted class of every item."""
        return predicted_class(self.scores)


def predicted_class(scores: Float[np.ndarray, "... outputs"]) -> Int[np.ndarray, "..."]:
    """The class that scores speak for: the sign of one, or the largest of several."""
    if scores.shape[-1] == 1:
        return (scores[..., 0] > 0).astype(np.int64)
    return scores.argmax(-1)


def ridge_sweep(
    features: Float[np.ndarray | Tensor, "sites items width"],
    labels: Int[np.ndarray, "labellings items"],
    folds: Int[np.ndarray, " items"],
    *,
    alphas: Sequence[float] = ALPHAS,
    given: Float[np.ndarray, "sites folds"] | None = None,
    refit: bool = False,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda sites: None,
) -> RidgeSweep:
    """Cross-validated class-balanced ridge classifiers of every site and labelling.

    Equal, for every site, labelling and fold, to scikit-learn's
    `make_pipeline(StandardScaler(), RidgeClassifier(alpha, class_weight="balanced"))` fitted on the
    other folds, in float64.

    Args:
        features: of every site and item.
        labels: class numbers from 0, of the true labelling first; further ones (shuffled, …) share what
            does not depend on labels, and α. All have the same classes.
        folds: the fold that every item is held out in, from 0.
        alphas: strengths of the penalty; of several, the first labelling chooses inside the training
            folds. given: strengths to use instead, as another sweep of these sites has chosen them.
        refit: fit the first labelling on all items too, with the folds' median α.
        device: where it is computed, in float64. advance: called with the number of sites done.

    Raises:
        BadInput: shapes that do not fit; one class only; one fold only; two folds and several α to choose
            from; an α that is not above 0.

    >>> x = np.random.default_rng(0).normal(size=(3, 40, 5))
    >>> y = (x[1, :, 2] > 0).astype(int)
    >>> sweep = ridge_sweep(x, y[None], np.arange(40) % 4, alphas=[1.0])
    >>> sweep.scores.shape, ((sweep.predicted[:, 0] == y).mean(1) > 0.8).tolist()
    ((3, 1, 40, 1), [False, True, False])
    """
    x = torch.as_tensor(features)
    _check(x.shape, labels, folds, alphas)
    if given is None and len(alphas) > 1 and folds.max() == 1:
        raise BadInput(f"alphas={list(alphas)} and two folds: {NO_INNER_FOLDS}")
    problem = _Problem.of(labels, folds, sorted(alphas), device)
    n_sites, n, d = x.shape
    n_labels, outputs = len(labels), problem.targets.shape[-1]
    scores = np.zeros((n_sites, n_labels, n, outputs))
    alpha = np.zeros((n_sites, problem.n_folds))
    directions, intercepts = np.zeros((n_sites, outputs, d)), np.zeros((n_sites, outputs))
    dual = d >= n
    moments = (n_labels * problem.n_classes + 4) * problem.n_folds
    chunk = 1 if dual else max(1, BYTES // (8 * (d + 1) ** 2 * moments))
    for start in range(0, n_sites, chunk):
        sites = slice(start, min(start + chunk, n_sites))
        fit = _dual if dual else _primal
        known = None if given is None else torch.as_tensor(given[sites]).to(problem.targets)
        done = fit(x[sites].to(problem.targets), problem, known, refit)
        for whole, part in zip((scores, alpha, directions, intercepts), done, strict=True):
            whole[sites] = part.cpu().numpy()
        advance(sites.stop - start)
    return RidgeSweep(scores, alpha, directions, intercepts)


def _check(shape: torch.Size, labels: np.ndarray, folds: np.ndarray, alphas: Sequence[float]):
    if len(shape) != 3 or labels.ndim != 2 or labels.shape[1] != shape[1] or len(folds) != shape[1]:
        raise BadInput(
            f"features of shape {list(shape)}, labels of shape {list(labels.shape)} and {len(folds)} folds: "
            "wanted [sites, items, width], [labellings, items] and one fold an item"
        )
    if labels.min() < 0 or any(len(np.unique(row)) < 2 for row in labels):
        raise BadInput("a labelling has one class only: wanted class numbers from 0, two or more")
    if len(np.unique(folds)) < 2 or folds.min() < 0 or folds.max() + 1 > len(np.unique(folds)):
        raise BadInput("folds are numbered from 0, every number used; wanted two folds or more")
    if not len(alphas) or not all(0 < alpha < float("inf") for alpha in alphas):
        raise BadInput(f"alphas={list(alphas)}: wanted one or more numbers above 0")


@dataclass(frozen=True)
class _Problem:
    """What all sites share: the targets, the folds, and every training set's class weights."""

    targets: Float[Tensor, "labellings items outputs"]  # +1 in the class, −1 outside
    codes: Int[Tensor, "labellings items"]
    folds: Int[Tensor, " items"]
    alphas: Float[Tensor, " alphas"]
    n_classes: int
    n_folds: int

    @staticmethod
    def of(labels: np.ndarray, folds: np.ndarray, alphas: Sequence[float], device) -> _Problem:
        codes = torch.as_tensor(labels, dtype=torch.long, device=device)
        n_classes = int(codes.max()) + 1
        columns = torch.arange(1 if n_classes == 2 else 0, n_classes, device=device)
        targets = 2.0 * (codes[..., None] == columns).double() - 1.0
        return _Problem(
            targets,
            codes,
            torch.as_tensor(folds, dtype=torch.long, device=device),
            torch.as_tensor(alphas, dtype=torch.float64, device=device),
            n_classes,
            int(folds.max()) + 1,
        )

    def class_weights(self, labelling: int, held_out: int | None) -> Float[Tensor, " classes"]:
        """n / (K n_k) of the training set without a fold; 0 for a class that it lacks."""
        codes = self.codes[labelling]
        codes = codes if held_out is None else codes[self.folds != held_out]
        counts = torch.bincount(codes, minlength=self.n_classes).double()
        present = counts > 0
        return torch.where(present, len(codes) / (present.sum() * counts.clamp_min(1)), 0.0)


def _scale(mean_square: Tensor, mean: Tensor, n: int, offset: Tensor) -> Tensor:
    """Standard deviations; 1 for features that are constant up to rounding, as StandardScaler has it.

    `mean` and `mean_square` may be those of shifted features; `offset` is their mean before the shift.
    """
    variance = (mean_square - mean**2).clamp_min(0)
    eps = torch.finfo(torch.float64).eps
    constant = variance <= n * eps * mean_square + (n * eps * offset) ** 2
    return torch.where(constant, 1.0, variance.sqrt())


# --- items <= width ------------------------------------------------------------------------------


def _dual(
    x: Float[Tensor, "1 items width"], problem: _Problem, given: Tensor | None, refit: bool
) -> tuple[Tensor, ...]:
    """One site through its kernel: (scores, alpha, directions, intercepts), each with a site axis."""
    n_labels, n, outputs = problem.targets.shape
    scores, chosen = x.new_zeros(1, n_labels, n, outputs), x.new_zeros(1, problem.n_folds)
    directions, intercepts = x.new_zeros(1, outputs, x.shape[-1]), x.new_zeros(1, outputs)
    offset = x[0].mean(0)
    x = x[0] - offset
    # the mean and the squares of every training set: those of all items less those of a fold
    member = torch.nn.functional.one_hot(problem.folds, problem.n_folds).to(x)
    sums, squares = member.T @ x, member.T @ x.square()
    for held_out in [*range(problem.n_folds), *([None] if refit else [])]:
        out = problem.folds == (-1 if held_out is None else held_out)
        train, test = (~out).nonzero()[:, 0], out.nonzero()[:, 0]
        folds = [fold for fold in range(problem.n_folds) if fold != held_out]
        count = len(train)
        mean = sums[folds].sum(0) / count
        scale = _scale(squares[folds].sum(0) / count, mean, count, offset)
        # training items first: what follows are views
        standard = x[torch.cat([train, test])].sub_(mean).div_(scale)
        kernel = standard[:count] @ standard.T
        square = kernel[:, :count]
        for labelling in range(1 if held_out is None else n_labels):
            weights = problem.class_weights(labelling, held_out)[problem.codes[labelling][train]]
            y = problem.targets[labelling][train]
            if held_out is None:
                alpha = _median(chosen)[0]
            elif given is not None:
                alpha = given[0, held_out]
            elif labelling == 0:
                alpha = _dual_alpha(square, y, weights, problem.folds[train], problem.alphas)
            a, b = _dual_fit(square, y, weights, alpha)
            if held_out is None:
                beta = (standard.T @ a / scale[:, None]).T
                directions[0], intercepts[0] = beta, b - beta @ (mean + offset)
            else:
                scores[0, labelling, test] = kernel[:, count:].T @ a + b
                chosen[0, held_out] = alpha
    return scores, chosen, directions, intercepts


def _dual_alpha(
    kernel: Float[Tensor, "train train"],
    y: Float[Tensor, "train outputs"],
    weights: Float[Tensor, " train"],
    folds: Int[Tensor, " train"],
    alphas: Float[Tensor, " alphas"],
) -> Float[Tensor, ""]:
    """The strength with the smallest weighted squared error on blocks that are left out.

    In float32: strengths lie a factor of tens apart, and the probe itself is fitted in float64.
    """
    if len(alphas) == 1:
        return alphas[0]
    kernel, y, weights = kernel.float(), y.float(), weights.float()
    blocks = [(folds == fold).nonzero()[:, 0] for fold in folds.unique()]
    errors = []
    right = torch.cat([torch.ones_like(y[:, :1]), y], 1)
    for alpha in alphas:
        factor = torch.linalg.cholesky(_plus_diagonal(kernel, alpha.float() / weights))
        inverse = torch.cholesky_inverse(factor)
        solved = inverse @ right
        u, v = solved[:, :1], solved[:, 1:]
        total, error = u.sum(), 0.0
        a = v - u * (v.sum(0) / total)
        for block in blocks:
            P = torch.addmm(inverse[block[:, None], block], u[block], u[block].T / -total)
            residual = torch.cholesky_solve(a[block], torch.linalg.cholesky(P))
            error = error + (weights[block, None] * residual**2).sum()
        errors.append(error)
    return alphas[_least(torch.stack(errors))]


def _dual_fit(
    kernel: Float[Tensor, "train train"],
    y: Float[Tensor, "train outputs"],
    weights: Float[Tensor, " train"],
    alpha: Tensor,
) -> tuple[Float[Tensor, "train outputs"], Float[Tensor, " outputs"]]:
    """(a, b) with scores kernel @ a + b."""
    factor = torch.linalg.cholesky(_plus_diagonal(kernel, alpha / weights))
    solved = torch.cholesky_solve(torch.cat([torch.ones_like(y[:, :1]), y], 1), factor)
    u, v = solved[:, :1], solved[:, 1:]
    b = v.sum(0) / u.sum()
    return v - u * b, b


# --- width < items -------------------------------------------------------------------------------


class _Moments(NamedTuple):
    """For every fold, class and site, sums over the items of x̃ x̃ᵀ and of x̃ yᵀ, x̃ = (1, x)."""

    xx: Float[Tensor, "folds classes sites plus plus"]
    xy: Float[Tensor, "folds classes sites plus outputs"]

    @staticmethod
    def of(plus: Float[Tensor, "sites items plus"], problem: _Problem, labelling: int) -> _Moments:
        xx, xy = [], []
        for fold in range(problem.n_folds):
            for label in range(problem.n_classes):
                rows = (problem.folds == fold) & (problem.codes[labelling] == label)
                part = plus[:, rows]
                xx.append(part.mT @ part)
                xy.append(part.mT @ problem.targets[labelling][rows])
        shape = problem.n_folds, problem.n_classes
        return _Moments(torch.stack(xx).unflatten(0, shape), torch.stack(xy).unflatten(0, shape))


def _primal(
    x: Float[Tensor, "sites items width"], problem: _Problem, given: Tensor | None, refit: bool
) -> tuple[Tensor, ...]:
    """Many sites through their moments: (scores, alpha, directions, intercepts)."""
    n_labels, n, outputs = problem.targets.shape
    n_sites, _, d = x.shape
    scores, chosen = (
        x.new_zeros(n_sites, n_labels, n, outputs),
        x.new_zeros(n_sites, problem.n_folds),
    )
    directions, intercepts = x.new_zeros(n_sites, outputs, d), x.new_zeros(n_sites, outputs)
    # Down-dating subtracts sums: features of mean 0 and size 1 leave nothing to cancel.
    offset = x.mean(1)
    size = _scale((x**2).mean(1), offset, n, offset)
    plus = torch.cat([torch.ones_like(x[..., :1]), (x - offset[:, None]) / size[:, None]], -1)
    moments = [_Moments.of(plus, problem, labelling) for labelling in range(n_labels)]
    by_fold = moments[0].xx.sum(1)
    everything = by_fold.sum(0)
    for held_out in [*range(problem.n_folds), *([None] if refit else [])]:
        inner = [fold for fold in range(problem.n_folds) if fold != held_out]
        total = everything if held_out is None else everything - by_fold[held_out]
        count = total[0, 0, 0]
        mean_square = total.diagonal(dim1=-2, dim2=-1)[:, 1:] / count
        scale = _scale(mean_square, total[:, 0, 1:] / count, int(count), offset / size)
        # α ‖β‖² of standardised features is α Σ s_j² β_j² of these, and the intercept is free
        penalty = torch.cat([torch.zeros_like(scale[:, :1]), scale**2], -1)
        for labelling in range(1 if held_out is None else n_labels):
            weights = problem.class_weights(labelling, held_out)
            xx, xy = (
                torch.einsum("c,fc...->f...", weights, of[inner]) for of in moments[labelling]
            )
            if held_out is None:
                alpha = _median(chosen)
            elif given is not None:
                alpha = given[:, held_out]
            elif labelling == 0:
                alpha = _primal_alpha(xx, xy, penalty, problem.alphas)
            solution = _solved(xx.sum(0), xy.sum(0), alpha[:, None] * penalty)
            if held_out is None:
                beta = solution[:, 1:] / size[..., None]
                directions[:] = beta.mT
                intercepts[:] = solution[:, 0] - (beta * offset[..., None]).sum(1)
            else:
                test = problem.folds == held_out
                scores[:, labelling, test] = plus[:, test] @ solution
                chosen[:, held_out] = alpha
    return scores, chosen, directions, intercepts


def _primal_alpha(
    xx: Float[Tensor, "folds sites plus plus"],
    xy: Float[Tensor, "folds sites plus outputs"],
    penalty: Float[Tensor, "sites plus"],
    alphas: Float[Tensor, " alphas"],
) -> Float[Tensor, " sites"]:
    """Every site's strength with the smallest weighted squared error on folds that are left out."""
    if len(alphas) == 1:
        return alphas.expand(len(penalty))
    rest_xx, rest_xy = xx.sum(0) - xx, xy.sum(0) - xy
    errors = []
    for alpha in alphas:
        left = _solved(rest_xx, rest_xy, alpha * penalty)
        # Σ w (y − x̃·β)² = Σ w y² − 2 β·Σ w x̃ y + βᵀ (Σ w x̃ x̃ᵀ) β; the first is the same for all α
        errors.append((left * (xx @ left - 2 * xy)).sum((0, -2, -1)))
    return alphas[_least(torch.stack(errors))]


def _solved(
    A: Float[Tensor, "... n n"], y: Float[Tensor, "... n outputs"], diagonal: Float[Tensor, "... n"]
) -> Float[Tensor, "... n outputs"]:
    """(A + diag)⁻¹ y."""
    return torch.cholesky_solve(y, torch.linalg.cholesky(_plus_diagonal(A, diagonal)))


def _plus_diagonal(A: Float[Tensor, "... n n"], diagonal: Float[Tensor, "... n"]) -> Tensor:
    A = A.clone()
    A.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return A


def _least(errors: Float[Tensor, "alphas ..."]) -> Int[Tensor, "..."]:
    """The place of the smallest error; of equals the last, the strongest."""
    return len(errors) - 1 - errors.flip(0).argmin(0)


def _median(chosen: Float[Tensor, "sites folds"]) -> Float[Tensor, " sites"]:
    """One of the strengths that folds chose; of two in the middle the stronger."""
    return chosen.sort(1).values[:, chosen.shape[1] // 2]
