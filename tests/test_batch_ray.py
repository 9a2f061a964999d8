"""The Ray engine on one machine with two workers: the serial tables, its own faults, no open port."""

from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from interp.batch import run_plan
from interp.batch.executors import engine
from interp.batch.results import state_of
from tests.batch_models import registered, save_series

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster():
    if find_spec("ray") is None:  # Ray reads where to listen when it is imported: not here
        pytest.skip("needs ray: pip install 'interp-suite[ray]'")
    with registered(), engine("ray", workers=2, resources={}):
        yield


@pytest.fixture
def plan(tmp_path) -> dict:
    series = save_series(tmp_path / "tiny", 3)
    options = {"marks": str(tmp_path / "began-"), "kind": "kill", "on": "1"}
    return {
        "models": [{"name": str(series), "revisions": ["step-*"]}],
        "analyses": ["z_norms", {"name": "trouble", "options": options}],
        "pages": False,
    }


def files(out: Path, folder: str) -> dict[str, bytes]:
    """The tables and arrays of a unit."""
    kinds = (".parquet", ".csv", ".safetensors")
    return {p.name: p.read_bytes() for p in (out / folder).iterdir() if p.suffix in kinds}


def test_servers_listen_on_loopback_only():
    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for child in psutil.Process().children(recursive=True)
        for connection in child.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and set(listening) <= {"127.0.0.1", "::1"}


def test_tables_are_those_of_a_serial_run_though_a_worker_is_killed(plan, tmp_path):
    """Bit for bit; the killed worker's unit runs again, and no unit twice."""
    out = tmp_path / "ray"
    index = run_plan(plan, out=out, engine="ray", workers=2)
    assert index["status"].tolist() == ["finished"] * 6
    assert index["attempts"].tolist() == [1, 1, 1, 2, 1, 1]
    assert len(list(tmp_path.glob("began-step-1.*"))) == 2
    assert len(list(out.rglob("manifest.json"))) == 6
    assert all(state_of(out / folder) == "finished" for folder in index["folder"])
    serial = tmp_path / "serial"  # the unit that kills was begun before: now it only measures
    assert run_plan(plan, out=serial)["folder"].tolist() == index["folder"].tolist()
    for folder in index["folder"]:
        found = files(out, folder)
        assert found == files(serial, folder) and len(found) >= 2
