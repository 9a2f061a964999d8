"""Units on workers: in this process, in processes of this machine, or in Ray actors on many.

`outcomes` is all that the rest of the package sees. A worker is one slot that runs a unit at a time and
keeps its model; what differs between engines is how one is started, what its death looks like, and how
it is ended.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from interp.batch.unit import Unit
from interp.batch.worker import Outcome, forget, perform
from interp.errors import BadInput

LOOPBACK = ("127.0.0.1", "::1")


class Worker(Protocol):
    """A slot for one unit at a time."""

    died: tuple[type[Exception], ...]
    """What a future raises when the worker is gone."""

    def submit(self, unit: Unit) -> Future[Outcome]:
        """Begin a unit."""
        ...

    def stop(self) -> None:
        """End the worker, and the unit it is at."""
        ...


def outcomes(
    units: Sequence[Unit], start: Callable[[], Worker], *, workers: int = 1, retries: int = 2
) -> Iterator[Outcome]:
    """Every unit's outcome, as units end.

    A worker is given units of the model that it holds as long as there are any. A unit whose worker
    died goes to the next free one, at most `retries` times; the dead worker is replaced.
    """
    waiting = deque(units)
    begun = dict.fromkeys((unit.id for unit in units), 0)
    idle: list[Worker] = []
    holds: dict[Worker, str] = {}
    running: dict[Future[Outcome], tuple[Worker, Unit]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                worker = idle.pop() if idle else start()
                unit = _next(waiting, holds.get(worker), set(holds.values()))
                holds[worker] = unit.source.key
                begun[unit.id] += 1
                try:
                    running[worker.submit(unit)] = worker, unit
                except worker.died as error:  # it died while it had nothing to do
                    running[_failed(error)] = worker, unit
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                worker, unit = running.pop(future)
                try:
                    outcome = future.result()
                    idle.append(worker)
                    yield replace(outcome, attempts=begun[unit.id])
                except worker.died as error:
                    holds.pop(worker)
                    worker.stop()
                    if begun[unit.id] <= retries:
                        waiting.appendleft(unit)
                    else:
                        yield _given_up(unit, begun[unit.id], error)
    finally:
        for worker in [*idle, *(worker for worker, _ in running.values())]:
            worker.stop()


def _next(waiting: deque[Unit], held: str | None, elsewhere: set[str]) -> Unit:
    """A unit of the model that the worker holds; else of one that nobody does; else the first."""
    fresh = None
    for place, unit in enumerate(waiting):
        if unit.source.key == held:
            break
        if fresh is None and unit.source.key not in elsewhere:
            fresh = place
    else:
        place = fresh or 0
    unit = waiting[place]
    del waiting[place]
    return unit


def _failed(error: Exception) -> Future[Outcome]:
    future: Future[Outcome] = Future()
    future.set_exception(error)
    return future


def _given_up(unit: Unit, times: int, error: Exception) -> Outcome:
    shown = (
        f"WorkerDied: its worker died {times} times; a process that is killed from outside has most "
        "often taken more memory than there is"
    )
    return Outcome(unit, error=shown, trace=f"{type(error).__name__}: {error}", attempts=times)


@contextmanager
def engine(
    name: str, *, workers: int, resources: Mapping[str, float], address: str | None = None
) -> Iterator[Callable[[], Worker]]:
    """What starts a worker of the engine called `name`; the engine is ended at the end."""
    if name == "ray":
        with _ray(workers, resources, address):
            yield lambda: Actor(resources)
    else:
        yield {"serial": Here, "processes": Process}[name]


class Here:
    """This process: a unit is done when it is submitted."""

    died = ()

    def submit(self, unit: Unit) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        future.set_result(perform(unit))
        return future

    def stop(self) -> None:
        forget()


class Process:
    """One process of its own, so that its death takes no other unit along.

    A pool of several processes is broken as a whole when one of them is killed; a pool of one is not
    missed.
    """

    died = (BrokenProcessPool,)

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, _context(), initializer=_alone)
        self._pid = self._pool.submit(os.getpid)
        self._busy: Future[Outcome] | None = None

    def submit(self, unit: Unit) -> Future[Outcome]:
        self._busy = self._pool.submit(perform, unit)
        return self._busy

    def stop(self) -> None:
        busy = self._busy is not None and not self._busy.done()
        if busy and self._pid.done() and not self._pid.exception():
            os.kill(self._pid.result(), signal.SIGKILL)
        self._pool.shutdown(wait=not busy, cancel_futures=True)


def _context() -> Any:
    """How processes begin: from a server that has imported what all need, where the system has one.

    Never by a fork of this process, whose threads and CUDA would not survive it.
    """
    import multiprocessing

    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["interp.batch.preload"])
    return context


def _alone() -> None:
    """In a worker process: Ctrl-C is the driver's, and without the driver there is no work."""
    from multiprocessing import parent_process

    def follow() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()


class Actor:
    """A Ray actor; Ray places it on a machine that has its CPUs and GPUs free."""

    def __init__(self, resources: Mapping[str, float]):
        import ray
        from ray.exceptions import (
            NodeDiedError,
            OutOfMemoryError,
            RayActorError,
            WorkerCrashedError,
        )

        self.died: tuple[type[Exception], ...] = (
            RayActorError,
            WorkerCrashedError,
            NodeDiedError,
            OutOfMemoryError,
        )
        # Retries are counted by `outcomes`: a task that Ray ran again by itself would not be seen.
        remote = ray.remote(
            num_cpus=resources.get("cpus", 1),
            num_gpus=resources.get("gpus", 0),
            max_restarts=0,
            max_task_retries=0,
        )(_Resident)
        self._actor: Any = remote.remote()

    def submit(self, unit: Unit) -> Future[Outcome]:
        return self._actor.perform.remote(unit).future()

    def stop(self) -> None:
        import ray

        ray.kill(self._actor)


class _Resident:
    """The actor's side: its process keeps the model between calls."""

    def perform(self, unit: Unit) -> Outcome:
        return perform(unit)


@contextmanager
def _ray(workers: int, resources: Mapping[str, float], address: str | None) -> Iterator[None]:
    """Ray, started on this machine and bound to loopback, or joined at `address`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None or address.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]"):
        # Ray takes an outer address of the machine even for 127.0.0.1, unless it is told on import
        # that it serves this machine alone; the name is that of the systems where that is the default.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ImportError as error:
        raise BadInput(
            "the engine 'ray' is not installed; pip install 'interp-suite[ray]', or take "
            "--engine processes"
        ) from error
    if ray.is_initialized():  # the caller's own, who also ends it
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    # Workers find modules where this process does; on another machine these folders may not exist.
    quiet["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
    if address is None:
        cpus = workers * max(1, int(resources.get("cpus", 1)))
        here = {"address": "local", "_node_ip_address": "127.0.0.1", "include_dashboard": False}
        ray.init(num_cpus=cpus, **here, **quiet)
    else:
        try:
            ray.init(address=address, **quiet)
        except ConnectionError as error:
            raise BadInput(
                f"no Ray cluster answers at '{address}': give the address that `ray start` printed (and "
                "RAY_AUTH_MODE=token where it asks for its token), or leave it out to run on this machine"
            ) from error
    try:
        if address is None and ray.util.get_node_ip_address() not in LOOPBACK:
            raise BadInput(
                "Ray would listen beyond this machine, as it was imported before: set "
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 before importing it, or call ray.init yourself"
            )
        yield
    finally:
        ray.shutdown()
