"""A circuit's nodes as words: what each head and MLP writes, read through the unembedding.

A knowledge circuit is told by where the answer appears: in which node's write, at which position, how
far up the vocabulary, and what stands beside it. Each write is read by the logit lens on its own; how
much it counts is its direct contribution to the logit difference, with the final norm held fixed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.answer_direction import answer_direction
from circuits.graph import Graph
from circuits.stream import HeadWrites, Writes, head_writers
from circuits.tasks import as_pairs, check_task
from interp.data.pairs import Pairs
from interp.errors import BadInput, unknown
from interp.lens import read
from interp.models.model import Model
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.cache import Run

AT_ONCE = 32
"""Nodes whose writes at a position are held at once."""


@dataclass(frozen=True)
class Read:
    """A node's write at one position of every pair: `contribution` [n] in logits, NaN but at the end."""

    vectors: Float[Tensor, "n d_model"]
    contribution: Float[np.ndarray, " n"]


class NodeWrites:
    """What every node writes in one clean run, by name ("embed", "23.0", "mlp.5").

    >>> pairs = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4])
    >>> writes = NodeWrites(tiny_model(), pairs)
    >>> total = sum(writes.at(name, "end").contribution for name in writes.graph.sender_names)
    >>> bool(np.allclose(total + writes.constant, writes.logit_diff, atol=1e-4))
    True
    """

    @torch.no_grad()
    def __init__(self, model: Model, pairs: Pairs):
        _ = model.W_U  # refused before the pass
        self.model, self.pairs, self.graph = model, pairs, Graph.of(model)
        self._writers: Mapping[int, HeadWrites] = head_writers(model, self.graph)
        last = f"resid_post.{model.n_layers - 1}"
        sites = ["embed", "z", "attn_out", "attn_write", "mlp_write", "resid_post"]
        self.run: Run = model.run(pairs.clean_batch, capture=sites, logits=False)
        self._writes = self._narrow()
        self.final = self.run.cache[last][:, pairs.end]
        self.direction = answer_direction(model, self.final, pairs)

    def _narrow(self) -> Writes:
        cache, writes = self.run.cache, Writes(self.run.cache["embed"].float())
        for layer, writer in self._writers.items():
            writes.z[layer] = cache[f"z.{layer}"]
            if writer.norm is not None:
                writes.sigma[layer] = writer.norm.sigma(cache[f"attn_out.{layer}"].float())
        for layer in cache.layers("mlp_write"):
            writes.mlp[layer] = cache[f"mlp_write.{layer}"].float()
        return writes

    @property
    def constant(self) -> Float[np.ndarray, " n"]:
        """What no node gives to the logit difference: attention biases, and biases after the stack."""
        total = self.direction.constant.clone()
        for layer in self._writers:
            whole = self.run.cache[f"attn_write.{layer}"][:, -1].float()
            heads = self._writes.heads(self._writers, layer)[:, :, -1].sum(0)
            total = total + ((whole - heads) * self.direction.vector).sum(-1)
        return total.cpu().numpy()

    @property
    def logit_diff(self) -> Float[np.ndarray, " n"]:
        """Answer minus wrong (before a soft-cap), in logits."""
        found = (self.final.float() * self.direction.vector).sum(-1) + self.direction.constant
        return found.cpu().numpy()

    def vectors(self, name: str, position: str) -> Float[Tensor, "n d_model"]:
        """A node's write at a named position of every pair."""
        sender = self.graph.senders[self.graph.sender(name)]
        rows, places = torch.arange(len(self.pairs)), self.pairs.position(position)
        if sender.kind == "embed":
            return self._writes.embed[rows, places]
        if sender.kind == "mlp":
            return self._writes.mlp[sender.layer][rows, places]
        writer = self._writers[sender.layer]
        z = self._writes.z[sender.layer][rows, places, sender.head].float()
        write = z @ writer.W[sender.head]
        if sender.layer not in self._writes.sigma:
            return write
        return (write + writer.share) / self._writes.sigma[sender.layer][rows, places][:, None]

    def at(self, name: str, position: str) -> Read:
        """A node's write at a named position, and what it gives to the logit difference from there."""
        vectors = self.vectors(name, position)
        given = (vectors * self.direction.vector).sum(-1).cpu().numpy()
        here = (self.pairs.position(position) == self.pairs.end).numpy()
        return Read(vectors, np.where(here, given, np.nan))


