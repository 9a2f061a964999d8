"""What a lens is fitted on, chosen on and tested on: token windows of a caller's text or of the English at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.data.english import Document, documents, recipe
from interp.data.prompts import lead_token
from interp.errors import BadInput
from interp.models.model import Model

MIN_WINDOWS = 10
CHOOSING_ROWS, TESTING_ROWS, ROWS_PER_WINDOW = 256, 1024, 16
FIT_TOKENS = 40_000
"""How much of the text at hand a lens is fitted on; a caller's own text is used whole."""
SHARED_WORDS = 8
MOST_SHARED = 0.1
"""A text to test on is left out if more than this share of its 8-word sequences was fitted on."""


@dataclass(frozen=True)
class Parts:
    """Token windows [n pos]: to fit on, and by kind of text to choose and to test on."""

    fit: Tensor
    choose: dict[str, Tensor]
    test: dict[str, Tensor]


def parts_of(
    model: Model, text: str | Tensor | None, name: str, window: int
) -> tuple[Parts, dict[str, Any]]:
    """The parts of a caller's text or of the English at hand, and how reports call it."""
    if text is not None:
        ids = ids_of(model, text)
        fit, choose, test = _consecutive(one_text(model, ids, window))
        kind = name or ("token ids" if isinstance(text, Tensor) else "text of the caller")
        content = text.encode() if isinstance(text, str) else text.cpu().numpy().tobytes()
        shown = {"name": kind, "sha256": hashlib.sha256(content).hexdigest(), "recipe": None}
        return (
            Parts(fit, {kind: evenly(choose, CHOOSING_ROWS)}, {kind: evenly(test, TESTING_ROWS)}),
            shown | {"tokens": len(ids)},
        )
    _require_tokenizer(model)
    found = documents()
    digest = hashlib.sha256("\n\n".join(document.text for document in found).encode())
    parts = _held_out_by_document(model, found, window)
    shown = {
        "name": name or "English at hand: " + ", ".join(parts.test),
        "sha256": digest.hexdigest(),
        "recipe": recipe(),
        "documents": len(found),
    }
    return parts, shown | {"tokens": parts.fit.numel()}


def _held_out_by_document(model: Model, found: Sequence[Document], window: int) -> Parts:
    """Of every kind, one document in eight to choose on and one to test on; the others to fit on."""
    roles: dict[str, dict[str, list[Document]]] = {"fit": {}, "choose": {}, "test": {}}
    counted: dict[str, int] = {}
    for document in found:
        i = counted[document.kind] = counted.get(document.kind, -1) + 1
        role = {3: "choose", 7: "test"}.get(i % 8, "fit")
        roles[role].setdefault(document.kind, []).append(document)
    fitted = {s for group in roles["fit"].values() for doc in group for s in _sequences(doc.text)}
    kinds = len(roles["fit"])
    parts: dict[str, dict[str, Tensor]] = {}
    for role, rows in (("choose", CHOOSING_ROWS), ("test", TESTING_ROWS)):
        parts[role] = {}
        for kind, group in roles[role].items():
            fresh = [doc for doc in group if role == "choose" or not _known(doc.text, fitted)]
            windows = _windows(model, [doc.text for doc in fresh], window)
            if len(windows):
                parts[role][kind] = evenly(windows, rows // kinds)
    texts = [doc.text for group in roles["fit"].values() for doc in group]
    fit = _windows(model, texts, window)
    if len(fit) < MIN_WINDOWS or not parts["choose"] or not parts["test"]:
        raise BadInput(f"only {len(fit)} windows of text are at hand: pass text=")
    return Parts(evenly(fit, FIT_TOKENS, each=fit.shape[1] - 1), parts["choose"], parts["test"])


def _sequences(text: str) -> set[int]:
    """Every run of SHARED_WORDS words, as a number."""
    words = text.split()
    return {hash(tuple(words[i : i + SHARED_WORDS])) for i in range(len(words) - SHARED_WORDS + 1)}


def _known(text: str, fitted: set[int]) -> bool:
    """Whether much of a text (boilerplate, a licence in another copy) was fitted on."""
    own = _sequences(text)
    return len(own & fitted) > MOST_SHARED * len(own)


def evenly(windows: Tensor, rows: int, each: int = ROWS_PER_WINDOW) -> Tensor:
    """Evenly spread windows, as many as give `rows` rows with `each` from a window."""
    wanted = max(1, rows // each)
    if len(windows) <= wanted:
        return windows
    return windows[torch.linspace(0, len(windows) - 1, wanted).long()]


def _require_tokenizer(model: Model) -> None:
    if model.tokenizer is None:
        raise BadInput(
            f"{model.id} was loaded without a tokenizer: pass text= as token ids, or load with tokenizer="
        )


def ids_of(model: Model, text: str | Tensor) -> Int[Tensor, " tokens"]:
    if isinstance(text, Tensor):
        return text.flatten().long().cpu()
    _require_tokenizer(model)
    return torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"]).long()


def _windows(model: Model, texts: Sequence[str], window: int) -> Int[Tensor, "n pos"]:
    """All whole windows of these texts, none across two of them."""
    rows = [_rows_of(model, ids_of(model, text), window) for text in texts]
    return torch.cat(rows) if rows else torch.empty(0, window, dtype=torch.long)


def one_text(model: Model, ids: Tensor, window: int) -> Int[Tensor, "n pos"]:
    """The windows of one text, enough to be split."""
    rows = _rows_of(model, ids, window)
    if len(rows) < MIN_WINDOWS:
        raise BadInput(
            f"the text has {len(ids)} tokens in windows of {window}; wanted at least {MIN_WINDOWS} "
            "windows of 2 or more tokens: give more text"
        )
    return rows


def _rows_of(model: Model, ids: Tensor, window: int) -> Int[Tensor, "n pos"]:
    """Consecutive windows of the ids, each behind the lead token."""
    lead = lead_token(model)
    width = min(window, (model.spec.n_ctx or window + 1) - len(lead))
    if width < 2:
        raise BadInput(f"window={window}: wanted 2 or more tokens")
    rows = ids[: len(ids) // width * width].reshape(-1, width)
    return torch.cat([lead.expand(len(rows), -1), rows], dim=1)


def _consecutive(windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Consecutive parts to fit on (80 %), choose on and test on (10 % each), one window apart."""
    tenth = max(2, len(windows) // 10)
    return windows[: -2 * tenth], windows[-2 * tenth + 1 : -tenth], windows[-tenth + 1 :]
