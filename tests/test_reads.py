"""Analyses of several models and of reports: from the shell, and where their reports say they come from."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pandas as pd
import pytest

import interp
from interp.cli import perform
from interp.commands import Deferred
from interp.errors import BadInput
from interp.registry import ANALYSES, Analysis, analysis
from interp.report import Report, combined_provenance


def lengths(models: list[str], *, times: int = 1) -> Report:
    """Length of every model's name.

    Args:
        models: names. times: a factor.
    """
    rows = {"model": models, "length": [times * len(Path(model).name) for model in models]}
    sources = [{"model": {"id": Path(model).name, "sha256": model}} for model in models]
    meta = combined_provenance(sources, options={"times": times}, seed=0)
    return Report("lengths", {"lengths": pd.DataFrame(rows)}, {}, meta)


def joined(reports: list[Report], *, columns: list[str] | None = None) -> Report:
    """The tables of several reports, one after the other.

    Args:
        reports: read from their folders. columns: that are kept.
    """
    table = pd.concat([report.table for report in reports])[columns or list(reports[0].table)]
    meta = combined_provenance([report.meta for report in reports], options={}, seed=0)
    return Report("joined", {"joined": table}, {}, meta)


def shell(monkeypatch, function, reads: str, *arguments: object) -> None:
    name = function.__name__
    made = Analysis(name, function, "nobody 2000", "", "", lambda: None, lambda r: r.table, reads)
    monkeypatch.setitem(ANALYSES, name, made)
    entry = EntryPoint(name, f"{__name__}:{name}", "interp.analyses")
    context = Deferred(name, entry, perform).make_context(name, [*map(str, arguments)])
    context.command.invoke(context)


def test_models_and_then_reports_from_the_shell(monkeypatch, tmp_path, capsys):
    one, two, out = (tmp_path / name for name in ("one", "two", "out"))
    shell(monkeypatch, lengths, "models", "a/bc", "def", "--times", 2, "--out", one)
    assert Report.load(one).table["length"].tolist() == [4, 6]
    shell(monkeypatch, lengths, "models", "g", "--out", two)
    shell(monkeypatch, joined, "reports", one, two, "--columns", "length", "--out", out)
    report = Report.load(out)
    assert report.table.columns.tolist() == ["length"]
    assert report.table["length"].tolist() == [4, 6, 1]
    assert [model["id"] for model in report.meta["models"]] == ["bc, def", "g"]
    assert "report.html" in capsys.readouterr().out


def test_what_is_no_report_is_told_and_nothing_is_written(monkeypatch, tmp_path):
    with pytest.raises(BadInput, match="no report in"):
        shell(monkeypatch, joined, "reports", tmp_path / "none", "--out", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_combined_provenance_follows_every_source(tiny_model):
    from interp.report import provenance

    metas = [provenance(tiny_model(seed=n), options={}, seed=0) for n in range(2)]
    both = combined_provenance(metas, options={"top": 3}, seed=5)
    assert both["models"] == [meta["model"] for meta in metas]
    assert both["options"] == {"top": 3} and both["seed"] == 5
    assert both["versions"] == metas[0]["versions"]
    turned = combined_provenance(metas[::-1], options={}, seed=0)
    assert turned["model"]["sha256"] != both["model"]["sha256"]
    assert (
        both["model"]["sha256"] == combined_provenance(metas, options={}, seed=1)["model"]["sha256"]
    )
    with pytest.raises(interp.InterpError, match="at least one"):
        combined_provenance([], options={}, seed=0)


def test_what_an_analysis_reads_is_one_of_three():
    with pytest.raises(ValueError, match="wanted one of model, models, reports"):
        analysis(name="x", source="", example="", figure="", validate=print, reads="files")  # type: ignore[arg-type]
