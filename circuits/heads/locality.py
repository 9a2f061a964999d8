"""How far and how freely heads look: effective context, entropy and its floor, position against content.

Scores, not labels, all on prose. Patterns and scores are read layer by layer as a pass goes by; what is kept
is a number for each prompt and head.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.heads.detector import Detector, PerPrompt
from interp.data.prompts import Prompts, text_windows
from interp.errors import BadInput
from interp.models.model import Model
from interp.run.edits import Edit, Seen

SHARE = 0.9
LONG, LONG_PROMPTS = 512, 8
"""Tokens in a prompt for effective context, where the model and the text have room, and how many prompts."""
SHORT_PROMPTS = 8
LEAST_WINDOW = 4


def _windows(model: Model, n: int, seed: int, length: int = 128) -> Prompts:
    return text_windows(model, n, length=length, seed=seed)


def _per_head(model: Model, n: int) -> np.ndarray:
    return np.full((n, model.n_layers, model.spec.n_heads), np.nan)


# --- effective context -------------------------------------------------------------------------------


def effective_context(
    model: Model, prompts: Prompts, share: float = SHARE
) -> Float[np.ndarray, "n n_layers n_heads"]:
    """Mean over the second half of a prompt of the fewest most recent keys that hold `share` of the mass, tokens.

    The first token is left out of the mass (most heads park attention there), so it describes the rest only.
    Rows are read chunk by chunk: no whole pattern is formed.

    >>> from interp.data.prompts import repeated_tokens
    >>> found = effective_context(tiny_model(), repeated_tokens(tiny_model(), 2, length=8)[0])
    >>> found.shape, bool((found >= 1).all())
    ((2, 2, 4), True)
    """
    start = prompts.length // 2
    first = max(prompts.lead, 1)
    found = _per_head(model, len(prompts))
    sums: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}

    def read(pattern: Tensor, seen: Seen) -> Tensor:
        rows = torch.arange(seen.start, seen.start + pattern.shape[2], device=pattern.device)
        late = rows >= start
        if bool(late.any()):
            mass = pattern[:, :, late, first:].float()
            held = mass.flip(-1).cumsum(-1).flip(-1)  # of this key and all later ones
            total = held[..., :1]
            # Keys from which on enough is held come first: the last of them is the nearest.
            nearest = first + (held >= share * total).sum(-1) - 1
            fewest = (rows[late] - nearest + 1).float()
            there = total[..., 0] > 0
            sums[seen.layer] = sums.get(seen.layer, 0) + (fewest * there).sum(-1)
            counts[seen.layer] = counts.get(seen.layer, 0) + there.sum(-1)
        return pattern

    for row in range(len(prompts)):
        sums.clear()
        counts.clear()
        model.run(
            prompts.rows(slice(row, row + 1)).batch,
            edits=[Edit.apply("pattern", read)],
            logits=False,
        )
        for layer, total in sums.items():
            mean = torch.where(counts[layer] > 0, total / counts[layer], torch.nan)[0]
            found[row, layer, : len(mean)] = mean.cpu().numpy()
    return found


def _observe_context(model: Model, n: int, seed: int) -> dict[str, np.ndarray]:
    prompts = _windows(model, min(n, LONG_PROMPTS), seed, LONG)
    score = effective_context(model, prompts)
    keys = np.arange(prompts.length // 2, prompts.length) + 1 - max(prompts.lead, 1)
    even = np.ceil(SHARE * keys).mean()
    return {"score": score, "null": np.where(np.isnan(score), np.nan, even)}


EFFECTIVE_CONTEXT = Detector(
    name="effective_context",
    title="Effective context",
    letter="e",
    description="Fewest most recent tokens that hold 90 % of a head's attention on prose, the first token left "
    "out, mean over the second half of windows of at most 512 tokens. It depends on the window's length and "
    "says nothing of what is read there.",
    source="after RecurFormer (Yan et al. 2024), which asks for the share in a fixed window; ours turns it round",
    reads=None,
    observe=_observe_context,
    null="a head without preference: attention to all visible keys alike",
    threshold=None,
    margin=0.0,
    rank=40,
    side=-1,
    unit="tokens",
    causal_only=True,
    needs_text=True,
    slow=True,
)


# --- entropy and its floor ---------------------------------------------------------------------------


def _scores(model: Model, prompts: Prompts) -> Iterator[tuple[int, int, Tensor]]:
    """(prompt, layer, masked scores [heads pos pos]); one prompt's scores are held at a time."""
    for row in range(len(prompts)):
        run = model.run(prompts.rows(slice(row, row + 1)).batch, capture=["scores"], logits=False)
        for layer, scores in run.cache.by_layer("scores").items():
            yield row, layer, scores[0].float()


def _visible(scores: Tensor) -> Tensor:
    return scores > torch.finfo(torch.float32).min / 2


