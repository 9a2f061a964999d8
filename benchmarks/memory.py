"""Peak memory over the loaded model: pattern statistics of all detectors at long context.

Each measurement is a process of its own; `--eager` adds Hugging Face's output_attentions=True at the
same length (18 GB at 4,096 tokens of the default model). Run: python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

CODE = """
import sys, torch, interp
from benchmarks.memory import peak_mb
from circuits.heads.detector import choose
from circuits.heads.prompt_sets import REPEATED, TEXT
from circuits.heads.scan import one_pass
from interp.data.prompts import repeated_tokens, text_windows

model, what, length = interp.load(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with torch.no_grad():
    model.module(input_ids=torch.arange(16)[None] + 100, use_cache=False)
before = peak_mb()
ids = text_windows(model, 1, length=length - 1).ids
if what == "plain":
    model.run(ids, logits=False, capture=[f"resid_post.{model.n_layers - 1}"])
elif what == "eager":
    model.module.set_attn_implementation("eager")
    with torch.no_grad():
        model.module(input_ids=ids, use_cache=False, output_attentions=True, logits_to_keep=1)
else:
    repeated, _ = repeated_tokens(model, 1, length=length // 2)
    one_pass(model, [d for d in choose(None) if d.reads is REPEATED], repeated)
    one_pass(model, [d for d in choose(None) if d.reads is TEXT], text_windows(model, 1, length=length - 1))
print(peak_mb() - before)
"""


def peak_mb(field: str = "VmHWM") -> float:
    """Largest resident size of this program so far, in MB; with field="VmRSS" the present one.

    `ru_maxrss` would not do: it begins at the size of the process that started this one.
    """
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def extra_mb(model: str, what: str, length: int) -> float:
    """Peak MB over the loaded model of one piece of work, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, model, what, str(length)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    kinds = ["plain", "statistics"] + (["eager"] if options.eager else [])
    print(f"{options.model}: peak MB over the loaded model, one prompt")
    print("tokens  " + "  ".join(f"{kind:>12}" for kind in kinds))
    for length in options.lengths:
        row = [extra_mb(options.model, kind, length) for kind in kinds]
        print(f"{length:>6}  " + "  ".join(f"{value:>12.0f}" for value in row))


if __name__ == "__main__":
    main()
