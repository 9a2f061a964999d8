"""What a head is by its weights alone: W_QK and W_OV, as factors whose product is never formed.

W_Q and W_K are read by asking: every layer is given each axis of the residual stream, alone in a prompt of one
token, and its q and k are their rows, so fused projections, gains of norms and rotary positions need no case of
their own. With rotary positions the QK circuit depends on how far the key lies back, W_Q R_Δ W_Kᵀ: R_Δ is solved
for from queries of some random vectors at both positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.heads.low_rank import Circuit
from circuits.heads.own_token import written
from interp.errors import Refused
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.edits import Edit

DISTANCES = (0, 1, 16)
"""How far back the key lies for which QK circuits are compared."""
ROWS_PER_FORWARD = 512
TRIED = 8
"""Random vectors on which the rows that were read are tried."""
LINEAR = {torch.float32: 1e-3, torch.float64: 1e-5}
"""How far a query of a random vector may be, in relative length, from what its axes' queries sum to; rows are kept
in float32."""
COARSE = 5e-2
"""The same in half precision."""


@dataclass(frozen=True)
class HeadWeights:
    """QK and OV circuits by layer, and why a layer has none."""

    qk: dict[int, Circuit]
    ov: dict[int, Circuit]
    notes: tuple[str, ...] = ()

    @property
    def kinds(self) -> Iterator[tuple[str, dict[int, Circuit]]]:
        """("qk", circuits by layer), ("ov", …)."""
        yield "qk", self.qk
        yield "ov", self.ov


@torch.no_grad()
def head_weights(model: Model) -> HeadWeights:
    """Both circuits of every head of every layer that has them as weights.

    >>> weights = head_weights(tiny_model())
    >>> weights.qk[0].left.shape, weights.ov[1].right.shape
    (torch.Size([3, 4, 32, 8]), torch.Size([4, 32, 8]))

    Raises:
        Refused: no layer has either.
    """
    notes = []
    ov = {}
    for layer in model.spec.attention_layers:
        try:
            ov[layer] = ov_circuit(model, layer)
        except Refused as refusal:
            notes.append(f"No OV circuit: {refusal}")
    try:
        qk, refused = qk_circuits(model)
        notes += refused
    except Refused as refusal:
        qk = {}
        notes.append(f"No QK circuit: {refusal}")
    if not qk and not ov:
        raise Refused(f"{model.id} has no head whose weights can be read: {notes[0]}")
    return HeadWeights(qk, ov, tuple(notes))


def ov_circuit(model: Model, layer: int) -> Circuit:
    """W_OV = W_V W_O, the input norm's gain and the write's scale folded in.

    Where what a block adds is not known (a norm after adding) W_O is taken as it is.
    """
    block = model.spec.blocks[layer]
    groups = [model.spec.kv_group(layer, head) for head in range(block.n_heads)]
    try:
        W_O = written(model, layer)
    except Refused:
        W_O = model.W_O(layer)
    W_V = model.W_V(layer)[groups].float().cpu()
    return Circuit(W_V[None], W_O.float().cpu().transpose(-1, -2))


def qk_circuits(model: Model) -> tuple[dict[int, Circuit], list[str]]:
    """W_QK = W_Q R_Δ W_Kᵀ of every layer at three distances, and what a reader should know of them.

    A residual vector divided by its norm's scale can be multiplied with them; with LayerNorm they are larger
    than the checkpoint's by d_model / (d_model − 1), the scale of one axis. Biases are left out.

    Where q and k are normalised (Qwen 3, Gemma 3, OLMo 2), a row tells its direction and not its length. How
    much longer row i is than the query of a reference r is read from the query of e_i + r, which is their sum
    but for its length. W is then known up to a factor a head, and is given the size that its normalised
    queries have on random vectors.

    Raises:
        Refused: queries are not seen, or the model does not read tokens.
    """
    layers = model.layers_with("q")
    if model.spec.embedding is None:
        raise Refused(
            f"{model.id} does not read tokens: its queries are not asked for axis by axis"
        )
    d_model, some = model.spec.d_model, max(model.spec.d_head, TRIED) + TRIED
    tried = torch.randn(some, d_model, generator=torch.Generator().manual_seed(0))
    tried = tried / tried.norm(dim=1, keepdim=True)
    seen = _answers(model, layers, tried)
    back = _answers(model, layers, -tried[:TRIED])
    constant = {key: (seen[key][:TRIED] + rows).mean(0) / 2 for key, rows in back.items()}
    odd = {key: (seen[key][:TRIED] - rows) / 2 for key, rows in back.items()}
    axes = _answers(model, layers, torch.eye(d_model))
    maps = {key: rows - constant[key] for key, rows in axes.items()}
    allowed = LINEAR.get(model.dtype, COARSE)

    def wrong(alone: bool) -> set[int]:
        made = {key: torch.einsum("nm,mhd->nhd", tried[:TRIED], maps[key]) for key in odd}
        return {key[0] for key, rows in odd.items() if _unlike(rows, made[key], alone) > allowed}

    notes, normed, failed = [], wrong(alone=False), set()
    if normed:
        maps |= _unnormalised(model, sorted(normed), maps, odd, tried[0])
        failed = wrong(alone=True)
    turns: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for distance in DISTANCES[1:]:
        there = _answers(model, layers, tried, at=distance)
        for layer in layers:
            here = seen[layer, "q"].transpose(0, 1).double()
            turned = there[layer, "q"].transpose(0, 1).double()
            turn = torch.linalg.lstsq(here, turned, driver="gelsd").solution
            if _unlike(turned.transpose(0, 1), (here @ turn).transpose(0, 1), alone=True) > allowed:
                failed.add(layer)
            turns[layer].append(turn.float())
    if failed:
        notes.append(
            f"No QK circuit in layers {sorted(failed)}: q or k is not a linear map of the stream, nor a "
            "normalised one (a latent, say)"
        )
    if kept := sorted(normed - failed):
        notes.append(
            f"q and k of layers {kept} are normalised: W_QK is known up to a factor a head"
        )
    found = {}
    for layer in layers:
        if layer not in failed:
            block = model.spec.blocks[layer]
            groups = [model.spec.kv_group(layer, head) for head in range(block.n_heads)]
            queries = maps[layer, "q"].transpose(0, 1)
            left = torch.stack([queries, *(queries @ turn for turn in turns[layer])])
            found[layer] = Circuit(left, maps[layer, "k"][:, groups].transpose(0, 1))
    return found, notes


Rows = dict[tuple[int, str], Float[Tensor, "n heads d_head"]]
"""What directions of the stream are mapped to, by layer and "q" or "k"."""


def _answers(
    model: Model, layers: list[int], directions: Float[Tensor, "n d_model"], at: int = 0
) -> Rows:
    """q and k of every direction, alone in a prompt of one token at position `at`.

    Directions are put in √d_model times as long (a norm's scale of a unit vector is then 1), and answers shrunk
    by it again.
    """
    size = model.spec.d_model**0.5
    last = at if model.spec.n_ctx is None else model.spec.n_ctx - 1
    parts: dict[tuple[int, str], list[Tensor]] = {}
    for chunk in directions.split(ROWS_PER_FORWARD):
        given = (chunk * size).to(model.device, model.dtype)[:, None]
        edits = [Edit.patch(f"resid_pre.{layer}", given) for layer in layers]
        ids = torch.zeros(len(chunk), 1, dtype=torch.long)
        positions = torch.full_like(ids, min(at, last))
        batch = Batch({"input_ids": ids, "position_ids": positions}, torch.ones_like(ids).bool())
        run = model.run(batch, capture=["q", "k"], edits=edits, logits=False)
        for layer in layers:
            for what in ("q", "k"):
                rows = run.cache[f"{what}.{layer}"][:, 0].float().cpu() / size
                parts.setdefault((layer, what), []).append(rows)
    return {key: torch.cat(rows) for key, rows in parts.items()}


def _unnormalised(
    model: Model, layers: list[int], maps: Rows, odd: Rows, reference: Float[Tensor, " d_model"]
) -> Rows:
    """Rows with their lengths: α/β times the row, where q(e_i + r) = α q(e_i) + β q(r)."""
    found = {}
    for key, both in _answers(model, layers, torch.eye(len(reference)) + reference).items():
        row, other = maps[key].double(), odd[key][0].double()
        basis = torch.stack([row, other.expand_as(row)], dim=-1)
        parts = torch.linalg.lstsq(basis, both.double()[..., None], driver="gelsd").solution[..., 0]
        length = parts[..., 0] / parts[..., 1].clamp_min(1e-6)
        size = (row * length[..., None]).square().sum((0, 2)).sqrt().clamp_min(1e-12)
        usual = odd[key].double().norm(dim=-1).mean(0) * len(reference) ** 0.5
        found[key] = (row * (length * usual / size)[..., None]).float()
    return found


def _unlike(
    seen: Float[Tensor, "n heads d_head"], made: Float[Tensor, "n heads d_head"], alone: bool
) -> float:
    """Largest relative difference of a vector's rows, all heads (or each alone) first put to the same length.

    The scale of the stream's norm differs from vector to vector and is the same for all heads.
    """
    over = (2,) if alone else (1, 2)
    squares = made.square().sum(over, keepdim=True).clamp_min(1e-30)
    size = seen.norm(dim=over)
    error = (seen - (seen * made).sum(over, keepdim=True) / squares * made).norm(dim=over)
    # a head without queries has none to get wrong
    return float((error / size.clamp_min(1e-6 * float(size.max()) + 1e-30)).max())
