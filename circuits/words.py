"""Heads and memories as words: queries, keys, values, neurons and norms of one position, in tokens.

Everything a block handles has a counterpart in the residual stream: what a head writes, what a value
would write, the direction that a query looks for, the direction that a key answers to, what a neuron
writes and what excites it. Each is a vector v of width d_model and is read as softmax(W_U norm_f(v)).

A query is compared with a key after rotary positions, in the key head that its group shares. So the
direction that query q_i looks for *at position j* is the gradient of its score q_i · k_j along the
stream at j, through the block's own key projection, with the scale of every norm on the way held
fixed. Its dot product with that residual is the score, up to biases. Nothing here knows how a model
positions or groups its heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.attribution import Kept, held_norm, rows_at, write_sites
from interp.direction import places_of
from interp.errors import BadInput
from interp.lens import read
from interp.models.model import Model
from interp.models.verify import relative_error, relative_tolerance
from interp.models.weights import FrozenNorm, linear_map
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.unembedding import Unembedding

NEEDED = ("q", "k", "v", "z", "pattern", "attn_out", "attn_write")
OF_HEADS = ("output", "value", "query", "key")
OF_NEURONS = ("up", "down", "key")
SAME = 1e-3
"""How far a norm's input may be from a captured site, as a share of its largest entry, to be that site; in
half precision what two passes of it differ by."""


def check_options(*, top_k: int = 5, neurons: int = 20, **_: object) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if top_k < 1:
        raise BadInput(f"top_k={top_k}: wanted 1 or more")
    if neurons < 0:
        raise BadInput(f"neurons={neurons}: wanted 0 (none shown) or more")


def loudest(report: Report) -> pd.DataFrame:
    """The fifteen heads that write most, with what they write."""
    shown = ["layer", "head", "norm", "output", "source_token", "weight", "prompt"]
    several = len(report.meta["tokens"]) > 1
    return report.tables["heads"].filter(shown if several else shown[:-1]).head(15)


@analysis(
    name="words",
    source="Katz & Belinkov 2023, VISIT: Visualizing and Interpreting the Semantic Information Flow of "
    "Transformers, arXiv 2305.13417; Geva et al. 2021 for MLPs as memories",
    example='interp words smollm2-135m "When Mary and John went to the store, John gave a drink to"',
    figure="heads",
    validate=check_options,
    summary=loudest,
)
def words(
    model: Model,
    prompt: Batch | Tensor | str | Sequence[str],
    *,
    position: int = -1,
    top_k: int = 5,
    neurons: int = 20,
) -> Report:
    """Queries, keys, values, outputs, neurons and norms at one position, each as its top tokens.

    Every vector v is read as softmax(W_U norm_f(v)), the vectors of head h at position i being

        output  z_i W_O^h                       what it writes
        value   v_j W_O^h                       what it would write if it read j alone
        query   ∂(q_i · k_j) / ∂ resid_pre_j    what it looks for at j
        key     ∂(q_i · k_j) / ∂ resid_pre_i    what a query at i must hold to be answered by j

    with j the source it takes most from, argmax_j A[i,j] ‖v_j W_O^h‖, and norms' scales held fixed. Of a
    neuron: ±a W_out ("up" and "down", what it raises and lowers) and the gradient of its activation along
    the stream ("key", what excites it more). Neurons are those with the largest |a| ‖W_out‖.

    A vector's size does not show in its words: the final norm takes it out, so a write of no
    consequence reads as clearly as a strong one (see `norm`). The vocabulary is the final layer's; a
    vector in the middle of a model may speak to a later layer in another basis. Words of queries, keys
    and excitations say what a score would rise with, not that anything in the prompt has it; where many
    heads share a large direction, their words agree and tell them apart badly.

    Args:
        prompt: text or texts, token ids, or a Batch.
        position: which position; negative from the end of the real tokens.
        top_k: how many tokens to name for each vector.
        neurons: how many neurons to name for each prompt; 0 for none.

    Returns: a Report. Table "words": one row for each token named: (prompt, kind, layer, index, what,
        place, token, token_id, probability); kind "head" with `what` output, value, query or key, kind
        "neuron" with up, down or key. Table "heads", largest first: (prompt, layer, head, norm of the
        output, source, source_token, weight, and the words of each `what`). Table "neurons", largest
        first: (prompt, layer, neuron, activation, norm |a|·‖W_out‖, and words). Table "norms": tokens that
        enter or leave the top_k through a norm's gain: (prompt, layer, site, norm, change, token,
        token_id, place_before, place_after); the site is what the norm reads, "final" the final norm.
        Norms are in units of the residual stream. meta["notes"] says what a model could not give.

    Raises:
        BadInput: a position not in the prompt, bad options. Refused: attention, writes or unembedding
        were not verified.

    Source: Katz & Belinkov 2023, arXiv 2305.13417, who project q W_K^T and k W_Q, for models without
    rotary positions and with one key head a query head. Theirs has no source: we name the position
    whose value is largest after weighting, since the most attended one often carries next to nothing.

    >>> report = words(tiny_model(), torch.tensor([[5, 6, 7]]), top_k=2, neurons=3)
    >>> sorted(report.tables), len(report.tables["heads"]), len(report.tables["neurons"])
    (['heads', 'neurons', 'norms', 'words'], 8, 3)
    """
    started = time.perf_counter()
    check_options(top_k=top_k, neurons=neurons)
    vectors = word_vectors(model, prompt, position=position, neurons=neurons)
    batch, texts = vectors.batch, _Texts(model)
    found = _Found(model, texts, top_k)
    for layer, head in vectors.heads.items():
        for what in OF_HEADS:
            if what in head.vectors:
                found.add("head", layer, what, head.vectors[what])
    for neuron in vectors.neurons:
        for what, vector in neuron.vectors.items():
            found.add_one("neuron", neuron.prompt, neuron.layer, neuron.index, what, vector)
    table, spoken = found.tables()
    tokens = [model.tokens(ids.tolist()) for ids in batch.ids]
    tables = {
        "words": table,
        "heads": _head_table(vectors, spoken, tokens),
        "neurons": _neuron_table(vectors, spoken),
        "norms": _norm_table(model, vectors, texts, top_k),
    }
    options = {"position": position, "top_k": top_k, "neurons": neurons}
    meta = provenance(model, options=options, seed=0) | {
        "tokens": tokens,
        "positions": vectors.positions.tolist(),
        "notes": [*model.notes, *vectors.notes],
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    return Report("words", tables, {}, meta)


# --- vectors ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeadVectors:
    """All heads of one layer at one position of each prompt.

    Attributes:
        sources: j, the position each head takes most from. weights: A[i, j].
        vectors: by "output", "value", "query", "key": in the residual stream. Queries and keys are
            missing where k or q does not depend on the layer's input (keys shared between layers).
        scores: q_i · k_j, before scaling and masks.
    """

    sources: Int[Tensor, "batch n_heads"]
    weights: Float[Tensor, "batch n_heads"]
    scores: Float[Tensor, "batch n_heads"]
    vectors: dict[str, Float[Tensor, "batch n_heads d_model"]]


@dataclass(frozen=True, eq=False)
class Neuron:
    """One neuron at one position of one prompt: its value, ‖a W_out‖, and its vectors in the stream."""

    prompt: int
    layer: int
    index: int
    activation: float
    norm: float
    vectors: dict[str, Float[Tensor, " d_model"]]


@dataclass(frozen=True, eq=False)
class NormCall:
    """What one norm read and returned at the position [batch d_model]; `site` is what it read."""

    layer: int
    site: str
    name: str
    before: Float[Tensor, "batch d_model"]
    after: Float[Tensor, "batch d_model"]


@dataclass(frozen=True, eq=False)
class WordVectors:
    """What `words` reads: heads by layer, neurons strongest first within a prompt, norms in order.

    `final`: the final residual [batch d_model]. `positions`: the read one of each prompt in the batch.
    """

    batch: Batch
    positions: Int[Tensor, " batch"]
    heads: dict[int, HeadVectors]
    neurons: list[Neuron]
    norms: list[NormCall]
    final: Float[Tensor, "batch d_model"]
    notes: list[str] = field(default_factory=list)


def word_vectors(
    model: Model,
    prompt: Batch | Tensor | str | Sequence[str],
    *,
    position: int = -1,
    neurons: int = 20,
) -> WordVectors:
    """Every vector that `words` reads, as tensors in the residual stream.

    See `words` for what they are, Args and Raises.

    >>> model, ids = tiny_model(), torch.tensor([[5, 6, 7]])
    >>> heads = word_vectors(model, ids).heads[1]
    >>> pre = model.run(ids, capture=["resid_pre.1"], logits=False).cache["resid_pre.1"]
    >>> at_source = pre[0, heads.sources[0]]
    >>> score = (heads.vectors["query"][0] * at_source).sum(-1)
    >>> torch.allclose(score, heads.scores[0], atol=1e-4)  # this model has no biases
    True
    """
    model.require_sum("word vectors")
    for site in NEEDED:
        model.layers_with(site)
    Unembedding(model)
    batch = model.as_batch(prompt)
    places = places_of(batch, position)
    notes = []
    with_neurons = neurons > 0 and "mlp_post" not in model.spec.refused
    if neurons > 0 and not with_neurons:
        notes.append(f"No neurons are named: {model.spec.refused['mlp_post']}.")
    with_mlps = not {"mlp_out", "mlp_write"} & set(model.spec.refused)
    last = model.n_layers - 1
    streams = ["resid_pre", f"resid_post.{last}", *(["mlp_post"] if with_neurons else [])]
    streams += [] if "resid_mid" in model.spec.refused else ["resid_mid"]
    writes = [site for site in write_sites(model) if with_mlps or not site.startswith("mlp")]
    writes += [] if "attn_out" in writes else ["attn_out"]
    kept = rows_at(model, batch, places, [*streams, *writes], attention=True)

    recorded = _Recorded(batch, places)
    graph_sites = ["resid_pre", "q", "k"]
    graph_sites += [site for site in ("mlp_post", "resid_mid") if site in streams]
    with _norms_held(model, recorded), torch.enable_grad():
        run = model.run(batch, capture=graph_sites, grad=True, logits=False)
    heads = {
        layer: _head_vectors(model, run, layer, kept, places)
        for layer in model.spec.attention_layers
        if model.spec.blocks[layer].attn_write is not None
    }
    if unread := [n for n, found in heads.items() if "query" not in found.vectors]:
        notes.append(f"Queries and keys of layers {unread} do not come from the layer's own input.")
    found = _neurons(model, run, kept, places, neurons) if with_neurons else []
    return WordVectors(
        batch, places, heads, found, recorded.calls(model, kept), kept["resid_post", last], notes
    )


def _head_vectors(model: Model, run: Run, layer: int, kept: Kept, places: Tensor) -> HeadVectors:
    """Outputs and values by W_O, queries and keys by the gradient of the score."""
    z, v = kept["z", layer].float(), kept["v", layer].float()
    size, n_heads, _ = z.shape
    groups = [model.spec.kv_group(layer, head) for head in range(n_heads)]
    W, shrink = _written(model, layer, "attn", kept, model.W_O(layer).float())
    gram = W @ W.transpose(-1, -2)
    of_heads = v[:, :, groups]
    sizes = torch.einsum("bshd,hde,bshe->bhs", of_heads, gram, of_heads).clamp_min(0).sqrt()
    taken = kept["pattern", layer].float() * sizes
    source = taken.argmax(-1)
    rows = torch.arange(size)[:, None]
    value = of_heads[rows, source, torch.arange(n_heads)]
    vectors = {
        "output": torch.einsum("bhd,hdm->bhm", z, W) * shrink[:, None],
        "value": torch.einsum("bhd,hdm->bhm", value, W) * shrink[:, None],
    }
    q = run.cache[f"q.{layer}"][rows[:, 0], places]
    k = run.cache[f"k.{layer}"][rows, source][rows, torch.arange(n_heads), groups]
    pre = run.cache[f"resid_pre.{layer}"]
    query, key = (
        torch.zeros(size, n_heads, pre.shape[-1]),
        torch.zeros(size, n_heads, pre.shape[-1]),
    )
    seen = True
    for head in range(n_heads):
        at_source = _gradient((q[:, head].detach() * k[:, head]).sum(), pre)
        at_query = _gradient((q[:, head] * k[:, head].detach()).sum(), pre)
        if at_source is None or at_query is None:
            seen = False
            break
        query[:, head] = at_source[rows[:, 0], source[:, head]].float().cpu()
        key[:, head] = at_query[rows[:, 0], places].float().cpu()
    if seen:
        vectors |= {"query": query, "key": key}
    return HeadVectors(
        source.cpu(),
        kept["pattern", layer].gather(-1, source[..., None])[..., 0].float().cpu(),
        (q * k).sum(-1).detach().float().cpu(),
        {what: x.detach().cpu() for what, x in vectors.items()},
    )


def _gradient(target: Tensor, at: Tensor) -> Tensor | None:
    if not target.requires_grad:
        return None
    return torch.autograd.grad(target, at, retain_graph=True, allow_unused=True)[0]


def _written(
    model: Model, layer: int, kind: str, kept: Kept, W: Float[Tensor, "*parts d_model"]
) -> tuple[Float[Tensor, "*parts d_model"], Float[Tensor, "batch 1"]]:
    """(W', s) with s · x W' what reaches the stream of x W, a norm behind it held at its scale."""
    block = model.spec.blocks[layer]
    write = block.attn_write if kind == "attn" else block.mlp_write
    assert write is not None
    shrink = torch.full((len(kept[f"{kind}_out", layer]), 1), write.scale)
    if (norm := held_norm(model, layer, kind, kept)) is None:
        return W, shrink.to(W.device)
    W = norm.centre(W) * norm.gain.to(W.device).float()
    return W, shrink.to(W.device) / norm.scale(kept[f"{kind}_out", layer]).to(W.device)


@dataclass(frozen=True)
class _Strong:
    """A neuron that is named: its prompt, layer, index, value and ‖a W_out‖."""

    prompt: int
    layer: int
    index: int
    activation: float
    norm: float


def _neurons(model: Model, run: Run, kept: Kept, places: Tensor, count: int) -> list[Neuron]:
    """The `count` neurons of each prompt that write most, with what they write and what excites them."""
    candidates: list[_Strong] = []
    written: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in model.layers_with("mlp_post"):
        block = model.spec.blocks[layer]
        if block.mlp_write is None:
            continue
        W, shrink = _written(model, layer, "mlp", kept, model.W_out(layer).float())
        written[layer] = W, shrink
        active = kept["mlp_post", layer].float()
        size = active.abs() * W.norm(dim=-1) * shrink.abs()
        best = size.topk(min(count, size.shape[1]), dim=1)
        for prompt, indices in enumerate(best.indices.tolist()):
            candidates += [
                _Strong(prompt, layer, i, float(active[prompt, i]), float(norm))
                for i, norm in zip(indices, best.values[prompt].tolist(), strict=True)
            ]
    found = []
    for prompt in range(run.batch.size):
        own = sorted((c for c in candidates if c.prompt == prompt), key=lambda c: -c.norm)[:count]
        for strong in own:
            W, shrink = written[strong.layer]
            write = (strong.activation * W[strong.index] * shrink[prompt]).detach().cpu()
            vectors = {"up": write, "down": -write}
            key = _excitation(model, run, strong, int(places[prompt]))
            if key is not None:
                vectors["key"] = key
            found.append(
                Neuron(prompt, strong.layer, strong.index, strong.activation, strong.norm, vectors)
            )
    return found


def _excitation(
    model: Model, run: Run, neuron: _Strong, place: int
) -> Float[Tensor, " d_model"] | None:
    """The gradient of a neuron's activation along what its MLP reads of the stream."""
    site = "resid_mid" if neuron.layer in run.cache.layers("resid_mid") else "resid_pre"
    target = run.cache[f"mlp_post.{neuron.layer}"][neuron.prompt, place, neuron.index]
    gradient = _gradient(target, run.cache[f"{site}.{neuron.layer}"])
    found = None if gradient is None else gradient[neuron.prompt, place].float().cpu()
    return None if found is None or not bool(found.any()) else found


# --- norms with their scale held ------------------------------------------------------------------


class _Recorded:
    """What every norm of width d_model read and returned at the read position."""

    def __init__(self, batch: Batch, places: Tensor):
        self.batch, self.places = batch, places
        self.seen: list[tuple[int, str, Tensor, Tensor]] = []

    def add(self, layer: int, name: str, x: Tensor, out: Tensor) -> None:
        """Keep one call of a norm that sees the whole stream."""
        size, length = self.batch.ids.shape
        if x.numel() != size * length * x.shape[-1]:
            return
        rows = torch.arange(size, device=x.device)
        before, after = (
            y.detach().reshape(size, length, -1)[rows, self.places.to(x.device)].float()
            for y in (x, out)
        )
        self.seen.append((layer, name, before, after))

    def calls(self, model: Model, kept: Mapping[tuple[str, int], Tensor]) -> list[NormCall]:
        """The calls whose input is a site of the layer, by the name of that site."""
        found, allowed = [], max(SAME, relative_tolerance(model.dtype))
        for layer, name, before, after in self.seen:
            if before.shape[-1] != model.spec.d_model:
                continue
            off = {
                site: relative_error(before, kept[site, layer])[0]
                for site in ("resid_pre", "resid_mid", "attn_out", "mlp_out")
                if (site, layer) in kept
            }
            nearest = min(off, key=lambda site: off[site])
            if off[nearest] < allowed:
                found.append(NormCall(layer, nearest, name, before, after))
        return found


@contextmanager
def _norms_held(model: Model, recorded: _Recorded) -> Iterator[None]:
    """Inside, every norm of a block is linear: its output is the same, its scale has no gradient."""
    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            for name, module in block.named_modules():
                leaf = not any(True for _ in module.children())
                if leaf and all(parameter.ndim < 3 for parameter in module.parameters()):
                    hook = _holding(layer, name, recorded)
                    stack.callback(module.register_forward_hook(hook).remove)
        yield


def _holding(
    layer: int, name: str, recorded: _Recorded
) -> Callable[[nn.Module, tuple, object], Tensor | None]:
    def hook(module: nn.Module, args: tuple, output: object) -> Tensor | None:
        if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            return None
        x, bare = args[0], _Bare(module)
        if x.shape != output.shape or not _forgets_size(bare, x, output):
            return None
        recorded.add(layer, name, x, output)
        return _linear(bare, x, output)

    return hook


class _Bare(nn.Module):
    """A module that can be asked what it is from within its own hook: it is called without hooks."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.forward(x)


@torch.no_grad()
def _forgets_size(module: nn.Module, x: Tensor, output: Tensor) -> bool:
    """Whether this is a norm: inputs all alike scaled give the same output, one entry scaled other ones.

    It is asked with its loudest input, which is none of padding, brought to a size that drowns epsilon
    and that float16 can square.
    """
    if x.ndim < 2 or not x.is_floating_point() or torch.equal(x, output):
        return False
    axes = min(2, x.ndim - 1)
    vectors = x.flatten(0, axes - 1)
    sizes = vectors.flatten(1).abs().amax(1)
    size = sizes.max()
    if not bool(size > 0) or not bool(size.isfinite()):
        return False
    length = 10.0 if x.dtype == torch.float16 else 1e6
    some = vectors[sizes.argmax()].reshape(*[1] * axes, *x.shape[axes:]) / size * length
    place = int(some.abs().argmax())
    uneven = some.clone()
    uneven.view(-1)[place] *= 100
    large, larger, other = (module(inputs) for inputs in (some, some * 2, uneven))
    allowed = relative_tolerance(x.dtype)
    if not relative_error(larger, large)[0] <= allowed:
        return False
    # tanh forgets sizes too, but of every entry by itself: the others stay as they were.
    row, column = divmod(place, x.shape[-1])
    others = torch.arange(x.shape[-1], device=x.device) != column
    large, other = (out.reshape(-1, x.shape[-1])[row, others] for out in (large, other))
    return relative_error(other, large)[0] > allowed


def _linear(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """A norm's output as a linear function of its input.

    gain · (x [− mean x]) / σ + bias with σ held, where that is what the norm computes on its last axis;
    else (a gain for every head) x times a factor held for every entry.
    """
    if x.shape[-1] % 2 == 0:
        with torch.no_grad():
            held = FrozenNorm(module, x.shape[-1])
            gain, bias = held.gain.to(x.device).float(), held.bias.to(x.device).float()
            scale = held.scale(x).nan_to_num(1.0) if gain.ndim == 1 else torch.ones(1)
        made = gain * held.centre(x.float()) / scale + bias
        allowed = relative_tolerance(x.dtype)
        if (
            made.shape == output.shape
            and relative_error(made.detach(), output.detach().float())[0] <= allowed
        ):
            return made.to(output.dtype)
    factor = (output / torch.where(x == 0, 1.0, x)).detach()
    return x * factor


# --- tables -------------------------------------------------------------------------------------


class _Texts:
    """Token texts, each id decoded once."""

    def __init__(self, model: Model):
        self.model, self.known = model, dict[int, str]()

    def __call__(self, ids: Sequence[int]) -> list[str]:
        if missing := sorted(set(ids) - set(self.known)):
            self.known.update(zip(missing, self.model.tokens(missing), strict=True))
        return [self.known[i] for i in ids]


Place = tuple[str, int, int, int, str]
"""kind, prompt, layer, index, what."""


class _Found:
    """Vectors gathered with their places, read all at once."""

    def __init__(self, model: Model, texts: _Texts, top_k: int):
        self.model, self.texts, self.k = model, texts, min(top_k, model.spec.d_vocab or top_k)
        self.places: list[Place] = []
        self.vectors: list[Tensor] = []

    def add(self, kind: str, layer: int, what: str, vectors: Tensor) -> None:
        """One vector for every prompt and head."""
        for prompt, of_prompt in enumerate(vectors):
            for index, vector in enumerate(of_prompt):
                self.add_one(kind, prompt, layer, index, what, vector)

    def add_one(
        self, kind: str, prompt: int, layer: int, index: int, what: str, vector: Tensor
    ) -> None:
        self.places.append((kind, prompt, layer, index, what))
        self.vectors.append(vector)

    def tables(self) -> tuple[pd.DataFrame, dict[Place, str]]:
        """The tidy table, and each vector's words in a line."""
        stack = torch.stack(self.vectors).to(self.model.device)
        reading = read(self.model, stack, top_k=self.k)
        ids = reading.top_ids.flatten().tolist()
        kinds, prompts, layers, indices, whats = zip(*self.places, strict=True)
        names = self.texts(ids)
        table = pd.DataFrame(
            {
                "prompt": np.repeat(prompts, self.k),
                "kind": np.repeat(np.array(kinds, dtype=object), self.k),
                "layer": np.repeat(layers, self.k),
                "index": np.repeat(indices, self.k),
                "what": np.repeat(np.array(whats, dtype=object), self.k),
                "place": np.tile(np.arange(self.k), len(self.places)),
                "token": names,
                "token_id": ids,
                "probability": reading.top_probabilities.flatten().numpy(),
            }
        )
        lines = (_line(names[i : i + self.k]) for i in range(0, len(names), self.k))
        return table, dict(zip(self.places, lines, strict=True))


def _line(tokens: Sequence[str]) -> str:
    """Tokens in a row, each in quotes so that spaces show.

    >>> _line([" Mary", "s"])
    '‘ Mary’ ‘s’'
    """
    return " ".join(f"‘{token}’" for token in tokens)


def _head_table(
    vectors: WordVectors, spoken: Mapping[Place, str], tokens: list[list[str]]
) -> pd.DataFrame:
    """One row a head, in each prompt those that write most first."""
    rows = []
    for layer, found in vectors.heads.items():
        norms = found.vectors["output"].norm(dim=-1)
        for prompt, head in np.ndindex(*found.sources.shape):
            source = int(found.sources[prompt, head])
            row = {
                "prompt": prompt,
                "layer": layer,
                "head": head,
                "norm": float(norms[prompt, head]),
                "source": source,
                "source_token": tokens[prompt][source],
                "weight": float(found.weights[prompt, head]),
            }
            rows.append(
                row | {w: spoken.get(("head", prompt, layer, head, w), "") for w in OF_HEADS}
            )
    table = pd.DataFrame(rows)
    return table.sort_values(["prompt", "norm"], ascending=[True, False], ignore_index=True)


def _neuron_table(vectors: WordVectors, spoken: Mapping[Place, str]) -> pd.DataFrame:
    columns = ["prompt", "layer", "neuron", "activation", "norm", *OF_NEURONS]
    rows = [
        [n.prompt, n.layer, n.index, n.activation, n.norm]
        + [spoken.get(("neuron", n.prompt, n.layer, n.index, what), "") for what in OF_NEURONS]
        for n in vectors.neurons
    ]
    return pd.DataFrame(rows, columns=columns)


@torch.no_grad()
def _norm_table(model: Model, vectors: WordVectors, texts: _Texts, top_k: int) -> pd.DataFrame:
    """What enters and leaves the top k through each norm."""
    unembed = Unembedding(model)
    rows: list[dict[str, object]] = []
    for call in vectors.norms:
        before, after = unembed(call.before), unembed(call.after)
        rows += _changes(call.layer, call.site, call.name, before, after, texts, top_k)
    if model.spec.final_norm is not None:
        # Before the final norm there is only its scale, which changes no order.
        bare = vectors.final.float() / model.final_norm.scale(vectors.final)
        W, b = linear_map(
            model.module.get_submodule(model.spec.unembedding or ""), model.spec.d_model
        )
        before = bare.to(W.device) @ W.float() + b.float()
        after = unembed(vectors.final).to(W.device)
        name = model.spec.final_norm
        rows += _changes(model.n_layers - 1, "final", name, before, after, texts, top_k)
    columns = ["prompt", "layer", "site", "norm", "change", "token", "token_id"]
    return pd.DataFrame(rows, columns=[*columns, "place_before", "place_after"])


def _changes(
    layer: int, site: str, name: str, before: Tensor, after: Tensor, texts: _Texts, top_k: int
) -> Iterator[dict[str, object]]:
    """One row for each token that is among the first k of one and not of the other."""
    k = min(top_k, before.shape[-1])
    for prompt, (old, new) in enumerate(zip(before, after, strict=True)):
        tops = [x.topk(k).indices.tolist() for x in (old, new)]
        for change, mine, others in (("enters", tops[1], tops[0]), ("leaves", tops[0], tops[1])):
            for i in [i for i in mine if i not in others]:
                yield {
                    "prompt": prompt,
                    "layer": layer,
                    "site": site,
                    "norm": name,
                    "change": change,
                    "token": texts([i])[0],
                    "token_id": i,
                    "place_before": int((old > old[i]).sum()),
                    "place_after": int((new > new[i]).sum()),
                }
