"""Heads and memories as words: queries, keys, values, neurons and norms of one position, in tokens.

Everything a block handles has a counterpart in the residual stream (`circuits.word_vectors`): what a head
writes, what a value would write, the direction that a query looks for, the direction that a key answers to,
what a neuron writes and what excites it. Each is a vector v of width d_model and is read as
softmax(W_U norm_f(v)).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from circuits.word_vectors import WordVectors, word_vectors
from interp.devices import wide
from interp.errors import BadInput
from interp.lens import read
from interp.models.model import Model
from interp.models.weights import linear_map
from interp.registry import analysis
from interp.report import Report, provenance
from interp.run.batch import Batch
from interp.unembedding import Unembedding

OF_HEADS = ("output", "value", "query", "key")
OF_NEURONS = ("up", "down", "key")


def check_options(*, top_k: int = 5, neurons: int = 20, **_: object) -> None:
    """Raise BadInput for options that no model could satisfy."""
    if top_k < 1:
        raise BadInput(f"top_k={top_k}: wanted 1 or more")
    if neurons < 0:
        raise BadInput(f"neurons={neurons}: wanted 0 (none shown) or more")


def loudest(report: Report) -> pd.DataFrame:
    """The fifteen heads that write most, with what they write."""
    shown = ["layer", "head", "norm", "output", "source_token", "weight", "prompt"]
    several = len(report.meta["tokens"]) > 1
    return report.tables["heads"].filter(shown if several else shown[:-1]).head(15)


@analysis(
    name="words",
    source="Katz & Belinkov 2023, VISIT: Visualizing and Interpreting the Semantic Information Flow of "
    "Transformers, arXiv 2305.13417; Geva et al. 2021 for MLPs as memories",
    example='interp words smollm2-135m "When Mary and John went to the store, John gave a drink to"',
    figure="heads",
    validate=check_options,
    summary=loudest,
)
def words(
    model: Model,
    prompt: Batch | Tensor | str | Sequence[str],
    *,
    position: int = -1,
    top_k: int = 5,
    neurons: int = 20,
) -> Report:
    """Queries, keys, values, outputs, neurons and norms at one position, each as its top tokens.

    Every vector v is read as softmax(W_U norm_f(v)), the vectors of head h at position i being

        output  z_i W_O^h                       what it writes
        value   v_j W_O^h                       what it would write if it read j alone
        query   ∂(q_i · k_j) / ∂ resid_pre_j    what it looks for at j
        key     ∂(q_i · k_j) / ∂ resid_pre_i    what a query at i must hold to be answered by j

    with j the source it takes most from, argmax_j A[i,j] ‖v_j W_O^h‖, and norms' scales held fixed. Of a
    neuron: ±a W_out ("up" and "down", what it raises and lowers) and the gradient of its activation along
    the stream ("key", what excites it more). Neurons are those with the largest |a| ‖W_out‖.

    A vector's size does not show in its words: the final norm takes it out, so a write of no
    consequence reads as clearly as a strong one (see `norm`). The vocabulary is the final layer's; a
    vector in the middle of a model may speak to a later layer in another basis. Words of queries, keys
    and excitations say what a score would rise with, not that anything in the prompt has it; where many
    heads share a large direction, their words agree and tell them apart badly.

    Args:
        prompt: text or texts, token ids, or a Batch.
        position: which position; negative from the end of the real tokens.
        top_k: how many tokens to name for each vector.
        neurons: how many neurons to name for each prompt; 0 for none.

    Returns: a Report. Table "words": one row for each token named: (prompt, kind, layer, index, what,
        place, token, token_id, probability); kind "head" with `what` output, value, query or key, kind
        "neuron" with up, down or key. Table "heads", largest first: (prompt, layer, head, norm of the
        output, source, source_token, weight, and the words of each `what`). Table "neurons", largest
        first: (prompt, layer, neuron, activation, norm |a|·‖W_out‖, and words). Table "norms": tokens that
        enter or leave the top_k through a norm's gain: (prompt, layer, site, norm, change, token,
        token_id, place_before, place_after); the site is what the norm reads, "final" the final norm.
        Norms are in units of the residual stream. meta["notes"] says what a model could not give.

    Raises:
        BadInput: a position not in the prompt, bad options. Refused: attention, writes or unembedding
        were not verified.

    Source: Katz & Belinkov 2023, arXiv 2305.13417, who project q W_K^T and k W_Q, for models without
    rotary positions and with one key head a query head. Theirs has no source: we name the position
    whose value is largest after weighting, since the most attended one often carries next to nothing.

    >>> report = words(tiny_model(), torch.tensor([[5, 6, 7]]), top_k=2, neurons=3)
    >>> sorted(report.tables), len(report.tables["heads"]), len(report.tables["neurons"])
    (['heads', 'neurons', 'norms', 'words'], 8, 3)
    """
    started = time.perf_counter()
    check_options(top_k=top_k, neurons=neurons)
    vectors = word_vectors(model, prompt, position=position, neurons=neurons)
    batch, texts = vectors.batch, _Texts(model)
    found = _Found(model, texts, top_k)
    for layer, head in vectors.heads.items():
        for what in OF_HEADS:
            if what in head.vectors:
                found.add("head", layer, what, head.vectors[what])
    for neuron in vectors.neurons:
        for what, vector in neuron.vectors.items():
            found.add_one("neuron", neuron.prompt, neuron.layer, neuron.index, what, vector)
    table, spoken = found.tables()
    tokens = [model.tokens(ids.tolist()) for ids in batch.ids]
    tables = {
        "words": table,
        "heads": _head_table(vectors, spoken, tokens),
        "neurons": _neuron_table(vectors, spoken),
        "norms": _norm_table(model, vectors, texts, top_k),
    }
    options = {"position": position, "top_k": top_k, "neurons": neurons}
    meta = provenance(model, options=options, seed=0) | {
        "tokens": tokens,
        "positions": vectors.positions.tolist(),
        "notes": [*model.notes, *vectors.notes],
        "wall_time_s": round(time.perf_counter() - started, 2),
    }
    return Report("words", tables, {}, meta)


# --- tables -------------------------------------------------------------------------------------


class _Texts:
    """Token texts, each id decoded once."""

    def __init__(self, model: Model):
        self.model, self.known = model, dict[int, str]()

    def __call__(self, ids: Sequence[int]) -> list[str]:
        if missing := sorted(set(ids) - set(self.known)):
            self.known.update(zip(missing, self.model.tokens(missing), strict=True))
        return [self.known[i] for i in ids]


Place = tuple[str, int, int, int, str]
"""kind, prompt, layer, index, what."""


class _Found:
    """Vectors gathered with their places, read all at once."""

    def __init__(self, model: Model, texts: _Texts, top_k: int):
        self.model, self.texts, self.k = model, texts, min(top_k, model.spec.d_vocab or top_k)
        self.places: list[Place] = []
        self.vectors: list[Tensor] = []

    def add(self, kind: str, layer: int, what: str, vectors: Tensor) -> None:
        """One vector for every prompt and head."""
        for prompt, of_prompt in enumerate(vectors):
            for index, vector in enumerate(of_prompt):
                self.add_one(kind, prompt, layer, index, what, vector)

    def add_one(
        self, kind: str, prompt: int, layer: int, index: int, what: str, vector: Tensor
    ) -> None:
        self.places.append((kind, prompt, layer, index, what))
        self.vectors.append(vector)

    def tables(self) -> tuple[pd.DataFrame, dict[Place, str]]:
        """The tidy table, and each vector's words in a line."""
        stack = torch.stack(self.vectors).to(self.model.device)
        reading = read(self.model, stack, top_k=self.k)
        ids = reading.top_ids.flatten().tolist()
        kinds, prompts, layers, indices, whats = zip(*self.places, strict=True)
        names = self.texts(ids)
        table = pd.DataFrame(
            {
                "prompt": np.repeat(prompts, self.k),
                "kind": np.repeat(np.array(kinds, dtype=object), self.k),
                "layer": np.repeat(layers, self.k),
                "index": np.repeat(indices, self.k),
                "what": np.repeat(np.array(whats, dtype=object), self.k),
                "place": np.tile(np.arange(self.k), len(self.places)),
                "token": names,
                "token_id": ids,
                "probability": reading.top_probabilities.flatten().numpy(),
            }
        )
        lines = (_line(names[i : i + self.k]) for i in range(0, len(names), self.k))
        return table, dict(zip(self.places, lines, strict=True))


