"""One base error: every message says what was given, what was wanted and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 60
"""Names that a message lists: all detectors or analyses, not every head of a model."""


class InterpError(Exception):
    """Something the user can mend; the command line prints its message as one line."""

    exit_code = 1


class BadInput(InterpError):
    """What was asked for cannot be done; found out before the expensive pass."""

    exit_code = 2


class Refused(InterpError):
    """This model cannot give this site or analysis, for the reason named (see `interp inspect`)."""

    exit_code = 2


class SaveFailed(InterpError):
    """A result could not be written; nothing half-written was left in its place."""

    exit_code = 1


def at_least(**bounded: tuple[float | None, float]) -> None:
    """Raise BadInput for an option under its least value; an option that is None was not given.

    >>> at_least(shots=(1, 2))
    Traceback (most recent call last):
    interp.errors.BadInput: shots=1: wanted 2 or more
    """
    for name, (value, least) in bounded.items():
        if value is not None and value < least:
            raise BadInput(f"{name}={value}: wanted {least} or more")


def unknown(what: str, got: str, known: Iterable[str]) -> BadInput:
    """The error for a name that is not there, with the nearest one that is.

    >>> str(unknown("site", "resid_pst", ["resid_post", "z"]))
    "no site 'resid_pst'; did you mean 'resid_post'? known: resid_post, z"
    >>> str(unknown("head", "99.0", [f"{layer}.{head}" for layer in range(30) for head in range(9)]))[-29:]
    '6.3, 6.4, 6.5, … (270 in all)'
    """
    names = list(known)
    near = difflib.get_close_matches(got, names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ";"
    more = f", … ({len(names)} in all)" if len(names) > LISTED else ""
    return BadInput(f"no {what} '{got}'{hint} known: {', '.join(names[:LISTED])}{more}")
