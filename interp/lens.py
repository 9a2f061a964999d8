"""The lens: what the vocabulary says at every layer and position.

A residual vector in the middle of a model is unembedded as if it were the final one (logit lens), or
after an affine map to the final one: the least-squares one (ridge lens, `interp.ridge_lens`) or one
trained on the KL (tuned lens, `probes.lenses`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.affine_lens import AffineLens, cached_lens
from interp.errors import BadInput, Refused, unknown
from interp.lens_vectors import Rows, Where, check_stages, check_writes, vectors_of
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.ridge_lens import fit_ridge_lens
from interp.run.batch import Batch
from interp.sites import Site
from interp.unembedding import Unembedding

READABLE = (
    *("embed", "resid_pre", "resid_mid", "resid_post"),
    *("attn_out", "attn_write", "mlp_out", "mlp_write", "z"),
)
"""Sites that live in the residual stream; `z` stands for the write of each head, z W_O."""

LENSES = ("logit", "ridge", "tuned", "best")
FOLLOWS = ("model", "text")
CHUNK_BYTES = 24 << 20
"""Memory of the logits held at once; larger is no faster once a chunk has a hundred rows."""


@dataclass(frozen=True)
class Reading:
    """What residual vectors say, one number (or k) for each; all tensors on the CPU.

    Attributes:
        top_ids, top_probabilities: [... k], most likely first. entropy: nats.
        kl: KL(final ‖ lens), nats; None without a final residual.
        target_probabilities, target_ranks: of the shape of the targets; None without. Rank 0 is the
            most likely token; the rank counts the tokens with a higher logit.
    """

    top_ids: Int[Tensor, "*rows k"]
    top_probabilities: Float[Tensor, "*rows k"]
    entropy: Float[Tensor, "*rows"]
    kl: Float[Tensor, "*rows"] | None = None
    target_ids: Int[Tensor, "*rows_few"] | None = None
    target_probabilities: Float[Tensor, "*rows_few"] | None = None
    target_ranks: Int[Tensor, "*rows_few"] | None = None


@torch.no_grad()
def read(
    model: Model,
    residual: Float[Tensor, "*lens rows d_model"],
    *,
    final: Float[Tensor, "rows d_model"] | None = None,
    targets: Int[Tensor, "*rows_few"] | None = None,
    top_k: int = 5,
    chunk_bytes: int = CHUNK_BYTES,
) -> Reading:
    """Top tokens, entropy and distance to the final distribution of any residual vectors.

    q = softmax(unembed(x)), with the final norm, soft-cap and scale as the model applies them, in
    float32. Never give it a vector that was normed already (`hidden_states[-1]` of Hugging Face is).

    Args:
        residual: vectors to read, such as `torch.stack([cache["resid_post.3"], …])`.
        final: the model's final residuals before the final norm (`resid_post` of the last block);
            KL(final ‖ lens) is then given.
        targets: a token id for every row, or several [rows few]; without them and with `final`: the final top token.
        top_k: how many tokens to name.
        chunk_bytes: memory of one chunk of logits; all of them never exist at once.

    Returns: a Reading with the leading axes of `residual`.

    Raises:
        BadInput: top_k out of range. Refused: the model cannot be unembedded.

    >>> model = tiny_model()
    >>> run = model.run(torch.tensor([[5, 6, 7]]), capture=["resid_post"])
    >>> layers = run.cache["resid_post"][0].transpose(0, 1)  # [n_layers pos d_model]
    >>> reading = read(model, layers, final=layers[-1], top_k=2)
    >>> reading.top_ids.shape, reading.kl[-1].tolist()
    (torch.Size([2, 3, 2]), [0.0, 0.0, 0.0])
    >>> bool((reading.top_ids[-1, :, 0] == run.logits[0].argmax(-1)).all())
    True
    """
    unembed = Unembedding(model)
    d_vocab = model.spec.d_vocab or unembed(residual.reshape(-1, residual.shape[-1])[:1]).shape[-1]
    _check_top_k(top_k, d_vocab)
    *lead, n, d_model = residual.shape
    stack = residual.reshape(-1, n, d_model)
    size = max(1, min(n, chunk_bytes // (4 * d_vocab)))
    # Results have their place beforehand: small tensors kept from between freed chunks of logits
    # would hold the heap open (gigabytes at 30 layers x 256 tokens).
    found: dict[str, Tensor] = {}
    for start in range(0, n, size):
        rows = slice(start, start + size)
        chosen = None if targets is None else targets[rows].to(residual.device)
        end = None
        if final is not None:
            end = _End.of(unembed(final[rows]))
            chosen = end.top if chosen is None else chosen
        for place, x in enumerate(stack[:, rows]):
            for key, value in _numbers(unembed(x), end, chosen, top_k).items():
                if key not in found:
                    found[key] = torch.empty(len(stack), n, *value.shape[1:], dtype=value.dtype)
                found[key][place, rows] = value.cpu()
    return Reading(**{key: x.reshape(*lead, n, *x.shape[2:]) for key, x in found.items()})


@dataclass(frozen=True)
class _End:
    """The final distribution of some rows: probabilities, log Σ exp, and Σ p · logit."""

    p: Tensor
    lse: Tensor
    dot: Tensor
    top: Tensor

    @staticmethod
    def of(logits: Tensor) -> _End:
        lse = logits.logsumexp(-1)
        p = (logits - lse[:, None]).exp_()
        return _End(p, lse, torch.linalg.vecdot(p, logits), logits.argmax(-1))


def _numbers(
    logits: Tensor, end: _End | None, targets: Tensor | None, top_k: int
) -> dict[str, Tensor]:
    """The fields of a Reading for rows of logits [rows d_vocab].

    KL(p ‖ q) = Σ p (log p − log q) = (Σ p·l_p − lse_p) − (Σ p·l_q − lse_q); H(q) = lse_q − Σ q·l_q.
    """
    top = logits.topk(top_k)
    lse = logits.logsumexp(-1)
    out = {"top_ids": top.indices, "top_probabilities": (top.values - lse[:, None]).exp()}
    if targets is not None:
        at = logits.gather(-1, targets.reshape(len(targets), -1))
        # Counted in 32 bits: seven times quicker than a count in 64.
        above = [(logits > one[:, None]).sum(-1, dtype=torch.int32) for one in at.unbind(1)]
        out["target_ids"] = targets
        out["target_probabilities"] = (at - lse[:, None]).exp().reshape(targets.shape)
        out["target_ranks"] = torch.stack(above, dim=1).long().reshape(targets.shape)
    if end is not None:
        gap = (end.dot - torch.linalg.vecdot(end.p, logits)) + (lse - end.lse)
        out["kl"] = gap.clamp_min(0)  # below 0 by rounding only
    q = (logits - lse[:, None]).exp_()
    out["entropy"] = (lse - torch.linalg.vecdot(q, logits)).clamp_min(0)
    return out


def check_options(
    *,
    sites: Sequence[str | Site] = ("resid_post",),
    lens: str | AffineLens = "best",
    top_k: int = 5,
    follow: str = "model",
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if isinstance(lens, str) and lens not in LENSES:
        raise unknown("lens", lens, LENSES)
    if follow not in FOLLOWS:
        raise unknown("choice of follow", follow, FOLLOWS)
    if not sites:
        raise BadInput("no site to read: give at least one, such as 'resid_post'")
    for site in map(Site.parse, [sites] if isinstance(sites, (str, Site)) else sites):
        if site.name not in READABLE:
            raise BadInput(
                f"'{site}' is not in the residual stream: nothing unembeds it; readable sites are "
                f"{', '.join(READABLE)}"
            )
    _check_top_k(top_k, None)


def _check_top_k(top_k: int, d_vocab: int | None) -> None:
    if top_k < 1 or (d_vocab is not None and top_k > d_vocab):
        raise BadInput(f"top_k={top_k}: wanted 1 to {d_vocab or 'the size of the vocabulary'}")


def at_the_end(report: Report) -> pd.DataFrame:
    """Every layer's reading at the last position."""
    rows = report.table.loc[report.table["position"] == report.table["position"].max()]
    return rows[
        ["site", "layer", "top_token", "top_probability", "kl", "target_rank", "target_token"]
    ]