def _line(tokens: Sequence[str]) -> str:
    """Tokens in a row, each in quotes so that spaces show.

    >>> _line([" Mary", "s"])
    '‘ Mary’ ‘s’'
    """
    return " ".join(f"‘{token}’" for token in tokens)


def _head_table(
    vectors: WordVectors, spoken: Mapping[Place, str], tokens: list[list[str]]
) -> pd.DataFrame:
    """One row a head, in each prompt those that write most first."""
    rows = []
    for layer, found in vectors.heads.items():
        norms = found.vectors["output"].norm(dim=-1)
        for prompt, head in np.ndindex(*found.sources.shape):
            source = int(found.sources[prompt, head])
            row = {
                "prompt": prompt,
                "layer": layer,
                "head": head,
                "norm": float(norms[prompt, head]),
                "source": source,
                "source_token": tokens[prompt][source],
                "weight": float(found.weights[prompt, head]),
            }
            rows.append(
                row | {w: spoken.get(("head", prompt, layer, head, w), "") for w in OF_HEADS}
            )
    table = pd.DataFrame(rows)
    return table.sort_values(["prompt", "norm"], ascending=[True, False], ignore_index=True)


def _neuron_table(vectors: WordVectors, spoken: Mapping[Place, str]) -> pd.DataFrame:
    columns = ["prompt", "layer", "neuron", "activation", "norm", *OF_NEURONS]
    rows = [
        [n.prompt, n.layer, n.index, n.activation, n.norm]
        + [spoken.get(("neuron", n.prompt, n.layer, n.index, what), "") for what in OF_NEURONS]
        for n in vectors.neurons
    ]
    return pd.DataFrame(rows, columns=columns)


