"""What a heads report says of each head, taken along by a report whose figures show heads.

A circuit's page opens a card for every head. What the head is known to do was found by `interp heads`
in a report of its own; its table travels inside the circuit's report, so that figures need no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from interp.errors import BadInput
from interp.report import Report

NAME = "head_claims"


def heads_report(source: Report | str | Path) -> Report:
    """A report of `interp heads`, given itself or by its folder; BadInput where it is none."""
    report = source if isinstance(source, Report) else Report.load(source)
    if report.analysis != "heads":
        raise BadInput(
            f"{_named(source)} is a report of '{report.analysis}'; give one of `interp heads`"
        )
    return report


def head_claims(
    source: Report | str | Path | None, model: Mapping[str, Any]
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """The table "head_claims" for a report on the same model, and what its meta keeps of the source.

    Args:
        source: a heads report, or its folder; None: nothing is taken along.
        model: meta["model"] of the report that takes the table.

    Returns: ({"head_claims": table}, {"head_claims": about}), each empty without a source. The table
        is the heads report's own, one row a head: every score with its 95 % interval (_low, _high),
        _null, corrected _p and _confidence, the labels, and the effect of ablating the head where it
        was measured. about: detectors (title, unit, null, threshold of every score), created, options.

    Raises:
        BadInput: not a heads report, or one of other weights.

    >>> head_claims(None, {})
    ({}, {})
    """
    if source is None:
        return {}, {}
    report = heads_report(source)
    theirs = report.meta["model"]
    if theirs["sha256"] != model["sha256"]:
        raise BadInput(
            f"{_named(source)} is about other weights than this circuit's: {_weights(theirs)}, not "
            f"{_weights(model)}; make one with `interp heads` on this model"
        )
    about = {
        "detectors": report.meta.get("detectors", []),
        "created": report.meta.get("created"),
        "options": report.meta.get("options"),
    }
    return {NAME: report.table}, {NAME: about}


def _named(source: Report | str | Path) -> str:
    return "the report given as heads" if isinstance(source, Report) else str(source)


def _weights(model: Mapping[str, Any]) -> str:
    return f"{model['id']} ({model.get('dtype', 'dtype unknown')}, sha256 {model['sha256'][:12]})"
