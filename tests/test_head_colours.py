"""Every role of the catalogue has a colour of its own on the page of heads, light and dark."""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import combinations

import numpy as np
import pytest

from circuits.heads.classify import classify_heads
from circuits.heads.detector import Detector, catalogue
from interp.figures.page import claims_document

SCRIPT = files("interp.figures").joinpath("head_claims.js").read_text(encoding="utf-8")
PALETTE = dict(re.findall(r'(\w+): "(#[0-9a-f]{6})"', SCRIPT.split("};")[0]))
PANELS = ("#ffffff", "#14171b")
LEAST = 0.11
"""In OKLab; a difference that can just be seen is about 0.02, black and white are 1 apart."""

KINDS = {
    "decoders": lambda d: not d.encoder_only and not (d.reads and d.reads.of_images),
    "encoders": lambda d: not d.causal_only and not (d.reads and d.reads.of_images),
    "image models": lambda d: d.sees is not None or (d.reads is not None and d.reads.of_images),
}


def oklab(colour: str) -> np.ndarray:
    """Björn Ottosson's OKLab, in which distances are about as large as they look."""
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    light = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = [[0.41222, 0.53633, 0.05145], [0.2119, 0.68070, 0.1074], [0.0883, 0.28172, 0.62998]]
    axes = [[0.21045, 0.79362, -0.00407], [1.978, -2.42859, 0.45059], [0.0259, 0.78277, -0.80868]]
    return np.array(axes) @ np.cbrt(np.array(cones) @ light)


def apart(a: str, b: str) -> float:
    return float(np.linalg.norm(oklab(a) - oklab(b)))


def roles(kind: str) -> list[Detector]:
    return [d for d in catalogue() if d.labels and KINDS[kind](d)]


@pytest.mark.parametrize("kind", KINDS)
def test_roles_that_can_stand_side_by_side_can_be_told_apart(kind):
    names = [d.name for d in roles(kind)]
    assert len(names) > 5
    assert not set(names) - set(PALETTE), "roles without a colour"
    for a, b in combinations(names, 2):
        assert apart(PALETTE[a], PALETTE[b]) > LEAST, (a, b)
    for name in names:
        assert min(apart(PALETTE[name], panel) for panel in PANELS) > LEAST, name


@pytest.mark.parametrize("kind", KINDS)
def test_letters_of_roles_are_different(kind):
    letters = [d.letter for d in roles(kind)]
    assert len(set(letters)) == len(letters)


def test_a_role_of_ones_own_gets_a_letter_that_no_other_has(hand_built):
    report = classify_heads(hand_built, prompts=4, progress=False)
    own = {"name": "idle", "title": "Idle", "letter": "I", "labels": True, "unit": ""}
    score = {"name": "incline", "title": "Incline", "letter": "I", "labels": False, "unit": ""}
    report.meta["detectors"] += [own, score]
    at = report.table.query("layer == 1 and head == 2").index
    report.table.loc[at, "labels"] = "induction,idle"
    figure = report.figure("map")
    told = str(figure.to_plotly_json()["layout"])
    assert "I induction" in told and "incline" not in told
    assert '"IE"' in str(figure.to_json()) and "E idle" in told  # D is the duplicate token heads'
    page = claims_document(report.table, report.meta["detectors"])
    assert {d["name"]: d["letter"] for d in page["detectors"]} | page["letters"] == {
        **{d["name"]: d["letter"] for d in report.meta["detectors"] if d["labels"]},
        "idle": page["letters"]["idle"],
        **{d["name"]: "" for d in report.meta["detectors"] if not d["labels"]},
    }
    assert len(set(page["letters"].values())) == len(page["letters"])
    alone = claims_document(report.table, [])["letters"]  # a circuit's page, without declarations
    assert len(set(alone.values())) == len(alone) >= 3


def test_no_role_of_the_palette_has_gone():
    assert set(PALETTE) == {d.name for d in catalogue() if d.labels}
