"""All-head direct attribution beside the forward it needs, and beside TransformerLens' stacked heads.

Three pieces of work on the same prompts, each in a process of its own for memory and in turns in one
process for time:

- forward: a plain Hugging Face forward, logits of all positions;
- ours: `direct_contributions`, every head, MLP, embedding and bias;
- theirs: TransformerLens' route, `run_with_cache` of what it needs (the heads' z, the final norm's
  scale), `stack_head_results` at the last position, `logit_attrs`;
- theirs, as called: the same without naming what is needed: everything cached, heads stacked at all
  positions, the last one read.

Run: python -m benchmarks.attribution
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import interp
from benchmarks.memory import peak_mb
from circuits.attribution import direct_attribution, direct_contributions
from interp.data.prompts import text_windows
from interp.models.model import Model

WORK = (
    "forward",
    "forward, one position",
    "ours",
    "ours with neurons",
    "ours with sources",
    "theirs",
    "theirs, as called",
)


def work(name: str, model: Model, bridge: Any, ids: torch.Tensor) -> Callable[[], object]:
    """One piece of work, ready to run."""
    answers, wrong = ids[:, 1], ids[:, 2]

    def theirs() -> torch.Tensor:
        names = ("attn.hook_z", "ln_final.hook_scale")
        _, cache = bridge.run_with_cache(ids, names_filter=lambda n: n.endswith(names))
        stack = cache.stack_head_results(layer=-1, pos_slice=-1)
        return cache.logit_attrs(stack, answers, wrong, pos_slice=-1)

    def theirs_as_called() -> torch.Tensor:
        _, cache = bridge.run_with_cache(ids)
        return cache.logit_attrs(cache.stack_head_results(), answers, wrong)[..., -1]

    plain = {"input_ids": ids, "use_cache": False}
    jobs: dict[str, Callable[[], object]] = {
        "forward": lambda: model.module(**plain),
        "forward, one position": lambda: model.module(**plain, logits_to_keep=1),
        "ours": lambda: direct_contributions(model, ids, answer=answers, instead=wrong),
        "ours with neurons": lambda: direct_contributions(
            model, ids, answer=answers, instead=wrong, neurons=True
        ),
        "ours with sources": lambda: direct_contributions(
            model, ids, answer=answers, instead=wrong, sources=True
        ),
        "report": lambda: direct_attribution(model, ids, answer=5, instead=6),
        "theirs": theirs,
        "theirs, as called": theirs_as_called,
    }
    return torch.no_grad()(jobs[name])


def prepared(
    name: str, prompts: int, length: int, *, with_theirs: bool = True
) -> tuple[Model, Any, torch.Tensor]:
    """Our model, their bridge of the same weights where it is asked for, and the prompts."""
    logging.disable(logging.WARNING)
    model, bridge = interp.load(name), None
    if with_theirs:
        from transformer_lens import TransformerBridge

        folder = str(model.module.config._name_or_path)  # type: ignore[union-attr]
        bridge = TransformerBridge.boot_transformers(folder, dtype=torch.float32, device="cpu")
        bridge.enable_compatibility_mode()
    return model, bridge, text_windows(model, prompts, length=max(16, length)).ids[:, :length]


def extra_megabytes(do: Callable[[], object], warm: Callable[[], object]) -> float:
    """Peak resident memory of a run above what was held before it.

    `warm` does the same on two prompts, for what is made once; what the allocator keeps of it is given back.
    """
    warm()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_mb("VmRSS")
    do()
    return peak_mb() - before


def in_its_own_process(options: argparse.Namespace, name: str) -> float:
    """Extra MB of one piece of work."""
    arguments = ["--model", options.model, "--prompts", str(options.prompts)]
    arguments += ["--length", str(options.length), "--only", name]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.attribution", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--length", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=WORK, help="print the extra MB of this piece of work")
    options = parser.parse_args()
    model, bridge, ids = prepared(
        options.model,
        options.prompts,
        options.length,
        with_theirs="theirs" in (options.only or "theirs"),
    )
    jobs = {name: work(name, model, bridge, ids) for name in WORK}
    if options.only:
        warm = work(options.only, model, bridge, ids[:2])
        print(extra_megabytes(jobs[options.only], warm))
        return
    ours, theirs = jobs["ours"](), jobs["theirs"]()
    stacked = theirs.reshape(model.n_layers, model.spec.n_heads, -1).permute(2, 0, 1)  # type: ignore[attr-defined]
    off = float((ours.heads - stacked).abs().max() / stacked.abs().max())  # type: ignore[attr-defined]
    times: dict[str, list[float]] = {name: [] for name in WORK}
    for _ in range(options.repeats):
        for name, do in jobs.items():
            start = time.perf_counter()
            do()
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(seen) for name, seen in times.items()}
    print(
        f"{model.id}, {model.dtype}, {torch.get_num_threads()} threads, "
        f"{options.prompts} prompts of {options.length} tokens; heads agree to {off:.1e}"
    )
    for name in WORK:
        print(
            f"{name:22} {seconds[name] / seconds['forward']:.2f} x forward, "
            f"{seconds['theirs'] / seconds[name]:.1f} x faster than theirs"
        )
    for name, needed in (
        ("ours", "forward, one position"),
        ("theirs", "forward"),
        ("theirs, as called", "forward"),
    ):
        above = (seconds[name] - seconds[needed]) / seconds["forward"]
        ratio = seconds[name] / seconds[needed]
        print(f"{name:22} {ratio:.2f} x the forward it needs: {above:+.2f} x forward on top of it")
    memory = {name: in_its_own_process(options, name) for name in WORK}
    for name in WORK:
        less = memory["theirs"] / max(memory[name], 0.1)
        print(f"{name:22} +{memory[name]:.0f} MB, {less:.1f} x less than theirs")


if __name__ == "__main__":
    main()
