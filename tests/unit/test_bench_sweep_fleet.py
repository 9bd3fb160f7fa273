# SPDX-License-Identifier: Apache-2.0
"""A sweep over a fleet: a real scheduler of dask.distributed, and workers that are killed, unfit, or missing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("distributed", reason="dask.distributed is not installed (it is in the dev dependencies)")

from pyvmm.bench.model import BenchError
from pyvmm.bench.sweep.run import Sweep
from pyvmm.bench.sweep.store import Store
from pyvmm.bench.sweep.work import MismatchError
from pyvmm.bench.sweep.workers import Fleet
from pyvmm.errors import UsageError
from tests.unit.bench_sweep_samples import plan, pretend

PATIENCE = 60.0


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not in {PATIENCE:.0f} s: {what}"
        time.sleep(0.05)


class Dask:
    """A scheduler and workers, each a process on this machine."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = directory / "scheduler.json"
        self.processes: list[subprocess.Popen[bytes]] = []
        self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(self._file))
        wait_for(lambda: self._file.exists() and self._file.stat().st_size, "the scheduler is there")
        self.address: str = json.loads(self._file.read_text())["address"]

    def worker(self, *options: str, threads: int = 1) -> subprocess.Popen[bytes]:
        local = ("--no-nanny", "--host", "127.0.0.1")
        return self._start("worker", self.address, "--nthreads", str(threads), *local, *options)

    def _start(self, what: str, *options: str) -> subprocess.Popen[bytes]:
        with open(self._directory / f"{what}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{what}", "--no-dashboard", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
            )
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[Dask]:
    (tmp_path / "dask").mkdir()
    fleet = Dask(tmp_path / "dask")
    yield fleet
    fleet.close()


def test_another_worker_measures_the_points_of_a_killed_worker(dask: Dask, tmp_path: Path) -> None:
    workers = {process.pid: process for process in (dask.worker(), dask.worker())}
    python = pretend(tmp_path, "if name == 'none-256' and tries == 1: time.sleep(1000)")
    with Store(str(tmp_path / "sweep.sqlite"), plan()) as store, Fleet(dask.address, python) as fleet:
        wait_for(lambda: fleet.title.startswith("2 workers of tcp://127.0.0.1:"), "both workers are there")

        def kill() -> int:
            wait_for(lambda: list(tmp_path.glob("none-256.*")), "the first point runs")
            [note] = tmp_path.glob("none-256.*")
            process = workers[int(note.read_text())]
            process.kill()
            return process.pid

        with ThreadPoolExecutor(1) as thread:
            killed = thread.submit(kill)
            assert Sweep(store, fleet, lambda *_: None).run() is None
        assert store.counts() == (4, 4, 0)
    ran = {
        name: sorted(int(note.read_text()) for note in tmp_path.glob(f"{name}.*"))
        for name in ("none-256", "none-1024", "pkvm-256", "pkvm-1024")
    }
    [survivor] = set(workers) - {killed.result()}
    assert ran["none-256"] == sorted((killed.result(), survivor))
    assert all(survivor in pids for pids in ran.values())
    for note in tmp_path.glob("none-256.*"):  # the killed worker's processes ended with it
        wait_for(partial(is_gone, note.suffix[1:]), "no process is left")


def is_gone(pid: str) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_stopped_sweep_leaves_no_process_and_a_lost_scheduler_ends_the_sweep(
    dask: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvmm.bench.sweep.workers.CONNECT_SECONDS", 2.0)  # also limits the search for a lost one
    python = pretend(tmp_path, "if name == 'none-256' and tries < 3: time.sleep(1000)")

    def gone(tries: int) -> None:
        notes = list(tmp_path.glob("none-256.*"))
        assert len(notes) == tries
        for note in notes:
            wait_for(partial(is_gone, note.suffix[1:]), "what was measured ends")

    with Store(str(tmp_path / "sweep.sqlite"), plan()) as store:
        with Fleet(dask.address, python) as fleet:  # no worker yet: it waits

            def show(*_: object) -> None:
                if len(dask.processes) == 1:
                    dask.worker()
                if list(tmp_path.glob("none-256.*")):
                    sweep.interrupt(signal.SIGINT)

            sweep = Sweep(store, fleet, show)
            assert sweep.run() == signal.SIGINT
        gone(1)
        assert store.counts() == (4, 0, 0)
        with Fleet(dask.address, python) as fleet:

            def kill(*_: object) -> None:
                if len(list(tmp_path.glob("none-256.*"))) == 2:
                    dask.processes[0].kill()

            with pytest.raises(BenchError, match=r"the scheduler at .* is gone"):
                Sweep(store, fleet, kill).run()


@pytest.mark.parametrize(
    ("options", "threads", "why"),
    [
        ((), 2, "dask worker --nthreads 1"),
        (("--preload", "import pyvmm.bench.sweep.work as work; work.__version__ = '0.0.7'"), 1, "has pyvmm 0.0.7"),
    ],
)
def test_unfit_workers_are_refused_whenever_they_join(
    dask: Dask, tmp_path: Path, options: tuple[str, ...], threads: int, why: str
) -> None:
    python = pretend(tmp_path, "")
    with Store(str(tmp_path / "sweep.sqlite"), plan()) as store, Fleet(dask.address, python) as fleet:
        dask.worker(*options, threads=threads)
        with pytest.raises(MismatchError) as caught:  # it joined after the others were checked
            Sweep(store, fleet, lambda *_: None).run()
        assert why in str(caught.value)
        assert store.counts() == (4, 0, 0)
    with pytest.raises(MismatchError) as caught:
        Fleet(dask.address, python)
    assert why in str(caught.value)
    assert not list(tmp_path.glob("*-*.*"))


def test_an_address_without_a_scheduler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvmm.bench.sweep.workers.CONNECT_SECONDS", 0.5)
    with pytest.raises(UsageError, match="is no scheduler's address"):
        Fleet("nonsense://127.0.0.1:1")
    before = threading.enumerate()
    with pytest.raises(BenchError, match=r"no scheduler answers at tcp://127\.0\.0\.1:1"):
        Fleet("tcp://127.0.0.1:1")
    assert threading.enumerate() == before
