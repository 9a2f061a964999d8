"""What a forward pass leaves: activations by site with named axes, logits, row statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.errors import BadInput
from interp.run.batch import Batch
from interp.sites import AXES, Site, head_axis, ranges

if TYPE_CHECKING:
    from transformer_lens import ActivationCache


class Cache(Mapping[str, Tensor]):
    """Captured activations: `cache["z.5"]` is one layer, `cache["z"]` stacks all captured layers.

    Stacked layers form the axis n_layers after the position axis (after batch for patterns):
    `cache["z"]` is [batch pos n_layers n_heads d_head], `cache["pattern"]` is
    [batch n_layers n_heads query_pos key_pos].
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._stored: dict[tuple[str, int], Tensor] = {}
        self._device = device

    def put(self, name: str, layer: int, value: Tensor) -> Tensor:
        """Keep one layer of a site; of a model on several devices, all layers on the first of them.

        Returns `value` to go on with, on its own device, that leads through what is kept: a copy on another
        device, beside the way to the logits, would have no gradient.
        """
        kept = value if self._device is None else value.to(self._device)
        self._stored[name, layer] = kept
        return kept.to(value.device) if torch.is_grad_enabled() else value

    def layers(self, name: str) -> list[int]:
        """The captured layers of a site."""
        return sorted(layer for stored, layer in self._stored if stored == name)

    def by_layer(self, name: str) -> dict[int, Tensor]:
        """A site's captured activations by layer, as `Edit.patch` takes them."""
        return {layer: self._stored[name, layer] for layer in self.layers(name)}

    def to_transformer_lens(self, model: Any = None) -> ActivationCache:
        """TransformerLens' own ActivationCache over the same tensors, under their names and shapes.

        `cache.to_transformer_lens()["pattern", 0]` is [batch head query key]. With `model` (the Model
        that was run) its methods find the weights, norm scales and token ids they ask for
        (`stack_head_results`, `logit_attrs`, `apply_ln`); without one it can be indexed, stacked and
        accumulated, and its last layer is the last one captured. See `interp.transformer_lens`.
        """
        from interp.transformer_lens import activation_cache

        return activation_cache(self, model)

    def axes(self, text: str | Site) -> tuple[str, ...]:
        """Names of the axes of `cache[text]`."""
        site = Site.parse(text)
        if site.name == "embed" or site.layer is not None:
            return tuple(
                a for i, a in enumerate(site.axes) if site.head is None or i != head_axis(site.name)
            )
        where = _layer_axis(site)
        return (*site.axes[:where], "n_layers", *site.axes[where:])

    def __getitem__(self, text: str | Site) -> Tensor:
        if isinstance(
            text, tuple
        ):  # theirs and ours differ: their "q" is the one before rotary positions
            raise BadInput(
                f"{text} is TransformerLens' form: write '{self._as_ours(text)}', or index "
                "cache.to_transformer_lens()"
            )
        site = Site.parse(text)
        layers = self.layers(site.name)
        if not layers or (site.layer is not None and site.layer not in layers):
            kept = [self._place(name) for name in self]
            raise BadInput(f"'{site}' was not captured; captured: {', '.join(kept) or 'nothing'}")
        if site.layer is not None:
            value = self._stored[site.name, site.layer]
            return value if site.head is None else value.select(head_axis(site.name), site.head)
        values = [self._stored[site.name, layer] for layer in layers]
        if site.name == "embed":
            return values[0]
        if len({value.shape for value in values}) > 1:
            raise BadInput(
                f"layers of '{site}' differ in shape; read them singly: '{site}.{layers[0]}'"
            )
        return torch.stack(values, dim=_layer_axis(site))

    def _place(self, name: str) -> str:
        """A captured site and which layers of it."""
        return name if name == "embed" else f"{name} (layers {ranges(self.layers(name))})"

    def __repr__(self) -> str:
        """Every captured site with its layers, and the axes and sizes of the first of them."""
        lines = []
        for name in self:
            shape = self._stored[name, self.layers(name)[0]].shape
            sizes = [f"{axis} {n}" for axis, n in zip(Site(name).axes, shape, strict=False)]
            lines.append(f"{self._place(name)} [{', '.join(sizes)}]")
        return f"Cache({'; '.join(lines)})"

    def _as_ours(self, key: tuple[Any, ...]) -> str:
        """TransformerLens' ("z", 5) as a site of ours; a layer counted from the end gets its number."""
        parts = list(map(str, key))
        layer = key[1] if len(key) > 1 else 0
        layers = self.layers(parts[0]) if parts else []
        if isinstance(layer, int) and -len(layers) <= layer < 0:
            parts[1] = str(layers[layer])
        return ".".join(parts)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            from interp.transformer_lens_elsewhere import CACHE

            theirs = name in CACHE
            hint = f"; as in TransformerLens: cache.to_transformer_lens(model).{name}" * theirs
            raise AttributeError(f"Cache has no '{name}'{hint}", name=name, obj=self)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({name for name, _ in self._stored}))

    def __len__(self) -> int:
        return len({name for name, _ in self._stored})

    def __contains__(self, text: object) -> bool:
        site = Site.parse(text) if isinstance(text, (str, Site)) else None
        return site is not None and any(
            name == site.name and site.layer in (None, layer) for name, layer in self._stored
        )


