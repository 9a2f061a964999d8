"""What bounds save: kept parts of every sum of a 256-token prompt, beside computing every part.

Both sides find the same parts (`tests/test_flow.py` compares them). Brute force is the published
formula, computed in two ways: by rows (one query row and head at a time, keys up to the row only:
everything stays in the processor's cache) and by squares (all query and key pairs of a head at
once, as one writes it first and as the published tool does). Processor seconds, so that other
work on the machine does not count. Run: python -m benchmarks.flow
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

import interp
from circuits.flow import MASS, SITES, Rule, Sum, kept_parts, sums
from interp.data.prompts import text_windows


def brute_force(whole: Sum, rule: Rule, *, squares: bool) -> int:
    """Kept parts of one sum, every part computed."""
    assert whole.weights is not None and whole.v is not None and whole.W_O is not None
    w = whole.whole
    size = w.abs().sum(-1)
    length = len(w)
    parts = torch.zeros(length, len(whole.weights), length)
    for head in range(len(whole.weights)):
        u = whole.v[head] @ whole.W_O[head]
        if squares:
            part = whole.weights[head, :, :, None] * u
            parts[:, head] = size[:, None] - (w[:, None] - part).abs().sum(-1)
            continue
        for i in range(length):
            part = whole.weights[head, i, : i + 1, None] * u[: i + 1]
            parts[i, head, : i + 1] = size[i] - (w[i] - part).abs().sum(-1)
    others = [size - (w - part).abs().sum(-1) for part in whole.others.values()]
    values = torch.cat([parts.flatten(1), torch.stack(others, 1)], 1).clamp_min(1e-5)
    total = values.sum(1, keepdim=True)
    if rule.threshold is not None:
        return int((values > rule.threshold * total).sum())
    ordered = values.sort(dim=1, descending=True).values
    return int((ordered.cumsum(1) < rule.mass * total).sum()) + length


def seconds(do: Callable[[], object]) -> float:
    """Processor seconds of one call, all threads together."""
    start = time.process_time()
    do()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--every", type=int, default=1, help="measure every n-th layer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = interp.load(options.model)
    ids = text_windows(model, 1, length=options.tokens).ids[:, : options.tokens]
    run = model.run(ids, capture=SITES, logits=False)
    rows = range(options.tokens)
    rules = {f"top {MASS:.0%} of mass": Rule(), "threshold 0.04": Rule(threshold=0.04)}
    by_rows, by_squares, spent = 0.0, 0.0, dict.fromkeys(rules, 0.0)
    computed, parts, kept = (dict.fromkeys(rules, 0) for _ in range(3))
    for layer in range(0, model.n_layers, options.every):
        whole = sums(model, run, layer)[0]
        if layer == 0:
            kept_parts(whole, rows, Rule())  # warm-up
        by_rows += seconds(lambda whole=whole: brute_force(whole, Rule(), squares=False))
        by_squares += seconds(lambda whole=whole: brute_force(whole, Rule(), squares=True))
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
    print(f"{model.id}, {options.tokens} tokens, every position, 1 thread")
    print(f"brute force: {by_squares:.1f} s by squares, {by_rows:.1f} s by rows")
    for name in rules:
        share = computed[name] / parts[name]
        print(
            f"{name:18} {by_squares / spent[name]:5.1f} x faster than squares, "
            f"{by_rows / spent[name]:.1f} x than rows; {share:.2%} of {parts[name]:,} attention parts "
            f"computed, {kept[name]:,} parts kept"
        )


if __name__ == "__main__":
    main()
