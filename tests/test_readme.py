"""The README says what is so: its family table is the tests' own, its five lines run."""

from pathlib import Path

from tests.families import FAMILIES, readme_table

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_family_table_is_the_one_the_tests_run_over():
    shown = README.split("<!-- families -->")[1].split("<!-- /families -->")[0].strip()
    assert shown == readme_table(), "run `python -m tests.families`"
    assert f"{len(FAMILIES)} families" in README


def test_the_two_commands_come_first():
    block = README.split("```console")[1].split("```")[0]
    assert [line.split("#")[0].strip() for line in block.strip().splitlines()] == [
        "$ make demo",
        "$ make test",
    ]
