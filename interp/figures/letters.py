"""One letter a role, so that a map of heads can say which roles a head has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any


def role_letters(detectors: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The letter of every detector that gives a label, no two alike.

    The first that wants a letter has it; another gets the first free one of its name, then of the alphabet.

    >>> wanted = [("induction", "I"), ("idle", "I"), ("dozing", None)]
    >>> role_letters([{"name": name, "letter": letter} for name, letter in wanted])
    {'induction': 'I', 'idle': 'D', 'dozing': 'O'}
    """
    letters: dict[str, str] = {}
    for detector in detectors:
        if detector.get("labels") is False:
            continue
        name = str(detector["name"])
        of_name = [letter for letter in name if letter.isalpha()]
        upper = [letter.upper() for letter in of_name]
        wanted = [*filter(None, [detector.get("letter")]), *upper, *of_name, *ascii_uppercase]
        taken = set(letters.values())
        letters[name] = next((letter for letter in wanted if letter not in taken), name)
    return letters