def entropy_floor(
    norm: Float[Tensor, "*shape"], keys: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Least entropy, in nats, of a softmax over t logits whose vector has at most this norm.

    log(1 + (t−1)β) + σ √(t(t−1)) β / (1 + (t−1)β), β = exp(−σ √(t/(t−1))): one logit stands out, all others
    are equal. It falls exponentially with σ.

    >>> entropy_floor(torch.tensor([0.0, 50.0]), torch.tensor([8.0, 8.0])).exp()
    tensor([8., 1.])

    Source: Zhai et al. 2023, Stabilizing Transformer Training by Preventing Attention Entropy Collapse, Thm 3.1
    """
    others = keys - 1
    far = norm * (keys / others).sqrt()
    beta = torch.exp(-far)
    rest = others * beta
    return torch.log1p(rest) + far * rest / (1 + rest)


def entropies(
    model: Model, prompts: Prompts
) -> tuple[Float[np.ndarray, "n n_layers n_heads"], Float[np.ndarray, "n n_layers n_heads"]]:
    """(entropy, its floor) of each head on each prompt, nats, means over queries that see two keys or more.

    σ is the spectral norm of the head's score matrix, every row less its mean over visible keys (a softmax
    does not see it); a row's norm is at most σ, so the floor holds for every row.
    """
    score, floor = _per_head(model, len(prompts)), _per_head(model, len(prompts))
    for row, layer, scores in _scores(model, prompts):
        seen = _visible(scores)
        keys = seen.sum(-1).float()
        centred = scores.masked_fill(~seen, 0)
        centred = (centred - centred.sum(-1, keepdim=True) / keys[..., None]).masked_fill(~seen, 0)
        gram = (centred @ centred.transpose(1, 2)).cpu()  # MPS has no eigenvalues
        norm = torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0).sqrt().to(scores.device)
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        several = keys >= 2
        entropy = torch.special.entr(p).sum(-1)
        least = entropy_floor(norm[:, None].expand_as(keys), keys.clamp_min(2))
        for out, values in ((score, entropy), (floor, least)):
            mean = (values * several).sum(-1) / several.sum(-1)
            out[row, layer, : len(mean)] = mean.cpu().numpy()
    return score, floor


def _observe_entropy(model: Model, n: int, seed: int) -> dict[str, np.ndarray]:
    score, floor = entropies(model, _windows(model, min(n, SHORT_PROMPTS), seed))
    return {"score": score, "null": floor}


ENTROPY = Detector(
    name="entropy",
    title="Entropy",
    letter="n",
    description="Mean entropy of attention on prose, in nats, beside the least that the spectral norm of the "
    "head's scores allows. A floor near zero says that the scores are large enough to collapse, not that "
    "they have.",
    source="Zhai et al. 2023, Stabilizing Transformer Training by Preventing Attention Entropy Collapse, Thm 3.1; "
    "ours takes the norm of the scores themselves, each row centred (theirs bounds it by the weights)",
    reads=None,
    observe=_observe_entropy,
    null="not a null but the lower bound from the spectral norm of the scores",
    threshold=None,
    margin=0.0,
    rank=41,
    unit="nats",
    needs_text=True,
    slow=True,
)


# --- position against content ------------------------------------------------------------------------


def _band(scores: Tensor, width: int) -> Tensor | None:
    """Scores by offset [heads rows offsets], each row less its mean; None where too few keys are visible.

    Rows start where `width` keys are behind them, so every row has the same offsets.
    """
    length = scores.shape[-1]
    rows = torch.arange(width, length, device=scores.device)
    offsets = torch.arange(width, device=scores.device)
    band = scores[:, rows[:, None], rows[:, None] - offsets]
    seen = _visible(band).all(0).all(0).long().cumprod(0)
    reach = int(seen.sum())
    if reach < LEAST_WINDOW:
        return None
    band = band[..., :reach]
    return band - band.mean(-1, keepdim=True)


Bands = dict[int, list[Tensor]]
"""By layer, each prompt's scores by offset [heads rows offsets]."""