def check_options(
    *,
    task: Any = None,
    nodes: Sequence[str] | None = None,
    positions: Sequence[str] = ("end",),
    top_k: int = 5,
    shown: int = 4,
    n: int = 32,
    **_: Any,
) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if isinstance(task, (str, Path)):
        check_task(task)
    if nodes is not None and not list(nodes):
        raise BadInput("no node: name at least one, such as '23.0' or 'mlp.5'")
    if not list(positions):
        raise BadInput("no position: name at least one, such as 'end'")
    for name, value in (("top_k", top_k), ("shown", shown), ("n", n)):
        if value < 1:
            raise BadInput(f"{name}={value}: give at least 1")


def loudest(report: Report) -> pd.DataFrame:
    """The nodes of the largest direct contributions."""
    order = np.argsort(-report.table["contribution"].abs().to_numpy(float), kind="stable")
    return report.table.iloc[order].head(15)


@analysis(
    name="readout",
    source="Yao et al. 2024, knowledge circuits in pretrained transformers; nostalgebraist 2020",
    example="interp readout smollm2-135m facts:capital --positions end,subject",
    figure="words",
    validate=check_options,
    summary=loudest,
    takes="text",
)
@torch.no_grad()
def readout(
    model: Model,
    task: Pairs | str,
    *,
    nodes: Sequence[str] | None = None,
    positions: Sequence[str] = ("end",),
    top_k: int = 5,
    shown: int = 4,
    n: int = 32,
    seed: int = 0,
) -> Report:
    """What each node of a circuit says: top tokens of its write, and the rank of the answer in it.

    A write w at position p is read as softmax(unembed(w)), the final norm applied to w alone: its
    direction, not its size. Its size is in `contribution`, w · d at the last position, d the direction
    of answer − wrong with the final norm held (logits).

    A node that says a word need not be why the model says it: what it writes may be overruled, and a
    node that speaks to later nodes in no words reads as noise.

    Args:
        task: a shipped task ("ioi", "facts:language"), a file of pairs, or Pairs.
        nodes: names such as 23.0, mlp.5 or embed, as a circuit lists them; by default all.
        positions: named positions of the task whose writes are read.
        top_k: tokens named for each write. shown: pairs whose tokens are kept.
        n: pairs of a named task. seed: of the task.

    Returns: a Report. Table "readout", one row a (node, position): contribution (logits, mean over
        pairs, at the end only), answer_rank and wrong_rank (medians over pairs; 0 is the most likely),
        answer_first (share of pairs whose top token is an answer). Table "words": (pair, node,
        position, place, token, probability) of the first `shown` pairs. Table "stream": answer_rank and
        answer_probability of the residual stream after every layer, at each position.

    Raises:
        BadInput: unknown node or position. Refused: writes or unembedding were not verified.

    Source: Yao et al. 2024, arXiv 2405.17969: there, a circuit of edges is read so.

    >>> pairs = Pairs.of([[5, 6, 7]], [[5, 9, 7]], answers=[3], wrong=[4])
    >>> report = readout(tiny_model(), pairs, nodes=["1.2", "mlp.1"], top_k=2)
    >>> report.table["node"].tolist(), len(report.tables["words"])
    (['1.2', 'mlp.1'], 4)
    """
    started = time.perf_counter()
    check_options(nodes=nodes, positions=positions, top_k=top_k, shown=shown, n=n)
    pairs = as_pairs(model, task, n=n, seed=seed)
    for position in positions:
        pairs.position(position)
    writes = NodeWrites(model, pairs)
    names = writes.graph.sender_names
    chosen = names if nodes is None else list(nodes)
    if missing := [name for name in chosen if name not in names]:
        raise unknown("node", missing[0], names)
    table, words = tables(writes, chosen, positions, top_k=top_k, shown=shown)
    options = {
        "task": pairs.name,
        "nodes": None if nodes is None else list(nodes),
        "positions": list(positions),
        "top_k": top_k,
        "n": len(pairs),
    }
    meta = provenance(model, options=options, seed=seed) | {
        "prompts": [model.tokens(ids.tolist()) for ids in pairs.clean[:shown]],
        "answers": [model.tokens(row[row >= 0].tolist()) for row in pairs.answers[:shown]],
        "notes": list(model.notes),
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    found = {"readout": table, "words": words, "stream": _stream(writes, positions)}
    return Report("readout", found, {}, meta)


def tables(
    writes: NodeWrites,
    nodes: Sequence[str],
    positions: Sequence[str] = ("end",),
    *,
    top_k: int = 5,
    shown: int = 4,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables "readout" and "words" of some nodes (see `readout`)."""
    model, pairs, n = writes.model, writes.pairs, len(writes.pairs)
    both = torch.stack([pairs.answers[:, 0], pairs.wrong[:, 0]], dim=1)
    rows, words = [], []
    for position, start in product(positions, range(0, len(nodes), AT_ONCE)):
        names = nodes[start : start + AT_ONCE]
        reads = [writes.at(name, position) for name in names]
        # One product with the unembedding for all of them: most of the time goes there.
        vectors = torch.cat([here.vectors for here in reads])
        found = read(model, vectors, targets=both.repeat(len(names), 1), top_k=top_k)
        assert found.target_ranks is not None
        for place, (name, here) in enumerate(zip(names, reads, strict=True)):
            own = slice(place * n, (place + 1) * n)
            answer_ranks, wrong_ranks = found.target_ranks[own].unbind(1)
            first = (found.top_ids[own, :1] == pairs.answers).any(1)
            rows.append(
                {
                    "node": name,
                    "position": position,
                    "contribution": _mean(here.contribution),
                    "answer_rank": float(np.median(answer_ranks.numpy())),
                    "wrong_rank": float(np.median(wrong_ranks.numpy())),
                    "answer_first": float(first.float().mean()),
                }
            )
            for pair in range(min(shown, n)):
                ids = found.top_ids[own][pair].tolist()
                words += [
                    {
                        "pair": pair,
                        "node": name,
                        "position": position,
                        "place": place,
                        "token": token,
                        "probability": float(found.top_probabilities[own][pair, place]),
                    }
                    for place, token in enumerate(model.tokens(ids))
                ]
    return pd.DataFrame(rows), pd.DataFrame(words)


def _mean(values: np.ndarray) -> float:
    """Mean of what is there; NaN where nothing is."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")


def _stream(writes: NodeWrites, positions: Sequence[str]) -> pd.DataFrame:
    """Rank and probability of the answer in the residual stream after every layer."""
    cache, pairs = writes.run.cache, writes.pairs
    rows, found = torch.arange(len(pairs)), []
    for position in positions:
        places = pairs.position(position)
        stack = torch.stack([x[rows, places] for x in cache.by_layer("resid_post").values()])
        reading = read(writes.model, stack, targets=pairs.answers[:, 0], top_k=1)
        assert reading.target_ranks is not None and reading.target_probabilities is not None
        for layer in range(len(stack)):
            found.append(
                {
                    "position": position,
                    "layer": layer,
                    "answer_rank": float(np.median(reading.target_ranks[layer].numpy())),
                    "answer_probability": float(reading.target_probabilities[layer].mean()),
                }
            )
    return pd.DataFrame(found)
