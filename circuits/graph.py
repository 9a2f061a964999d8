"""The computational graph of a model as dense tensors: a score or a yes/no for every edge, nodes as views.

Senders (rows) write to the residual stream: the embedding, every head, every MLP. Receivers (columns)
read it: every head's q, k and v, every MLP, the logits. An edge is a pair [sender, receiver]; a tensor
[n_senders n_receivers] of floats is a scoring of all edges, one of bools is a circuit. `Graph` holds the
names of both axes and which pairs exist; there are no edge objects.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import BadInput, Refused, unknown
from interp.models.model import Model

Scores = Float[Tensor, "n_senders n_receivers"]
"""A number for every edge; 0 where there is none (see `Graph.allowed`)."""
Circuit = Bool[Tensor, "n_senders n_receivers"]
"""Which edges belong to a circuit."""

NEEDED_SITES = ("z", "attn_out", "attn_write", "mlp_write")


class Sender(NamedTuple):
    """What writes to the residual stream: kind "embed", "head" or "mlp". `embed` has layer -1."""

    kind: str
    layer: int
    head: int = -1

    @property
    def name(self) -> str:
        """ "embed", "23.0" (layer 23, head 0) or "mlp.5"."""
        if self.kind == "head":
            return f"{self.layer}.{self.head}"
        return "embed" if self.kind == "embed" else f"mlp.{self.layer}"


class Receiver(NamedTuple):
    """What reads the residual stream: kind "q", "k", "v", "mlp" or "logits" (layer n_layers).

    k and v belong to a *query* head: in grouped-query models the heads of a group share their k and v,
    but an edge into "23.0.k" changes what query head 0 alone sees of them.
    """

    kind: str
    layer: int
    head: int = -1

    @property
    def name(self) -> str:
        """ "23.0.q", "mlp.5" or "logits"."""
        if self.kind == "logits":
            return "logits"
        return (
            f"mlp.{self.layer}" if self.kind == "mlp" else f"{self.layer}.{self.head}.{self.kind}"
        )


@dataclass(frozen=True, eq=False)
class Graph:
    """Names of the two axes of every score or circuit tensor, and which edges exist.

    Senders are in order of computation, so row order is a topological order; receivers come layer by
    layer as q of all heads, k of all heads, v of all heads, MLP; logits last.

    Attributes:
        senders, receivers: what the rows and columns stand for.
        allowed: [n_senders n_receivers], whether the receiver reads what the sender wrote. In a
            parallel block the heads and the MLP of one layer do not feed each other.

    >>> graph = Graph.of(tiny_model())
    >>> graph.allowed.shape, graph.n_edges
    (torch.Size([11, 27]), 110)
    >>> graph.sender("1.3"), graph.receiver("mlp.0"), graph.senders[0].name
    (9, 12, 'embed')
    >>> scores = torch.randn(graph.shape) * graph.allowed
    >>> circuit = graph.prune(graph.top_edges(scores, 40))
    >>> list(graph.to_table(scores, circuit))
    ['sender', 'receiver', 'score']
    """

    senders: tuple[Sender, ...]
    receivers: tuple[Receiver, ...]
    allowed: Bool[Tensor, "n_senders n_receivers"]

    @staticmethod
    def of(model: Model) -> Graph:
        """The graph of a model whose writes to the residual stream are known.

        Raises:
            Refused: the residual stream is not a sum of known writes (norm after adding, unseen
            attention), so edges mean nothing.
        """
        try:
            model.require_sum("a graph of edges")
            for site in NEEDED_SITES:
                model.layers_with(site)
        except Refused as error:
            raise Refused(
                f"{error}; edges need the residual stream as a sum of head and MLP writes. "
                "Patching of resid_pre and resid_post still works"
            ) from error
        senders, receivers = [Sender("embed", -1)], []
        for layer, block in enumerate(model.spec.blocks):
            # What a block does not write (weights of zero) has no edges.
            heads = range(block.n_heads if block.attn_write is not None and block.W_O else 0)
            senders += [Sender("head", layer, head) for head in heads]
            receivers += [Receiver(kind, layer, head) for kind in "qkv" for head in heads]
            if block.mlp_write is not None:
                senders.append(Sender("mlp", layer))
                receivers.append(Receiver("mlp", layer))
        receivers.append(Receiver("logits", model.n_layers))
        written, read = (
            torch.tensor([node.layer for node in side]) for side in (senders, receivers)
        )
        into_mlp = torch.tensor(
            [r.kind == "mlp" and not model.spec.blocks[r.layer].parallel for r in receivers]
        )
        is_head = torch.tensor([s.kind == "head" for s in senders])
        same_block = (written[:, None] == read) & is_head[:, None] & into_mlp
        allowed = (written[:, None] < read) | same_block
        return Graph(tuple(senders), tuple(receivers), allowed)

    # --- names and sizes -------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(n_senders, n_receivers)."""
        return len(self.senders), len(self.receivers)

    @cached_property
    def n_edges(self) -> int:
        """How many edges exist."""
        return int(self.allowed.sum())

    @cached_property
    def _sender_index(self) -> dict[str, int]:
        return {sender.name: i for i, sender in enumerate(self.senders)}

    @cached_property
    def _receiver_index(self) -> dict[str, int]:
        return {receiver.name: i for i, receiver in enumerate(self.receivers)}

    def sender(self, name: str) -> int:
        """Row of "embed", "23.0" or "mlp.5"; BadInput with the nearest name."""
        if name not in self._sender_index:
            raise unknown("sender", name, self._sender_index)
        return self._sender_index[name]

    def receiver(self, name: str) -> int:
        """Column of "23.0.q", "mlp.5" or "logits"; BadInput with the nearest name."""
        if name not in self._receiver_index:
            raise unknown("receiver", name, self._receiver_index)
        return self._receiver_index[name]

    @cached_property
    def node(self) -> Int[Tensor, " n_receivers"]:
        """For every receiver the row of the sender that it is the input of; n_senders for logits.

        q, k and v of a head all lead to that head's row.
        """
        rows = {tuple(sender): i for i, sender in enumerate(self.senders)}
        kinds = {"q": "head", "k": "head", "v": "head"}
        keys = [(kinds.get(r.kind, r.kind), r.layer, r.head) for r in self.receivers]
        return torch.tensor([rows.get(key, len(self.senders)) for key in keys])

    def rows(self, layer: int) -> slice:
        """Senders of one layer: its heads, then its MLP."""
        return _places([sender.layer for sender in self.senders], layer)

    def columns(self, layer: int) -> slice:
        """Receivers of one layer: q of all heads, k, v, then its MLP."""
        return _places([receiver.layer for receiver in self.receivers], layer)

    # --- circuits --------------------------------------------------------------------------------

    @property
    def empty(self) -> Circuit:
        """The circuit without edges."""
        return torch.zeros(self.shape, dtype=torch.bool)

    @property
    def whole(self) -> Circuit:
        """The circuit of all edges: the model itself."""
        return self.allowed.clone()

    def circuit(self, edges: Iterable[tuple[str, str]]) -> Circuit:
        """The circuit of edges given by name, such as [("embed", "0.1.v"), ("0.1", "logits")].

        Raises: BadInput: a name that is not there, or a pair that is no edge (it would run backwards).
        """
        found = self.empty
        for sender, receiver in edges:
            place = self.sender(sender), self.receiver(receiver)
            if not self.allowed[place]:
                raise BadInput(
                    f"'{sender}' → '{receiver}' is no edge: {receiver} is computed before {sender} has "
                    "written, or beside it"
                )
            found[place] = True
        return found

    def node_circuit(self, nodes: Iterable[str]) -> Circuit:
        """All edges among these heads and MLPs, from the embedding and to the logits.

        Every other node's write is then corrupted for everyone: the node-level circuit of the same
        nodes, as the special case of an edge circuit.
        """
        rows = torch.zeros(len(self.senders) + 1, dtype=torch.bool)
        rows[[0, len(self.senders), *(self.sender(name) for name in nodes)]] = True
        return self.allowed & rows[:-1, None] & rows[self.node]

    def nodes(self, circuit: Circuit) -> list[str]:
        """Senders with at least one edge in the circuit, in order of computation."""
        return [self.senders[int(i)].name for i in circuit.any(1).nonzero()]

    def adjacency(self, circuit: Circuit) -> Bool[Tensor, "n_nodes n_nodes"]:
        """Which node feeds which, q, k and v taken together; the last node is the logits."""
        n = len(self.senders) + 1
        found = torch.zeros(n, n, dtype=torch.long)
        found[:-1].index_add_(1, self.node, (circuit & self.allowed).long())
        return found > 0

    def prune(self, circuit: Circuit) -> Circuit:
        """The edges of `circuit` that lie on a path from the embedding to the logits; others are dropped.

        A head counts as reached when any of its q, k and v is.
        """
        feeds = self.adjacency(circuit)
        n = len(feeds)
        reached, reaches = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
        reached[0], reaches[-1] = True, True
        for i in range(1, n):  # rows are in topological order
            reached[i] = (feeds[:, i] & reached).any()
        for i in reversed(range(n - 1)):
            reaches[i] = (feeds[i] & reaches).any()
        return circuit & self.allowed & reached[:-1, None] & reaches[self.node]

    def top_edges(self, scores: Scores, n: int, *, absolute: bool = False) -> Circuit:
        """The n edges of the highest score (or largest magnitude), not pruned; ties go to earlier edges.

        Raises: BadInput: n is negative, scores of another shape or with NaN.
        """
        self.check(scores)
        if n < 0:
            raise BadInput(f"a circuit of {n} edges: give 0 to {self.n_edges}")
        flat = (scores.abs() if absolute else scores)[self.allowed].double()
        chosen = torch.zeros(self.n_edges, dtype=torch.bool)
        chosen[torch.argsort(flat, descending=True, stable=True)[:n].cpu()] = True
        found = self.empty
        found[self.allowed] = chosen
        return found

    def random_scores(self, seed: int = 0) -> Scores:
        """Standard normal scores: `top_edges` of them is a random circuit."""
        scores = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))
        return scores * self.allowed

    # --- views -----------------------------------------------------------------------------------

    def node_scores(self, scores: Scores) -> Float[Tensor, " n_senders"]:
        """Each sender's score: the sum over its edges.

        To first order, corrupting a node is corrupting all of its edges at once.
        """
        return (scores * self.allowed).sum(1)

    def to_table(
        self, scores: Scores, circuit: Circuit | None = None, *, n: int | None = None
    ) -> pd.DataFrame:
        """Edges as a tidy table (sender, receiver, score), largest magnitude first.

        Args:
            circuit: only these edges. n: only the first n rows.
        """
        self.check(scores)
        rows, columns = (self.allowed if circuit is None else circuit & self.allowed).nonzero().T
        values = scores[rows, columns].detach().cpu().double().numpy()
        order = np.argsort(-np.abs(values), kind="stable")[:n]
        return pd.DataFrame(
            {
                "sender": [self.senders[int(rows[i])].name for i in order],
                "receiver": [self.receivers[int(columns[i])].name for i in order],
                "score": values[order],
            }
        )

    def from_table(self, table: pd.DataFrame) -> Scores:
        """Dense scores of a table with columns sender, receiver, score; 0 for edges it does not name."""
        scores = torch.zeros(self.shape)
        for edge in table.to_dict("records"):
            scores[self.sender(edge["sender"]), self.receiver(edge["receiver"])] = edge["score"]
        return scores

    def check(self, scores: Tensor) -> None:
        """BadInput where a tensor is not one number for each sender and receiver of this graph."""
        if tuple(scores.shape) != self.shape:
            raise BadInput(
                f"edge scores have shape {tuple(scores.shape)}; this model has {self.shape[0]} senders and "
                f"{self.shape[1]} receivers: were they made with another model?"
            )
        if scores.is_floating_point() and not bool(torch.isfinite(scores[self.allowed]).all()):
            raise BadInput(
                "edge scores hold NaN or infinite values: check the metric and the weights"
            )

    @property
    def sender_names(self) -> list[str]:
        """Names of the rows."""
        return [sender.name for sender in self.senders]

    @property
    def receiver_names(self) -> list[str]:
        """Names of the columns."""
        return [receiver.name for receiver in self.receivers]


def _places(layers: list[int], layer: int) -> slice:
    """Where a layer stands in a sorted list of layers; empty, in its place, where it is absent."""
    return slice(bisect_left(layers, layer), bisect_right(layers, layer))


def overlap(a: Sequence[str], b: Sequence[str]) -> float:
    """Share of the nodes (or edges) of the smaller set that the larger one has too.

    >>> overlap(["5.1", "6.0", "7.2"], ["6.0", "7.2"])
    1.0
    """
    smaller = min(len(set(a)), len(set(b)))
    return len(set(a) & set(b)) / smaller if smaller else float("nan")
