"""Text of three domains: prose, code, lists.

Code is `domain_code.txt`, a frozen copy of some files of this project; lists are made of the shipped
facts, numbered and shuffled; prose is the shipped novel.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import numpy as np

from interp.data.facts import RELATIONS, facts
from interp.data.prompts import prose

PER_LIST = 8


@cache
def domain_texts() -> dict[str, str]:
    """One long text for each domain.

    >>> {name: text.count("\\n") > 300 for name, text in domain_texts().items()}
    {'prose': True, 'code': True, 'lists': True}
    """
    code = files("circuits.heads").joinpath("domain_code.txt").read_text(encoding="utf-8")
    return {"prose": prose(), "code": code, "lists": _lists()}


def _lists() -> str:
    """Numbered lists of facts, each under the name of its relation, in a shuffled order."""
    generator = np.random.default_rng(0)
    lists = []
    for relation in RELATIONS:
        known = facts(relation)
        order = generator.permutation(len(known))
        for start in range(0, len(order) - PER_LIST + 1, PER_LIST):
            items = [known[i] for i in order[start : start + PER_LIST]]
            lines = [f"{i}. {fact.subject}: {fact.answer}" for i, fact in enumerate(items, 1)]
            lists.append("\n".join([f"{relation.capitalize()}:", *lines]))
    return "\n\n".join(lists[i] for i in generator.permutation(len(lists))) + "\n"
