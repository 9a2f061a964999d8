"""The plan of a pass: what is captured and edited where, and which layers that takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from interp.errors import BadInput, Refused
from interp.models.offered import Offered
from interp.run.edits import Edit
from interp.run.statistics import RowStatistics, Statistic
from interp.sites import Site


@dataclass
class Plan:
    """What one pass captures and edits, by (site name, layer); which layers it ran and which sites it came by."""

    capture: set[tuple[str, int]] = field(default_factory=set)
    edits: dict[tuple[str, int], list[Edit]] = field(default_factory=dict)
    statistics: RowStatistics | None = None
    statistics_until: int = -1
    grad: bool = False
    ran: set[int] = field(default_factory=set)
    met: set[tuple[str, int]] = field(default_factory=set)

    @property
    def sites(self) -> set[tuple[str, int]]:
        return self.capture | set(self.edits)

    def wants(self, name: str, layer: int) -> bool:
        return (name, layer) in self.capture or (name, layer) in self.edits

    def edits_at(self, name: str, layer: int) -> Sequence[Edit]:
        """The edits of a site that the pass has come by."""
        self.met.add((name, layer))
        return self.edits.get((name, layer), ())

    def require_met(self, start: int, until: int) -> None:
        """Refused where a site of a layer from `start` on, before `until`, was passed by: an edit did nothing there.

        Its layer did not run at all (a tracker looks back on no frame at its first), or not as on the probe.
        """
        for name, layer in sorted(self.sites - self.met):
            if not start <= layer < until:
                continue
            if layer not in self.ran:
                raise Refused(
                    f"'{name}.{layer}' was passed by: layer {layer} is not called on these inputs, as it was on the "
                    "probe; give inputs on which it is"
                )
            raise Refused(
                f"'{name}.{layer}' was passed by: on these inputs the layer does not call what it called on the "
                "probe, where this site is; give inputs of another length or kind, or name another site"
            )

    def kept(self, x: Tensor) -> Tensor:
        """What is captured of x: where gradients are wanted and nothing before it needs one, a leaf in its place.

        Not where the model has switched gradients off: that of a leaf there would be 0, whatever it does.
        """
        wanted = self.grad and torch.is_grad_enabled() and not x.requires_grad
        return x.detach().requires_grad_() if wanted else x

    def wants_any(self, names: Iterable[str], layer: int) -> bool:
        return any(self.wants(name, layer) for name in names)

    def layers_of(self, *names: str) -> set[int]:
        return {layer for name, layer in self.sites if name in names}

    @property
    def last_layer(self) -> int:
        return max([layer for _, layer in self.sites] + [self.statistics_until], default=-1)


def planned(
    offered: Offered,
    capture: Iterable[str | Site] = (),
    edits: Sequence[Edit] = (),
    statistics: Mapping[str, Statistic] | None = None,
    device: torch.device | str = "cpu",
) -> Plan:
    """The plan of a pass that captures these sites after these edits; row statistics are kept on `device`.

    Raises:
        BadInput: unknown site, layer or head. Refused: a site this model cannot give.
    """
    plan = Plan()
    if not isinstance(capture, (str, Site, Iterable)):
        kind = "function" if callable(capture) else type(capture).__name__
        raise BadInput(f"capture is a list of sites, not a {kind}: capture=['z', 'pattern.3']")
    for text in [capture] if isinstance(capture, (str, Site)) else capture:
        site = Site.parse(text)
        plan.capture |= {(site.name, layer) for layer in offered.layers_of(site)}
    for edit in Edit.several(edits):
        for layer in _layers_of(edit, offered):
            plan.edits.setdefault((edit.site.name, layer), []).append(edit)
    if statistics:
        offered.layers_with("pattern")
        plan.statistics = RowStatistics(
            {name: _moved(statistic, device) for name, statistic in statistics.items()}
        )
        plan.statistics_until = max(offered.spec.attention_layers)
    return plan


def first_changed(offered: Offered, edits: Sequence[Edit]) -> int:
    """The first layer that these edits change, and a replay of them begins at; the last one where there are none."""
    if not offered.spec.chained:
        return 0
    layers = [layer for edit in edits for layer in _layers_of(edit, offered)]
    return min(layers, default=offered.spec.n_layers - 1)


def _layers_of(edit: Edit, offered: Offered) -> list[int]:
    """The layers that an edit is of; none where it names no heads at all (heads=[])."""
    existing = offered.layers_to_see(edit.site.name)
    if not existing:
        raise Refused(
            f"no layer of {offered.id} has '{edit.site.name}': an edit of it does nothing"
        )
    return edit.layers(existing)


def _moved(statistic: Statistic, device: torch.device | str) -> Statistic:
    return type(statistic)(
        *(getattr(statistic, name).to(device) for name in statistic.__dataclass_fields__)
    )
