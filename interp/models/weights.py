"""Weights by the field's names, read from modules without changing or copying the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from interp.devices import wide
from interp.errors import BadInput, Refused
from interp.models.block_map import BlockMap
from interp.models.calls import FAILURES
from interp.models.layout import CHANNELS_BEFORE
from interp.models.offered import Offered
from interp.models.spec import first_tensor, module_device
from interp.sites import CROSSES


@torch.no_grad()
def linear_map(
    module: nn.Module, d_in: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """(W [d_in, d_out], b [d_out]) of any module that computes x @ W + b.

    `nn.Linear` keeps Wᵀ and GPT-2's Conv1D keeps W; any other module (quantised, with an adapter) is
    asked for its outputs on the identity.
    """
    weight = getattr(module, "weight", None)
    plain = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    if plain and isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta:
        W = (weight.T if isinstance(module, nn.Linear) else weight).detach()
        W, bias = W.to(device or W.device), getattr(module, "bias", None)
        return W, W.new_zeros(W.shape[1]) if bias is None else bias.detach().to(W.device)
    some = next(module.parameters(), torch.zeros(0))
    dtype = some.dtype if some.is_floating_point() else torch.float32
    home = torch.device(device or "cpu") if some.is_meta else some.device
    of_one = isinstance(module, nn.Conv1d)  # of kernel 1, with channels before positions

    def made(x: Tensor) -> Tensor:
        x = x.to(home, dtype)
        try:
            out = first_tensor(module(x[..., None] if of_one else x))
        except FAILURES:
            if of_one:
                raise
            out = first_tensor(module(x[None]))  # one that folds rows and positions itself
            out = None if out is None else out[0]
        if out is None:
            raise Refused(f"{type(module).__name__} returns no tensor: it is no linear layer")
        return out[..., 0] if of_one else out

    zero, rows = made(torch.zeros(1, d_in)), made(torch.eye(d_in))
    W = rows - zero
    return W.to(device or home), zero[0].to(device or home)


LARGE = 128.0
"""Size of the vectors that a norm's gain is read at: an epsilon of 1e-5 is 6e-10 of its square."""
LARGER = 2.0**20
"""The same in float64, of which 6e-10 would be seen."""


class FrozenNorm:
    """A norm with its scale held fixed: norm(x) = gain · (x [− mean x]) / σ(x) + bias.

    Gain, bias and whether the mean is taken out are found by asking the module, so Gemma's
    (1 + weight) or a norm without weights needs no case of its own. With `module=None`: identity.
    Gain and bias lie on `device`, by default the module's own. `turned`: it reads channels before positions.
    `dtype` is what the norm computes in: most of transformers' round to float32 also in models in float64.
    """

    @torch.no_grad()
    def __init__(
        self,
        module: nn.Module | None,
        d_model: int,
        device: torch.device | None = None,
        *,
        turned: bool = False,
    ):
        self.module, self._turned = module, turned
        some = None if module is None else next(module.parameters(), None)
        self._place = torch.device("cpu") if module is None else module_device(module)
        like = torch.ones(d_model, dtype=None if some is None else some.dtype, device=self._place)
        self.gain, self.bias, self.centred = like, torch.zeros_like(like), False
        self.dtype = like.dtype
        if module is None:
            self.gain, self.bias = self.gain.to(device), self.bias.to(device)
            return
        if any(parameter.numel() > d_model for parameter in module.parameters()):
            raise Refused(f"{type(module).__name__} is not a norm: it mixes channels")
        if d_model % 2:
            raise Refused(f"d_model = {d_model} is odd: the norm's gain is not read")
        # ±c in equal numbers has mean 0 and size c: LayerNorm and RMSNorm both make ±1 of it. A large c
        # drowns epsilon, and c² is still a number in float16.
        size = LARGER if like.dtype == torch.float64 else LARGE
        sign = like.clone()
        sign[1::2] = -1
        plus, minus = self._normed(size * sign[None])[0], self._normed(-size * sign[None])[0]
        self.gain, self.bias = (plus - minus) / 2 * sign, (plus + minus) / 2
        if like.dtype == torch.float64:
            finer = size * sign[None]
            finer[0, 0] += 1e-12 * size  # far below what float32 tells apart
            if torch.equal(self._normed(finer)[0], plus):
                self.dtype = torch.float32
        # A constant vector has nothing left once its mean is taken out.
        self.centred = bool(
            (
                (self._normed(size * like[None])[0] - self.bias).abs()
                < 1e-2 * self.gain.abs() + 1e-6
            ).all()
        )
        self.gain, self.bias = self.gain.to(device), self.bias.to(device)

    def _normed(self, x: Tensor) -> Tensor:
        """What the module makes of vectors [... d_model]."""
        assert self.module is not None
        if not self._turned:
            return self.module(x)
        return self.module(x.reshape(-1, x.shape[-1])[..., None]).reshape(x.shape)

    @torch.no_grad()
    def scale(self, x: Tensor) -> Tensor:
        """σ(x) [... 1], in float32 or what x is in where that is wider."""
        if self.module is None:
            return torch.ones_like(wide(x[..., :1]))
        gain = wide(self.gain.to(x.device))
        inner = gain * self.centre(wide(x))
        out = wide(self._normed(x.to(self._place, self.gain.dtype)).to(x.device))
        out = out - wide(self.bias.to(x.device))
        return (inner * inner).sum(-1, keepdim=True) / (inner * out).sum(-1, keepdim=True)

    def pull_back(self, direction: Tensor, at: Tensor) -> Tensor:
        """The residual direction whose dot product with a write is its effect along `direction`.

        `at` is the residual [... d_model] whose scale is held fixed; `direction` lies after the norm.
        """
        pulled = self.centre(wide(direction) * wide(self.gain.to(direction.device)))
        return pulled.to(at.device) / self.scale(at)

    def centre(self, x: Tensor) -> Tensor:
        """x less its mean, where the norm takes it out."""
        return x - x.mean(-1, keepdim=True) if self.centred else x


