"""Contextual decomposition: every activation as what comes from chosen sources plus the rest.

With patterns and norm scales held at the clean run's, the rest can be computed by itself, by running
the real blocks with the sources at their baseline; what the sources gave is the difference, and

    relevant + irrelevant = the model's own activation

at every site, whatever the architecture. The rules of CD-T follow from this: an MLP f passes on
f(r + i) − f(i), a norm divides both parts by the total's scale, attention carries both through the
clean pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.answer_direction import answer_direction
from circuits.frozen import Frozen
from interp.data.pairs import Pairs
from interp.devices import wide
from interp.errors import BadInput, unknown
from interp.metrics import logit_diff
from interp.models.calls import uncapped_logits
from interp.models.model import Model
from interp.run.cache import Cache, Run
from interp.run.edits import Edit, Seen
from interp.run.resume import Checkpoint
from interp.sites import Site

T = TypeVar("T")
BASELINES = ("corrupted", "mean", "zero")
ATTENTION = ("values", "all")
BIAS = ("rest", "shared")
WAYS = ("pattern", "value")
"""How a source reaches a head's output: by where the head looks, or by what it finds there."""


@dataclass(frozen=True)
class Part:
    """One split of a run: the same sites twice, once from the sources, once from all else.

    Attributes:
        relevant, irrelevant: captured sites; they sum to the clean activation. Layers before the
            sources are not there: nothing in them is relevant.
        logit_diff: [n], logits that the sources give to answer − wrong. rest: [n], all other logits.
    """

    relevant: Cache
    irrelevant: Cache
    logit_diff: Float[Tensor, " n"]
    rest: Float[Tensor, " n"]


@dataclass(frozen=True)
class Relevance:
    """What every source gives to the answer and to every later node, in logits.

    Attributes:
        sources, nodes: names ("embed", "23.0", "mlp.5").
        to_logits: [n_sources n], of each pair's logit difference.
        to_nodes: [n_sources n_nodes 2], means over pairs, by way (pattern, value): the change of the
            node's output that the source makes, times the gradient of the logit difference there.
    """

    sources: tuple[str, ...]
    nodes: tuple[str, ...]
    to_logits: Float[np.ndarray, "n_sources n"]
    to_nodes: Float[np.ndarray, "n_sources n_nodes 2"]


