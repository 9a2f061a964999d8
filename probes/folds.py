"""Which items a probe is judged on while others fit it, with their labels and the labels of its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Shaped

from interp.data.labelled import LabelledTexts
from interp.errors import BadInput
from probes.controls import control_labels, shuffled_labels


@dataclass(frozen=True)
class Task:
    """Labels as class numbers, the controls, and who is held out when."""

    classes: list[str]
    labels: Int[np.ndarray, " items"]
    shuffled: Int[np.ndarray, " items"]
    control: Int[np.ndarray, " items"]
    folds: Int[np.ndarray, " items"]
    control_folds: Int[np.ndarray, " items"]
    groups: Int[np.ndarray, " items"]
    notes: list[str]

    @staticmethod
    def of(data: LabelledTexts, folds: int, seed: int) -> Task:
        classes, labels = np.unique(data.labels, return_inverse=True)
        _, groups = np.unique(data.groups, return_inverse=True)
        words = [word.lower() for word in data.words or ()]
        recurring = 1 < len(set(words)) < len(words)
        keys = words if recurring else list(data.groups)
        notes = []
        if len(set(keys)) == len(keys):
            notes.append(
                "The control says little here: no word or group occurs twice, so there is nothing that a "
                "probe could memorise."
            )
        return Task(
            classes.tolist(),
            labels,
            shuffled_labels(labels, data.groups, seed),
            control_labels(keys, labels, seed),
            folds_by_group(labels, data.groups, folds, seed),
            folds_within_keys(keys, folds, seed),
            groups,
            notes,
        )


def folds_by_group(
    labels: Shaped[np.ndarray, " items"], groups: Sequence, folds: int, seed: int
) -> Int[np.ndarray, " items"]:
    """The fold of every item: classes as even as whole groups allow.

    >>> folds = folds_by_group(np.array([0, 1, 0, 1, 0, 1]), ["a", "a", "b", "b", "c", "c"], 3, 0)
    >>> (folds[::2] == folds[1::2]).all(), sorted(folds[::2].tolist())
    (np.True_, [0, 1, 2])
    """
    from sklearn.model_selection import StratifiedGroupKFold

    split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    of_item = np.zeros(len(labels), dtype=np.int64)
    for fold, (_, held_out) in enumerate(split.split(np.zeros(len(labels)), labels, groups)):
        of_item[held_out] = fold
    return of_item


def folds_within_keys(keys: Sequence[str], folds: int, seed: int) -> Int[np.ndarray, " items"]:
    """The fold of every item, the items of a key in as many folds as they can be.

    >>> folds = folds_within_keys(["a", "a", "b", "b"], 2, 0)
    >>> folds[0] != folds[1] and folds[2] != folds[3]
    np.True_
    """
    rng = np.random.default_rng(seed)
    _, of_item = np.unique(np.asarray(keys), return_inverse=True)
    rank = rng.permutation(of_item.max() + 1)[of_item]
    order = np.lexsort((rng.permutation(len(rank)), rank))  # key after key, each in random order
    folds_of = np.empty(len(rank), dtype=np.int64)
    folds_of[order] = np.arange(len(rank)) % folds
    return folds_of


def check_folds(data: LabelledTexts, folds: int) -> None:
    lengths = {"labels": len(data.labels), "groups": len(data.groups)}
    lengths |= {} if data.words is None else {"words": len(data.words)}
    for what, count in lengths.items():
        if count != len(data):
            raise BadInput(f"{data.name} has {len(data)} texts but {count} {what}: give one a text")
    classes = sorted(set(data.labels))
    if len(classes) < 2:
        raise BadInput(
            f"{data.name} has one class only ({', '.join(classes)}): a probe needs two or more"
        )
    if folds < 2:
        raise BadInput(f"folds={folds}: give at least 2")
    if len(data) < folds:
        raise BadInput(f"{data.name} has {len(data)} items, fewer than folds={folds}")
    groups = len(set(data.groups))
    if groups < folds:
        raise BadInput(
            f"{data.name} has {groups} groups, fewer than folds={folds}, and a group is never split: "
            "give more groups, or fewer folds"
        )
    for name in classes:
        of_class = {g for g, label in zip(data.groups, data.labels, strict=True) if label == name}
        if len(of_class) < folds:
            raise BadInput(
                f"class '{name}' of {data.name} is in {len(of_class)} groups, fewer than folds={folds}: "
                "some fold would have none of it; give more of it, or fewer folds"
            )