@dataclass(frozen=True)
class Weights:
    """The weights of a model's layers and ends, on `device`; `Model`'s W_O, W_V, W_U … are these."""

    module: nn.Module
    offered: Offered
    device: torch.device

    def _block(self, layer: int) -> BlockMap:
        blocks = self.offered.spec.blocks
        if not -len(blocks) <= layer < len(blocks):
            raise BadInput(
                f"no layer {layer} in {self.offered.id}: layers are 0 to {len(blocks) - 1}"
            )
        return blocks[layer]

    def attention_output(self, layer: int, cross: int) -> tuple[Tensor, Tensor]:
        """Output projection [n_heads d_head d_model] and bias [d_model] of a layer's attention; `cross`: of that to
        its first or second source."""
        if not 0 <= cross <= len(CROSSES):
            raise BadInput(
                f"cross={cross}: a block attends to a first source (1) or to a second (2)"
            )
        self.offered.layers_to_see(f"{CROSSES[cross - 1]}out" if cross else "attn_out")
        block, id = self._block(layer), self.offered.id
        of = block.to_source(cross - 1) if cross else block
        if of is None or of.W_O is None:
            raise Refused(f"layer {layer} of {id} has no attention output projection")
        if block.between and not cross:
            what = "times a gate" if block.between == "gate" else "only through a function of it"
            raise Refused(
                f"layer {layer} of {id}: '{block.W_O}' reads z {what}, so no head has a linear "
                "map from z to its output; sites z and attn_out are there"
            )
        W, b = self._linear_map(of.W_O, of.n_heads * of.d_head)
        return W.reshape(of.n_heads, of.d_head, -1), b

    def mlp_output(self, layer: int) -> tuple[Tensor, Tensor]:
        """Linear layer from neurons [d_mlp d_model], and its bias [d_model]."""
        self.offered.layers_with("mlp_post")
        block = self._block(layer)
        if block.W_out is None:
            raise Refused(
                f"layer {layer} of {self.offered.id} has no one linear layer from neurons"
            )
        return self._linear_map(block.W_out, block.d_mlp)

    def values(self, layer: int) -> Tensor:
        """Value projection [n_kv_heads d_model d_head] with its norm's gain."""
        block, id = self._block(layer), self.offered.id
        if block.v is None:
            raise Refused(f"layer {layer} of {id}: no linear layer whose outputs are v was found")
        if not block.v.input or self.offered.spec.n_streams > 1:
            raise Refused(f"layer {layer} of {id}: v is not read from the normed residual stream")
        W, _ = self._linear_map(block.v.module, block.d_model)
        if W.shape[0] != block.d_model:
            raise Refused(f"layer {layer} of {id}: v is read from a latent of width {W.shape[0]}")
        gain = torch.ones(block.d_model)
        if block.v.input != "resid_pre":
            gain = self.norm(block.v.input).gain
        columns = block.v.columns.to(W.device)
        return (gain.to(W)[:, None, None] * W[:, columns]).permute(1, 0, 2)

    def norm(self, name: str | None) -> FrozenNorm:
        """The norm of the residual stream that the module called `name` is; the identity for None."""
        spec, module = self.offered.spec, None if name is None else self.module.get_submodule(name)
        around = (b for b in spec.blocks if f"{name}.".startswith(f"{b.name}."))
        block = next(around, None)
        if block is None:
            return FrozenNorm(module, spec.d_model, self.device)
        turned = block.axes == CHANNELS_BEFORE
        return FrozenNorm(module, block.d_model, self.device, turned=turned)

    def embedding(self) -> Tensor:
        """Token embedding [d_vocab d_model]."""
        if self.offered.spec.embedding is None:
            where = " where its stack begins" if self.offered.spec.named else ""
            raise Refused(f"{self.offered.id} has no token embedding{where}")
        return self.module.get_submodule(self.offered.spec.embedding).weight  # type: ignore[return-value]

    def unembedding(self) -> Tensor:
        """Unembedding [d_model d_vocab], without the final norm's gain."""
        self.require_unembedding()
        W, _ = self._linear_map(self.offered.spec.unembedding or "", self.offered.spec.d_model)
        return W

    def require_unembedding(self) -> None:
        """Refused where the model has no unembedding, or one that was not verified."""
        spec = self.offered.spec
        if spec.unembedding is None or "unembedding" in spec.refused:
            reason = spec.refused.get("unembedding", "it has no language-model head")
            raise Refused(f"{self.offered.id} cannot be unembedded: {reason}")

    def _linear_map(self, name: str, d_in: int) -> tuple[Tensor, Tensor]:
        return linear_map(self.module.get_submodule(name), d_in, self.device)