def _layer_axis(site: Site) -> int:
    return 1 if site.axes[1] == "n_heads" else 2


_NOT_OF_A_RUN = {
    "loss": "interp.metrics.loss(run.logits[:, :-1], run.batch.ids[:, 1:])",
    "tokens": "model.tokens(run.batch.ids[0])",
    "ids": "run.batch.ids",
    "mask": "run.batch.mask",
    "probs": "run.logits.softmax(-1)",
}
"""What is asked of a Run and stands elsewhere."""


@dataclass
class Run:
    """One forward pass: what went in, and what was kept of it.

    Attributes:
        batch: the inputs.
        logits: [batch pos d_vocab] (or [batch n_classes], or the last hidden state of a model
            without a head); None when the pass stopped early.
        cache: captured activations.
        statistics: row statistics by name, each [batch n_layers n_heads] (NaN: layer not seen).
        extras: what blocks returned beside the residual stream, kept so that a replay can go on.
        held: by layer, the shape in which the block held what it read.
        stand_ins: by (site, layer), zeros that were added to a site which several calls compute, for its gradient.
    """

    batch: Batch
    logits: Tensor | None = None
    cache: Cache = field(default_factory=Cache)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[int, tuple] = field(default_factory=dict)
    held: dict[int, torch.Size] = field(default_factory=dict)
    stand_ins: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        logits = None if self.logits is None else list(self.logits.shape)
        statistics = f", statistics={list(self.statistics)}" * bool(self.statistics)
        return f"Run({self.batch}, logits={logits}, {self.cache}{statistics})"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            elsewhere = f'run.cache["{name}"]' if name in AXES else _NOT_OF_A_RUN.get(name)
            hint = f"; here: {elsewhere}" if elsewhere else ""
            raise AttributeError(f"Run has no '{name}'{hint}", name=name, obj=self)

        def __getitem__(self, site: Any) -> Any:
            raise TypeError(f"a Run is not indexed: run.cache[{site!r}]")

    def gradients(self, target: Tensor, site: str) -> Tensor:
        """d target / d site, shaped like `cache[site]`; needs `run(..., grad=True)`.

        `target` is a scalar made from `logits` or from captured activations. The graph is the model's own: no
        gradient leads through what its forward detaches (reference points of some detectors).
        """
        parsed = Site.parse(site)
        layers = [parsed.layer] if parsed.layer is not None else self.cache.layers(parsed.name)
        if not target.requires_grad:
            raise BadInput("the target has no gradient; make it from a run(..., grad=True)")
        if target.numel() != 1:
            raise BadInput(
                f"the target has shape {list(target.shape)}, wanted one number: target.sum(), or one element"
            )
        kept = [self.cache[Site(parsed.name, layer)] for layer in layers]
        values = [
            self.stand_ins.get((parsed.name, layer), value)
            for layer, value in zip(layers, kept, strict=True)
        ]
        if not all(value.requires_grad for value in values):
            raise BadInput(
                f"'{site}' of this run has no gradient; capture it in a run(..., grad=True), and of a model that "
                "computes some layers with gradients switched off (torch.no_grad) name another layer"
            )
        grads = torch.autograd.grad(target, values, retain_graph=True, allow_unused=True)
        out = Cache()
        for layer, value, grad in zip(layers, kept, grads, strict=True):
            grad = torch.zeros_like(value) if grad is None else grad.to(value.device)
            out.put(parsed.name, layer, grad)
        return out[parsed]
