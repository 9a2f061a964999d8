"""A plan, run: what is finished is kept, what is missing is done, and every unit's end is written down."""

from __future__ import annotations

import datetime
import json
import logging
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.batch.executors import engine, outcomes
from interp.batch.lock import locked
from interp.batch.models import TOKENS, Hashes, Source, described_source
from interp.batch.plan import Plan, read_plan
from interp.batch.results import clear_incoming, state_of, write_result
from interp.batch.unit import Unit, units_of
from interp.batch.worker import Outcome
from interp.errors import BadInput, SaveFailed
from interp.run.files import check_writable, write_atomically
from interp.run.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

PLAN, INDEX, PAGE, FAILURES = "plan.json", "index.parquet", "plan.html", "failures"
UNIT_DISK = {True: 6_000_000, False: 1_000_000}
"""Bytes that a report may take, with its page (most of it is the script that draws) and without."""
_log = logging.getLogger("interp")


@dataclass(frozen=True)
class Layout:
    """A plan that was checked whole: its units, and what they may need.

    Attributes:
        memory: bytes that the largest unit may need times the units that run at a time. available:
            bytes of memory that are free now. disk, free: bytes that the results may take, and that
            the disk has.
    """

    plan: Plan
    units: tuple[Unit, ...]
    memory: int
    available: int
    disk: int
    free: int
    hashes: Hashes

    def table(self) -> pd.DataFrame:
        """One row a unit: what it is, the memory it may need, and whether its result is there."""
        import pandas as pd

        rows = [{**_named(unit), **_cost(unit), "state": self._state(unit)} for unit in self.units]
        return pd.DataFrame(rows)

    def needs(self) -> str:
        """What the plan may need, in words."""
        plan = self.plan
        fits = "" if self.memory <= self.available else "; give fewer workers, or a smaller dtype"
        return (
            f"units: {len(self.units)}, {plan.workers} at a time ({plan.engine}), threads of "
            f"each: {plan.threads}\nmemory, estimated from weights and one pass over {TOKENS} tokens: "
            f"{self.memory / 1e9:.2f} GB of {self.available / 1e9:.1f} GB available{fits}\n"
            f"disk, at most about {self.disk / 1e9:.2f} GB of {self.free / 1e9:.1f} GB free in {plan.out}"
        )

    def _state(self, unit: Unit) -> str:
        return state_of(self.plan.out / unit.folder)


def lay_out(plan: str | Path | Mapping[str, Any], **overrides: Any) -> Layout:
    """The units of a plan, after everything that can be checked without loading a weight was.

    Args:
        plan: a TOML file, or a mapping of the same shape. overrides: keys of the plan given anew.

    Raises:
        BadInput: see `read_plan`; a model or revision that is not there, or is damaged; one that does
            not fit into this machine's memory; a disk without room for the results.
    """
    import psutil

    read = read_plan(plan, **overrides)
    hashes = Hashes(read.out)
    sources = [described_source(source, hashes) for source in read.sources]
    units = tuple(units_of(read, sources))
    memory = psutil.virtual_memory()
    if read.engine != "ray":  # whose machines are others
        _check_memory(sources, memory.total)
    missing = sum(not (read.out / unit.folder).exists() for unit in units)
    disk = missing * UNIT_DISK[read.pages]
    free = shutil.disk_usage(_existing(read.out)).free
    if disk > free:
        raise BadInput(
            f"{missing} reports may take {disk / 1e9:.1f} GB and {_existing(read.out)} has "
            f"{free / 1e9:.1f} GB free; free some, give another folder with --out, or set pages = false"
        )
    largest = max((source.n_bytes or 0 for source in sources), default=0)
    return Layout(read, units, largest * read.workers, memory.available, disk, free, hashes)


