"""A made-up edges or circuit report of the default model's shape, for the page's tests: nothing was measured."""

from __future__ import annotations

import numpy as np
import pandas as pd

from interp.report import Report


def circuit_report(
    edges: int = 300,
    n_layers: int = 30,
    n_heads: int = 9,
    *,
    analysis: str = "circuit_find",
    model_id: str = "SmolLM2-135M-Instruct",
    token: str = " Mary",
    seed: int = 0,
) -> Report:
    """`edges` distinct random edges among the heads and MLPs of a model, and what its tables say of them.

    Every head that writes to a later layer may do so; strong edges are rare, as in a real circuit.
    """
    draw = np.random.default_rng(seed)
    senders = [("embed", -1.0)]
    receivers = [("logits", float(n_layers))]
    for layer in range(n_layers):
        for head in range(n_heads):
            senders.append((f"{layer}.{head}", float(layer)))
            receivers += [(f"{layer}.{head}.{kind}", float(layer)) for kind in "qkv"]
        senders.append((f"mlp.{layer}", layer + 0.5))
        receivers.append((f"mlp.{layer}", layer + 0.5))
    chosen: set[tuple[str, str]] = {("embed", "mlp.0")}
    while len(chosen) < edges:
        s, r = senders[draw.integers(len(senders))], receivers[draw.integers(len(receivers))]
        if s[1] < r[1]:
            chosen.add((s[0], r[0]))
    table = pd.DataFrame(sorted(chosen), columns=["sender", "receiver"])
    table["score"] = draw.standard_normal(len(table)) ** 5 / 10
    if analysis == "edges":
        table["importance"] = -table["score"] / 4.0
    table = table.sort_values("score", key=lambda x: -x.abs(), ignore_index=True)
    nodes = table.groupby("sender")["score"].sum().rename_axis("node").reset_index()
    nodes["contribution"] = draw.standard_normal(len(nodes))
    words = pd.DataFrame(
        [
            {"pair": pair, "node": node, "position": "end", "place": place, "token": token}
            for node in nodes["node"]
            for pair in range(2)
            for place in range(3)
        ]
    )
    meta = {
        "model": {"id": model_id, "sha256": "0" * 64, "n_layers": n_layers, "n_heads": n_heads},
        "options": {"task": "ioi", "method": "eap-ig", "metric": "logit_diff"},
        "faithfulness": {"unit": "logits"},
        "notes": ["faithfulness 0.97, made up", "another note"],
    }
    return Report(analysis, {analysis: table, "nodes": nodes, "words": words}, {}, meta)
