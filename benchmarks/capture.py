"""What watching costs: capture and pattern statistics beside a plain Hugging Face forward.

Prints ratios of medians, measured in turns in one process. Run: python benchmarks/capture.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import interp
from circuits.heads.detector import choose
from circuits.heads.prompt_sets import REPEATED, TEXT
from circuits.heads.scan import one_pass
from interp.data.prompts import repeated_tokens, text_windows


def medians(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each piece of work, in turns, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, do in work.items():
            start = time.perf_counter()
            do()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seen) for name, seen in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    model = interp.load(options.model)
    repeated, control = repeated_tokens(model, 8)
    text = text_windows(model, 8, length=128)
    batch = model.as_batch(text.ids[:, :128])
    on_repeats = [d for d in choose(None) if d.reads is REPEATED]
    on_text = [d for d in choose(None) if d.reads is TEXT]

    def plain(ids: torch.Tensor) -> object:
        with torch.no_grad():
            return model.module(input_ids=ids, use_cache=False)

    def plain_sets() -> None:
        for prompts in (repeated, control, text):
            plain(prompts.ids)

    def all_detectors() -> None:
        one_pass(model, on_repeats, repeated)
        one_pass(model, on_repeats, control)
        one_pass(model, on_text, text)

    seconds = medians(
        {
            "plain": lambda: plain(batch.ids),
            "z of all layers": lambda: model.run(batch, capture=["z"]),
            "z of all layers, no logits": lambda: model.run(batch, capture=["z"], logits=False),
            "all patterns kept": lambda: model.run(batch, capture=["pattern"]),
            "plain, three sets": plain_sets,
            "statistics of all detectors, three sets": all_detectors,
        },
        options.repeats,
    )
    print(f"{model.id}, {model.dtype}, {torch.get_num_threads()} threads, 8 x 128 tokens, SDPA")
    for name, base in (
        ("z of all layers", "plain"),
        ("z of all layers, no logits", "plain"),
        ("all patterns kept", "plain"),
        ("statistics of all detectors, three sets", "plain, three sets"),
    ):
        print(f"{name:42} {seconds[name] / seconds[base]:.2f} x {base}")


if __name__ == "__main__":
    main()
