"""A gate for every head between full and streaming attention, and the gates that keep a model's answers.

Streaming attention is full attention with the hidden keys' weight taken away and each row divided by what is
left, so both come from one pattern, of any architecture: a row's visible keys are scaled by
α + (1 − α) / (its mass on them), its other keys by α.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.heads.passkeys import Passkeys
from circuits.heads.streaming import check_padding, streaming_keys
from circuits.stream import frozen
from interp.models.calls import at_home
from interp.models.model import Model
from interp.run.adam import adam, moments
from interp.run.edits import Edit, Seen
from interp.run.resume import Checkpoint

STEPS_PER_UNIT = 5
"""Optimisation steps between two writes to the checkpoint."""

EMPTY = 1e-30
"""A row with less mass than this on the keys a streaming head sees has nothing to divide: it gives almost 0."""


@dataclass(frozen=True)
class Units:
    """What has a gate: kv heads, or query heads.

    Attributes:
        heads: the (layer, query heads) of each. of: for every layer, the unit of each of its heads.
        kv_heads: the (layer, kv head) that each unit reads.
    """

    heads: tuple[tuple[int, tuple[int, ...]], ...]
    of: Mapping[int, Int[Tensor, " n_heads"]]
    kv_heads: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.heads)

    @staticmethod
    def of_model(model: Model, unit: str = "kv") -> Units:
        """Every kv head of the model with the query heads that read it; or every query head."""
        spec, members = model.spec, {}
        for layer, head in spec.heads:
            group = spec.kv_group(layer, head)
            members.setdefault((layer, group, -1 if unit == "kv" else head), []).append(head)
        of = {
            layer: torch.zeros(spec.blocks[layer].n_heads, dtype=torch.long)
            for layer, *_ in members
        }
        for number, ((layer, *_), heads) in enumerate(members.items()):
            of[layer][heads] = number
        return Units(
            tuple((layer, tuple(heads)) for (layer, *_), heads in members.items()),
            {layer: numbers.to(model.device) for layer, numbers in of.items()},
            tuple((layer, group) for layer, group, _ in members),
        )

    def streams(
        self, full: Bool[np.ndarray, " units"], model: Model
    ) -> Bool[Tensor, "n_layers n_heads"]:
        """Which query heads stream where only these units stay full."""
        out = torch.zeros(model.n_layers, model.spec.n_heads, dtype=torch.bool)
        for (layer, heads), keeps in zip(self.heads, full, strict=True):
            out[layer, list(heads)] = not keeps
        return out


def gated(gates: Float[Tensor, " units"], units: Units, sink: int, recent: int) -> Edit:
    """Edit of every pattern: gate · full + (1 − gate) · streaming attention, differentiable in the gates.

    A sink logit (where a model has one) takes its share of both. Gates of 1 change nothing, bit for bit.
    In float32 a row needs at least EMPTY of its mass on the keys that streaming sees.
    """

    def change(pattern: Tensor, seen: Seen) -> Tensor:
        check_padding(seen)
        p = pattern if pattern.dtype == torch.float64 else pattern.float()
        alpha = gates[units.of[seen.layer]].to(p)[:, None, None]
        rows, keys = p.shape[-2:]
        visible = streaming_keys(seen.start, rows, keys, sink, recent, p.device)
        # What a row lacks to 1 went to a sink logit, unless it is rounding.
        lacking = 1 - p.sum(-1, keepdim=True)
        lacking = torch.where(lacking > torch.finfo(pattern.dtype).eps * keys**0.5, lacking, 0)
        kept = torch.where(visible, p, 0).sum(-1, keepdim=True) + lacking
        return p * torch.where(visible, alpha + (1 - alpha) / kept.clamp_min(EMPTY), alpha)

    return Edit.apply("pattern", change)


# --- the gates ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gates:
    """Optimised gates.

    Attributes:
        value: one a unit, 0 to 1. curve: after every step, distillation loss before it and mean gate [steps 2].
    """

    value: Float[np.ndarray, " units"]
    curve: Float[np.ndarray, "steps 2"]


def optimise_gates(
    model: Model,
    prompts: Passkeys,
    units: Units,
    *,
    sink: int = 4,
    recent: int = 16,
    steps: int = 30,
    learning_rate: float = 0.1,
    weight: float = 0.002,
    batch: int = 1,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Gates:
    """Gates that keep the hidden states of the answers, each open gate at a price.

    loss = mean (h_gated − h_full)² / mean h_full² + weight · Σ |α|, h the final residual behind the final
    norm at the judged positions. Gates start at 1 and are clamped to [0, 1] after every step of Adam;
    the learning rate rises over the first fifth of the steps and falls over the last.
    A gate says what these prompts need of a head, given what the others do.

    Args:
        weight: share of the squared hidden state that one open gate may cost.
        batch: prompts a step, drawn anew from `prompts`.
        checkpoint: keeps gates and moments every STEPS_PER_UNIT steps.
    """
    checkpoint = Checkpoint() if checkpoint is None else checkpoint
    judged, batch = prompts.judged.to(model.device), min(batch, len(prompts))

    @cache
    def target(row: int) -> Float[Tensor, "1 m d_model"]:
        return final_states(model, prompts.ids[row : row + 1], judged).float()

    def walk(state: Mapping[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
        gates = torch.tensor(state["gates"], device=model.device, requires_grad=True)
        optimiser = adam(gates, learning_rate, state)
        curve = []
        edits = [gated(gates, units, sink, recent)]
        for step in range(start, stop):
            generator = np.random.default_rng([seed, step])
            rows = generator.permutation(len(prompts))[:batch].tolist()
            wanted = torch.cat([target(row) for row in rows])
            h = final_states(model, prompts.ids[rows], judged, edits=edits, grad=True)
            away = (h.float() - wanted).square().mean() / wanted.square().mean()
            (gates.grad,) = torch.autograd.grad(
                away.to(gates) + weight * gates.abs().sum(), [gates]
            )
            optimiser.param_groups[0]["lr"] = learning_rate * _warmth(step, steps)
            optimiser.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
            curve.append((float(away.detach()), float(gates.detach().mean())))
            advance(1)
        found = {"gates": gates.detach().cpu().numpy(), "curve": np.array(curve)}
        return found | moments(optimiser, gates)

    state: Mapping[str, np.ndarray] = {"gates": np.ones(len(units), dtype=np.float32)}
    curves = []
    with frozen(model.module), torch.enable_grad():
        for start in range(0, steps, STEPS_PER_UNIT):
            stop = min(start + STEPS_PER_UNIT, steps)
            state = checkpoint.compute(
                f"steps.{stop}",
                lambda state=state, start=start, stop=stop: walk(state, start, stop),
            )
            curves.append(state["curve"])
    return Gates(state["gates"], np.concatenate(curves))


def _warmth(step: int, steps: int) -> float:
    """Share of the learning rate at a step: up over the first fifth, down over the last, never under 0.1."""
    fifth = max(steps // 5, 1)
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


def final_states(
    model: Model,
    ids: Int[Tensor, "batch pos"],
    judged: Int[Tensor, " m"],
    *,
    edits: Sequence[Edit] = (),
    grad: bool = False,
) -> Float[Tensor, "batch m d_model"]:
    """The final residual behind the final norm at these positions; nothing is unembedded."""
    site = f"resid_post.{model.n_layers - 1}"
    run = model.run(ids, capture=[site], edits=edits, logits=False, grad=grad)
    resid = run.cache[site][:, judged.to(model.device)]
    name = model.spec.final_norm
    with torch.set_grad_enabled(grad):
        return resid if name is None else at_home(model.module.get_submodule(name), resid)
