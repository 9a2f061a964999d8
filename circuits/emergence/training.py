"""Training of a small attention-only Llama that leaves a series of checkpoints with an abrupt induction head.

The model is an ordinary LlamaForCausalLM whose MLPs are one neuron wide, zero and frozen, so every tool
that loads Llama checkpoints loads these. On the language of `circuits.emergence.language` two layers
form previous-token and induction heads within a few hundred steps; one layer cannot.

    python -m circuits.emergence.training --out series
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from circuits.emergence.clamping import Clamp, Clamps
from circuits.emergence.language import (
    BOS,
    D_VOCAB,
    MARKOV,
    SHORTEST,
    as_text,
    markov_chain,
    sample_rows,
    tokenizer,
)
from interp.errors import BadInput, InterpError, SaveFailed
from interp.metrics import loss
from interp.models.model import Model
from interp.run.edits import Edit
from interp.run.files import check_writable, write_atomically
from interp.run.progress import Progress

TRAINING = "training.json"
"""In a series' folder: how it was trained."""
HELD_OUT = "held_out.txt"
"""In a series' folder: rows of the same language that training did not see, one a line."""
HELD_OUT_ROWS = 64
WARMUP = 30
STREAMS = {"chain": 0, "train": 1, "held_out": 2}
"""Random streams of one seed, so that a longer training or another model reads the same rows."""


def saved_steps(steps: int, per_octave: int = 4) -> list[int]:
    """Steps at which a checkpoint is kept: 0, then `per_octave` for every doubling, and the last.

    >>> saved_steps(16, 2)
    [0, 1, 2, 3, 4, 6, 8, 11, 16]
    """
    powers = np.arange(0, per_octave * np.log2(max(steps, 1)) + 1e-9)
    found = {round(2.0 ** (p / per_octave)) for p in powers}
    return sorted({0, steps} | {step for step in found if step <= steps})


def attention_only_llama(
    *, layers: int = 2, heads: int = 2, d_model: int = 64, n_ctx: int = 48, seed: int = 0
) -> LlamaForCausalLM:
    """A random Llama with inert MLPs: their weights are zero and take no gradient."""
    config = LlamaConfig(
        hidden_size=d_model,
        intermediate_size=1,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=D_VOCAB,
        max_position_embeddings=n_ctx,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=None,
        architectures=["LlamaForCausalLM"],
        # Distances are short: with the usual 10,000 most rotary pairs would hardly turn.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = LlamaForCausalLM(config)
    for name, parameter in module.named_parameters():
        if ".mlp." in name:
            parameter.requires_grad_(False).zero_()
    return module


def train_series(
    out: str | Path,
    *,
    layers: int = 2,
    heads: int = 2,
    d_model: int = 64,
    n_ctx: int = 48,
    steps: int = 1000,
    batch_size: int = 32,
    lr: float = 5e-3,
    markov: float = MARKOV,
    seed: int = 0,
    clamps: Sequence[str | Clamp] = (),
    save_at: Sequence[int] | None = None,
    progress: bool | None = None,
) -> Path:
    """A folder of checkpoints `step-<n>`, in which an induction head appears abruptly (two layers or more).

    Every checkpoint is an ordinary Hugging Face folder. Beside them are `training.json`, all options and
    the loss of every step (nats a token), and `held_out.txt`, rows of the same language that were not
    trained on. On one machine with one number of threads, equal options give equal weights, bit for bit;
    runs that differ in clamps alone begin with the same weights and read the same rows.

    Args:
        out: a new or empty folder.
        layers, heads, d_model, n_ctx: of the model.
        steps, batch_size, lr: of AdamW, with a warm-up of 30 steps.
        markov: share of rows that are Markov text; the more, the later induction appears.
        seed: of weights and rows.
        clamps: activations held while training, `SITE=TO` or `SITE=TO@STEP` (`circuits.emergence.clamping`).
        save_at: steps to keep; by default `saved_steps(steps)`.
        progress: show a progress bar; by default in a terminal or a notebook.

    Returns: the folder.

    Raises:
        BadInput: options that cannot be trained, a folder that holds something. SaveFailed: the
            folder cannot be written.
    """
    options: dict[str, Any] = {
        "layers": layers,
        "heads": heads,
        "d_model": d_model,
        "n_ctx": n_ctx,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "markov": markov,
        "seed": seed,
    }
    out = Path(out)
    _check(options, out)
    kept = saved_steps(steps) if save_at is None else sorted(set(save_at))
    if not kept or kept[0] < 0 or kept[-1] > steps:
        raise BadInput(f"save_at={save_at}: give steps between 0 and steps={steps}")
    held = Clamps(clamps)
    shape = {name: options[name] for name in ("layers", "heads", "d_model", "n_ctx", "seed")}
    model = Model(attention_only_llama(**shape), tokenizer(), id=str(out))
    rngs = {name: np.random.default_rng([seed, i]) for name, i in STREAMS.items()}
    chain = markov_chain(int(rngs["chain"].integers(2**31)))
    held_out = sample_rows(rngs["held_out"], HELD_OUT_ROWS, n_ctx, chain, markov=markov)
    last = max((clamp.since for clamp in held.clamps), default=0)
    model.run(
        held_out[:1], edits=held.edits(held_out[:1], last)
    )  # a head that is not there is told now
    check_writable(out)
    write_atomically(out / HELD_OUT, as_text(held_out).encode())
    with Progress(progress) as bars:
        advance = bars.stage("Training", steps)
        optimizer = _optimizer(model, lr)
        losses: list[float] = []
        for step in range(steps + 1):
            if step in kept:
                _save(model, out / f"step-{step}")
            if step == steps:
                break
            ids = sample_rows(rngs["train"], batch_size, n_ctx, chain, markov=markov)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / WARMUP)
            losses.append(_update(model, optimizer, ids, held.edits(ids, step)))
            advance(1)
    options["clamps"] = [str(clamp) for clamp in held.clamps]
    text = json.dumps({"options": options, "saved": kept, "loss": losses})
    write_atomically(out / TRAINING, text.encode())
    return out


