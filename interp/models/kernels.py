"""A model's own attention implementations beside each other, where its logits depend on which one it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

from torch import Tensor, nn

from interp.errors import BadInput
from interp.models.attention import Watch, implementation, window
from interp.models.calls import call_model, output_tensor
from interp.models.examples import all_in_float64
from interp.models.relative import relative_error, relative_tolerance
from interp.run.batch import Batch

MOST_IN_FLOAT64 = 250_000_000
"""Parameters of a model that is copied in float64: 2 GB."""


Told = Callable[[nn.Module, Batch], list[Tensor]]
"""What a model computes of a batch that is compared: its logits, and what the last block of a named stack returns."""


def logits_of(module: nn.Module, batch: Batch) -> list[Tensor]:
    """What the model returns, alone."""
    return [output_tensor(call_model(module, batch))]


def under(module: nn.Module, batch: Batch, name: str, told: Told) -> list[Tensor] | None:
    """What is told of the model itself with its attention implementation of this name; None where it has none."""
    with implementation(module, name):
        try:
            return told(module, batch)
        except (ValueError, NotImplementedError):
            return None


def between_kernels(module: nn.Module, batch: Batch, told: Told = logits_of) -> float:
    """How far what is told with the model's eager and SDPA attention is apart, relative to its size.

    In 16 bits the rounding of a kernel can send a token to another expert: that is no one's error.
    """
    eager, sdpa = under(module, batch, "eager", told), under(module, batch, "sdpa", told)
    return 0.0 if eager is None or sdpa is None else apart(eager, sdpa)


def apart(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative error among tensors."""
    return max(relative_error(a, b)[0] for a, b in zip(got, wanted, strict=True))


def eager_instead(
    module: nn.Module, batch: Batch, seen: Sequence[Tensor], told: Told
) -> list[Tensor] | None:
    """What is told of the model with its eager attention, where this is what was `seen` and only rounding sets its own
    apart.

    A model can make much of a rounding: interpolate where it points to, or choose the largest. Two attentions
    that compute different things are told from that by the same model in float64: there they differ too. There it
    is seen through the window, since eager attention may have its softmax in float32 whatever the scores are in.
    """
    eager, allowed = under(module, batch, "eager", told), relative_tolerance(seen[0].dtype)
    if eager is None or apart(seen, eager) > allowed:
        return None
    if (copies := small_in_float64(module, batch)) is None:
        return None
    copied, exact = copies
    own = told(copied, exact)
    with window(copied, lambda module: _Forming()):
        shown = told(copied, exact)
    return eager if apart(shown, own) <= allowed else None


class _Forming(Watch):
    """Has the window form patterns, as eager attention does."""

    needs_rows = True


def in_float64(module: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    """A copy of the model, and its inputs, in float64."""
    exact = {name: x.double() if x.is_floating_point() else x for name, x in batch.inputs.items()}
    objects = {name: all_in_float64(name, x) for name, x in batch.objects.items()}
    return deepcopy(module).double(), replace(batch, inputs=exact, objects=objects)


def small_in_float64(module: nn.Module, batch: Batch) -> tuple[nn.Module, Batch] | None:
    """The same; None of a large model, of one whose weights are not in memory, or of an input that has no such copy."""
    parameters = list(module.parameters())
    on_meta = any(parameter.is_meta for parameter in parameters)
    if on_meta or sum(parameter.numel() for parameter in parameters) > MOST_IN_FLOAT64:
        return None
    try:
        return in_float64(module, batch)
    except BadInput:  # an object that cannot be taken apart
        return None


def note(module: nn.Module, off: float) -> tuple[str, ...]:
    """What to say of a model whose own implementations are so far apart on the probe; nothing where they are not."""
    if not off:
        return ()
    configs = (getattr(part, "config", None) for part in module.modules())
    named = {getattr(config, "_attn_implementation", None) for config in configs}
    own = " and ".join(sorted(name for name in named if name and name != "eager")) or "other"
    return (
        f"its own {own} and eager attention give outputs that differ by {off:.1e} of their size on the probe, while "
        "in float64 they agree: this model makes that much of a rounding. Its map was verified with its eager "
        "attention; runs that form patterns may differ from its own forward as much, in float64 they do not",
    )
