"""What claims about heads cost, and how far they can be trusted, on the default model.

speed: every fast detector beside the plain forwards over its prompts; exact ablation of every head beside a
loop of full forwards.

The loop is what one would write without this package: for each head a plain Hugging Face forward with a hook
on what W_O reads, all logits, cross-entropy at the judged positions. Ablation is compared with it three times:
on four prompts of 129 tokens, in time and in multiplications, with the largest difference of the two; on one
prompt of 17 tokens; and to a standard error of at most 2 % of the largest effect, where the loop, which does not
look at what it has seen, must run every head on as many prompts as the hardest head needs.

On the same prompts, how far replay can be ahead is bounded. Whatever a head of layer l changes, all positions
of every block behind it change too, so an exact effect costs the blocks from l on (half of them on average) and
the logits of the judged positions. Of the default model's forward, 30 blocks take 79 % of the multiplications
and the unembedding 21 %; with half of the positions judged that leaves 0.5 · 0.79 + 0.5 · 0.21, so about 2 x
fewer multiplications, whatever is done. Leaving out the head's own attention and the last block's unjudged
positions would add 4 %. Where a forward is long enough to keep the machine busy, time follows the work; a short
one (17 tokens) spends most of its time on reading weights, which the nine heads of a layer share.

shapley: Shapley values until every standard error is under 0.05 of the largest value, in exact ablation sweeps.

labels: agreement of labels over three seeds; labels on the same architecture with random weights, every
detector on, as a share of all heads × roles.

    python -m benchmarks.heads speed
    python -m benchmarks.heads shapley
    python -m benchmarks.heads labels
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import circuits
import interp
from benchmarks.capture import medians
from circuits.heads.ablate import ablate_heads
from circuits.heads.ablation import ablation_effects
from circuits.heads.detector import choose
from circuits.heads.scan import prompt_sets, scan
from circuits.heads.shapley import shapley_values
from circuits.heads.usable import usable
from interp.data.prompts import Prompts, repeated_tokens
from interp.metrics import loss
from interp.models.model import Model
from interp.run.resume import Checkpoint
from probes.controls import random_weights


@torch.no_grad()
def plain(model: Model, prompts: Prompts) -> None:
    """A Hugging Face forward of every prompt, 8 at a time."""
    for start in range(0, len(prompts), 8):
        model.module(input_ids=prompts.ids[start : start + 8], use_cache=False)


def fast_detectors(model: Model, n: int, repeats: int) -> None:
    detectors, _ = usable(model, choose(["fast"]))
    sets = prompt_sets(model, detectors, n, 0)
    every = [prompts for both in sets.values() for prompts in both if prompts is not None]

    def all_fast() -> None:
        scan(model, detectors, sets, n, 0, Checkpoint())

    def forwards() -> None:
        for prompts in every:
            plain(model, prompts)

    seconds = medians({"detectors": all_fast, "forwards": forwards}, repeats)
    print(
        f"{len(detectors)} fast detectors: {seconds['detectors'] / seconds['forwards']:.2f} x the plain "
        f"forwards over their {sum(map(len, every))} prompts"
    )


def exact_ablation(model: Model, n: int, length: int, looped: int = 27) -> None:
    """Replay of every head beside a loop of full forwards, of which `looped` heads are timed: all cost the same."""
    prompts, _ = repeated_tokens(model, n, length=length)
    read, heads = prompts.judged, model.spec.heads
    targets = prompts.ids[:, read + 1]
    some = heads[:: max(1, len(heads) // looped)]

    def replay(of=heads) -> np.ndarray:
        return ablation_effects(model, prompts, of)

    with torch.no_grad():
        clean = loss(model.module(input_ids=prompts.ids).logits[:, read], targets).numpy()
    start = time.perf_counter()
    replayed = replay()
    middle = time.perf_counter()
    full = np.stack([forward_without(model, prompts, head) for head in some]) - clean
    seconds = (time.perf_counter() - middle) * len(heads) / len(some)
    one_a_layer = [(layer, 0) for layer in model.spec.attention_layers]
    once = work(lambda: model.run(prompts.batch, logits=read))
    mine = work(lambda: replay(one_a_layer)) - once  # the clean run serves all heads
    theirs = work(lambda: forward_without(model, prompts, heads[0])) * len(one_a_layer)
    difference = np.abs(replayed[:: max(1, len(heads) // looped)] - full).max()
    print(
        f"exact ablation of {len(heads)} heads, {n} prompts of {prompts.length} tokens: {middle - start:.0f} s by "
        f"replay, {seconds:.0f} s in a loop of forwards, {seconds / (middle - start):.1f} x; multiplications "
        f"{theirs / mine:.1f} x; largest difference {difference:.1e} nats"
    )


def ablation_to_an_error(model: Model, length: int = 32, looped: int = 27) -> None:
    """`ablate_heads` beside a loop in which every head sees as many prompts as the hardest one needs."""
    heads = model.spec.heads
    some = heads[:: max(1, len(heads) // looped)]
    prompts, _ = repeated_tokens(model, 8, length=length)
    start = time.perf_counter()
    report = ablate_heads(model, length=length, progress=False)
    middle = time.perf_counter()
    for head in some:
        forward_without(model, prompts, head)
    each = (time.perf_counter() - middle) / len(some) / len(prompts)
    told = report.meta["ablation"]
    seconds, loop = middle - start, each * told["all_as_the_hardest"]
    used = report.table["prompts"]
    print(
        f"to a standard error of {told['largest_error'] / told['largest']:.3f} of the largest effect (within "
        f"what was asked: {told['within']}): {used.mean():.1f} prompts a head, the hardest {used.max()}; "
        f"{seconds:.0f} s, {loop:.0f} s in a loop of forwards, {loop / seconds:.1f} x"
    )


@torch.no_grad()
def forward_without(model: Model, prompts: Prompts, head: tuple[int, int]) -> np.ndarray:
    """Loss of every prompt in a plain Hugging Face forward with one head's z replaced by its mean."""
    layer, place = head
    block = model.spec.blocks[layer]
    columns = slice(place * block.d_head, (place + 1) * block.d_head)

    def ablate(_, args: tuple) -> tuple:
        z = args[0].clone()
        z[..., columns] = z[..., columns].mean((0, 1))
        return (z,)

    assert block.W_O is not None
    handle = model.module.get_submodule(block.W_O).register_forward_pre_hook(ablate)
    try:
        logits = model.module(input_ids=prompts.ids, use_cache=False).logits
    finally:
        handle.remove()
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), prompts.ids[:, 1:], reduction="none"
    )
    return each[:, prompts.judged].mean(1).numpy()


