"""Seconds of `import interp`, and of the model layer beyond torch and transformers' own import.

Each import is a fresh process; medians. Run: python benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
HEAVY = "import torch, transformers; from transformers import AutoModelForCausalLM, masking_utils"


def seconds(setup: str, statement: str, repeats: int = 5) -> float:
    """Median seconds of `statement` in a fresh process, after `setup`."""
    code = f"{setup}\n{TIMED.format(statement)}"
    runs = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(repeats)
    ]
    return statistics.median(runs)


def main() -> None:
    print(f"import interp                                  {seconds('', 'import interp'):.3f} s")
    nouns = "from interp import Model, Report, Edit, load"
    print(f"its nouns, beyond torch and transformers       {seconds(HEAVY, nouns):.3f} s")
    circuits = "import circuits"
    print(f"import circuits, beyond torch and transformers {seconds(HEAVY, circuits):.3f} s")


if __name__ == "__main__":
    main()