@analysis(
    name="lens",
    source="nostalgebraist 2020 (logit lens); Belrose et al. 2023 (affine translators)",
    example='interp lens smollm2-135m "The capital of France is"',
    figure="map",
    validate=check_options,
    summary=at_the_end,
)
def logit_lens(
    model: Model,
    prompts: str | Sequence[str] | Tensor | Batch,
    *,
    sites: str | Site | Sequence[str | Site] = ("resid_post",),
    lens: str | AffineLens = "best",
    top_k: int = 5,
    target: str | int | Tensor | None = None,
    follow: str = "model",
    positions: Sequence[int] | None = None,
    progress: bool | None = None,
) -> Report:
    """What every layer believes comes next at every position, and how far that is from the end.

    One forward; then each residual x_l is read as q = softmax(unembed(T_l x_l)), T_l the identity
    (logit lens) or the affine map of a ridge or tuned lens to the final residual. KL is
    KL(final ‖ lens) in nats.

    A reading says what the final layer would make of the vector, not what the model uses it for; a
    logit lens that reads nonsense may be looking in the wrong basis. A single write (`attn_write`,
    `mlp_write`, one head) is normed by itself: its direction is read, not its size. Only block
    inputs and outputs have such a map; every other site is read by the logit lens, whatever `lens`.

    Args:
        prompts: text, texts, token ids [batch pos] or a Batch. One token is enough.
        sites: names or Sites, with or without a layer: `resid_pre`, `resid_mid`, `resid_post`,
            `embed`, `attn_write`, `mlp_write`, `attn_out`, `mlp_out`; `z`, `z.5`, `z.5.1` for what
            heads write.
        lens: "logit"; "ridge" (fitted now if it is not in the cache: minutes); "tuned" (from the
            cache, where `interp tune-lens` puts it); "best": the tuned lens if it is in the cache,
            else the ridge lens if that is, else the logit lens; or an AffineLens.
        top_k: how many tokens to name at each place.
        target: the token whose rank and probability are followed: one token of text (mind its leading
            space), an id, or ids shaped like the prompts.
        follow: without a target: "model", the model's own top token at the position; "text", the
            token that comes next in the prompt (at the last position again the model's).
        positions: only these, from the first token on; negative ones count from each prompt's end.
        progress: show a progress bar while a lens is fitted.

    Returns: a Report with table "lens", one row a (prompt, site, layer, head, position): top_token,
        top_probability, entropy (nats), kl (nats), target_token, target_probability, target_rank (0 is
        the most likely). head is −1 except for heads. Table "top" names the k tokens of each row; with
        a ridge or tuned lens, table "held_out" gives the KL of that and of the simpler lenses on text it
        was not fitted on.

    Raises:
        BadInput: unknown site, lens or target; no tuned lens in the cache; a target of several
            tokens; a position out of range. Refused: the model cannot be unembedded, or has not got
            the site.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al. 2023, arXiv
    2303.08112 (tuned lens). The ridge lens is ours.

    >>> report = logit_lens(tiny_model(), torch.tensor([[5, 6, 7]]), lens="logit", top_k=2)
    >>> last = report.table.query("layer == 1")
    >>> len(report.table), last["kl"].tolist(), last["target_rank"].tolist()
    (6, [0.0, 0.0, 0.0], [0, 0, 0])
    """
    started = time.perf_counter()
    sites = [sites] if isinstance(sites, (str, Site)) else list(sites)
    check_options(sites=sites, lens=lens, top_k=top_k, follow=follow)
    Unembedding(model)
    if model.spec.d_vocab is None:
        raise Refused(
            f"{model.id} reads no tokens, and the table of a lens has one at every position; "
            "interp.lens.read gives what any of its residual vectors says"
        )
    _check_top_k(top_k, model.spec.d_vocab)
    parsed = [Site.parse(site) for site in sites]
    check_writes(model, parsed)
    check_stages(model, parsed)
    batch = model.as_batch(prompts)
    rows = Rows.of(batch, positions)
    targets = _targets(model, batch, rows, target, follow)
    options = {
        "sites": [str(site) for site in parsed],
        "lens": lens if isinstance(lens, str) else "given",
        "top_k": top_k,
        "target": target.tolist() if isinstance(target, Tensor) else target,
        "follow": follow,
        "positions": None if positions is None else list(positions),
    }
    meta = provenance(model, options=options, seed=0)
    learnt = _learnt(model, lens, meta["model"]["sha256"], progress)
    last = Site("resid_post", model.n_layers - 1)
    cache = model.run(batch, capture=[*parsed, last], logits=False).cache
    final = rows.pick(cache[last])
    if targets is not None and follow == "text" and target is None:
        targets = _fill_last(model, targets, final)

    tables, tops = [], []
    for where, vectors in vectors_of(model, cache, parsed, rows):
        reading = read(
            model,
            _translated(learnt, where, vectors, model.n_layers),
            final=final,
            targets=targets,
            top_k=top_k,
        )
        table, top = _tables(model, where, reading, rows, batch, learnt)
        tables.append(table)
        tops.append(top)
    found = {
        "lens": pd.concat(tables, ignore_index=True),
        "top": pd.concat(tops, ignore_index=True),
    }
    meta["prompts"] = [
        {"title": f"prompt {i}", "tokens": model.tokens(ids)} for i, ids in enumerate(rows.prompts)
    ]
    meta["kl"] = "KL(final ‖ lens), nats"
    meta["notes"] = list(model.notes)
    meta["lens"] = {"kind": "logit"}
    if learnt is not None:
        found["held_out"] = learnt.held_out
        about = {key: value for key, value in learnt.about.items() if key != "held_out"}
        meta["lens"] = about | {"kind": learnt.kind}
        if 0 in rows.position:
            meta["notes"].append(
                f"The {learnt.kind} lens is not fitted at the first position: its readings there "
                "extrapolate."
            )
    meta["wall_time_s"] = round(time.perf_counter() - started, 2)
    return Report("lens", found, {}, meta)


