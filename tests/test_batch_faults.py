"""Batches under faults: killed workers and drivers, full disks, memory that runs out, two drivers at once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest

from interp.batch import run_plan
from interp.batch.lock import OWNER, locked
from interp.batch.results import state_of
from interp.errors import BadInput, SaveFailed
from tests.batch_models import registered, save_series

ROOT = Path(__file__).parent.parent
N = 3


@pytest.fixture(scope="module", autouse=True)
def _probe():
    with registered():
        yield


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    return save_series(tmp_path_factory.mktemp("models") / "tiny", N)


@pytest.fixture
def plan(series, tmp_path) -> Callable[..., dict]:
    def plan(kind: str = "none", on: str = "1", **changed) -> dict:
        """`trouble` on every step of the series; of `kind` on step `on`."""
        options = {"marks": str(tmp_path / "began-"), "kind": kind, "on": on}
        return {
            "models": [{"name": str(series), "revisions": ["step-*"]}],
            "analyses": [{"name": "trouble", "options": options}],
            "out": str(tmp_path / "out"),
            "pages": False,
            **changed,
        }

    return plan


def begun(folder: Path) -> dict[str, list[int]]:
    """The processes that began the unit of each step, in turn."""
    found: dict[str, list[int]] = {}
    for mark in sorted(folder.glob("began-step-*")):
        step = mark.stem.removeprefix("began-")
        found.setdefault(step, []).append(int(mark.read_text() or 0))
    return found


def assert_whole(plan: dict, n: int = N) -> None:
    """All units are there, sound, and none twice; nothing else was left."""
    out = Path(plan["out"])
    results = [path.parent for path in out.rglob("manifest.json")]
    assert len(results) == n and all(state_of(path) == "finished" for path in results)
    assert not list(out.glob(".incoming-*")) and not (out / OWNER).exists()


def started(plan: dict, folder: Path) -> subprocess.Popen:
    """A driver of its own, at work on the plan from a shell."""
    (folder / "plan.json").write_text(json.dumps(plan))
    code = (
        "import json, sys, logging, tests.batch_probe\n"
        "from interp.batch import run_plan\n"
        "if __name__ == '__main__':\n"
        "    try: run_plan(json.load(open(sys.argv[1])), progress=False)\n"
        "    except KeyboardInterrupt: sys.exit(130)\n"
    )
    (folder / "driver.py").write_text(code)
    return subprocess.Popen(
        [sys.executable, str(folder / "driver.py"), str(folder / "plan.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def test_a_unit_whose_worker_is_killed_runs_again_on_another(plan, tmp_path):
    asked = plan("kill")
    index = run_plan(asked, engine="processes", workers=2, progress=False)
    assert index["status"].tolist() == ["finished"] * N
    assert index["attempts"].tolist() == [1, 2, 1]
    first, second = begun(tmp_path)["step-1"]
    assert first != second and index["worker"][1].endswith(f":{second}")
    assert_whole(asked)


def test_tables_of_processes_are_those_of_a_serial_run(series, tmp_path):
    """Bit for bit."""
    plan = {"models": [str(series / "step-*")], "analyses": ["z_norms"], "pages": False}
    index = run_plan(plan, out=tmp_path / "processes", engine="processes", workers=2)
    assert run_plan(plan, out=tmp_path / "serial")["folder"].tolist() == index["folder"].tolist()
    assert f":{os.getpid()}" not in "".join(index["worker"])
    for folder in index["folder"]:
        for name in ("z_norms.parquet", "logits.parquet", "arrays.safetensors"):
            one, other = (tmp_path / engine / folder / name for engine in ("processes", "serial"))
            assert one.read_bytes() == other.read_bytes()


def test_a_unit_that_kills_every_worker_is_given_up_and_the_rest_is_done(plan, tmp_path):
    asked = plan("kill always", retries=1)
    index = run_plan(asked, engine="processes", workers=1, progress=False)
    assert index["status"].tolist() == ["finished", "failed", "finished"]
    assert index["attempts"][1] == 2 == len(set(begun(tmp_path)["step-1"]))
    assert "its worker died 2 times" in index["error"][1]
    assert_whole(asked, N - 1)


def test_a_killed_driver_leaves_what_it_finished_and_takes_its_workers_along(
    plan, tmp_path, caplog
):
    asked = plan("wait", "2", engine="processes", workers=1)
    driver = started(asked, tmp_path)
    until(lambda: "step-2" in begun(tmp_path) or driver.poll() is not None)
    until(lambda: len(list((tmp_path / "out").rglob("manifest.json"))) == 2)
    worker = psutil.Process(begun(tmp_path)["step-2"][0])
    driver.kill()
    driver.communicate()
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    assert json.loads((tmp_path / "out" / OWNER).read_text())["pid"] == driver.pid
    (tmp_path / "out" / ".incoming-half").mkdir()  # what a driver that was killed in writing leaves
    (tmp_path / "began-go").touch()
    caplog.set_level("INFO", logger="interp")
    index = run_plan(asked, engine="serial")
    assert index["status"].tolist() == ["kept", "kept", "finished"]
    assert f"process {driver.pid} on" in caplog.text
    assert {name: len(times) for name, times in begun(tmp_path).items()} == {
        "step-0": 1, "step-1": 1, "step-2": 2,
    }  # fmt: skip
    assert_whole(asked)


def test_ctrl_c_keeps_what_is_finished(plan, tmp_path):
    asked = plan("wait", "2", engine="processes", workers=1)
    driver = started(asked, tmp_path)
    until(lambda: "step-2" in begun(tmp_path) or driver.poll() is not None)
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=120)
    assert driver.returncode == 130, err
    worker = begun(tmp_path)["step-2"][0]
    assert not psutil.pid_exists(worker)
    index = pd.read_parquet(tmp_path / "out" / "index.parquet")
    assert index["status"].tolist() == ["finished", "finished", "waiting"]
    assert_whole(asked, 2)


def test_a_second_driver_is_told_who_holds_the_folder(plan, tmp_path):
    asked = plan("wait", "0", engine="serial")
    driver = started(asked, tmp_path)
    until(lambda: "step-0" in begun(tmp_path) or driver.poll() is not None)
    with pytest.raises(BadInput, match=rf"in use by process {driver.pid} on .* since 20"):
        run_plan(asked)
    (tmp_path / "began-go").touch()
    assert driver.wait(timeout=120) == 0
    assert {len(times) for times in begun(tmp_path).values()} == {1}
    assert_whole(asked)


def test_a_lock_ends_with_its_block_and_tells_what_was_left(tmp_path):
    with locked(tmp_path) as left:
        assert left is None
        with pytest.raises(BadInput, match=f"process {os.getpid()} "), locked(tmp_path):
            pass
    (tmp_path / OWNER).write_text('{"pid": 1, "host": "elsewhere", "since": "2020"}')
    with locked(tmp_path) as left:
        assert left is not None and left["host"] == "elsewhere"
    assert not (tmp_path / OWNER).exists()


def test_a_full_disk_is_told_and_what_is_finished_is_kept(plan, tmp_path, monkeypatch):
    asked = plan()
    fsync, n = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal n
        inside = ".incoming-" in os.readlink(f"/proc/self/fd/{handle}")
        n += inside
        if inside and n > 6:  # in the second unit: a report without arrays is four files
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveFailed, match="No space left on device: 1 of 3 units are finished"):
        run_plan(asked)
    assert_whole(asked, 1)
    monkeypatch.setattr(os, "fsync", fsync)
    assert run_plan(asked)["status"].tolist() == ["kept", "finished", "finished"]
    assert [len(times) for times in begun(tmp_path).values()] == [1, 2, 1]
    assert_whole(asked)


@pytest.mark.parametrize(("kind", "words"), [("raise", "a bad day"), ("memory", "memory")])
def test_a_unit_that_fails_is_told_and_the_rest_is_done(plan, tmp_path, kind, words):
    asked = plan(kind)
    index = run_plan(asked)
    assert index["status"].tolist() == ["finished", "failed", "finished"]
    assert words in index["error"][1]
    assert "Traceback" in (tmp_path / "out" / index["folder"][1]).read_text()
    assert_whole(asked, N - 1)
    mended = run_plan({**asked, "analyses": plan()["analyses"]})
    assert mended["status"].tolist() == ["finished"] * N, "other options are other units"
