"""A model's own attention implementations beside each other, where its logits depend on which one it runs."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from torch import Tensor, nn

from interp.models.attention import implementation
from interp.models.calls import call_model, output_tensor
from interp.models.recording import record
from interp.models.verify import relative_error, relative_tolerance
from interp.run.batch import Batch

MOST_IN_FLOAT64 = 250_000_000
"""Parameters of a model that is copied in float64: 2 GB."""


def under(module: nn.Module, batch: Batch, name: str) -> Tensor | None:
    """What the model itself returns with its attention implementation of this name; None where it has none."""
    with implementation(module, name):
        try:
            return output_tensor(call_model(module, batch))
        except (ValueError, NotImplementedError):
            return None


def between_kernels(module: nn.Module, batch: Batch) -> float:
    """How far logits with the model's eager and SDPA attention are apart, relative to their size.

    In 16 bits the rounding of a kernel can send a token to another expert: that is no one's error.
    """
    eager, sdpa = under(module, batch, "eager"), under(module, batch, "sdpa")
    return 0.0 if eager is None or sdpa is None else relative_error(eager, sdpa)[0]


def eager_instead(module: nn.Module, batch: Batch, plain: Tensor, seen: Tensor) -> Tensor | None:
    """What the model returns with its eager attention, where this is what was `seen` and only rounding sets it apart.

    A model can make much of a rounding: interpolate where it points to, or choose the largest. Two attentions
    that compute different things are told from that by the same model in float64: there they differ too. There it
    is seen through the window, since eager attention may have its softmax in float32 whatever the scores are in.
    """
    eager, allowed = under(module, batch, "eager"), relative_tolerance(plain.dtype)
    if eager is None or relative_error(seen, eager)[0] > allowed:
        return None
    parameters = list(module.parameters())
    on_meta = any(parameter.is_meta for parameter in parameters)
    if on_meta or sum(parameter.numel() for parameter in parameters) > MOST_IN_FLOAT64:
        return None
    copied, exact = in_float64(module, batch)
    own, shown = output_tensor(call_model(copied, exact)), record(copied, exact).output
    return eager if relative_error(shown, own)[0] <= allowed else None


def in_float64(module: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    """A copy of the model, and its inputs, in float64."""
    exact = {name: x.double() if x.is_floating_point() else x for name, x in batch.inputs.items()}
    return deepcopy(module).double(), replace(batch, inputs=exact)


def note(module: nn.Module, apart: float) -> tuple[str, ...]:
    """What to say of a model whose own implementations are so far apart on the probe; nothing where they are not."""
    if not apart:
        return ()
    own = getattr(getattr(module, "config", None), "_attn_implementation", None) or "other"
    return (
        f"its own {own} and eager attention give outputs that differ by {apart:.1e} of their size on the probe, while "
        "in float64 they agree: this model makes that much of a rounding. Its map was verified with its eager "
        "attention; runs that form patterns may differ from its own forward as much, in float64 they do not",
    )