def run_plan(
    plan: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    engine: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    address: str | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """What became of every unit of a plan; results are in the plan's folder.

    Units whose results are there, and sound, are not run again: after a crash, Ctrl-C or a full disk
    the same call goes on. A unit that raises is reported and does not stop the others. Tables are the
    same bit for bit from every engine and number of workers, as each worker has `threads` threads.

    A script that uses "processes" has its call under `if __name__ == "__main__":`, as its workers
    import it.

    Workers on several machines load their models themselves: a folder has to be at the same place on
    each. Results come back to this process, which alone writes them.

    Args:
        plan: a TOML file (see `interp.batch.plan`), or a mapping of the same shape.
        out, engine, workers, threads: instead of the plan's own.
        address: of a Ray cluster; without it Ray runs on this machine, bound to loopback.
        progress: whether to draw a bar; by default in a terminal.

    Returns:
        One row a unit: model, revision, analysis, data, options, unit, status ("finished", "kept"
        or "failed"), seconds, attempts, worker, error and folder.

    Raises:
        BadInput: the plan cannot be run, or another process is at work in its folder.
        SaveFailed: the disk is full; what was finished is kept.
    """
    given = {"engine": engine, "workers": workers, "threads": threads}
    laid = lay_out(plan, out=None if out is None else str(out), **given)
    return run_layout(laid, address=address, progress=progress)


def run_layout(
    laid: Layout, *, address: str | None = None, progress: bool | None = None
) -> pd.DataFrame:
    """`run_plan` of a plan that was laid out."""
    plan, out = laid.plan, laid.plan.out
    check_writable(out)
    with locked(out) as left:
        if left is not None:
            _log.info(
                "%s: process %s on %s, there since %s, ended without finishing; going on from what it left",
                out, left.get("pid"), left.get("host"), left.get("since"),
            )  # fmt: skip
        clear_incoming(out)
        laid.hashes.save()
        rows = {unit.id: _kept(out, unit) for unit in laid.units}
        missing = [unit for unit in laid.units if rows[unit.id] is None]
        _write_plan(laid)
        try:
            with Progress(progress) as bars:
                advance = bars.stage("Units", len(laid.units))
                advance(len(laid.units) - len(missing))
                with closing(_run(plan, missing, address)) as ends:
                    for outcome in ends:
                        rows[outcome.unit.id] = _record(out, outcome)
                        advance(1)
        except SaveFailed as error:
            n = sum(row is not None and row["status"] != "failed" for row in rows.values())
            raise SaveFailed(
                f"{error}: {n} of {len(laid.units)} units are finished and kept; free some space, "
                "and the same command goes on from them"
            ) from error
        except KeyboardInterrupt:
            _write_index(laid, rows)
            raise
        return _write_index(laid, rows)


def _run(plan: Plan, units: Sequence[Unit], address: str | None) -> Generator[Outcome, None, None]:
    if not units:
        return
    workers = 1 if plan.engine == "serial" else min(plan.workers, len(units))
    with engine(plan.engine, workers=workers, resources=plan.resources, address=address) as start:
        yield from outcomes(units, start, workers=workers, retries=plan.retries)


def _kept(out: Path, unit: Unit) -> dict[str, Any] | None:
    """The row of a unit whose result is there, or None; a damaged result is told."""
    folder = out / unit.folder
    state = state_of(folder)
    if state == "damaged":
        _log.warning("the result of %s is damaged, it is made again: %s", unit.shown, folder)
    if state != "finished":
        return None
    record = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del record["files"]
    return {**record, **_named(unit), "status": "kept"}


def _record(out: Path, outcome: Outcome) -> dict[str, Any]:
    """Write what a unit gave, its report or its error, and return its row."""
    unit = outcome.unit
    failure = out / FAILURES / f"{unit.id}.txt"
    row = {
        **_named(unit),
        "status": "finished" if outcome.error is None else "failed",
        "seconds": round(outcome.seconds, 3),
        "attempts": outcome.attempts,
        "worker": outcome.worker,
        "error": outcome.error,
        "folder": str(unit.folder),
    }
    if outcome.error is None:
        write_result(out, unit.folder, outcome.files, row)
        failure.unlink(missing_ok=True)
    else:
        row["folder"] = str(failure.relative_to(out))
        write_atomically(failure, f"{unit.shown}\n{outcome.trace}\n{outcome.error}\n".encode())
        _log.warning("failed: %s: %s", unit.shown, outcome.error)
    return row


def _write_plan(laid: Layout) -> None:
    text = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "plan": laid.plan.text,
        "engine": laid.plan.engine,
        "workers": laid.plan.workers,
        "threads": laid.plan.threads,
        "units": [{**_named(unit), "folder": str(unit.folder)} for unit in laid.units],
    }
    content = json.dumps(text, indent=1, default=str).encode()
    write_atomically(laid.plan.out / PLAN, content)


def _write_index(laid: Layout, rows: Mapping[str, dict[str, Any] | None]) -> pd.DataFrame:
    """The table of all units, beside the results, and the page that links to every report."""
    import io

    import pandas as pd

    from interp.figures.plan_page import plan_page

    waiting = {"status": "waiting", "seconds": 0.0, "attempts": 0, "worker": "", "error": None}
    full = [rows[unit.id] or {**_named(unit), **waiting, "folder": ""} for unit in laid.units]
    index = pd.DataFrame(full)
    index["error"] = index["error"].astype("str").where(index["error"].notna(), "")
    buffer = io.BytesIO()
    index.to_parquet(buffer, index=False)
    write_atomically(laid.plan.out / INDEX, buffer.getvalue())
    page = plan_page(index, json.loads((laid.plan.out / PLAN).read_text(encoding="utf-8")))
    write_atomically(laid.plan.out / PAGE, page.encode("utf-8", "replace"))
    return index


def _named(unit: Unit) -> dict[str, Any]:
    return {
        "model": unit.source.name,
        "revision": unit.revision,
        "analysis": unit.analysis,
        "data": unit.data,
        "options": unit.options,
        "unit": unit.id,
    }


def _cost(unit: Unit) -> dict[str, Any]:
    n = unit.source.n_bytes
    return {"memory": "unknown" if n is None else f"{n / 1e9:.2f} GB"}


def _check_memory(sources: Sequence[Source], total: int) -> None:
    for source in sources:
        here = str(source.loading.get("device", "cpu")).startswith("cpu")
        if here and source.n_bytes is not None and source.n_bytes > total:
            raise BadInput(
                f"'{source.shown}' may need {source.n_bytes / 1e9:.1f} GB and this machine has "
                f'{total / 1e9:.1f} GB; give dtype = "bfloat16", or a device that has it'
            )


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
