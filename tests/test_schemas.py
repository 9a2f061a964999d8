"""Reports as other programs read them: every kind has a schema, and old versions are read."""

import json
import pickle
from importlib.metadata import entry_points
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest

from interp.errors import BadInput
from interp.report import Report, combined_provenance
from interp.schemas import HERE, SCHEMA_VERSION, UPGRADES, read_description, schema_of
from interp.schemas.__main__ import schema_from


def small(**meta) -> Report:
    source = {"model": {"id": "m", "sha256": "0" * 64}}
    table = pd.DataFrame({"layer": [0, 1], "score": [0.5, np.nan], "label": ["a", None]})
    arrays = {"z": np.zeros((2, 3), np.float32)}
    return Report(
        "small",
        {"small": table},
        arrays,
        combined_provenance([source], options={}, seed=0) | meta,
    )


def described(report: Report) -> dict:
    return json.loads(report.files(page=False)["report.json"])


def test_there_is_a_schema_for_every_analysis_and_for_nothing_else():
    """Each is held against a report in `contracts/`."""
    installed = {entry.name for entry in entry_points(group="interp.analyses")}
    assert {path.stem for path in HERE.glob("*.json")} == installed
    with pytest.raises(BadInput, match="did you mean 'heads'"):
        schema_of("head")


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("seed"),
        lambda d: d["tables"].pop("small"),
        lambda d: d["tables"]["small"]["columns"].pop("layer"),
        lambda d: d["tables"]["small"]["columns"].update(score="string"),
        lambda d: d["arrays"]["z"].update(dtype="int64"),
        lambda d: d["arrays"]["z"]["shape"].append(1),
        lambda d: d.update(schema_version=SCHEMA_VERSION - 1),
        lambda d: d.update(analysis="heads"),
    ],
)
def test_a_schema_can_be_broken(damage):
    text = described(small())
    schema = schema_from([text], "Small.")
    jsonschema.validate(text, schema)
    damage(text)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(text, schema)


def test_what_only_some_reports_have_is_not_required():
    one, other = small(), small(note="x")
    other.tables["small"]["extra"] = 1
    other.tables["more"] = pd.DataFrame({"a": [1]})
    schema = schema_from([described(one), described(other)], "")
    jsonschema.validate(described(one), schema)
    jsonschema.validate(described(other), schema)
    assert schema["properties"]["note"] == {"type": ["null", "string"]}


def test_report_json_says_what_the_files_hold(tmp_path):
    report = small()
    text = read_description(report.save(tmp_path))
    assert text["tables"] == {
        "small": {"rows": 2, "columns": {"layer": "int64", "score": "double", "label": "string"}}
    }
    assert text["arrays"] == {"z": {"dtype": "float32", "shape": [2, 3]}}


def as_version_1(folder: Path) -> None:
    """What was written before tables and arrays were described."""
    path = folder / "report.json"
    text = json.loads(path.read_text())
    text |= {
        "schema_version": 1,
        "tables": sorted(text["tables"]),
        "arrays": sorted(text["arrays"]),
    }
    path.write_text(json.dumps(text))


def test_version_1_is_read(tmp_path):
    report = small(notes=["kept"])
    now = read_description(report.save(tmp_path))
    as_version_1(tmp_path)
    assert read_description(tmp_path) == now
    loaded = Report.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.table, report.table, check_dtype=False)
    assert loaded.arrays["z"].shape == (2, 3) and loaded.meta["notes"] == ["kept"]
    assert loaded.meta["schema_version"] == SCHEMA_VERSION
    assert list(UPGRADES) == list(range(1, SCHEMA_VERSION))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema_version": 99}', "schema 99, this version reads 1 to 2: update interp-suite"),
        ('{"schema_version": 0}', "schema 0, .*: make the report again"),
        ('{"schema_version": "x"}', "schema x, .*: make the report again"),
        ("{}", "is damaged"),
        ("[1]", "is damaged"),
        ("{", "is damaged"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, text, words):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(BadInput, match=words):
        Report.load(tmp_path)


def test_a_file_of_a_report_is_no_report(tmp_path):
    path = small().save(tmp_path) / "report.json"
    with pytest.raises(BadInput, match=f"is a file, and a report is a folder: give {tmp_path}"):
        Report.load(path)


def test_a_table_that_is_not_there_is_told_with_those_that_are(tmp_path):
    made = small()
    for report in (made, Report.load(made.save(tmp_path)), pickle.loads(pickle.dumps(made))):
        with pytest.raises(
            BadInput, match="no table of the report 'small' 'smal'; did you mean 'small'"
        ):
            report.tables["smal"]
        with pytest.raises(BadInput, match="no array of the report 'small' 'x'; known: z"):
            report.arrays["x"]
        assert "smal" not in report.tables and report.tables.get("smal") is None
        assert list(report.tables) == ["small"] and "smal" not in report.tables
