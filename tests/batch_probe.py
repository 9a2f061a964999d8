"""Two small analyses that the tests of batches run: one that measures, and one that gets into trouble.

Workers import this module by its name. The tests take the two out of the registry again.
"""

from __future__ import annotations

import glob
import os
import signal
import time
from pathlib import Path

import pandas as pd

from interp.errors import BadInput
from interp.registry import analysis
from interp.report import Report, provenance

NAMES = ("z_norms", "trouble")


def check_z_norms(*, scale: float = 1.0) -> None:
    if scale <= 0:
        raise BadInput(f"scale={scale}; wanted above 0")


@analysis(
    name="z_norms", source="", example="interp z-norms MODEL", figure="", validate=check_z_norms
)
def z_norms(
    model, ids: list[int] | None = None, *, scale: float = 1.0, out: Path | None = None
) -> Report:
    """Norm of every head's output on one fixed prompt."""
    import torch

    prompt = torch.tensor([ids or [1, 5, 9, 5, 9, 2, 7]])
    run = model.run(prompt, capture=["z"])
    z = run.cache["z"]
    rows = [
        {"layer": layer, "head": head, "norm": scale * z[0, :, layer, head].norm().item()}
        for layer in range(z.shape[2])
        for head in range(z.shape[3])
    ]
    if out is not None:
        (out / "beside").mkdir()
        (out / "beside" / "ids.txt").write_text(str(prompt.tolist()))
    logits = pd.DataFrame(run.logits[0, -1:].float().numpy())
    logits.columns = [str(name) for name in logits]
    return Report(
        "z_norms",
        {"z_norms": pd.DataFrame(rows), "logits": logits},
        {"z": z.numpy()},
        provenance(model, options={"scale": scale}, seed=0),
    )


@analysis(
    name="trouble", source="", example="interp trouble MODEL", figure="", validate=lambda: None
)
def trouble(model, *, marks: str, kind: str = "none", on: str = "") -> Report:
    """A report, or what `kind` says: on models whose name ends in `on`, in the first attempt or always.

    Every beginning leaves a file `<marks><model>.<attempt>`, with the process in it.
    """
    import torch

    name = Path(model.id).name
    attempt = len(glob.glob(f"{marks}{name}.*"))
    Path(f"{marks}{name}.{attempt}").write_text(str(os.getpid()))
    if name.endswith(on):
        if kind == "raise":
            raise ValueError("a bad day\nwith details")
        if kind == "memory":
            torch.empty(1 << 60)
        if (kind == "kill" and attempt == 0) or kind == "kill always":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "wait":
            deadline = time.monotonic() + 120
            while not Path(f"{marks}go").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
    table = pd.DataFrame({"parameters": [sum(p.numel() for p in model.module.parameters())]})
    return Report("trouble", {"trouble": table}, {}, provenance(model, options={}, seed=0))
