"""What storing activations costs beside the bare forward that it needs.

The bare forward is the Hugging Face module on the same batches, left behind the same block, keeping
nothing. Both take turns; the store's time holds everything: tokenising, hashing the model's weights,
capturing, narrowing to 16 bits, checksums, writing and syncing. Wanted: at most 1.15 times.

Run: python benchmarks/sae_store.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import interp
from interp.data.activations import collect_activations, window_batches
from interp.data.prompts import prose
from interp.models.load import weights_sha256
from interp.models.model import Model
from interp.run.batch import Batch
from interp.sites import Site


class Behind(Exception):
    """The block was reached."""


@torch.no_grad()
def bare_forward(model: Model, batches: list[Batch], layer: int) -> None:
    """The module's own forward up to the end of a block."""

    def leave(*_: object) -> None:
        raise Behind

    handle = model.blocks[layer].register_forward_hook(leave)
    try:
        for batch in batches:
            try:
                model.module(**batch.inputs, use_cache=False)
            except Behind:
                continue
    finally:
        handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--site", default="z.12")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = interp.load(options.model)
    paragraphs = prose().split("\n\n")
    texts = ["\n\n".join(paragraphs[i::40]) for i in range(40)]
    turns = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            data = collect_activations(
                model, texts, Path(folder), site=options.site, tokens=options.tokens, progress=False
            )
            stored = time.perf_counter() - started
            batches = [*window_batches(data.train), *window_batches(data.held_out)]
        started = time.perf_counter()
        bare_forward(model, batches, Site.parse(options.site).layer or 0)
        bare = time.perf_counter() - started
        started = time.perf_counter()
        weights_sha256(model.module)
        fixed = time.perf_counter() - started
        turns.append((stored, bare, fixed))
    n = data.train.n_rows + data.held_out.n_rows
    ratio = statistics.median(stored / bare for stored, bare, _ in turns)
    without = statistics.median((stored - fixed) / bare for stored, bare, fixed in turns)
    print(f"{n:,} activations, {n / statistics.median(t[1] for t in turns):,.0f} a second bare")
    print(f"store {ratio:.3f} x bare forward; {without:.3f} x without hashing the weights once")


if __name__ == "__main__":
    main()
