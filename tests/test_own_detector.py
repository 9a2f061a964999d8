"""A detector in a file of one's own: nothing else changes, and it is in the list, the table, the map and the page."""

from __future__ import annotations

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

import circuits
import circuits.heads
import interp
from circuits.heads import detector
from circuits.heads.detector import catalogue
from tests.ground_truth.head_zoo import FIXED, ZOO, head_zoo
from tests.ground_truth.induction_model import character_tokenizer

EXTEND = Path(__file__).parents[1] / "docs" / "extend.md"
HEAD = (0, list(ZOO).index("fixed_offset"))
"""The zoo's head that looks FIXED tokens back."""


def documented() -> str:
    """The detector that the documentation writes, with the zoo's offset for its own."""
    blocks = re.findall(r"^```python.*?\n(.*?)^```", EXTEND.read_text("utf-8"), re.M | re.S)
    (code,) = [block for block in blocks if "TWO_BACK = Detector(" in block]
    assert "offset_key(prompts, 2)" in code
    return code.replace("offset_key(prompts, 2)", f"offset_key(prompts, {FIXED})")


@pytest.fixture(autouse=True)
def _catalogue_of_this_test():
    catalogue.cache_clear()
    yield
    catalogue.cache_clear()


@pytest.fixture(params=["a file beside the others", "an entry point"])
def own(request, tmp_path, monkeypatch) -> None:
    name = f"two_back_{request.param_index}"
    (tmp_path / f"{name}.py").write_text(documented())
    if request.param_index == 0:
        monkeypatch.setattr(circuits.heads, "__path__", [*circuits.heads.__path__, str(tmp_path)])
    else:
        monkeypatch.syspath_prepend(tmp_path)
        point = EntryPoint("two_back", f"{name}:TWO_BACK", "interp.detectors")
        monkeypatch.setattr(
            detector, "entry_points", lambda group: [point] if group == point.group else []
        )


def test_it_is_listed_found_labelled_and_drawn(own, run, tmp_path):
    code, listed, _ = run("detectors", "--json")
    mine = [row for row in json.loads(listed) if row["name"] == "two_back"]
    assert code == 0 and mine[0]["cost"] == "fast" and "Clark" in mine[0]["source"]
    model = interp.load(head_zoo(), tokenizer=character_tokenizer())
    report = circuits.classify_heads(model, prompts=8, ablate=False, progress=False)
    table = report.table.set_index(["layer", "head"])
    has = table["labels"].str.split(",").map(lambda names: "two_back" in names)
    assert list(table.index[has]) == [HEAD]
    assert table.loc[HEAD, "two_back"] > 0.95 and table.loc[HEAD, "two_back_p"] < 0.01
    assert np.isfinite(table["two_back"]).all()
    assert table.loc[HEAD, "labels"].startswith("fixed_offset")  # those that were there stay
    report = interp.Report.load(report.save(tmp_path / "report"))
    assert len(report.figure("map", score="two_back").data) == 1
    page = report.to_html()
    assert "Two back" in page and "after Clark et al. 2019" in page


def test_without_the_file_it_is_gone():
    assert "two_back" not in {d.name for d in catalogue()}
