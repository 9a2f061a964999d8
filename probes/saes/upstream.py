"""Where a feature's direct feature attribution comes from: tokens, MLPs and earlier features, position by position.

With patterns and norm scales as they were, v is linear in the residual stream, and the stream is a sum
of writes. A feature's pre-activation is then a sum over everything written before it at the positions
that its heads read, and an earlier feature among the writers can be taken apart in the same way.

Source: Kissane et al. 2024, "Interpreting attention layer outputs with sparse autoencoders", recursive
direct feature attribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.direction import places_of
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.models.weights import linear_map
from interp.run.cache import Cache
from probes.saes.attention import (
    Place,
    Prompt,
    attention_of,
    before_norm,
    feature_ids,
    pre_activation_bias,
    write_sites,
)
from probes.saes.model import SAE
from probes.saes.sparse import products

COLUMNS = [
    "row", "parent", "depth", "target", "source", "token", "component", "layer", "head",
    "feature", "activation", "contribution",
]  # fmt: skip


@torch.no_grad()
def recursive_attribution(
    model: Model,
    sae: SAE,
    prompt: Prompt,
    feature: int,
    *,
    position: int = -1,
    upstream: Sequence[SAE] = (),
    depth: int = 1,
    branch: int = 5,
) -> pd.DataFrame:
    """A feature's pre-activation as a sum over everything written before it at the positions it reads.

        pre_i(t) = Σ_s r_s · (embed_s + Σ_{l<L} attn_l,s + mlp_l,s) + Σ_s b_s + bias_i
        r_s = Σ_h A_h[t, s] W_V^h W_enc[h, i] / σ_s        (σ_s: the scale of the norm before attention)

    with A and σ as they were in the run. Attention of a layer that has an SAE in `upstream` is a sum of
    its features, its error and its b_dec; of another layer, of its heads. With depth > 1 the `branch`
    earlier features of the largest contributions are taken apart in turn, in proportion: the rows under
    one sum to it.

    It ignores QK: why a head attends to s, and what a write does to any pattern or norm scale, is not in
    it. Which features are active is held too. MLPs are leaves, taken whole.

    Args:
        prompt: one prompt.
        feature: of `sae`. position: where its pre-activation is explained, counted over real tokens.
        upstream: SAEs of z of earlier layers, at most one a layer.
        depth: how many features deep; at least 1. branch: how many are followed from each.

    Returns: one row a term: row; parent (the row that it is part of, −1 for the asked feature), depth;
        target, source (positions), token (at source); component; layer, head, feature, activation
        (where they apply); contribution, in units of the asked feature's pre-activation.
        Components: "embed", "mlp", "head", "attn_bias" (b_O), "feature", "error", "sae_bias" (b_dec),
        "v_bias" (biases between stream and v; of the reading layer), "encoder_bias" (of the reading
        feature). Rows with parent −1 sum to the pre-activation; without "encoder_bias" and by source,
        to `direct_feature_attribution`.

    Raises:
        BadInput: several prompts, SAEs of other sites or later layers, no such feature or position.
        Refused: v is not linear in the stream here (latent attention), or writes were not verified.

    Source: Kissane et al. 2024, recursive direct feature attribution.

    >>> from probes.saes.model import SAEConfig
    >>> early, late = (SAE(SAEConfig(32, 64, k=4, site=f"z.{i}", heads=4), seed=i) for i in (0, 1))
    >>> ids = torch.tensor([[5, 6, 7]])
    >>> table = recursive_attribution(tiny_model(), late, ids, 3, upstream=[early])
    >>> sorted(table["component"].unique())[:4]
    ['attn_bias', 'embed', 'encoder_bias', 'error']
    """
    if depth < 1 or branch < 1:
        raise BadInput(f"depth={depth}, branch={branch}: wanted at least 1 of both")
    feature = int(feature_ids(sae, [feature])[0])
    layer, heads = attention_of(sae, model)
    saes = _by_layer(model, layer, upstream)
    batch = model.as_batch(prompt)
    if batch.size != 1:
        raise BadInput(
            f"{batch.size} prompts were given: a feature is followed through one at a time"
        )
    target = int(places_of(batch, position)[0])
    sites = ["embed", f"resid_pre.{layer}", f"pattern.{layer}", f"v.{layer}"]
    for earlier in range(layer):
        block = model.spec.blocks[earlier]
        if block.attn_write is not None:
            sites += [f"z.{earlier}", *write_sites(model, earlier)]
        if block.mlp_write is not None:
            model.layers_with("mlp_write")
            sites.append(f"mlp_write.{earlier}")
    for earlier in saes:
        sites += [f"resid_pre.{earlier}", f"pattern.{earlier}", f"v.{earlier}"]
    model.require_sum("following a feature upstream")
    model.layers_with("attn_write")
    cache = model.run(batch, capture=dict.fromkeys(sites), logits=False).cache
    tokens = model.tokens(batch.ids[0].tolist())
    tree = _Tree(model, saes, cache, tokens)
    tree.expand(sae, (layer, heads), feature, target, 1.0, parent=-1, depth=1)
    for level in range(1, depth):
        for row in tree.strongest(level, branch):
            tree.follow(row, level + 1)
    return pd.DataFrame(tree.rows, columns=COLUMNS).astype({"head": "Int64", "feature": "Int64"})


@dataclass
class _Tree:
    """The rows found so far, and what is needed to take another feature apart."""

    model: Model
    saes: dict[int, tuple[SAE, tuple[int, ...]]]
    cache: Cache
    tokens: list[str]
    rows: list[tuple] = field(default_factory=list)

    def expand(
        self,
        sae: SAE,
        place: Place,
        feature: int,
        target: int,
        weight: float,
        parent: int,
        depth: int,
    ) -> None:
        """Rows for the terms of weight × the pre-activation of a feature at `target`."""
        model, cache = self.model, self.cache
        layer = place[0]
        r, v_bias = _directions(model, cache, sae, place, feature, target)
        r, v_bias = r * weight, v_bias * weight
        # A source that no head attends to has no term: later positions, those out of a window.
        read = r.any(-1).nonzero()[:, 0].tolist()
        about = parent, depth, target

        def add(component: str, values: Tensor, layer: int | None, head: int | None = None) -> None:
            every = values.tolist()
            for source in read:
                self._add(about, source, component, layer, head, None, None, every[source])

        add("embed", (cache["embed"][0].float() * r).sum(-1), None)
        for earlier in range(layer):
            block = model.spec.blocks[earlier]
            if block.mlp_write is not None:
                add("mlp", (cache[f"mlp_write.{earlier}"][0].float() * r).sum(-1), earlier)
            if block.attn_write is not None:
                self._attention(earlier, r, add, about, set(read))
        add("v_bias", v_bias, layer)
        bias = float(pre_activation_bias(sae)[feature]) * weight
        self._add(about, target, "encoder_bias", layer, None, None, None, bias)

    def _attention(
        self, layer: int, r: Tensor, add: Callable[..., None], about: tuple, read: set[int]
    ) -> None:
        """Rows for what the attention of a layer wrote at every source: heads, or an SAE's features."""
        model, block = self.model, self.model.spec.blocks[layer]
        assert block.attn_write is not None
        pulled = before_norm(model, self.cache, layer, r, 0)
        bias = (model.b_O(layer).float() * pulled).sum(-1)
        if not block.direct:
            norm_bias = model.norm(block.attn_write.module).bias.float()
            bias = bias + (r @ norm_bias) * block.attn_write.scale
        add("attn_bias", bias, layer)
        g = torch.einsum("sm,hdm->shd", pulled, model.W_O(layer).float())
        z = self.cache[f"z.{layer}"][0].float()
        sae, own = self.saes.get(layer, (None, ()))
        heads = list(own)
        for head, values in enumerate((z * g).sum(-1).unbind(1)):
            if head not in heads:
                add("head", values, layer, head)
        if sae is None:
            return
        x, g = (y[:, heads].flatten(1).to(sae.encoder) for y in (z, g))
        codes = sae.codes(x)
        parts = codes.value * products(codes, g, sae.W_dec)
        columns = (codes.row, codes.latent, codes.value, parts)
        for source, *rest in zip(*(column.tolist() for column in columns), strict=True):
            if rest[1] > 0 and source in read:
                self._add(about, source, "feature", layer, None, *rest)
        add("error", ((x - sae.decode(codes)) * g).sum(-1), layer)
        add("sae_bias", g @ sae.b_dec, layer)

    def follow(self, row: tuple, depth: int) -> None:
        """Take apart the feature of a row: its activation is linear in the pre-activation."""
        (number, _, _, _, source, _, _, layer, _, feature, activation, contribution) = row
        sae, heads = self.saes[layer]
        share = contribution / activation  # of the asked pre-activation, a unit of this feature
        slope, rest = 1.0, 0.0
        if sae.config.activation == "gated":
            slope = float(sae.r_mag[feature].exp())
            rest = float(sae.b_mag[feature]) - slope * float(sae.b_enc[feature])
        self.expand(sae, (layer, heads), feature, source, share * slope, number, depth)
        if rest:
            about = number, depth, source
            self._add(about, source, "encoder_bias", layer, None, None, None, share * rest)

    def strongest(self, depth: int, branch: int) -> list[tuple]:
        """Of every parent's rows, the features of the largest contributions of either sign."""
        by_parent: dict[int, list[tuple]] = {}
        for row in self.rows:
            if row[2] == depth and row[6] == "feature":
                by_parent.setdefault(row[1], []).append(row)
        return [
            row
            for rows in by_parent.values()
            for row in sorted(rows, key=lambda row: -abs(row[-1]))[:branch]
        ]

    def _add(self, about: tuple, source: int, component: str, *rest: object) -> None:
        number = len(self.rows)
        self.rows.append((number, *about, source, self.tokens[source], component, *rest))


