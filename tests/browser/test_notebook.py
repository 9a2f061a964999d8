"""A report's frame where notebooks show it: inside frames of their own, under their rules, without a network.

VS Code and Colab do not run here. Their outputs are put into pages that restrict them as theirs do, and, as VS
Code's, scroll by script. The rules of VS Code are those seen at work in code-server 4.139.1, which serves the
workbench of VS Code 1.139.1 to a browser. Of Colab only what it documents is known.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from circuits.explain import explain
from interp.figures.page import notebook_frame
from interp.report import Report

from .conftest import Drive, quiet
from .synthetic import head_report

pytestmark = pytest.mark.browser

VS_CODE = (
    "default-src 'none'; script-src 'self' https://*.vscode-cdn.net 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' https://*.vscode-cdn.net 'unsafe-inline'; "
    "img-src 'self' https://*.vscode-cdn.net https: http: data:; "
    "font-src 'self' https://*.vscode-cdn.net https:; connect-src https:; child-src https: data:"
)
"""Content-Security-Policy of a notebook's outputs (backLayerWebView.ts), which frames with srcdoc inherit; VS
Code sets it only with `notebook.experimental.enableCsp`, and nothing by default."""
RULES = {
    "VS Code": (
        "allow-scripts allow-same-origin allow-forms allow-pointer-lock allow-downloads",
        VS_CODE,
    ),
    # an origin that nobody shares, and no other rule: what a cross-origin frame of Colab amounts to
    "Colab": ("allow-scripts allow-forms allow-downloads", ""),
}
TALL = "document.querySelector('iframe').clientHeight"


HEARD = "document.documentElement.dataset.wheels"


def host(name: str, output: str, *, ink: str = "black") -> str:
    """A notebook's page: a frame with rules, which has the output put into it and tells how high it is.

    Wheels that the frame hears are counted, by direction, in the page's `data-wheels`. `ink`: colour of its text.
    """
    sandbox, policy = RULES[name]
    inner = f"""<!doctype html><meta charset=utf-8>
        {f'<meta http-equiv="Content-Security-Policy" content="{policy}">' if policy else ""}
        <body style="color:{ink}"><div id=out></div><script>
        document.getElementById("out").innerHTML = {json.dumps(output).replace("</", "<" + chr(92) + "/")};
        new ResizeObserver(() => parent.postMessage(document.documentElement.scrollHeight, "*"))
          .observe(document.body);
        addEventListener("wheel", (e) => parent.postMessage(e.deltaY > 0 ? "down" : "up", "*"));
        </script>"""
    return f"""<!doctype html><meta charset=utf-8><title>{name}</title>
        <iframe id=outer sandbox="{sandbox}" style="width:100%;height:20px"
          srcdoc="{html.escape(inner)}"></iframe>
        <script>
        {HEARD} = "";
        addEventListener("message", (e) => {{
          if (typeof e.data === "string") {HEARD} += e.data + " ";
          else document.getElementById("outer").style.height = e.data + "px"; }})</script>"""


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


@pytest.mark.parametrize("name", RULES)
def test_a_wheel_that_moves_nothing_in_the_report_moves_the_notebook(
    drive: Drive, tmp_path: Path, name: str
) -> None:
    """A notebook that scrolls by script hears no wheel of a frame: without help it stops at every report."""
    path = tmp_path / "host.html"
    path.write_text(host(name, head_report(6, 4)._repr_html_()), encoding="utf-8")
    steps: list[list[Any]] = [["wait", 1500], ["hover", "iframe", {"x": 300, "y": 30}]]
    for turns in ([60], [20000, 20000], [60], [-60]):
        for turn in turns:
            steps += [["wheel", turn], ["wait", 700]]
        steps += [["eval", HEARD]]
    r = quiet(drive(path, steps))
    first, end, beyond, back = (r[at] for at in range(len(r)) if steps[at] == ["eval", HEARD])
    assert first == "", "the report scrolls first"
    assert end == "down ", "its end was reached by the turn before"
    assert beyond == "down down " and back == beyond, "it goes back first, too"


def test_a_wheel_over_figures_that_fit_moves_the_notebook(drive: Drive, tmp_path: Path) -> None:
    path = tmp_path / "host.html"
    path.write_text(host("VS Code", with_figures()._repr_html_()), encoding="utf-8")
    steps: list[list[Any]] = [["wait", 1500], ["hover", "iframe", {"x": 300, "y": 30}]]
    steps += [["wheel", 60], ["wait", 300], ["wheel", -60], ["wait", 300], ["eval", HEARD]]
    assert quiet(drive(path, steps))[-1] == "down up "


def test_a_link_to_a_section_stays_in_the_report(drive: Drive, tmp_path: Path, tiny_model) -> None:
    """A frame with srcdoc has the notebook's address, and so have its links."""
    report = explain(tiny_model(), list(range(3, 15)), answer=3, instead=4)
    path = tmp_path / "host.html"
    path.write_text(host("VS Code", report._repr_html_()), encoding="utf-8")
    top = "document.getElementById('flow').getBoundingClientRect().top"
    steps = [["ready"], ["eval", top], ["click", "a[href='#flow']"], ["wait", 300], ["eval", top]]
    r = quiet(drive(path, steps, frame=["#outer", "iframe"]))
    assert 0 <= r[-1] < 120 < r[1]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("ink", ["rgb(20, 20, 20)", "color(srgb 0.9 0.9 0.9)"])
def test_the_report_is_as_dark_as_the_notebook(
    drive: Drive, tmp_path: Path, ink: str, dark: bool
) -> None:
    """Whatever the system is: a notebook has a theme of its own."""
    path = tmp_path / "host.html"
    path.write_text(host("VS Code", head_report(6, 4)._repr_html_(), ink=ink), encoding="utf-8")
    steps: list[list[Any]] = [
        ["ready"], ["wait", 200],
        ["eval", "getComputedStyle(document.body).backgroundColor"], ["text", "#theme"],
        ["click", "#theme"], ["text", "#theme"],
    ]  # fmt: skip
    r = quiet(drive(path, steps, frame=["#outer", "iframe"], dark=dark))
    light_ink = "srgb" in ink
    assert r[2] == ("rgb(20, 23, 27)" if light_ink else "rgb(255, 255, 255)")
    assert [r[3], r[5]] == (["Light", "Dark"] if light_ink else ["Dark", "Light"])


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
