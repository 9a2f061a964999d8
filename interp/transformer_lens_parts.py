"""What stands at the nodes of a TransformerLens model: `cfg`, `blocks[3].attn.W_Q`, `ln_final.w`, `unembed.b_U`."""

from __future__ import annotations

from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from interp.errors import Refused
from interp.models.calls import at_home
from interp.models.weights import FrozenNorm

if TYPE_CHECKING:
    from interp.transformer_lens_weights import Weights


class Config(SimpleNamespace):
    """`cfg`: sizes and names that were found in the model; of others it is told where they stand."""

    def __init__(self, module: nn.Module, **found: Any):
        super().__init__(**found)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "default_prepend_bos":
            self.default_prepend_bos = puts_bos_first(type(self._module).__name__)
            return self.default_prepend_bos
        theirs = hasattr(getattr(self._module, "config", None), name)
        where = f"model.module.config.{name}" if theirs else "model.module.config, model.spec"
        known = ", ".join(name for name in vars(self) if name[0] != "_")
        raise AttributeError(f"cfg has no '{name}'; see {where}; cfg has {known}")


def puts_bos_first(architecture: str) -> bool:
    """Whether TransformerLens' `to_tokens` puts BOS before text for this architecture: what its adapter says.

    >>> puts_bos_first("LlamaForCausalLM"), puts_bos_first("GPTNeoXForCausalLM"), puts_bos_first("Own")
    (True, False, True)
    """
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    sizes = dict.fromkeys(("d_model", "d_head", "n_heads", "n_layers", "n_ctx", "d_mlp"), 1)
    config = TransformerBridgeConfig(**sizes, d_vocab=1, act_fn="gelu", architecture=architecture)
    try:
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
    except (ValueError, ImportError):  # none, or not without more of the checkpoint's config
        return config.default_prepend_bos
    return adapter.cfg.default_prepend_bos


class HookPoint:
    """What a hook is told of its place: `hook.name`, `hook.layer()`."""

    def __init__(self, name: str, layer: int):
        self.name, self.layer = name, lambda: layer

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"hook has no '{name}', only name and layer(): keep what you want in a variable of your own"
        )


class Block:
    """`blocks[layer]`: attn, mlp, ln1, ln2."""

    def __init__(self, lens: Weights, layer: int):
        self._lens, self._layer = lens, layer
        self.attn, self.mlp = Attention(lens, layer), MLP(lens, layer)
        write = lens.model.spec.blocks[layer].mlp_write
        self.residual_contribution_scale = 1.0 if write is None else write.scale

    @cached_property
    def ln1(self) -> Norm:
        """The norm before attention."""
        return self._norm(self._lens.norm_before_attention(self._layer), "attention")

    @cached_property
    def ln2(self) -> Norm:
        """The norm before the MLP."""
        return self._norm(self._lens.norm_before_mlp(self._layer), "its MLP alone")

    def _norm(self, found: tuple[FrozenNorm, str] | None, what: str) -> Norm:
        if found is None:
            raise Refused(
                f"layer {self._layer} of {self._lens.model.id}: no norm whose output {what} reads was "
                "found; model.module has what there is"
            )
        return Norm(found[0], found[0].module)


class Attention:
    """`blocks[layer].attn`."""

    def __init__(self, lens: Weights, layer: int):
        self._lens, self._layer = lens, layer
        write = lens.model.spec.blocks[layer].attn_write
        self._result_contribution_scale = 1.0 if write is None else write.scale

    def _projection(self, name: str) -> tuple[Tensor, Tensor]:
        return self._lens.projections.weights(name, self._layer)

    @property
    def W_Q(self) -> Tensor:
        return self._projection("q")[0]

    @property
    def W_K(self) -> Tensor:
        return self._projection("k")[0]

    @property
    def W_V(self) -> Tensor:
        return self._projection("v")[0]

    @property
    def b_Q(self) -> Tensor:
        return self._projection("q")[1]

    @property
    def b_K(self) -> Tensor:
        return self._projection("k")[1]

    @property
    def b_V(self) -> Tensor:
        return self._projection("v")[1]

    @property
    def W_O(self) -> Tensor:
        return self._lens.model.W_O(self._layer)

    @property
    def b_O(self) -> Tensor:
        return self._lens.model.b_O(self._layer)


class MLP:
    """`blocks[layer].mlp`."""

    def __init__(self, lens: Weights, layer: int):
        self._lens, self._layer = lens, layer

    def _reads(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        return self._lens.projections.neurons(self._layer)

    @property
    def W_in(self) -> Tensor:
        return self._reads()[0][0]

    @property
    def b_in(self) -> Tensor:
        return self._reads()[0][1]

    @property
    def W_gate(self) -> Tensor | None:
        gate = self._reads()[1]
        return None if gate is None else gate[0]

    @property
    def W_out(self) -> Tensor:
        return self._lens.model.W_out(self._layer)

    @property
    def b_out(self) -> Tensor:
        return self._lens.model.b_out(self._layer)


class Norm:
    """A norm of the residual stream; `w` is the gain as it is applied (Gemma's is 1 + the checkpoint's weight)."""

    def __init__(self, norm: FrozenNorm, module: nn.Module | None):
        self.w, self.b, self._module = norm.gain, norm.bias, module

    def __call__(self, residual: Tensor) -> Tensor:
        """The normed residual, gain and bias included."""
        return residual if self._module is None else at_home(self._module, residual)


class Embed:
    """`embed`: the token embedding."""

    def __init__(self, lens: Weights):
        self._lens = lens

    @property
    def W_E(self) -> Tensor:
        return self._lens.W_E

    def __call__(self, ids: Tensor) -> Tensor:
        """The rows of W_E [... d_model] of token ids."""
        return self.W_E[ids.to(self.W_E.device)]


class Unembed:
    """`unembed`: from normed residual vectors to logits."""

    def __init__(self, lens: Weights):
        self._lens = lens

    @property
    def W_U(self) -> Tensor:
        return self._lens.W_U

    @property
    def b_U(self) -> Tensor:
        return self._lens.b_U

    def __call__(self, normed: Tensor) -> Tensor:
        """Logits [... d_vocab] of normed residual vectors [... d_model]."""
        model = self._lens.model
        return at_home(model.module.get_submodule(model.spec.unembedding or ""), normed)
