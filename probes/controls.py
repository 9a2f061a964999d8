"""What a probe's number is compared with: control labels, shuffled labels, a model that learned nothing.

A probe's accuracy says how well *the probe* can tell the classes apart, which is as much about the probe
as about the representation. Each control takes one thing away: control labels the regularity, shuffled
labels any relation at all, random weights what training wrote.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped

from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.models.sources.pretrained import quiet


def control_labels(
    keys: Sequence[str], labels: Shaped[np.ndarray, " items"], seed: int
) -> Shaped[np.ndarray, " items"]:
    """A label for every item that depends on its key alone: what only memorising keys can predict.

    Each key (word type, or group where there are no words) gets one label, drawn from the labels'
    distribution. A probe's *selectivity* is its accuracy on the task minus that on the control task:
    high accuracy with low selectivity means that the probe is able to memorise, not that the property
    is there. Where no key of the test folds was seen in training, nothing can be memorised either and
    the control's accuracy is the majority's: split by items, not by keys, to measure memorising.

    The draw is a hash of (key, seed), so that a key has the same label in every call with the same
    label distribution. Should every key get the same label, all are drawn again.

    Args:
        keys: one a item.
        labels: of any type that sorts; one a item.
        seed: of the draw.

    Returns:
        Control labels, of the type of `labels`; at least two classes.

    Raises:
        BadInput: keys not aligned with labels; one class only; one key only.

    >>> words = ["cat", "dog", "cat", "sun", "dog"]
    >>> drawn = control_labels(words, np.array([0, 1, 0, 1, 1]), seed=0)
    >>> bool(drawn[0] == drawn[2]), bool(drawn[1] == drawn[4])
    (True, True)

    Source: Hewitt & Liang 2019, "Designing and Interpreting Probes with Control Tasks".
    """
    _check(keys, "keys", labels)
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise BadInput(
            f"a control task needs keys that differ, and all {len(keys)} are {distinct[0]!r}: "
            "give each item its word or its group"
        )
    classes, counts = np.unique(labels, return_counts=True)
    upper = np.cumsum(counts) / counts.sum()
    attempt, drawn = 0, np.zeros(1, dtype=int)
    while len(set(drawn)) < 2:
        numbers = [_number(key, seed, attempt) for key in distinct]
        drawn = np.minimum(np.searchsorted(upper, numbers, side="right"), len(classes) - 1)
        attempt += 1
    of_key = dict(zip(distinct, drawn, strict=True))
    return classes[[of_key[key] for key in keys]]


def shuffled_labels(
    labels: Shaped[np.ndarray, " items"], groups: Sequence[str], seed: int
) -> Shaped[np.ndarray, " items"]:
    """The labels with every relation to the items cut, and what groups share kept.

    Groups whose items all have one label exchange these labels among each other; groups of mixed labels
    exchange them with groups of their size, then permute them within. So a group that was of one class
    still is, a pair of opposites still is one, and a probe with folds by group sees labels with the
    dependence between items that the true ones have. Where one-class groups differ in size, the
    number of items a class has may change; otherwise it does not.

    Args:
        labels: one a item. groups: one a item. seed: of the permutation.

    Returns:
        Labels of the same type; the groups have the same labels between them.

    Raises:
        BadInput: groups not aligned with labels; one class only.

    >>> shuffled = shuffled_labels(np.array([0, 0, 1, 1, 0, 0]), ["a", "a", "b", "b", "c", "c"], seed=0)
    >>> shuffled.reshape(3, 2).std(1).tolist(), int(shuffled.sum())
    ([0.0, 0.0, 0.0], 2)
    """
    _check(groups, "groups", labels)
    rng = np.random.default_rng(seed)
    names, of_item = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(of_item == g) for g in range(len(names))]
    alike: dict[int, list[int]] = {}  # size of a mixed group, 0 for all groups of one class
    for g, items in enumerate(members):
        mixed = len(np.unique(labels[items])) > 1
        alike.setdefault(len(items) if mixed else 0, []).append(g)
    shuffled = labels.copy()
    for size in sorted(alike):
        for g, source in zip(alike[size], rng.permutation(alike[size]), strict=True):
            given = labels[members[source]]
            shuffled[members[g]] = rng.permutation(given) if size else given[0]
    return shuffled


def random_weights(model: Model, seed: int = 0) -> Model:
    """The same architecture with weights as they were before training: what the shape alone gives.

    Drawn by the architecture's own initialiser (`_init_weights`, with the standard deviations of the
    config), on the CPU, then moved to the model's device; dtype and tokenizer are kept. A probe on it reads
    token identity, positions and whatever a random network passes on; what a probe on the trained
    model finds beyond that, training wrote. The given model is not touched.

    Args:
        model: of a Hugging Face architecture. seed: of the draw; the same seed gives the same weights.

    Returns:
        A Model of its own, with `(random weights, seed N)` in its id.

    Raises:
        Refused: the module is no Hugging Face model with a config to draw from.

    >>> model = tiny_model()
    >>> blank = random_weights(model)
    >>> blank.spec.n_heads == model.spec.n_heads, torch.equal(blank.W_E, model.W_E)
    (True, False)
    """
    from transformers import PreTrainedModel

    module = model.module
    if not isinstance(module, PreTrainedModel):
        raise Refused(
            f"{model.id} is a {type(module).__name__}, not a Hugging Face model: no initialiser is known "
            "to draw its weights anew; load the Hugging Face module, or leave the random model out"
        )
    config: Any = copy.deepcopy(module.config)
    # A checkpoint's compression is of its trained weights; nothing of it is drawn.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with quiet(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        fresh = type(module)._from_config(config, dtype=model.dtype)
    torch.nn.Module.to(fresh.requires_grad_(False), model.device)
    stack = model.spec.stack if model.spec.named else None
    return Model(fresh, model.tokenizer, f"{model.id} (random weights, seed {seed})", stack=stack)


def _number(key: str, seed: int, attempt: int) -> float:
    """A number from 0 to 1 that looks drawn and depends on its arguments alone."""
    digest = hashlib.sha256(f"{seed}\0{attempt}\0{key}".encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56


def _check(names: Sequence[str], what: str, labels: np.ndarray) -> None:
    """Aligned, and more than one class."""
    if len(names) != len(labels):
        raise BadInput(f"{len(names)} {what} for {len(labels)} labels: give one for every item")
    if len(labels) == 0 or bool((labels == labels[0]).all()):
        found = (
            f"all {len(labels)} labels are {labels[0]!r}" if len(labels) else "there are no labels"
        )
        raise BadInput(f"{found}: give items of at least two classes")
