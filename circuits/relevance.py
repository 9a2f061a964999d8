"""How much each input token matters for one prediction: rollout, flow, relevance, gradients.

Five readings of the same prompt, from the crudest to the most exact. Rollout and flow look at patterns
alone; Chefer's relevance weighs patterns with gradients; gradient × input and integrated gradients are
about the embeddings, and the last is complete: its scores sum to the change in the target.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.devices import float_type
from interp.errors import BadInput, Refused
from interp.models.layout import require_tokens_alone
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.edits import Edit

SINK = 0
"""The position that `exclude_sink` leaves out: attention with nothing to read goes to the first token."""
FLOW_UNIT = 10**8
"""Max-flow is computed on whole numbers: capacities in units of 1e-8."""
FIRST_PANELS = 8
"""Panels that the path of integrated gradients starts with: fewer could agree by accident."""
TOKENS_WITH_GRAPH = 256
"""Tokens put through one forward that keeps its graph."""


@dataclass(frozen=True)
class Target:
    """What is explained: the logit of `answer` at `position`, minus that of `instead` if there is one."""

    position: int
    answer: int
    instead: int | None = None

    def of(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        """The target in logits, of each row's logits at the position."""
        logits = logits.float()
        found = logits[:, self.answer]
        return found if self.instead is None else found - logits[:, self.instead]


def one_prompt(model: Model, prompt: str | Sequence[int] | Tensor | Batch) -> Batch:
    """The prompt as a Batch of one row with at least two tokens and no padding."""
    if not isinstance(prompt, (str, Tensor, Batch)):
        prompt = torch.tensor(list(prompt))
    batch = model.as_batch(prompt)
    if "input_ids" not in batch.inputs:
        raise BadInput("information flow is drawn between tokens: give text or token ids")
    if batch.has_source:
        raise Refused(
            f"{model.id} is an encoder-decoder: flow and relevance are between tokens of one stack, and "
            "its decoder reads the source besides"
        )
    if batch.size != 1:
        raise BadInput(f"got {batch.size} prompts, wanted one: call once for each")
    if batch.padded:
        raise BadInput("the prompt has padding: give its real tokens only")
    if batch.ids.shape[1] < 2:
        raise BadInput("the prompt is one token: information flows between at least two")
    return batch


def position_of(position: int, length: int) -> int:
    """`position` counted from the front; BadInput when it is not in the prompt."""
    if not -length <= position < length:
        raise BadInput(
            f"position {position} is not in the prompt: it has {length} tokens, "
            f"so positions are 0 to {length - 1}, or -1 to {-length} from the end"
        )
    return position % length


def target_of(
    model: Model,
    batch: Batch,
    *,
    position: int = -1,
    answer: str | int | None = None,
    instead: str | int | None = None,
) -> Target:
    """The Target that the arguments name; without `answer`, the model's own first choice.

    Raises:
        BadInput: position, token or prompt that is not there. Refused: no language-model head.
    """
    if model.spec.unembedding is None:
        raise Refused(
            f"{model.id} has no language-model head, so no token can be explained: "
            "use circuits.flow.flow_graph or circuits.relevance.rollout, which need none"
        )
    if instead is not None and answer is None:
        raise BadInput("instead= compares two tokens: give answer= too")
    place = position_of(position, batch.ids.shape[1])
    wrong = None if instead is None else model.token_id(instead)
    if answer is not None:
        return Target(place, model.token_id(answer), wrong)
    return Target(place, int(_logits_at(model, batch, place)[0].argmax()), wrong)


def _logits_at(model: Model, batch: Batch, position: int, **options) -> Tensor:
    run = model.run(batch, logits=torch.tensor([position]), **options)
    assert run.logits is not None
    return run.logits[:, 0]


# --- patterns alone ----------------------------------------------------------------------------