def _check(options: dict[str, Any], out: Path) -> None:
    """Raise BadInput for what cannot be trained."""
    for name in ("layers", "heads", "steps", "batch_size"):
        if options[name] < 1:
            raise BadInput(f"{name}={options[name]}: give at least 1")
    if options["d_model"] % (2 * options["heads"]):
        raise BadInput(
            f"d_model={options['d_model']} does not give {options['heads']} heads an even width each: give a "
            f"multiple of {2 * options['heads']}"
        )
    if options["n_ctx"] < 4 * SHORTEST:
        raise BadInput(f"n_ctx={options['n_ctx']}: repeats need at least {4 * SHORTEST} tokens")
    if not 0 <= options["markov"] <= 1:
        raise BadInput(f"markov={options['markov']} is a share of rows: give 0 to 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} holds something already: give a new or empty folder")


def _optimizer(model: Model, lr: float) -> torch.optim.AdamW:
    trained = [p for p in model.module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)


def _update(
    model: Model, optimizer: torch.optim.Optimizer, ids: Int[Tensor, "n pos"], edits: list[Edit]
) -> float:
    """One step on these rows; the loss before it, in nats a token."""
    logits = model.run(ids, edits=edits, grad=True).logits
    assert logits is not None
    value = loss(logits[:, :-1], ids[:, 1:]).mean()
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return round(float(value.detach()), 5)


def _save(model: Model, folder: Path) -> None:
    """An ordinary Hugging Face folder, there whole or not at all."""
    config: Any = model.module.config
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        # Not module.save_pretrained: it shows a progress bar of its own for every checkpoint.
        config.save_pretrained(part)
        save_file(model.module.state_dict(), part / "model.safetensors", metadata={"format": "pt"})
        model.tokenizer.save_pretrained(part)
        part.chmod(0o755)
        os.rename(part, folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise SaveFailed(f"cannot write {folder}: {error.strerror}; free some space") from error


def main(
    out: Annotated[Path, typer.Option(help="New folder for the series.")],
    layers: Annotated[int, typer.Option(help="1 is the control: no induction head appears.")] = 2,
    heads: Annotated[int, typer.Option(help="Heads in each layer.")] = 2,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of weights and rows.")] = 0,
    clamp: Annotated[
        list[str] | None,
        typer.Option(help="SITE=TO[@STEP], such as pattern.0.0=previous_token; may be repeated."),
    ] = None,
) -> None:
    """Train a small attention-only Llama and keep a series of checkpoints."""
    # Threads of so small a model wait for each other; and the weights are then the same on any number of cores.
    torch.set_num_threads(1)
    try:
        train_series(out, layers=layers, heads=heads, steps=steps, seed=seed, clamps=clamp or ())
    except InterpError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    typer.echo(f"Next: interp emergence {out}")


if __name__ == "__main__":
    typer.run(main)
