"""Finished work is kept for the very pairs it was made of: change any of them, and it is not read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from circuits.circuit_find import circuit_find
from circuits.decomposition import decompose
from circuits.edges import edge_attribution
from circuits.evaluation import _not_held_out, circuit_evaluate
from circuits.patching import patch
from circuits.path_patching import path_patch
from interp.data.pairs import Pairs
from interp.errors import BadInput
from interp.models.model import Model
from interp.report import Report

PAIRS = Pairs.of(
    [[5, 6, 7, 8], [9, 10, 11, 12]],
    [[5, 16, 7, 8], [9, 20, 11, 12]],
    answers=[3, 4],
    wrong=[4, 3],
    positions={"second": [1, 1]},
)
CHANGED = {
    "clean": replace(PAIRS, clean=PAIRS.clean + 1),
    "corrupted": replace(PAIRS, corrupted=PAIRS.corrupted + 1),
    "answers": replace(PAIRS, answers=PAIRS.answers + 10),
    "wrong": replace(PAIRS, wrong=PAIRS.wrong + 10),
    "positions": replace(PAIRS, positions={"second": PAIRS.positions["second"] + 1}),
}
SMALL = {"sizes": [10, 100], "random": 1, "subsets": 1}
ANALYSES: dict[str, Callable[..., Report]] = {
    "patch": partial(patch, site="z"),
    "path_patch": partial(path_patch, receiver="1.2.k", positions="second"),
    "edges": partial(edge_attribution, method="eap"),
    "circuit_find": partial(circuit_find, method="eap", edges=20),
    "circuit_evaluate": partial(circuit_evaluate, scores="eap", **SMALL),
    "decompose": decompose,
}


@pytest.mark.parametrize("name", ANALYSES)
def test_work_on_other_pairs_is_not_resumed(name: str, tiny: Model, tmp_path: Path) -> None:
    run = partial(ANALYSES[name], tiny, checkpoint=tmp_path / "units", progress=False)
    run(PAIRS)
    for what, pairs in CHANGED.items():
        with pytest.raises(BadInput, match="cannot resume"):
            run(pairs, resume=True)
        assert len({PAIRS.digest, pairs.digest}) == 2, what
    run(PAIRS, resume=True)


def test_circuits_of_another_report_in_the_same_folder_are_not_resumed(
    tiny: Model, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    judge = partial(
        circuit_evaluate, tiny, PAIRS, scores=str(saved), progress=False,
        checkpoint=tmp_path / "units", **SMALL,
    )  # fmt: skip
    circuit_find(tiny, PAIRS, method="eap", edges=20, progress=False).save(saved)
    judge()
    judge(resume=True)
    circuit_find(tiny, PAIRS, method="eap", edges=60, progress=False).save(saved)
    with pytest.raises(BadInput, match="cannot resume"):
        judge(resume=True)


def test_pairs_that_were_not_held_out_are_told(tiny: Model) -> None:
    told = "edges were scored on the same pairs that circuits are judged on"
    assert (
        told in circuit_evaluate(tiny, PAIRS, scores="eap", progress=False, **SMALL).meta["notes"]
    )
    drawn = circuit_evaluate(tiny, "induction", n=4, scores="eap", progress=False, **SMALL)
    assert not any("edges were scored on" in note for note in drawn.meta["notes"])
    # as where another seed draws from few facts
    assert "on 1 of the 2 pairs" in _not_held_out(PAIRS.rows(slice(1)), PAIRS)[0]