def mixing(
    patterns: Float[Tensor, "n_layers n_heads query_pos key_pos"], *, exclude_sink: bool = False
) -> Float[Tensor, "n_layers query_pos key_pos"]:
    """How much of each position a layer passes to each other, residual stream included; rows sum to one.

    Ã = rownorm(mean_h A + I). With `exclude_sink`, attention to the first token is left out and the
    rest of each row normalised before I is added; a row that attends to nothing else passes itself on.

    >>> mixing(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]))
    tensor([[[1.0000, 0.0000],
             [0.2500, 0.7500]]])
    """
    mean = patterns.mean(1, dtype=float_type(patterns.device))
    if exclude_sink:
        mean = without_sink(mean)
        mean = mean / mean.sum(-1, keepdim=True).clamp_min(1e-12)
    mixed = mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    return (mixed / mixed.sum(-1, keepdim=True)).to(patterns.dtype)


def without_sink(matrix: Float[Tensor, "*batch query_pos key_pos"]) -> Tensor:
    """The same weights with those of other positions on the first token set to zero."""
    matrix = matrix.clone()
    matrix[..., SINK + 1 :, SINK] = 0
    return matrix


def rollout(
    patterns: Float[Tensor, "n_layers n_heads query_pos key_pos"], *, exclude_sink: bool = False
) -> Float[Tensor, "query_pos key_pos"]:
    """Share of each last-layer position that comes from each input position; rows sum to one.

    R = Ã_L ⋯ Ã_1, Ã = rownorm(mean_h A + I). It takes every head as equally important, values as equally
    long and the MLP as absent: a map of where attention could bring things from, not of what it used.

    Args:
        patterns: [n_layers n_heads query_pos key_pos] of one prompt.
        exclude_sink: leave out attention to the first token.

    Returns: [query_pos key_pos], shares.

    >>> rollout(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]] * 2))
    tensor([[1.0000, 0.0000],
            [0.4375, 0.5625]])

    Source: Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers".
    """
    mixed = mixing(patterns, exclude_sink=exclude_sink).to(float_type(patterns.device))
    out = torch.eye(mixed.shape[-1], dtype=mixed.dtype, device=mixed.device)
    for layer in mixed:
        out = layer @ out
    return out.to(patterns.dtype)


