"""Every notebook runs from a fresh kernel, and is kept in git without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbconvert.preprocessors import ExecutePreprocessor

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_and_shows_its_reports(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), (
        "clear the outputs before committing"
    )
    ExecutePreprocessor(timeout=600).preprocess(notebook, {"metadata": {"path": tmp_path}})
    shown = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("<iframe" in out.get("data", {}).get("text/html", "") for out in shown)
    assert any("application/vnd.plotly.v1+json" in out.get("data", {}) for out in shown)
