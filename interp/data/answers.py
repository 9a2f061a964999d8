"""The token that an answer begins with, as it follows a prompt."""

from __future__ import annotations

from typing import NamedTuple

from interp.errors import BadInput
from interp.models.model import Model


class Begun(NamedTuple):
    """A prompt's tokens, and the first token of what follows it; None with the reason in `why`."""

    ids: list[int]
    token: int | None
    why: str = ""


def begun(model: Model, prompt: str, answer: str, called: str = "answer") -> Begun:
    """The first token of an answer that follows a prompt after a space, unless the prompt ends in one.

    There is none where the tokenizer merges the two, or does not know the answer. `called` is what the
    reason calls the answer.

    Raises BadInput where the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise BadInput(
            f"{model.id} was loaded without a tokenizer: {called}s are words; load it with tokenizer="
        )
    ids = list(model.tokenizer(prompt)["input_ids"])
    joint = "" if prompt[-1].isspace() else " "
    whole = list(model.tokenizer(prompt + joint + answer)["input_ids"])
    if len(whole) <= len(ids) or whole[: len(ids)] != ids:
        return Begun(ids, None, f"the {called}'s tokens do not simply follow the prompt's")
    if whole[len(ids)] == getattr(model.tokenizer, "unk_token_id", None):
        return Begun(ids, None, f"the tokenizer does not know the {called}")
    return Begun(ids, whole[len(ids)])
