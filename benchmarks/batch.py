"""Speed-up of a plan by worker processes and by Ray over the serial run, on this machine; tables compared.

Random Llamas (4 layers, d_model 256), every head's roles of each. A worker has one thread in every run, so
the tables are the same bit for bit.

Run: python benchmarks/batch.py [--models 24] [--workers 2] [--engines processes,ray]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from interp.batch import run_plan, tables

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}


def save_models(folder: Path, n: int) -> None:
    """`folder` with step-0 … step-(n-1)."""
    for step in range(n):
        torch.manual_seed(step)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder / f"step-{step}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engines", default="processes,ray")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_models(root / "models", asked.models)
        plan = {
            "models": [f"{root}/models/step-*"],
            "analyses": [{"name": "heads", "options": {"prompts": 32, "ablate": False}}],
            "pages": False,
        }
        run_plan({**plan, "models": [f"{root}/models/step-0"]}, out=root / "warm")  # imports
        whole, busy = {}, {}
        for engine in ["serial", *asked.engines.split(",")]:
            started = time.perf_counter()
            workers = 1 if engine == "serial" else asked.workers
            index = run_plan(plan, out=root / engine, engine=engine, workers=workers)
            whole[engine] = time.perf_counter() - started
            busy[engine] = float(index["seconds"].sum()) / workers
            assert (index["status"] == "finished").all(), index["error"].tolist()
        serial = tables(root / "serial", "heads")
        print(f"{asked.models} units, {asked.workers} workers, one thread each")
        print(f"serial     {whole['serial']:6.1f} s")
        for engine in whole:
            if engine == "serial":
                continue
            same = serial.equals(tables(root / engine, "heads"))
            print(
                f"{engine:10} {whole[engine]:6.1f} s, {whole['serial'] / whole[engine]:.2f} × as fast, "
                f"{whole[engine] - busy[engine]:.1f} s of it start and waiting; tables "
                + ("the same bit for bit" if same else "DIFFER")
            )


if __name__ == "__main__":
    main()
