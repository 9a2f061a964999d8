"""A Model's weights in TransformerLens' layout: `W_Q` [n_layers n_heads d_model d_head] and so on."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp.block_norms import BlockNorms, block_norms
from interp.errors import Refused
from interp.models.model import Model
from interp.models.weights import FrozenNorm, linear_map
from interp.projections import Projections
from interp.transformer_lens_parts import Block, Config, Embed, Norm, Unembed

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix


class Weights:
    """Weights of a Model by TransformerLens' names, stacked over layers and by block.

    Weights are the checkpoint's own, as with a bridge outside compatibility mode: no norm gain is
    folded in and nothing is centred. `tokens_to_residual_directions` alone has the final norm's gain in
    it, so that `cache.logit_attrs` of a full decomposition sums to the logit without the bias.

    What their caches call head results is z W_O: where a norm stands behind attention (Gemma 2, OLMo 2),
    heads sum to `attn.hook_out` and not to `hook_attn_out`, in their bridge as here;
    `circuits.attribution` carries each head through that norm.

    Attributes:
        model: the Model. cfg: n_layers, n_heads, n_key_value_heads, d_model, d_head, d_mlp, d_vocab,
            n_ctx, normalization_type, … blocks: `blocks[3].attn.W_Q`, `blocks[3].mlp.W_out`.
    """

    def __init__(self, model: Model):
        self.model = model
        spec = model.spec
        has_norm = spec.final_norm is not None and not spec.readout
        kind = "LN" if has_norm and model.final_norm.centred else "RMS"
        self.cfg = Config(
            model.module,
            model_name=model.id,
            n_layers=model.n_layers,
            n_heads=spec.n_heads,
            n_key_value_heads=spec.n_kv_heads,
            d_model=spec.d_model,
            d_head=spec.d_head,
            d_mlp=max((block.d_mlp for block in spec.blocks), default=0),
            d_vocab=spec.d_vocab,
            n_ctx=spec.n_ctx,
            attn_only=all(block.mlp_write is None for block in spec.blocks),
            normalization_type=kind if has_norm else None,
            final_rms=has_norm and kind == "RMS",
            device=model.device,
            dtype=model.dtype,
        )
        self.blocks = [Block(self, layer) for layer in range(model.n_layers)]

    @cached_property
    def projections(self) -> Projections:
        """Where q, k and v come from, found by a code in every column of the layers before attention."""
        return Projections(self.model.module, self.model.spec)

    # --- weights -----------------------------------------------------------------------------------

    def _stacked(self, part: str, name: str) -> Tensor:
        layers = range(self.model.n_layers) if part == "mlp" else self.model.layers_with("z")
        tensors = [getattr(getattr(self.blocks[layer], part), name) for layer in layers]
        if len({tensor.shape for tensor in tensors}) != 1:
            raise Refused(
                f"layers of {self.model.id} have no one shape of {name}: read blocks[layer].{part}.{name}"
            )
        return torch.stack([tensor.to(self.model.device) for tensor in tensors])

    @property
    def W_Q(self) -> Float[Tensor, "n_layers n_heads d_model d_head"]:
        """Query projections of all layers."""
        return self._stacked("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "n_layers n_kv_heads d_model d_head"]:
        """Key projections, one a key/value head, as in TransformerLens."""
        return self._stacked("attn", "W_K")

    @property
    def W_V(self) -> Float[Tensor, "n_layers n_kv_heads d_model d_head"]:
        """Value projections, one a key/value head, as in TransformerLens."""
        return self._stacked("attn", "W_V")

    @property
    def W_O(self) -> Float[Tensor, "n_layers n_heads d_head d_model"]:
        """Output projections."""
        return self._stacked("attn", "W_O")

    @property
    def b_Q(self) -> Float[Tensor, "n_layers n_heads d_head"]:
        """Query biases; zeros where there are none, as with every bias here."""
        return self._stacked("attn", "b_Q")

    @property
    def b_K(self) -> Float[Tensor, "n_layers n_kv_heads d_head"]:
        """Key biases."""
        return self._stacked("attn", "b_K")

    @property
    def b_V(self) -> Float[Tensor, "n_layers n_kv_heads d_head"]:
        """Value biases."""
        return self._stacked("attn", "b_V")

    @property
    def b_O(self) -> Float[Tensor, "n_layers d_model"]:
        """Biases of the output projections."""
        return self._stacked("attn", "b_O")

    @property
    def W_in(self) -> Float[Tensor, "n_layers d_model d_mlp"]:
        """What the neurons read; in a gated MLP the ungated half."""
        return self._stacked("mlp", "W_in")

    @property
    def W_gate(self) -> Float[Tensor, "n_layers d_model d_mlp"] | None:
        """What the gates read; None where the MLP has no gate."""
        if self.blocks[0].mlp.W_gate is None:
            return None
        return self._stacked("mlp", "W_gate")

    @property
    def W_out(self) -> Float[Tensor, "n_layers d_mlp d_model"]:
        """What the neurons write."""
        return self._stacked("mlp", "W_out")

    @property
    def b_in(self) -> Float[Tensor, "n_layers d_mlp"]:
        """Biases of the neurons."""
        return self._stacked("mlp", "b_in")

    @property
    def b_out(self) -> Float[Tensor, "n_layers d_model"]:
        """Biases of the MLP outputs."""
        return self._stacked("mlp", "b_out")

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding."""
        return self.model.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding."""
        return self.model.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Bias of the unembedding."""
        self.W_U  # noqa: B018 -- refuses where there is no unembedding
        spec = self.model.spec
        head = self.model.module.get_submodule(spec.unembedding or "")
        return linear_map(head, spec.d_model, self.model.device)[1]

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of every head, [n_layers n_heads d_model d_model], kept as its factors."""
        from transformer_lens import FactoredMatrix

        return FactoredMatrix(self._of_every_head(self.W_V), self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_Kᵀ of every head, [n_layers n_heads d_model d_model], kept as its factors."""
        from transformer_lens import FactoredMatrix

        return FactoredMatrix(self.W_Q, self._of_every_head(self.W_K).transpose(-2, -1))

    def _of_every_head(self, W: Tensor) -> Tensor:
        """Of weights a key/value head, those that each head reads."""
        layers = self.model.layers_with("z")
        groups = [
            [self.model.spec.kv_group(layer, head) for head in range(self.model.spec.n_heads)]
            for layer in layers
        ]
        return torch.stack([each[group] for each, group in zip(W, groups, strict=True)])

    @cached_property
    def embed(self) -> Embed:
        """The token embedding: W_E, and vectors of ids."""
        return Embed(self)

    @cached_property
    def ln_final(self) -> Norm:
        """The final norm, gain included: `ln_final(residual)`, `ln_final.w`."""
        name = self.model.spec.final_norm
        return Norm(self.model.final_norm, self.model.module.get_submodule(name) if name else None)

    @cached_property
    def unembed(self) -> Unembed:
        """Logits of normed residual vectors: `unembed(normed)`, `unembed.W_U`."""
        return Unembed(self)

    def norm_before_attention(self, layer: int) -> tuple[FrozenNorm, str] | None:
        """The norm that a layer's attention reads, and the site that it reads; None where there is none."""
        found = self._norms.before_attention.get(layer)
        return None if found is None else (self.model.norm(found[0]), found[1])

    def norm_before_mlp(self, layer: int) -> tuple[FrozenNorm, str] | None:
        """The norm that a layer's MLP reads and its attention does not, and the site that it reads."""
        found = self._norms.before_mlp.get(layer)
        return None if found is None else (self.model.norm(found[0]), found[1])

    @cached_property
    def _norms(self) -> BlockNorms:
        return block_norms(self.model)

    @torch.no_grad()
    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:
        """Directions [... d_model] whose dot product with the normed residual is a token's logit."""
        ids = torch.as_tensor(self.model.token_id(tokens) if isinstance(tokens, str) else tokens)
        gain = self.model.final_norm.gain.to(self.W_U)
        directions = (gain[:, None] * self.W_U)[:, ids.reshape(-1)].T
        return directions.reshape(*ids.shape, -1) if ids.numel() > 1 else directions.reshape(-1)

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the biases that attention and MLPs before `layer` write."""
        total = torch.zeros(self.cfg.d_model, device=self.cfg.device, dtype=self.cfg.dtype)
        for i in range(layer + mlp_input):
            attn = self.blocks[i].attn
            total = total + attn._result_contribution_scale * attn.b_O
            if include_mlp_biases and i < layer:
                block = self.blocks[i]
                total = total + block.residual_contribution_scale * block.mlp.b_out
        return total
