"""What the report page holds, read back without a browser."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
import struct
from typing import Any

import numpy as np
import pandas as pd
import pytest

from interp.figures import page
from interp.figures.document import compact, part
from interp.report import Report

from .browser.synthetic import HOSTILE, head_report


def unpacked(document: str) -> tuple[dict[str, Any], bytes]:
    found = re.search(r'<script type="text/plain" id="data">([A-Za-z0-9+/=]+)</script>', document)
    assert found
    data = gzip.decompress(base64.b64decode(found[1]))
    (length,) = struct.unpack("<I", data[:4])
    return json.loads(data[4 : 4 + length]), data[4 + length :]


def test_hostile_tokens_stay_inside_the_data() -> None:
    name = "</title><script>alert(1)</script>\ud800\x00"
    report = head_report(4, 3, lengths=(40,), model_id=name)
    document = page.head_page(report)
    assert document.encode("utf-8")
    assert len(re.findall(r"<script", document)) == 2
    assert len(re.findall(r"</script", document)) == 2
    assert "<title>&lt;/title&gt;&lt;script&gt;" in document
    data, _ = unpacked(document)
    assert data["prompts"][0]["tokens"] == report.meta["prompts"][0]["tokens"]
    assert set(data["ov"]["words"]) <= set(report.tables["ov_tokens"]["token"])
    assert set(HOSTILE) & set(data["ov"]["words"])


def test_nothing_is_fetched_and_only_the_pages_script_may_run() -> None:
    document = page.head_page(head_report(2, 2, lengths=(4,)))
    assert not re.search(r"https?://|@import|\bsrc=|\bhref=\"(?!#)", document)
    assert "default-src &#39;none&#39;" in document or "default-src 'none'" in document
    assert re.search(r"script-src '?(&#39;)?sha256-", document)


@pytest.mark.parametrize("causal", [True, False])
def test_patterns_travel_exactly(causal: bool) -> None:
    report = head_report(3, 2, lengths=(9, 5), causal=causal)
    data, raw = unpacked(page.head_page(report))
    assert data["causal"] is causal and data["slots"] == [3, 2]
    start = 0
    for p, n in enumerate((9, 5)):
        query, key = np.tril_indices(n) if causal else map(np.ravel, np.indices((n, n)))
        size = 6 * len(query)
        got = np.frombuffer(raw[start : start + size], np.uint8).reshape(3, 2, -1)
        np.testing.assert_array_equal(got, report.arrays["pattern"][p][:, :, query, key])
        start += size
    assert start == len(raw)


def test_numbers_keep_six_digits_and_nan_is_null() -> None:
    report = head_report(2, 4, lengths=(4,))
    heads = report.tables["heads"]
    heads["induction"] = [0.123456789, -1234.56789, 0.0, np.nan, np.inf, 1e-12, 3.0, 2e-7]
    data, _ = unpacked(page.head_page(report))
    assert data["columns"]["induction"] == [0.123457, -1234.57, 0.0, None, None, 1e-12, 3.0, 2e-7]
    assert all(isinstance(value, int) for value in data["columns"]["layer"])
    assert data["columns"]["ablation_effect"].count(None) == heads["ablation_effect"].isna().sum()


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([3], "L3"),
        ([2, 5, 9], "L2–L9"),
        ([0, *[20] * 4, *[21] * 4, 29], "L0–L29, half of them in L20–L21"),
        ([0, *[20] * 8, 29], "L0–L29, half of them in L20"),
        (list(range(30)), "L0–L29"),  # spread evenly: the middle half says no more
    ],
)
def test_a_role_is_said_to_lie_where_its_heads_do(layers: list[int], said: str) -> None:
    assert page._depth(pd.Series(layers)) == said


def test_summary_counts_come_from_the_table() -> None:
    report = head_report(2, 4, lengths=())
    heads = report.tables["heads"]
    heads["labels"] = ["induction", "", "induction,broad", "", "", "", "", ""]
    heads["induction"] = [0.5, 0, 0.9, 0, 0, 0, 0, 0]
    heads["ablation_effect"] = [0.5, np.nan, -0.25] + [np.nan] * 5
    text = re.sub(r"<[^>]+>|\s+", " ", page.head_page(report))
    text = re.sub(r"\s+", " ", text)
    assert "8 heads in 2 layers. 2 pass the test for at least one role:" in text
    assert "2 induction heads (L0, strongest L0H2 )" in text
    assert "1 broad head (L0" in text
    assert "6 pass none. Of 2 heads ablated one at a time, L0H0 matters most: +0.50 nats" in text


def test_a_pattern_is_drawn_in_square_cells_with_its_weights_on_hover() -> None:
    report = head_report(2, 2, lengths=(12,))
    drawn = report.figure("pattern", head=(1, 0))
    assert drawn.layout.yaxis.scaleanchor == "x" and drawn.layout.yaxis.autorange == "reversed"
    np.testing.assert_allclose(np.sqrt(drawn.data[0].customdata), drawn.data[0].z)
    assert len(drawn.data[0].x) == len(drawn.data[0].y) == 12


def test_a_large_model_without_patterns_is_quick_to_hold() -> None:
    report = head_report(80, 64, lengths=(), ov=False)
    document = page.head_page(report)
    data, raw = unpacked(document)
    assert (len(data["columns"]["layer"]), data["prompts"], raw) == (5120, [], b"")
    assert len(document) < 3_000_000


def test_what_may_be_absent() -> None:
    heads = pd.DataFrame({"layer": [0, 3], "head": [1, 0], "labels": "", "confidence": np.nan})
    bare = Report("heads", {"heads": heads}, {}, {"model": {"id": "m"}})
    data, raw = unpacked(page.head_page(bare))
    assert data["shape"] == [4, 2] and data["ov"]["heads"] == [] and raw == b""
    report = head_report(2, 4, lengths=(4,))
    report.tables["heads"] = report.tables["heads"].drop(index=[1, 6])
    report.tables["ov_tokens"] = report.tables["ov_tokens"].iloc[:0]
    data, _ = unpacked(page.head_page(report))
    assert data["shape"] == [2, 4] and len(data["columns"]["head"]) == 6


def test_same_report_same_page() -> None:
    assert page.head_page(head_report(2, 2)) == page.head_page(head_report(2, 2))


def test_notebook_frame_holds_the_page() -> None:
    document = page.head_page(head_report(2, 2, lengths=(4,)))
    frame = page.notebook_frame(document, height=500)
    assert 'sandbox="allow-scripts allow-downloads"' in frame
    found = re.fullmatch(r'<iframe [^>]*srcdoc="([^"]*)">([^<]*)</iframe>', frame)
    assert found and html.unescape(found[1]) == document
    assert "not trusted" in found[2]  # what is left where a notebook's frames are taken out
    assert "height:500px" in frame


def test_the_script_is_small() -> None:
    assert len(compact(part("page.js")).encode()) <= 40_000