class Decomposition:
    """A clean run of a task, ready to be split by any set of sources.

    Args:
        baseline: what a source is compared with: "corrupted", its activation on the corrupted
            prompts; "mean", that activation's mean over the prompts, position by position; "zero".
        attention: "values", patterns belong to the context and stay (the paper); "all", patterns
            are computed again from the irrelevant part, so that moving attention counts as relevant.
        bias: "rest", biases belong to no source; "shared", every linear layer's and norm's bias is
            split by |W r| : |W i| (the paper).

    Attributes: model, pairs; nodes: names of all heads and MLPs that can be sources or targets.

    >>> pairs = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4])
    >>> whole = Decomposition(tiny_model(), pairs, baseline="zero")
    >>> part = whole.split([["0.1", "mlp.1"]], capture=["resid_post.1"])[0]
    >>> total = part.relevant["resid_post.1"] + part.irrelevant["resid_post.1"]
    >>> torch.allclose(total, whole.clean["resid_post.1"])
    True
    """

    def __init__(
        self,
        model: Model,
        pairs: Pairs,
        *,
        baseline: str = "corrupted",
        attention: str = "values",
        bias: str = "rest",
        capture: Iterable[str] = (),
    ):
        check_rules(baseline, attention, bias)
        check_model(model)
        self.model, self.pairs, self.attention = model, pairs, attention
        self.nodes = _nodes(model)
        self._index = {name: i for i, name in enumerate(self.nodes)}
        has_mlps = any(name.startswith("mlp.") for name in self.nodes)
        self._sites = ["z", "mlp_write"] if has_mlps else ["z"]
        self.frozen = Frozen(
            model,
            pairs.clean_batch,
            ["embed", *self._sites, *capture],
            share_bias=bias == "shared",
        )
        self._baselines = _baselines(model, pairs, baseline, ["embed", *self._sites])
        self.direction = answer_direction(model, self._final(self.clean), pairs)

    @property
    def clean(self) -> Cache:
        """Activations of the clean run."""
        return self.frozen.run.cache

    @property
    def logit_diff(self) -> Float[Tensor, " n"]:
        """Answer minus wrong on the clean prompts (before a soft-cap), in logits."""
        return self._linear(self._final(self.clean)) + self.direction.constant

    def split(
        self,
        sources: Sequence[Sequence[str] | str],
        *,
        capture: Iterable[str] = (),
        positions: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Part]:
        """The run split once for every entry of `sources`, all in joint forwards.

        Args:
            sources: sets of node names: ["23.0", "mlp.5"], "23.0+mlp.5", "23.0" or "embed".
            capture: sites of the parts; their clean activations must have been captured too
                (`Decomposition(..., capture=)`; z, mlp_write, embed and resid_pre always are).
            positions: a named position of the task: only there are the sources taken.

        Raises:
            BadInput: an unknown node, position or site; an empty set.
        """
        capture = [str(Site.parse(site)) for site in capture]
        if missing := [site for site in capture if site not in self.clean]:
            raise BadInput(
                f"'{missing[0]}' of the clean run was not kept: Decomposition(..., capture={missing})"
            )
        variants = [self._variant(one, positions) for one in sources]
        return self._replay(variants, self._part, capture, progress)

    def _part(self, run: Run) -> Part:
        relevant = Cache()
        for name in run.cache:
            for layer, rest in run.cache.by_layer(name).items():
                relevant.put(name, layer, wide(self.clean[Site(name, layer)]) - wide(rest))
        gain = self._gain(run)
        rest = self._linear(self._final(run.cache)) + self.direction.constant
        return Part(relevant, run.cache, gain, rest)

    def _replay(
        self,
        variants: Sequence[tuple[list[Edit], int]],
        read: Callable[[Run], T],
        capture: Iterable[str] = (),
        progress: Callable[[int], None] | None = None,
        recorders: Sequence[Callable[[int], list[Edit]]] | None = None,
    ) -> list[T]:
        """Irrelevant streams of variants (source edits, first layer that reads them)."""
        joined = []
        for i, (edits, first) in enumerate(variants):
            later = range(first, self.model.n_layers)
            watching = [] if recorders is None else recorders[i](first)
            holding = self.frozen.hold_patterns(later) if self.attention == "values" else []
            joined.append([*edits, *watching, *holding])
        return self.frozen.replay(
            joined, read, capture=[*capture, self.frozen.last], progress=progress
        )

    def _variant(self, names: Sequence[str] | str, positions: str | None) -> tuple[list[Edit], int]:
        """Edits that put sources at their baseline, and the first layer whose pattern they reach."""
        names = names.split("+") if isinstance(names, str) else list(names)
        if not names:
            raise BadInput("a set of sources is empty: name at least one, such as 'embed' or '0.1'")
        where = None if positions is None else self.pairs.position(positions)
        edits, layers = [], []
        for name in names:
            site = self._site(name)
            value = self._baselines.get(site.name)
            layer = site.layer or 0
            edits.append(
                Edit.zero(site, positions=where)
                if value is None
                else Edit.patch(site, value[layer], positions=where)
            )
            layers.append(0 if site.name == "embed" else layer + 1)
        return edits, min(layers)

    def _site(self, name: str) -> Site:
        if name not in (known := ("embed", *self.nodes)):
            raise unknown("node", name, known)
        kind, layer, head = kind_of(name)
        if kind == "embed":
            return Site("embed")
        return Site("z", layer, head) if kind == "head" else Site("mlp_write", layer)

    def _final(self, cache: Cache) -> Float[Tensor, "n d_model"]:
        return cache[self.frozen.last][:, self.pairs.end]

    def _linear(self, final: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
        return (wide(final) * self.direction.vector).sum(-1)

    # --- all sources to all targets --------------------------------------------------------------

    def relevance(
        self,
        sources: Sequence[str] | None = None,
        *,
        positions: str | None = None,
        units: Checkpoint | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Relevance:
        """What each source by itself gives to the logits and to every later head and MLP.

        To the logits the split is exact under its own rules. To a node t it is the change of t's
        output times the clean gradient of the logit difference there: for a head,

            Σ (A − A_i) · ∂m/∂A   by way of the pattern, A_i made from the irrelevant part's scores,
            Σ (z − z_i) · ∂m/∂z   by way of the values, with the pattern held,

        for an MLP Σ (write − write_i) · ∂m/∂write. The softmax is not linearised, what follows the
        head is. A node's share contains every route to it, also through other nodes.
        """
        sources = self.nodes if sources is None else tuple(sources)
        units = Checkpoint() if units is None else units
        gradients = self._clean_gradients()
        logits = np.zeros((len(sources), len(self.pairs)), np.float32)
        nodes = np.zeros((len(sources), len(self.nodes), len(WAYS)), np.float32)
        order = {name: self._variant(name, positions) for name in sources}
        for first in sorted({first for _, first in order.values()}):
            places = [i for i, name in enumerate(sources) if order[name][1] == first]

            def unit(places: list[int] = places) -> dict[str, np.ndarray]:
                sums = [torch.zeros(len(self.nodes), len(WAYS)) for _ in places]
                recorders = [self._recorder(found, gradients["pattern"]) for found in sums]
                gains = self._replay(
                    [order[sources[i]] for i in places],
                    lambda run: (self._gain(run).cpu(), self._value_ways(run, gradients)),
                    self._sites,
                    recorders=recorders,
                )
                by_value = torch.stack([values for _, values in gains])
                by_pattern = torch.stack(sums)[..., 0] / len(self.pairs)
                if self.attention == "all":  # z has moved with its pattern: both ways are in it
                    by_value = by_value - by_pattern
                both = torch.stack([by_pattern, by_value], -1)
                # What is computed before a source, or beside it, differs by rounding only.
                for row, i in enumerate(places):
                    both[row, ~self._after(sources[i])] = 0
                return {
                    "logits": torch.stack([gain for gain, _ in gains]).numpy(),
                    "nodes": both.numpy(),
                }

            found = units.compute(
                f"sources.{positions}.{first}.{[sources[i] for i in places]}", unit
            )
            logits[places], nodes[places] = found["logits"], found["nodes"]
            if progress is not None:
                progress(len(places))
        return Relevance(tuple(sources), self.nodes, logits, nodes)

    def _after(self, source: str) -> Bool[Tensor, " n_nodes"]:
        """The nodes that some node of a source feeds; the source's own nodes are no targets."""
        own = source.split("+")
        found = torch.zeros(len(self.nodes), dtype=torch.bool)
        for kind, layer, _ in map(kind_of, own):
            for i, (other, place, _) in enumerate(map(kind_of, self.nodes)):
                found[i] |= place > layer or (place == layer and (kind, other) == ("head", "mlp"))
        found[[self._index[name] for name in own if name in self._index]] = False
        return found

    def _gain(self, run: Run) -> Float[Tensor, " n"]:
        """What the sources give to the logit difference; a difference in 16 bits would round it once more."""
        return self._linear(wide(self._final(self.clean)) - wide(self._final(run.cache)))

    def _value_ways(self, run: Run, gradients: Mapping[str, dict[int, Tensor]]) -> Tensor:
        """Σ (x − x_i) · ∂m/∂x of every node's output, mean over pairs [n_nodes]."""
        found = torch.zeros(len(self.nodes))
        for site in ("z", "mlp_write"):
            if site not in run.cache:
                continue
            for layer, rest in run.cache.by_layer(site).items():
                change = (wide(self.clean[Site(site, layer)]) - wide(rest)) * gradients[site][layer]
                # Heads have an axis of their own before the last.
                effect = change.sum((0, 1, -1)) / len(self.pairs)
                found[self._places(site, layer)] = effect.reshape(-1).cpu().float()
        return found

    def _recorder(self, found: Tensor, gradient: dict[int, Tensor]) -> Callable[[int], list[Edit]]:
        """Edits that change nothing and add Σ (A − A_i) · ∂m/∂A of every head to `found`."""
        clean = self.clean.by_layer("pattern")

        def watch(x: Tensor, seen: Seen) -> Tensor:
            rows, keys = slice(seen.start, seen.start + x.shape[2]), slice(x.shape[3])
            whole = clean[seen.layer][:, :, rows, keys]
            change = wide(whole) - wide(x.to(whole.device))
            effect = (change * gradient[seen.layer][:, :, rows, keys]).sum((0, 2, 3))
            found[self._places("z", seen.layer), 0] += effect.cpu()
            return x

        def edits(first: int) -> list[Edit]:
            return [Edit.apply(f"pattern.{layer}", watch) for layer in clean if layer >= first]

        return edits

    def _places(self, site: str, layer: int) -> list[int]:
        """Where the nodes of one layer stand in `nodes`, heads in order."""
        if site == "mlp_write":
            return [self._index[f"mlp.{layer}"]]
        heads = range(self.model.spec.blocks[layer].n_heads)
        return [self._index[f"{layer}.{head}"] for head in heads]

    def _clean_gradients(self) -> dict[str, dict[int, Tensor]]:
        """d logit difference / d pattern, z and MLP write of the clean run, by site and layer."""
        sites = ["pattern", *self._sites]
        run = self.model.run(
            self.pairs.clean_batch, capture=[*sites, self.frozen.last], logits=False, grad=True
        )
        with torch.enable_grad():
            logits = uncapped_logits(self.model.spec, self.model.module, self._final(run.cache))
            target = logit_diff(logits, self.pairs.answers, self.pairs.wrong).sum()
        places = [(site, layer) for site in sites for layer in run.cache.layers(site)]
        values = [run.cache[Site(*place)] for place in places]
        found = torch.autograd.grad(target, values, allow_unused=True)
        out: dict[str, dict[int, Tensor]] = {site: {} for site in sites}
        for (site, layer), value, grad in zip(places, values, found, strict=True):
            out[site][layer] = torch.zeros_like(value) if grad is None else wide(grad)
        return out


def _nodes(model: Model) -> tuple[str, ...]:
    """Heads and MLPs in order of computation; MLPs only where their write is known."""
    has_mlp = "mlp_write" not in model.spec.refused
    names = []
    for layer, block in enumerate(model.spec.blocks):
        names += [f"{layer}.{head}" for head in range(block.n_heads)]
        names += [f"mlp.{layer}"] if has_mlp and block.mlp_write is not None else []
    return tuple(names)


def _baselines(
    model: Model, pairs: Pairs, baseline: str, sites: Sequence[str]
) -> dict[str, dict[int, Tensor]]:
    """What each site's source is set to, by layer; nothing for zero."""
    if baseline == "zero":
        return {}
    cache = model.run(pairs.corrupted_batch, capture=sites, logits=False).cache
    found = {site: cache.by_layer(site) for site in sites}
    if baseline == "corrupted":
        return found
    return {
        site: {layer: x.mean(0, keepdim=True).expand_as(x) for layer, x in layers.items()}
        for site, layers in found.items()
    }


def kind_of(name: str) -> tuple[str, int, int]:
    """Kind, layer and head of a node; -1 where it has none, and for sets."""
    if "+" in name:
        return "set", -1, -1
    if name == "embed":
        return "embed", -1, -1
    first, second = name.split(".")
    return ("mlp", int(second), -1) if first == "mlp" else ("head", int(first), int(second))


def check_rules(baseline: str, attention: str, bias: str) -> None:
    """BadInput where one of these is no known rule."""
    for name, value, known in (
        ("baseline", baseline, BASELINES),
        ("choice of attention", attention, ATTENTION),
        ("choice of bias", bias, BIAS),
    ):
        if value not in known:
            raise unknown(name, value, known)


def check_model(model: Model) -> None:
    """Refused where patterns or W_U are not there."""
    model.layers_with("pattern")
    _ = model.W_U
