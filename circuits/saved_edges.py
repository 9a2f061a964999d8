"""Edges that were scored before: the scores and the circuit of a saved report."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from circuits.graph import Circuit, Graph, Scores
from interp.errors import BadInput
from interp.report import Report


def saved_edges(
    report: Report, called: str, graph: Graph, source: dict[str, Any]
) -> tuple[Scores, Circuit | None, list[str]]:
    """Importances (and circuit) of a saved report of `edges` or `circuit_find`, and what to say of it."""
    if report.analysis not in ("edges", "circuit_find") or "scores" not in report.arrays:
        raise BadInput(
            f"{called} is a report of '{report.analysis}'; give one of `interp edges` or `interp circuit find`"
        )
    names = [report.meta.get("senders"), report.meta.get("receivers")]
    if names != [graph.sender_names, graph.receiver_names]:
        raise BadInput(
            f"{called} was made on {report.meta['model']['id']}, whose graph is another than this model's"
        )
    notes = []
    if report.meta["model"]["sha256"] != source["model"]["sha256"]:
        notes.append(f"the edges were scored on other weights ({report.meta['model']['id']})")
    scores = torch.from_numpy(report.arrays["scores"]).float()
    ends = report.meta.get("faithfulness", {})
    gap = report.meta.get("clean", ends.get("model", 1.0)) - report.meta.get(
        "corrupted", ends.get("empty", 0.0)
    )
    if report.meta.get("signed", True):
        scores = -scores / gap
    circuit = None
    if "mask" in report.arrays:
        circuit = torch.from_numpy(report.arrays["mask"]).bool()
        if not graph.prune(circuit).any():
            raise BadInput(
                f"the circuit in {called} has no edge on a path from embedding to logits: nothing to judge"
            )
    same = [report.meta.get("options", {}).get("task"), report.meta.get("seed")]
    if same == [source["options"]["task"], source["seed"]]:
        notes.append("edges were scored on pairs drawn with the same seed as those judged on")
    return scores, circuit, notes


def digest(scores: Scores, circuit: Circuit | None) -> str:
    """Changes when a saved report's edges do."""
    content = scores.numpy().tobytes() + (b"" if circuit is None else circuit.numpy().tobytes())
    return hashlib.sha256(content).hexdigest()[:16]