@torch.no_grad()
def _norm_table(model: Model, vectors: WordVectors, texts: _Texts, top_k: int) -> pd.DataFrame:
    """What enters and leaves the top k through each norm."""
    unembed = Unembedding(model)
    rows: list[dict[str, object]] = []
    for call in vectors.norms:
        before, after = unembed(call.before), unembed(call.after)
        rows += _changes(call.layer, call.site, call.name, before, after, texts, top_k)
    if model.spec.final_norm is not None:
        # Before the final norm there is only its scale, which changes no order.
        bare = wide(vectors.final) / model.final_norm.scale(vectors.final)
        W, b = linear_map(
            model.module.get_submodule(model.spec.unembedding or ""), model.spec.d_model
        )
        before = bare.to(W.device) @ wide(W) + wide(b)
        after = unembed(vectors.final).to(W.device)
        name = model.spec.final_norm
        rows += _changes(model.n_layers - 1, "final", name, before, after, texts, top_k)
    columns = ["prompt", "layer", "site", "norm", "change", "token", "token_id"]
    return pd.DataFrame(rows, columns=[*columns, "place_before", "place_after"])


def _changes(
    layer: int, site: str, name: str, before: Tensor, after: Tensor, texts: _Texts, top_k: int
) -> Iterator[dict[str, object]]:
    """One row for each token that is among the first k of one and not of the other."""
    k = min(top_k, before.shape[-1])
    for prompt, (old, new) in enumerate(zip(before, after, strict=True)):
        tops = [x.topk(k).indices.tolist() for x in (old, new)]
        for change, mine, others in (("enters", tops[1], tops[0]), ("leaves", tops[0], tops[1])):
            for i in [i for i in mine if i not in others]:
                yield {
                    "prompt": prompt,
                    "layer": layer,
                    "site": site,
                    "norm": name,
                    "change": change,
                    "token": texts([i])[0],
                    "token_id": i,
                    "place_before": int((old > old[i]).sum()),
                    "place_after": int((new > new[i]).sum()),
                }