# --- targets --------------------------------------------------------------------------------------


def _targets(
    model: Model, batch: Batch, rows: Rows, target: str | int | Tensor | None, follow: str
) -> Tensor | None:
    """A target id for every row; −1 where the text has no next token; None: the final top token."""
    if target is None:
        if follow == "model":
            return None
        pairs = zip(rows.prompt, rows.position, strict=True)
        following = ([*rows.prompts[i], -1][p + 1] for i, p in pairs)
        return torch.tensor(list(following))
    if isinstance(target, Tensor):
        if target.shape != batch.ids.shape:
            raise BadInput(
                f"target has shape {list(target.shape)}, the prompts have {list(batch.ids.shape)}: "
                "give one id for every position"
            )
        ids = rows.pick(target.to(batch.ids.device)).cpu()
        for i in (int(ids.min()), int(ids.max())):
            model.token_id(i)
        return ids
    return torch.full((len(rows.prompt),), model.token_id(target))


def _fill_last(model: Model, targets: Tensor, final: Tensor) -> Tensor:
    """Targets with the model's own top token where the text has no next one."""
    missing = targets < 0
    if not missing.any():
        return targets
    own = read(model, final[missing.to(final.device)], top_k=1).top_ids[:, 0]
    return targets.masked_scatter(missing, own)


