"""How well an SAE reconstructs held-out articles at a fixed budget, and what the model loses by it.

z of layer 12 of the default model on the slice of English Wikipedia that the package gensim carries
(CC BY-SA 3.0): 262,144 activations for training, each seen at most four times, others of held-out
articles. Wanted: FVU at most 0.291 with d_sae 4,608 and k = 32, at most 2 % of the latents dead.
PCA with 32 and 128 components is fitted on the same rows.

    pip install --no-deps gensim==4.4.0
    python benchmarks/sae_quality.py --out FOLDER

An interrupted run goes on where it was: collecting by shard, training by checkpoint.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import interp
from interp.data.activations import Activations, collect_activations
from interp.data.texts import wikipedia_articles
from interp.run.store import Rows
from probes.saes.evaluate import evaluate_sae, reconstruction
from probes.saes.interop import save_sae
from probes.saes.train import train_sae


def pca_fvu(data: Activations, components: tuple[int, ...]) -> dict[int, float]:
    """FVU on held-out rows of projections on the first components of the training rows."""
    x = data.train.rows(torch.arange(data.train.n_rows))
    mean = x.mean(0)
    x -= mean
    _, vectors = torch.linalg.eigh((x.T @ x).double())
    test, mean = data.held_out.rows(torch.arange(data.held_out.n_rows)).double(), mean.double()
    total = (test - test.mean(0)).square().sum()
    found = {}
    for n in components:
        top = vectors[:, -n:]
        made = (test - mean) @ top @ top.T + mean
        found[n] = float((test - made).square().sum() / total)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheel", help="the gensim wheel, where gensim is not installed")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--site", default="z.12")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--activation", default="topk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--only", choices=("collect", "train", "all"), default="all")
    options = parser.parse_args()
    started = time.perf_counter()
    folder = options.out / "activations"
    if options.only == "train":
        data, model = Activations.open(folder), None
    else:
        model = interp.load(options.model)
        data = collect_activations(
            model,
            wikipedia_articles(options.wheel),
            folder,
            site=options.site,
            tokens=options.tokens,
            shard_mb=32,
        )
    print(
        f"{data.train.n_rows:,} + {data.held_out.n_rows:,} activations in "
        f"{time.perf_counter() - started:.0f} s"
    )
    if options.only == "collect":
        return
    started = time.perf_counter()
    sae, report = train_sae(
        data,
        d_sae=options.d_sae,
        k=options.k,
        activation=options.activation,
        seed=options.seed,
        checkpoint=options.out / "training",
        resume=True,
    )
    seconds = time.perf_counter() - started
    save_sae(sae, options.out / "sae")
    on_training = share_dead(sae, data.train)
    found = report.table.iloc[0]
    print(
        f"{options.activation}, d_sae {options.d_sae}, k {options.k}: FVU {found['fvu']:.4f}, "
        f"L0 {found['l0']:.1f}, cosine {found['cosine']:.3f}; never active in "
        f"{data.held_out.n_rows:,} held-out rows {found['dead']:.1%}, in {data.train.n_rows:,} "
        f"training rows {on_training:.1%}; {seconds:.0f} s, {report.meta['rows_per_s']:,.0f} rows/s"
    )
    for n, fvu in pca_fvu(data, (32, 128)).items():
        print(f"PCA {n}: FVU {fvu:.4f}")
    if model is not None:
        judged = evaluate_sae(model, sae, data, windows=options.windows, seed=options.seed)
        judged.save(options.out / "evaluation")
        print(judged.table.to_string(index=False))
        print(judged.tables["loss"].to_string(index=False))
        by = ["representation", "latents"]
        print(judged.tables["probing"].pivot_table("auc", by).reset_index().to_string(index=False))


def share_dead(sae, rows: Rows) -> float:
    """Latents active in none of these rows, as a share."""
    return reconstruction(sae, rows)[0]["dead"]


if __name__ == "__main__":
    main()