def _by_layer(
    model: Model, layer: int, upstream: Sequence[SAE]
) -> dict[int, tuple[SAE, tuple[int, ...]]]:
    """The upstream SAEs and their heads by layer, checked."""
    found: dict[int, tuple[SAE, tuple[int, ...]]] = {}
    for other in upstream:
        own, heads = attention_of(other, model)
        if own >= layer:
            raise BadInput(
                f"upstream SAE of layer {own}: this feature, of layer {layer}, reads earlier layers"
            )
        if own in found:
            raise BadInput(f"two upstream SAEs are of layer {own}: give one a layer")
        found[own] = other, heads
    return found


def _directions(
    model: Model, cache: Cache, sae: SAE, place: Place, feature: int, target: int
) -> tuple[Float[Tensor, "source d_model"], Float[Tensor, " source"]]:
    """What the feature's pre-activation at `target` reads of the stream at each source, and v's biases."""
    layer, heads = place
    block = model.spec.blocks[layer]
    not_linear = (
        f"layer {layer} of {model.id}: v is not the norm of the residual stream through one linear "
        "layer, so a feature's attribution cannot be carried further up; direct_feature_attribution works"
    )
    if block.v is None:
        raise Refused(not_linear)
    W, b = linear_map(model.module.get_submodule(block.v.module), model.spec.d_model, model.device)
    if len(W) != model.spec.d_model:
        raise Refused(not_linear)
    W_V = model.W_V(layer).float()
    norm = model.norm(None if block.v.input == "resid_pre" else block.v.input)
    columns = block.v.columns.to(W.device)
    b_V = (norm.bias.float() @ W.float() + b.float())[columns]  # [kv_head d_head]
    groups = [model.spec.kv_group(layer, head) for head in heads]
    encoder = sae.encoder[feature].detach().float().unflatten(0, (len(heads), -1)).to(W.device)
    weights = cache[f"pattern.{layer}"][0, list(heads), target].float()  # [head source]
    x = cache[f"resid_pre.{layer}"][0]
    read = torch.einsum("hs,hmd,hd->sm", weights, W_V[groups], encoder)
    r = norm.centre(read) / norm.scale(x)
    v_bias = weights.T @ (b_V[groups] * encoder).sum(-1)
    made = (r * x.float()).sum(-1) + v_bias
    v = cache[f"v.{layer}"][0][:, groups].float()
    wanted = torch.einsum("hs,shd,hd->s", weights, v, encoder)
    if not torch.allclose(made, wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max()) + 1e-6):
        raise Refused(not_linear)
    return r, v_bias