def work(do: Callable[[], object]) -> int:
    """Floating point operations of the matrix products in a call."""
    with FlopCounterMode(display=False) as counter:
        do()
    return counter.get_total_flops()


def shapley(model: Model) -> None:
    report = shapley_values(model, prompts=16, length=8, progress=False)
    table, game = report.table, report.meta["game"]
    share = table["error"].max() / table["value"].abs().max()
    print(f"Shapley: largest standard error {share:.3f} of the largest value; {game}")


def stability(model: Model) -> None:
    report = circuits.classify_heads(
        model, detectors=["fast"], seeds=3, ablate=False, evidence=0, progress=False
    )
    print(f"labels over three seeds, fast detectors: {report.meta['stability']}")


def false_labels(model: Model, seeds: int) -> None:
    for seed in range(seeds):
        report = circuits.classify_heads(
            random_weights(model, seed),
            detectors=["all"],
            prompts=16,
            ablate=False,
            evidence=0,
            progress=False,
        )
        labels = [name for text in report.table["labels"] for name in text.split(",") if name]
        roles = sum(bool(detector["labels"]) for detector in report.meta["detectors"])
        pairs = roles * len(report.table)
        print(
            f"random weights, seed {seed}: {len(labels)} labels in {pairs} heads x roles "
            f"({len(labels) / pairs:.2%}): {dict(zip(*np.unique(labels, return_counts=True), strict=True))}; "
            f"skipped: {report.meta['skipped']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("speed", "shapley", "labels"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1, help="draws of random weights")
    options = parser.parse_args()
    model = interp.load(options.model)
    if options.what == "speed":
        fast_detectors(model, options.prompts, options.repeats)
        exact_ablation(model, 4, 64)
        exact_ablation(model, 1, 8)
        ablation_to_an_error(model)
    elif options.what == "shapley":
        shapley(model)
    else:
        stability(model)
        false_labels(model, options.seeds)


if __name__ == "__main__":
    main()
