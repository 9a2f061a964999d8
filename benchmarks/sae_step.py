"""Activations a second of one training step: forward, backward, optimiser, bookkeeping.

d_in 576, k = 32, batch 4,096, TopK. Beside the step with the encoder's product in float32 and in
bfloat16 stands the plain dense step in torch: dense decode, autograd, Adam. Steps take turns in one
process and medians are compared. `sae_saelens.py` does the same against SAELens.

Run: python benchmarks/sae_step.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from interp.run.store import MemoryRows
from probes.saes.model import SAE, SAEConfig
from probes.saes.options import Options
from probes.saes.training import Training

D_IN, K, BATCH = 576, 32, 4096


def rows(n: int = 2 * BATCH, seed: int = 0) -> torch.Tensor:
    """Correlated rows, so that latents differ in how often they are active."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D_IN, D_IN, generator=generator) / D_IN**0.5
    return torch.randn(n, D_IN, generator=generator) @ mix


def training(d_sae: int, precision: str, x: torch.Tensor, steps: int = 1000) -> Training:
    """Our training state for the step that is timed."""
    options = Options(
        rows=steps * BATCH,
        batch_size=BATCH,
        lr=1e-4,
        warmup=0.0,
        decay=0.0,
        sparsity=0.0,
        init="data",
        encoder_scale=1.0,
        revive="auxk",
        aux=1 / 32,
        dead_after=steps * BATCH,  # no latent is dead: the step that is the rule is timed
        precision=precision,
        seed=0,
    )
    return Training(SAEConfig(d_in=D_IN, d_sae=d_sae, k=K), options, MemoryRows(x))


def plain_step(d_sae: int, x: torch.Tensor) -> Callable[[], None]:
    """The same step in plain dense torch."""
    sae = SAE(SAEConfig(d_in=D_IN, d_sae=d_sae, k=K))
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-4)

    def step() -> None:
        loss = (x - sae(x)).square().sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        sae.normalise_decoder()

    return step


def in_turns(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[4608, 9216])
    options = parser.parse_args()
    x = rows()
    batch = x[:BATCH]
    for d_sae in options.d_sae:
        ours = {p: training(d_sae, p, x) for p in ("float32", "bfloat16")}
        steps: dict[str, Callable[[], object]] = {
            name: (lambda t=t: t.step(batch)) for name, t in ours.items()
        }
        steps["plain torch"] = plain_step(d_sae, batch)
        seconds = in_turns(steps, options.repeats)
        print(f"d_sae {d_sae}, {torch.get_num_threads()} threads")
        for name, value in seconds.items():
            ratio = seconds["plain torch"] / value
            print(f"  {name:12} {BATCH / value:>10,.0f} activations/s   {ratio:.2f} x plain torch")


if __name__ == "__main__":
    main()