def attention_flow(
    patterns: Float[Tensor, "n_layers n_heads query_pos key_pos"],
    position: int = -1,
    *,
    exclude_sink: bool = False,
) -> Float[np.ndarray, " key_pos"]:
    """The most that could flow from each input token to `position` of the last layer, each alone.

    Maximum flow through the graph of all (layer, position) with capacities Ã (see `rollout`). Unlike
    rollout it does not multiply along a path, so it says what is possible, not what is typical; the
    values of different tokens share edges and do not sum to one.

    Args:
        patterns: [n_layers n_heads query_pos key_pos] of one prompt.
        position: the receiving position.

    Returns: [key_pos], 0 to 1, exact to 1e-8 a capacity.

    >>> attention_flow(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]] * 2)).tolist()
    [0.5, 0.75]

    Source: Abnar & Zuidema 2020. Computed by scipy.sparse.csgraph.maximum_flow.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_flow

    mixed = mixing(patterns, exclude_sink=exclude_sink).cpu().double().numpy()
    n_layers, length, _ = mixed.shape
    position = position_of(position, length)
    reached = np.zeros((n_layers + 1, length), dtype=bool)
    reached[n_layers, position] = True
    for layer in reversed(range(n_layers)):
        reached[layer] = (mixed[layer][reached[layer + 1]] > 0).any(0)
    layers, queries, keys = np.nonzero((mixed > 0) & reached[1:, :, None])
    capacity = np.rint(mixed[layers, queries, keys] * FLOW_UNIT).astype(np.int32)
    nodes = (n_layers + 1) * length
    ends = (layers * length + keys, (layers + 1) * length + queries)
    graph = csr_array((capacity, ends), shape=(nodes, nodes))
    sink = n_layers * length + position
    flows = [
        maximum_flow(graph, source, sink).flow_value if reached[0, source] else 0
        for source in range(length)
    ]
    return np.array(flows) / FLOW_UNIT


# --- patterns and gradients --------------------------------------------------------------------


@torch.enable_grad()
def pattern_gradients(
    model: Model, batch: Batch, target: Target
) -> dict[int, tuple[Float[Tensor, "n_heads q k"], Float[Tensor, "n_heads q k"]]]:
    """(A, d target / d A) of every attention layer on one prompt, in logits a unit of attention."""
    place = torch.tensor([target.position])
    run = model.run(batch, capture=["pattern"], logits=place, grad=True)
    assert run.logits is not None
    grads = run.gradients(target.of(run.logits[:, 0])[0], "pattern")
    layers = run.cache.layers("pattern")
    return {
        layer: (run.cache[f"pattern.{layer}"][0].detach().float(), grads[0, i].float())
        for i, layer in enumerate(layers)
    }


def chefer_relevance(
    model: Model,
    batch: Batch,
    target: Target,
    *,
    exclude_sink: bool = False,
) -> Float[Tensor, "query_pos key_pos"]:
    """Relevance of each input token to each position, for one target; the target's row is the answer.

    Ā = mean_h (∇A ⊙ A)⁺; R ← R + Ā R from R = I, over layers. Only attention that raises the target
    counts; what queries and MLPs did with it does not, and relevance is in no unit: compare it within
    one row only. R keeps the identity, so subtract 1 at the row's own position to rank it with others.

    Source: Chefer, Gur & Wolf 2021, "Generic Attention-model Explainability", the self-attention rule.
    """
    R = None
    for pattern, grad in pattern_gradients(model, batch, target).values():
        raising = (grad * pattern).clamp_min(0).mean(0)
        raising = without_sink(raising) if exclude_sink else raising
        R = torch.eye(len(raising), device=raising.device) if R is None else R
        R = R + raising @ R
    if R is None:
        raise Refused(f"{model.id} shows no attention patterns to propagate relevance through")
    return R


# --- embeddings --------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbeddingScores:
    """Per-token scores of an attribution to embeddings.

    scores: [pos], logits. change: what they should sum to, logits. gap: |Σ scores − change|, logits.
    points: gradients that were evaluated.
    """

    scores: Float[Tensor, " pos"]
    change: float
    gap: float
    points: int

    @property
    def about(self) -> dict[str, float]:
        """How complete the scores are, as reports say it."""
        return {"change": self.change, "gap": self.gap, "points": self.points}


def gradient_times_input(model: Model, batch: Batch, target: Target) -> Float[Tensor, " pos"]:
    """First-order effect of each token's embedding on the target, in logits.

    Σ_d x_d · ∂target/∂x_d at the residual stream's start (`resid_pre.0`, positions included). Exact
    for a linear model; elsewhere a saturated norm or softmax hides what matters (scores near zero).

    Source: Shrikumar et al. 2016; Denil et al. 2014.
    """
    x = _embeddings(model, batch)
    return (_values_and_gradients(model, batch, target, x)[1] * x.float()).sum(-1)[0]


def integrated_gradients(
    model: Model,
    batch: Batch,
    target: Target,
    *,
    baseline: Float[Tensor, "1 pos d_model"] | None = None,
    tolerance: float = 0.01,
    max_points: int = 769,
) -> EmbeddingScores:
    """Each token's part of the target's change from a baseline to the prompt, in logits; they sum to it.

    (x − x₀) · ∫₀¹ ∇target(x₀ + α(x − x₀)) dα, by Simpson's rule in panels. A panel's error is known
    without knowing the integral (its scores must sum to the target's change over it), so the worst
    panels are halved, reusing their gradients, until all errors together are below `tolerance` of the
    change. The scores depend on the baseline, and on a straight path that leaves the prompts the model
    was trained on.

    Args:
        baseline: where the path starts; by default `same_everywhere`, in which no token can be told
            from another.
        max_points: gradients after which to stop; `gap` says what is then left.

    Source: Sundararajan, Taly & Yan 2017.
    """
    x = _embeddings(model, batch).float()
    start = same_everywhere(x) if baseline is None else baseline.to(x)
    way = x - start
    seen: dict[float, tuple[float, Tensor]] = {}

    def look(alphas: set[float]) -> None:
        new = sorted(alphas - seen.keys())
        points = start + torch.tensor(new, device=x.device).view(-1, 1, 1) * way
        values, grads = _values_and_gradients(model, batch, target, points)
        seen.update(zip(new, zip(values.tolist(), (grads * way).sum(-1), strict=True), strict=True))

    def scores_of(a: float, b: float) -> Tensor:
        (_, low), (_, middle), (_, high) = seen[a], seen[(a + b) / 2], seen[b]
        return (b - a) / 6 * (low + 4 * middle + high)

    ends = np.linspace(0, 1, FIRST_PANELS + 1).tolist()
    panels = list(itertools.pairwise(ends))
    while True:
        look({alpha for a, b in panels for alpha in (a, (a + b) / 2, b)})
        errors = [abs(float(scores_of(a, b).sum()) - (seen[b][0] - seen[a][0])) for a, b in panels]
        change = seen[1.0][0] - seen[0.0][0]
        # Float32 logits of size 10 to 100 are known to about 1e-5: a smaller change has no 1 %.
        left = sum(errors) - max(tolerance * abs(change), 1e-4)
        if left <= 0 or len(seen) >= max_points:
            break
        for place in sorted(range(len(panels)), key=lambda i: -errors[i]):
            a, b = panels[place]
            panels[place] = (a, (a + b) / 2)
            panels.append(((a + b) / 2, b))
            left -= errors[place]
            if left <= 0:
                break
    scores = torch.stack([scores_of(a, b) for a, b in panels]).sum(0)
    return EmbeddingScores(scores, change, abs(float(scores.sum()) - change), len(seen))


def same_everywhere(x: Float[Tensor, "1 pos d_model"]) -> Float[Tensor, "1 pos d_model"]:
    """The prompt's embeddings with every token after the first replaced by their mean.

    The first token stays, because models park attention on it and a path on which that comes into
    being has slopes of thousands of logits. The mean stays, because from it the way is short.

    >>> same_everywhere(torch.tensor([[[4.0], [1.0], [3.0]]]))[0, :, 0]
    tensor([4., 2., 2.])
    """
    mean = x[:, SINK + 1 :].mean(1, keepdim=True).expand_as(x[:, SINK + 1 :])
    return torch.cat([x[:, : SINK + 1], mean], dim=1)


@torch.no_grad()
def _embeddings(model: Model, batch: Batch) -> Float[Tensor, "batch pos d_model"]:
    return model.run(batch, capture=["resid_pre.0"], stop_at=0, logits=False).cache["resid_pre.0"]


@torch.enable_grad()
def _values_and_gradients(
    model: Model, batch: Batch, target: Target, points: Tensor
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n pos d_model"]]:
    """The target where the residual stream starts from each of `points`, and its gradient there."""
    values, grads = [], []
    for chunk in points.to(model.dtype).split(max(1, TOKENS_WITH_GRAPH // points.shape[1])):
        leaf = chunk.detach().requires_grad_()
        edit = Edit.apply("resid_pre.0", lambda x, seen, leaf=leaf: leaf)
        repeated = batch.repeat(len(leaf))
        logits = _logits_at(model, repeated, target.position, edits=[edit], grad=True)
        found = target.of(logits)
        grads.append(torch.autograd.grad(found.sum(), leaf)[0].float())
        values.append(found.detach())
    return torch.cat(values), torch.cat(grads)


# --- all of them -------------------------------------------------------------------------------


def relevance_scores(
    model: Model,
    batch: Batch,
    target: Target,
    patterns: Float[Tensor, "n_layers n_heads query_pos key_pos"] | None,
    *,
    exclude_sink: bool = False,
    max_flow: bool = True,
) -> pd.DataFrame:
    """One row a token: position, token, rollout, attention_flow, relevance, gradient_x_input.

    Each with respect to the target's position; `relevance` is Chefer's, less the identity that it
    starts from. `attention_flow` is left out without `max_flow`; all but the last where a model shows
    no patterns.
    """
    require_tokens_alone(model.spec.hidden_axes, "relevance")
    place = target.position
    table = {
        "position": np.arange(batch.ids.shape[1]),
        "token": model.tokens(batch.ids[0].tolist()),
    }
    if patterns is not None:
        table["rollout"] = rollout(patterns, exclude_sink=exclude_sink)[place].cpu().numpy()
        if max_flow:
            table["attention_flow"] = attention_flow(patterns, place, exclude_sink=exclude_sink)
        relevance = chefer_relevance(model, batch, target, exclude_sink=exclude_sink)[place]
        relevance[place] -= 1
        table["relevance"] = relevance.cpu().numpy()
    table["gradient_x_input"] = gradient_times_input(model, batch, target).cpu().numpy()
    return pd.DataFrame(table)
