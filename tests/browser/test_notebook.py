"""A report's frame where notebooks show it: inside frames of their own, under their rules, without a network.

VS Code and Colab do not run here. Their outputs are put into pages that restrict them as theirs do.
"""

from __future__ import annotations

import html
import json
from pathlib import Path

import pandas as pd
import pytest

from interp.figures.page import notebook_frame
from interp.report import Report

from .conftest import Drive, quiet
from .synthetic import head_report

pytestmark = pytest.mark.browser

VS_CODE = (
    "default-src 'none'; script-src https://*.vscode-cdn.net 'unsafe-inline' 'unsafe-eval'; "
    "style-src https://*.vscode-cdn.net 'unsafe-inline'; img-src https://*.vscode-cdn.net https: http: data:; "
    "font-src https://*.vscode-cdn.net https:; connect-src https:; child-src https: data:"
)
"""Content-Security-Policy of a notebook's outputs (backLayerWebView.ts), which frames with srcdoc inherit."""
RULES = {
    "VS Code": ("allow-scripts allow-same-origin allow-forms allow-downloads", VS_CODE),
    # an origin that nobody shares, and no other rule: what a cross-origin frame of Colab amounts to
    "Colab": ("allow-scripts allow-forms allow-downloads", ""),
}
TALL = "document.querySelector('iframe').clientHeight"


def host(name: str, output: str) -> str:
    """A notebook's page: a frame with rules, which has the output put into it and tells how high it is."""
    sandbox, policy = RULES[name]
    inner = f"""<!doctype html><meta charset=utf-8>
        {f'<meta http-equiv="Content-Security-Policy" content="{policy}">' if policy else ""}
        <body><div id=out></div><script>
        document.getElementById("out").innerHTML = {json.dumps(output).replace("</", "<" + chr(92) + "/")};
        new ResizeObserver(() => parent.postMessage(document.documentElement.scrollHeight, "*"))
          .observe(document.body);
        </script>"""
    return f"""<!doctype html><meta charset=utf-8><title>{name}</title>
        <iframe id=outer sandbox="{sandbox}" style="width:100%;height:20px"
          srcdoc="{html.escape(inner)}"></iframe>
        <script>addEventListener("message", (e) => {{
          document.getElementById("outer").style.height = e.data + "px"; }})</script>"""


def with_figures() -> Report:
    """A report without a page of its own: plotly draws it."""
    rows = [(layer, head, 0.1 * head, 0.01) for layer in range(2) for head in range(3)]
    table = pd.DataFrame(rows, columns=["layer", "head", "value", "error"])
    table = table.assign(low=table["value"] - 0.02, high=table["value"] + 0.02)
    meta = {"model": {"id": "m"}, "game": {"loss_none": 3.0, "loss_all": 2.0}}
    return Report("shapley", {"shapley": table}, meta=meta)


@pytest.mark.parametrize("name", RULES)
def test_the_report_works_inside_a_notebook(drive: Drive, tmp_path: Path, name: str) -> None:
    path = tmp_path / "host.html"
    path.write_text(host(name, head_report(6, 4)._repr_html_()), encoding="utf-8")
    chosen = [
        ["ready"],
        ["click", "[data-head='5']"],
        ["press", "ArrowRight"],
        ["text", "#card-title"],
    ]
    r = quiet(drive(path, chosen, frame=["#outer", "iframe"]))
    assert r[3] == "L1H2"
    whole = quiet(drive(path, [["wait", 300], ["eval", TALL]]))
    assert whole[1] > 900  # nothing of the frame is cut off


@pytest.mark.parametrize("name", RULES)
def test_plotly_draws_inside_a_notebook(drive: Drive, tmp_path: Path, name: str) -> None:
    path = tmp_path / "host.html"
    path.write_text(host(name, with_figures()._repr_html_()), encoding="utf-8")
    drawn = "document.querySelectorAll('.js-plotly-plot .main-svg').length"
    wide = "document.querySelector('.js-plotly-plot').clientWidth <= innerWidth"
    r = quiet(
        drive(path, [["wait", 500], ["eval", drawn], ["eval", wide]], frame=["#outer", "iframe"])
    )
    assert r[1] > 0 and r[2]


def test_without_frames_words_are_left(drive: Drive, tmp_path: Path) -> None:
    """A notebook that is not trusted drops the tag and keeps what stands in it; otherwise it is not seen."""
    frame = notebook_frame("<p>page</p>")
    path = tmp_path / "host.html"
    path.write_text(
        f"<!doctype html><meta charset=utf-8><div id=a>{frame}</div><div id=b></div><script>"
        "b.textContent = a.querySelector('iframe').textContent</script>",
        encoding="utf-8",
    )
    r = quiet(drive(path, [["text", "#a"], ["text", "#b"]]))
    assert "trust" not in r[0].lower() and "Trust the notebook" in r[1]
