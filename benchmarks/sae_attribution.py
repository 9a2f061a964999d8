"""Direct feature attribution beside the naive route that forms z's terms one by one.

Both start from the same captured values and patterns and give, of every feature, the attribution of
every target position by source position, summed over heads [batch feature target source]:

- ours: v is multiplied with W_enc first (`FeatureAttribution`), for all targets; and for one target a
  prompt, as it is used where a feature is looked at on the prompts that activate it most;
- naive: A[b, h, t, s] v[b, s, h, :] as one tensor [batch target source n_heads · d_head], then its
  product with the encoder's columns. For several features it is timed formed once for all of them, and
  formed anew for each, as code written for one feature at a time does.

The SAE's weights are random: what a product costs does not depend on them. Routes take turns; medians
of several rounds are compared, and the two sides' results.

Run: python -m benchmarks.sae_attribution
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

import interp
from interp.data.prompts import text_windows
from probes.saes.attention import encoded_values
from probes.saes.attribute import FeatureAttribution, direct_feature_attribution
from probes.saes.model import SAE, SAEConfig

LAYER, D_SAE = 12, 4608


def naive(weights: torch.Tensor, v: torch.Tensor, encoder: torch.Tensor) -> torch.Tensor:
    """[batch feature target source] from z's terms [batch target source n_heads · d_head]."""
    by_target = weights.permute(
        0, 2, 3, 1
    ).contiguous()  # faster than einsum on the strided pattern
    terms = (by_target[..., None] * v[:, None]).flatten(3)
    return (terms @ encoder.T).permute(0, 3, 1, 2)


def naive_each(weights: torch.Tensor, v: torch.Tensor, encoder: torch.Tensor) -> None:
    """The naive route for one feature after the other."""
    for row in encoder:
        naive(weights, v, row[None])


def ours(
    sae: SAE, weights: torch.Tensor, v: torch.Tensor, like: FeatureAttribution
) -> torch.Tensor:
    """The same by `FeatureAttribution`, the product with W_enc included."""
    values = encoded_values(sae, v, like.features)
    found = FeatureAttribution(like.features, like.heads, like.targets, weights, values, like.bias)
    return found.by_source


def seconds(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each job, in turns, after one run that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(rounds + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if i:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


@torch.no_grad()
def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--length", type=int, default=127)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = interp.load(options.model)
    ids = text_windows(model, options.prompts, length=options.length).ids
    block = model.spec.blocks[LAYER]
    d_in = block.n_heads * block.d_head
    sae = SAE(SAEConfig(d_in, D_SAE, k=32, site=f"z.{LAYER}", heads=block.n_heads))
    cache = model.run(ids, capture=[f"v.{LAYER}", f"pattern.{LAYER}"], logits=False).cache
    groups = [model.spec.kv_group(LAYER, head) for head in range(block.n_heads)]
    v, weights = cache[f"v.{LAYER}"][:, :, groups], cache[f"pattern.{LAYER}"]
    size = f"{len(ids)} × {ids.shape[1]} tokens, {block.n_heads} heads × {block.d_head}"
    print(
        f"{options.model}, layer {LAYER}, {size}; d_sae {D_SAE}; {torch.get_num_threads()} threads"
    )
    last = weights[:, :, -1:].contiguous()
    for n in (1, 32):
        features = torch.arange(n)
        encoder = sae.encoder[features].detach()
        like = direct_feature_attribution(model, sae, ids, features)
        found, plain = ours(sae, weights, v, like), naive(weights, v, encoder)
        off = float((found - plain).abs().max() / plain.abs().max())
        jobs: dict[str, Callable[[], object]] = {
            "ours": partial(ours, sae, weights, v, like),
            "ours, one target": partial(ours, sae, last, v, like),
            "naive": partial(naive, weights, v, encoder),
        }
        taken = seconds(jobs, options.rounds)
        if n > 1:
            taken |= seconds({"naive, each anew": partial(naive_each, weights, v, encoder)}, 1)
        print(f"\n{n} feature{'s' * (n > 1)} (largest difference {off:.1e} of the largest entry)")
        for name, value in taken.items():
            against = ""
            if name.startswith("naive"):
                every, one = (value / taken[own] for own in ("ours", "ours, one target"))
                against = f"   ours {every:.0f}× faster, for one target a prompt {one:.0f}×"
            print(f"  {name:18} {value * 1e3:9.2f} ms{against}")


if __name__ == "__main__":
    main()
