"""What training a lens brings on held-out text, and what it costs beside the forwards it needs.

Quality: KL(final ‖ lens) by layer of the logit, ridge and tuned lens (means over kinds of text), from
`tune_lens`, which keeps its state in a folder and goes on from there when called again.
Cost, all in turns in one process: optimiser steps of all layers on the rows of one forward against that
forward alone; all layers sharing a forward against one layer at a time, each with its own forwards; and a
step over a part of the vocabulary against one over all of it.
Run: python -m benchmarks.tuned_lens [--quality FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import interp
from benchmarks.capture import medians
from interp.data.prompts import prose
from interp.lens_text import Parts
from interp.models.model import Model
from probes.lens_inputs import Inputs
from probes.lens_rows import Rows
from probes.lens_start import Start, spread_of
from probes.lens_training import Options, Training
from probes.lenses import tune_lens


def training_on(
    model: Model, windows: torch.Tensor, layers: list[int], vocabulary: int, steps: int
) -> Training:
    """Training from the identity: what a step costs does not depend on where it starts."""
    inputs = Inputs.of(model, "layers", layers)
    x, final = inputs.read(windows[:2], slice(1, None))
    d, n = model.spec.d_model, len(layers)
    sample = torch.stack([x[place] for place in range(n)])
    maps = {"A": torch.eye(d).repeat(n, 1, 1, 1), "b": torch.zeros(n, 1, d)}
    d_vocab = model.spec.d_vocab or 0
    frequency = torch.full((d_vocab,), 1 / d_vocab)
    start = Start(maps, sample.mean(-2), spread_of(sample), spread_of(final), frequency)
    options = Options(
        kind="layers", rank=None, steps=steps, batch_size=256, vocabulary=vocabulary,
        optimiser="adam", lr=1e-4, weight_decay=0.0, clip=1.0, checks=1, patience=9, seed=0,
    )  # fmt: skip
    choose = {"text": Rows.of(inputs, windows[:1], 1)}
    parts = Parts(windows, {"text": windows[:1]}, {"text": windows[:1]})
    return Training(inputs, options, start, parts, choose, train=range(n), key={})


def cost(model: Model, repeats: int, shared: int) -> None:
    """Ratios of one forward's worth of steps."""
    ids = torch.tensor(model.tokenizer(prose())["input_ids"])[: 8 * 127].reshape(8, 127)
    windows = torch.cat([ids[:, :1], ids], 1)
    layers = list(range(model.n_layers))
    whole = training_on(model, windows, layers, 2048, steps=10**6)
    exact = training_on(model, windows, layers, 0, steps=10**6)
    batches = whole._batches()
    x, final = next(batches)
    per_forward = windows.shape[0] * (windows.shape[1] - 1) // len(final)
    found = medians(
        {
            "forward": lambda: model.run(
                windows, logits=False, capture=[f"resid_post.{model.n_layers - 1}"]
            ),
            "forward with logits": lambda: model.run(windows),
            "step": lambda: whole.step(x, final),
            "step, whole vocabulary": lambda: exact.step(x, final),
        },
        repeats,
    )
    steps = per_forward * found["step"]
    print(f"{model.id}, {torch.get_num_threads()} threads, {windows.numel()} tokens a forward")
    for name, value in found.items():
        print(f"{name:24} {value:.2f} s")
    print(f"training {(found['forward'] + steps) / found['forward']:.2f} x a plain forward")
    print(
        f"training {(found['forward'] + steps) / found['forward with logits']:.2f} x a forward "
        "with logits, over the same tokens"
    )
    print(f"whole vocabulary {found['step, whole vocabulary'] / found['step']:.2f} x a step")

    some = layers[:: max(1, len(layers) // shared)][:shared]
    together = training_on(model, windows, some, 2048, steps=10**6)
    alone = [training_on(model, windows, [layer], 2048, steps=10**6) for layer in some]

    def run(training: Training) -> None:
        done = training.done
        for batch in training._batches():
            training.step(*batch)
            if training.done - done == per_forward:
                return

    sharing = medians(
        {"together": lambda: run(together), "alone": lambda: [run(one) for one in alone]}, repeats
    )
    print(
        f"{len(some)} layers one at a time {sharing['alone'] / sharing['together']:.2f} x the same "
        "layers on shared forwards"
    )


def quality(model: Model, folder: Path, steps: int) -> None:
    """KL by layer, from training that goes on where it was stopped."""
    report = tune_lens(
        model, steps=steps, checkpoint=folder, resume=True, out=folder, keep=False, progress=True
    )
    table = report.table.groupby(["layer", "lens"])[["kl", "bits", "agreement"]].mean().unstack()
    print(table.round(3).to_string())
    for note in report.meta["notes"]:
        print(note)
    report.save(folder / "report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shared", type=int, default=6, help="layers trained one at a time")
    parser.add_argument("--quality", type=Path, help="folder of a full training")
    parser.add_argument("--steps", type=int, default=96)
    options = parser.parse_args()
    model = interp.load(options.model)
    if options.quality is None:
        cost(model, options.repeats, options.shared)
    else:
        quality(model, options.quality, options.steps)


if __name__ == "__main__":
    main()
