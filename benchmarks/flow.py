"""What bounds and a search from the chosen token save, beside computing every part.

First the whole of it: the important-flow graph of the last token. Brute force is the published formula
and the published order: the parts of every sum at every position, then the search; in two ways, by rows
(one query row and head at a time, keys up to the row only: everything stays in the processor's cache)
and by squares (all query and key pairs of a head at once, as one writes it first and as the published
tool does). Both sides must find the same edges. A third brute force does what ours does first, visit
only the rows that the search reaches, and shows what is left to the bounds alone.

Then the bounds alone: the kept parts of every sum at every position, which the graph of all tokens
would need. Processor seconds, so that other work on the machine does not count.

Run: python -m benchmarks.flow
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import interp
from circuits.flow import flow_graph
from circuits.flow_parts import MASS, SITES, Rule, Sum, kept_parts, sums
from interp.data.prompts import text_windows
from interp.models.model import Model
from interp.run.cache import Run

Edge = tuple[int, str, str, int, int]


def proximities(whole: Sum, rows: Sequence[int], how: str) -> Tensor:
    """π of every part at `rows` [rows others + heads·keys], the others first; 0: no attention."""
    w = whole.whole
    size = w.abs().sum(-1)
    others = torch.stack([size - (w - part).abs().sum(-1) for part in whole.others.values()], 1)
    others = others.clamp_min(1e-5)[list(rows)]
    if whole.weights is None or whole.v is None or whole.W_O is None:
        return others
    parts = torch.zeros(len(rows), len(whole.weights), len(w))
    for head in range(len(whole.weights)):
        u = whole.v[head] @ whole.W_O[head]
        if how == "squares":
            part = whole.weights[head, rows][:, :, None] * u
            parts[:, head] = size[rows, None] - (w[rows, None] - part).abs().sum(-1)
            continue
        for place, i in enumerate(rows):
            part = whole.weights[head, i, : i + 1, None] * u[: i + 1]
            parts[place, head, : i + 1] = size[i] - (w[i] - part).abs().sum(-1)
    parts = parts.clamp_min(1e-5) * (whole.weights[:, rows].transpose(0, 1) > 0)
    return torch.cat([others, parts.flatten(1)], 1)


def count(values: Tensor, rule: Rule) -> Tensor:
    """How many of the largest parts of each row the rule keeps."""
    total = values.sum(1, keepdim=True)
    if rule.threshold is not None:
        return (values > rule.threshold * total).sum(1)
    ordered = values.sort(dim=1, descending=True).values
    return (ordered.cumsum(1) < rule.mass * total).sum(1) + 1


def brute_force_graph(model: Model, run: Run, rule: Rule, how: str) -> set[Edge]:
    """The edges of the last token's graph, every part computed ("visited": of the rows reached only)."""
    length = run.cache["resid_pre.0"].shape[1]
    edges: set[Edge] = set()
    reached = [length - 1]
    for layer in reversed(range(model.n_layers)):
        for whole in reversed(sums(model, run, layer)):
            rows = reached if how == "visited" else range(length)
            values = proximities(whole, rows, how)
            if how != "visited":
                values = values[reached]
            names, sources = [*whole.others], set()
            order, kept = values.sort(dim=1, descending=True).indices, count(values, rule)
            for i, parts, k in zip(reached, order.tolist(), kept.tolist(), strict=True):
                for part in parts[:k]:
                    j = i if part < len(names) else (part - len(names)) % length
                    kind = names[part] if part < len(names) else "attention"
                    edges.add((layer, whole.stage, kind, i, j))
                    sources |= set() if kind == "bias" else {j}
            reached = sorted(sources)
    return edges


def our_graph(model: Model, run: Run, rule: Rule) -> set[Edge]:
    table = flow_graph(model, run, mass=rule.mass, threshold=rule.threshold).edges
    columns = (table[name] for name in ("layer", "stage", "kind", "position", "source_position"))
    return set(zip(*columns, strict=True))


def seconds(do: Callable[[], object], repeats: int = 1) -> float:
    """Processor seconds of one call, all threads together: the median of several."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        do()
        found.append(time.process_time() - start)
    return float(np.median(found))


def graphs(model: Model, run: Run, rules: dict[str, Rule]) -> None:
    length = run.cache["resid_pre.0"].shape[1]
    print(f"{model.id}, the last of {length} tokens, 1 thread")
    our_graph(model, run, Rule())  # warm-up
    for place, (name, rule) in enumerate(rules.items()):
        edges = our_graph(model, run, rule)
        spent = seconds(lambda rule=rule: our_graph(model, run, rule), 5)
        line = f"  {name:18} {len(edges):5} edges in {spent:.2f} s;"
        # Squares take a minute, and the same whatever the rule.
        for how in ("squares", "rows", "visited")[min(place, 1) :]:
            found: list[set[Edge]] = []
            brute = seconds(
                lambda how=how, rule=rule, found=found: found.append(
                    brute_force_graph(model, run, rule, how)
                )
            )
            # Float32 on both sides: where two parts tie to rounding, one edge may stand for another.
            different = len(found[0] ^ edges)
            assert different <= 2 + len(edges) // 500, f"{different} edges differ by {how}"
            line += f" {brute / spent:.1f} x faster than by {how}"
        print(line, flush=True)


def bounds(model: Model, run: Run, rules: dict[str, Rule], every: int) -> None:
    length = run.cache["resid_pre.0"].shape[1]
    rows = range(length)
    by_rows, by_squares, spent = 0.0, 0.0, dict.fromkeys(rules, 0.0)
    computed, parts, kept = (dict.fromkeys(rules, 0) for _ in range(3))
    for layer in range(0, model.n_layers, every):
        whole = sums(model, run, layer)[0]
        by_rows += seconds(lambda whole=whole: count(proximities(whole, rows, "rows"), Rule()))
        by_squares += seconds(
            lambda whole=whole: count(proximities(whole, rows, "squares"), Rule())
        )
        for name, rule in rules.items():
            found = []
            spent[name] += seconds(
                lambda whole=whole, rule=rule, found=found: found.append(
                    kept_parts(whole, rows, rule)
                )
            )
            computed[name] += found[0].computed
            parts[name] += found[0].parts
            kept[name] += len(found[0].weight)
    print(f"every position of {length}, by squares {by_squares:.1f} s, by rows {by_rows:.1f} s")
    for name in rules:
        share = computed[name] / parts[name]
        print(
            f"  {name:18} {by_squares / spent[name]:5.1f} x faster than by squares "
            f"{by_rows / spent[name]:.1f} x faster than by rows; {share:.2%} of {parts[name]:,} "
            f"attention parts computed, {kept[name]:,} parts kept"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--every", type=int, default=1, help="bounds alone: every n-th layer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = interp.load(options.model)
    ids = text_windows(model, 1, length=options.tokens).ids[:, : options.tokens]
    run = model.run(ids, capture=SITES, logits=False)
    rules = {
        f"top {MASS:.0%} of mass": Rule(),
        "top 95% of mass": Rule(0.95),
        "threshold 0.04": Rule(threshold=0.04),
    }
    with torch.no_grad():
        graphs(model, run, rules)
        bounds(model, run, rules, options.every)


if __name__ == "__main__":
    main()