# --- the lens that is asked for -----------------------------------------------------------------


def _learnt(
    model: Model, lens: str | AffineLens, sha256: str, progress: bool | None
) -> AffineLens | None:
    """The affine lens that is asked for; None for the logit lens."""
    if isinstance(lens, AffineLens):
        if lens.about["model"]["sha256"] != sha256:
            raise BadInput(
                f"this lens was fitted on {lens.about['model']['id']} with weights "
                f"{lens.about['model']['sha256'][:16]}, {model.id} has {sha256[:16]}: fit one for it"
            )
        return lens
    kinds = {"logit": (), "best": ("tuned", "ridge")}.get(lens, (lens,))
    for kind in kinds:
        if (found := cached_lens(model, kind, sha256)) is not None:
            return found
    if lens == "tuned":
        raise BadInput(
            f"no tuned lens of {model.id} is in the cache: train one with `interp tune-lens`, or "
            "give lens='ridge', which is fitted at once"
        )
    return fit_ridge_lens(model, progress=progress) if lens == "ridge" else None


def _translated(
    learnt: AffineLens | None, where: Where, vectors: Tensor, n_layers: int
) -> Float[Tensor, "lens rows d_model"]:
    inputs = where.inputs
    if learnt is None or inputs is None:
        return vectors
    return torch.stack([learnt(x, layer) for x, layer in zip(vectors, inputs, strict=True)])


# --- tables -------------------------------------------------------------------------------------


def _tables(
    model: Model,
    where: Where,
    reading: Reading,
    rows: Rows,
    batch: Batch,
    learnt: AffineLens | None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tidy rows of one stack: (one a vector, one a vector and place in its top k)."""
    n, k = len(rows.prompt), reading.top_ids.shape[-1]
    layers, heads = np.array(where.places).T
    text = _Words(model)
    key = {
        "prompt": np.tile(rows.prompt, len(layers)),
        "site": where.site,
        "layer": layers.repeat(n),
        "head": heads.repeat(n),
        "position": np.tile(rows.position, len(layers)),
    }
    ids = rows.pick(batch.ids).cpu().numpy()
    top_ids, top_p = reading.top_ids.flatten().numpy(), reading.top_probabilities.flatten().numpy()
    assert reading.kl is not None and reading.target_ids is not None
    assert reading.target_probabilities is not None and reading.target_ranks is not None
    read_by = "logit" if learnt is None or where.inputs is None else learnt.kind
    lens = pd.DataFrame(
        key
        | {
            "token": text(np.tile(ids, len(layers))),
            "lens": read_by,
            "top_token": text(top_ids[::k]),
            "top_probability": top_p[::k],
            "entropy": reading.entropy.flatten().numpy(),
            "kl": reading.kl.flatten().numpy(),
            "target_token": text(reading.target_ids.flatten().numpy()),
            "target_id": reading.target_ids.flatten().numpy(),
            "target_probability": reading.target_probabilities.flatten().numpy(),
            "target_rank": reading.target_ranks.flatten().numpy(),
        }
    )
    top = lens[list(key)].loc[lens.index.repeat(k)].reset_index(drop=True)
    top = top.assign(
        place=np.tile(np.arange(k), len(lens)),
        token=text(top_ids),
        token_id=top_ids,
        probability=top_p,
    )
    return lens, top


class _Words:
    """Token texts, each id decoded once."""

    def __init__(self, model: Model):
        self.model = model

    def __call__(self, ids: np.ndarray) -> list[str]:
        different, back = np.unique(ids, return_inverse=True)
        words: Mapping[int, str] = dict(enumerate(self.model.tokens(different.tolist())))
        return [words[i] for i in back]