def _bands(model: Model, prompts: Prompts) -> Bands:
    bands: Bands = {}
    for _, layer, scores in _scores(model, prompts):
        band = _band(scores, prompts.length // 2)
        if band is not None:
            bands.setdefault(layer, []).append(band)
    return bands


def _shuffled(bands: Bands, seed: int) -> Bands:
    """Every row's keys in random order, the same for all heads of a layer."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(band: Tensor) -> Tensor:
        order = torch.rand(band.shape[1:], generator=generator).argsort(-1)
        return band.gather(-1, order.to(band.device).expand_as(band))

    return {layer: [shuffle(band) for band in each] for layer, each in bands.items()}


def position_and_content(
    model: Model, prompts: Prompts
) -> tuple[Float[np.ndarray, "n n_layers n_heads"], Float[np.ndarray, "n n_layers n_heads"]]:
    """(share of score variance explained by offset alone, share that the key alone adds to it).

    Scores q·k before the softmax, each row less its mean, over the last half-prompt of keys of every query in
    the second half. Offset: s[q, k] ≈ f(q − k), f the mean of the *other* prompts. Key: the mean of what is
    left over every other query, judged on the queries between. Both out of sample: a useless predictor is at or
    below 0. What remains to 1 is query and key together, and noise. A prompt's share is of the mean variance
    over prompts, so that the mean over prompts is the share of all variance.

    Raises:
        BadInput: fewer than two prompts (the others predict each one).

    >>> from interp.data.prompts import repeated_tokens
    >>> offset, key = position_and_content(tiny_model(), repeated_tokens(tiny_model(), 3, length=16)[0])
    >>> offset.shape, bool((offset.mean(0) <= 1).all())
    ((3, 2, 4), True)
    """
    if len(prompts) < 2:
        raise BadInput("the other prompts predict each one: give at least two")
    return _shares(model, len(prompts), _bands(model, prompts))


def _shares(model: Model, n: int, bands: Bands) -> tuple[np.ndarray, np.ndarray]:
    offset, key = _per_head(model, n), _per_head(model, n)
    for layer, each in bands.items():
        means = torch.stack([band.mean(1) for band in each])  # [n heads offsets]
        # The floor is for heads whose scores never vary: nothing of nothing is explained.
        whole = torch.stack([band.square().sum((1, 2)) for band in each]).mean(0).clamp_min(1e-9)
        by_offset, by_key, parts = [], [], []
        for row, band in enumerate(each):
            others = (means.sum(0) - means[row]) / (len(each) - 1)
            left = band - others[:, None]
            by_offset.append(band.square().sum((1, 2)) - left.square().sum((1, 2)))
            gained, judged = _by_key(left)
            by_key.append(gained)
            parts.append(band[:, judged].square().sum((1, 2)))
        part = torch.stack(parts).mean(0).clamp_min(1e-9)
        for out, gained, total in ((offset, by_offset, whole), (key, by_key, part)):
            out[:, layer, : len(total)] = (torch.stack(gained) / total).cpu().numpy()
    return offset, key


def _by_key(left: Float[Tensor, "heads rows offsets"]) -> tuple[Float[Tensor, " heads"], slice]:
    """How much the mean over even rows of each key takes off the squares of the odd rows, and those rows."""
    _, rows, offsets = left.shape
    place = torch.arange(rows)[:, None] - torch.arange(offsets) + offsets - 1
    place = place.to(left.device)
    size = rows + offsets - 1

    def by_key(values: Tensor, at: Tensor) -> Tensor:
        return left.new_zeros(len(values), size).index_add_(1, at.flatten(), values.flatten(1))

    even, odd = slice(0, None, 2), slice(1, None, 2)
    count = by_key(left.new_ones(1, *place[even].shape), place[even]).clamp_min(1)
    mean = by_key(left[:, even], place[even]) / count
    predicted = mean[:, place[odd]]
    predicted = predicted - predicted.mean(-1, keepdim=True)
    before, after = left[:, odd], left[:, odd] - predicted
    return before.square().sum((1, 2)) - after.square().sum((1, 2)), odd


def _observe_shares(model: Model, n: int, seed: int) -> dict[str, np.ndarray]:
    prompts = _windows(model, min(n, SHORT_PROMPTS), seed)
    bands = _bands(model, prompts)
    offset, key = _shares(model, len(prompts), bands)
    offset_null, key_null = _shares(model, len(prompts), _shuffled(bands, seed))
    return {"score": offset, "null": offset_null, "key": key, "key_null": key_null}


def _key(seen, control) -> tuple[PerPrompt, PerPrompt]:
    return seen["key"], seen["key_null"]


POSITIONAL_SHARE = Detector(
    name="positional_share",
    title="Positional share",
    letter="q",
    description="Share of the variance of a head's scores (before the softmax, on prose, over the last 64 keys) "
    "that the offset alone predicts from other prompts. High: the head looks by place, whatever the words.",
    source="decomposition of QK scores into position and content; the out-of-sample variance share is ours",
    reads=None,
    observe=_observe_shares,
    null="the same with every row's keys in random order",
    threshold=None,
    margin=0.0,
    rank=42,
    unit="share of score variance",
    causal_only=True,
    needs_text=True,
    slow=True,
)

KEY_SHARE = Detector(
    name="key_share",
    title="Key share",
    letter="y",
    description="Share of the variance of a head's scores that the key alone adds to the offset: some tokens "
    "draw attention whatever the query. What neither explains is the match of query and key (or noise).",
    source="decomposition of QK scores into position and content; the out-of-sample variance share is ours",
    reads=None,
    observe=_observe_shares,
    combine=_key,
    null="the same with every row's keys in random order",
    threshold=None,
    margin=0.0,
    rank=43,
    unit="share of score variance",
    causal_only=True,
    needs_text=True,
    slow=True,
)
