"""What the lens costs beside the unembeddings it cannot avoid, and the memory it takes.

The lens over all layers and positions of one prompt must multiply every residual with W_U once; the
ratio is to exactly that (final norm, product, nothing kept), measured in turns in one process.
Run: python benchmarks/lens.py
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import interp
from interp.data.prompts import text_windows
from interp.lens import CHUNK_BYTES, logit_lens, read


def timed(do: Callable[[], object]) -> tuple[float, float]:
    """(wall, processor) seconds; processor time is what other people's work disturbs least."""
    wall, cpu = time.perf_counter(), time.process_time()
    do()
    return time.perf_counter() - wall, time.process_time() - cpu


def extra_megabytes(do: Callable[[], object]) -> float:
    """Largest resident memory while `do` runs, above what there was, sampled every 2 ms."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before, most, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    do()
    done.set()
    thread.join()
    return (most - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    model = interp.load(options.model)
    ids = text_windows(model, 1, length=options.tokens - 1).ids
    run = model.run(ids, capture=["resid_post"], logits=False)
    layers = run.cache["resid_post"][0].transpose(0, 1).contiguous()

    @torch.no_grad()
    def unembeddings() -> None:
        for layer in layers:
            model.unembed(layer)

    work = {
        "unembeddings": unembeddings,
        "read": lambda: read(model, layers, final=layers[-1]),
        "logit_lens": lambda: logit_lens(model, ids, lens="logit"),
    }
    memory = {name: extra_megabytes(do) for name, do in work.items()}
    turns = [{name: timed(do) for name, do in work.items()} for _ in range(options.repeats)]
    wall, cpu = (
        {name: statistics.median(turn[name][i] for turn in turns) for name in work} for i in (0, 1)
    )
    n_layers, n, _ = layers.shape
    held = n_layers * n * (model.spec.d_vocab or 0) * 4 / 1e6
    print(f"{model.id}, {model.dtype}, {torch.get_num_threads()} threads, {n_layers} x {n} places")
    print(f"all logits at once would be {held:,.0f} MB; a chunk is {CHUNK_BYTES / 1e6:.0f} MB")
    for name, seconds in wall.items():
        print(
            f"{name:14} {seconds / wall['unembeddings']:.2f} x wall, "
            f"{cpu[name] / cpu['unembeddings']:.2f} x processor, {seconds:.1f} s, "
            f"+{memory[name]:.0f} MB"
        )


if __name__ == "__main__":
    main()
