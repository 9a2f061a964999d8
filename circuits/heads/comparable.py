"""Whether reports on heads may be compared, and what each is called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from interp.errors import BadInput
from interp.report import Report

SAME = ("unit", "null", "threshold", "margin", "labels", "prompts")
"""What two reports must say alike of a detector, or its scores are of different things."""


def comparable(reports: Sequence[Report]) -> tuple[list[dict[str, Any]], list[str]]:
    """The detectors that all reports share, and what a reader should know; BadInput where there is none."""
    if len(reports) < 2:
        raise BadInput(
            f"{len(reports)} report was given: a comparison needs at least two; make another with "
            "`interp heads MODEL`"
        )
    for report in reports:
        if report.analysis != "heads":
            raise BadInput(
                f"a report of '{report.analysis}' ({report.meta.get('model', {}).get('id')}) was given; "
                "wanted reports of `interp heads`"
            )
    first = reports[0]
    for other in reports[1:]:
        _check_options_alike(first, other)
        _check_detectors_alike(first, other)
    shared = [
        d
        for d in first.meta["detectors"]
        if all(d["name"] in {e["name"] for e in report.meta["detectors"]} for report in reports)
    ]
    if not shared:
        raise BadInput(
            "the reports have no detector in common: make them again with the same --detectors"
        )
    left_out = {
        name: f"{_id(report)}: {reason}"
        for report in reports
        for name, reason in report.meta["skipped"].items()
    }
    notes = [f"{name} is not compared ({reason})." for name, reason in sorted(left_out.items())]
    counts = {report.meta["options"]["prompts"] for report in reports}
    if len(counts) > 1:
        notes.append(
            f"Reports have {_listed(counts)} prompts: scores are means over them, and intervals "
            "are wider where there are fewer."
        )
    return shared, notes


def _check_options_alike(a: Report, b: Report) -> None:
    for name, why in (
        ("tokens", "scores on prompts of other lengths are not comparable"),
        ("alpha", "labels were given at different levels of significance"),
    ):
        x, y = a.meta["options"].get(name), b.meta["options"].get(name)
        if x != y:
            raise BadInput(
                f"{_id(a)} was made with {name}={x}, {_id(b)} with {name}={y}: {why}; make one again with "
                f"--{name} {x}"
            )


def _check_detectors_alike(a: Report, b: Report) -> None:
    asked = [{d["name"] for d in r.meta["detectors"]} | set(r.meta["skipped"]) for r in (a, b)]
    if asked[0] != asked[1]:
        only = [
            f"only {_id(r)} has {_listed(mine - theirs)}"
            for r, mine, theirs in ((a, *asked), (b, *asked[::-1]))
            if mine - theirs
        ]
        raise BadInput(
            f"reports were made with different detectors: {'; '.join(only)}; make them again with the same "
            f"--detectors, such as {','.join(sorted(asked[0] & asked[1])) or 'fast'}"
        )
    mine = {d["name"]: d for d in a.meta["detectors"]}
    for d in b.meta["detectors"]:
        differ = [key for key in SAME if mine.get(d["name"], d).get(key) != d.get(key)]
        if differ:
            raise BadInput(
                f"'{d['name']}' has another {differ[0]} in {_id(a)} than in {_id(b)} (made by different "
                "versions): make the older report again"
            )


def names_of(reports: Sequence[Report]) -> list[str]:
    """A name for each report: its model's id, with the seed or a number where that is not enough.

    >>> report = Report("heads", {}, meta={"model": {"id": "a"}, "seed": 0})
    >>> names_of([report, Report("heads", {}, meta={"model": {"id": "b"}, "seed": 0}), report])
    ['a (1)', 'b', 'a (2)']
    """
    ids = [_id(report) for report in reports]
    with_seed = [f"{name}, seed {r.meta['seed']}" for name, r in zip(ids, reports, strict=True)]
    names = []
    for place, name in enumerate(ids):
        if ids.count(name) == 1:
            names.append(name)
        elif with_seed.count(with_seed[place]) == 1:
            names.append(with_seed[place])
        else:
            names.append(f"{name} ({1 + ids[:place].count(name)})")
    return names


def _id(report: Report) -> str:
    return str(report.meta.get("model", {}).get("id"))


def _listed(values: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, values)))
