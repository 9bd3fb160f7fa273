# SPDX-License-Identifier: Apache-2.0
"""Measure one point in a separate process. An executor's worker calls this, here or on another machine.

Owns the processes it runs, which end when this one does. Can be used from any thread. The owner of the executor must
have one machine measure one point at a time, since two would disturb each other.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pyvmm import __version__
from pyvmm.bench.model import BenchError, Point, Value, parse
from pyvmm.errors import HostError

GRACE: Final = 60.0
"""Seconds that a process has on top of a point's own deadline, to start and to tell: an emulated one is slow."""

LAST_WORDS: Final = 2000
"""Bytes kept of what a process said on stderr before it failed."""

INSIDE: Final = ("-P", "-m", "pyvmm.bench.sweep.inside")
"""What Python runs to measure one point; its argument is :func:`request`'s."""


class LostError(BenchError):
    """A point's worker was lost, or its process was killed. Another try may give a result."""


class PointError(BenchError):
    """A point cannot be measured. Another try would fail too."""


class MismatchError(BenchError):
    """A worker must not measure for this sweep: it has another version, or would measure two points at once."""


@dataclass(frozen=True, slots=True)
class Job:
    """The input of a worker for one point. ``sweep`` names the sweep, ``deadline`` is in seconds.

    ``python`` replaces the interpreter and what it runs; the request is its last argument.
    """

    case: str
    point: Point
    deadline: float
    sweep: str
    version: str = __version__
    python: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a point: its series as plain values, the worker, the time (seconds since 1970), the environment."""

    environment: dict[str, Value]
    series: tuple[dict[str, Any], ...]
    worker: str
    started: float
    ended: float


_running: dict[subprocess.Popen[bytes], str] = {}
_cancelled: set[str] = set()
_guard = threading.Lock()
"""Of both."""


def request(job: Job, *, parent: int | None = None) -> str:
    """Return a point as ``inside`` reads it; it ends when the process ``parent`` does, if one is given."""
    return json.dumps({"case": job.case, "point": job.point, "deadline": job.deadline, "parent": parent})


def measure(job: Job, worker: str = "") -> Answer:
    """Measure a point on this machine.

    Raises LostError if its process was killed, PointError if it failed, HostError if every point would fail
    here, MismatchError for another pyvmm's job.
    """
    check_version(job.version)
    worker = worker or socket.gethostname()
    command = [*(job.python or (sys.executable, *INSIDE)), request(job, parent=os.getpid())]
    started = time.time()
    with _guard:
        if job.sweep in _cancelled:
            raise LostError("the sweep has ended")
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a ^C at the terminal is for the sweep, which then ends this process
        )
        _running[process] = job.sweep
    try:
        with process:
            try:
                stdout, stderr = process.communicate(timeout=job.deadline + GRACE)
            except subprocess.TimeoutExpired:
                raise PointError(f"not done after {job.deadline + GRACE:g} s, and killed") from None
            finally:
                process.kill()
    finally:
        with _guard:
            del _running[process]
    status = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return answer(status, stdout, stderr, worker, started)


def answer(status: int, stdout: bytes, stderr: bytes, worker: str, started: float) -> Answer:
    """Return the answer of a process that ended with ``status``, 128 + N for signal N; raises as :func:`measure`."""
    said = stderr[-LAST_WORDS:].decode(errors="replace").strip()
    words = f"; it said: {said}" if said else ""
    if status > 128:
        try:
            name = signal.Signals(status - 128).name
        except ValueError:
            name = f"signal {status - 128}"
        raise LostError(f"the process that measured it was killed by {name}{words}")
    if status == HostError.exit_status:
        raise HostError(f"{worker} cannot measure: {said}")
    if status:
        raise PointError(f"the process that measured it ended with status {status}{words}")
    try:
        run = parse(stdout.decode(errors="replace").splitlines(), "what it printed")
    except BenchError as error:
        raise PointError(f"{error.message}{words}") from None
    if run.end is None:
        raise PointError(f"its results end in the middle{words}")
    series = tuple(each.to_json() for each in run.series)
    return Answer(run.environment, series, worker, started, time.time())


def check_version(version: str) -> None:
    """Raise MismatchError if a sweep belongs to another pyvmm than this one."""
    if version != __version__:
        raise MismatchError(
            f"{socket.gethostname()} has pyvmm {__version__}, the sweep is of {version}",
            hint="install the same version on every machine of the fleet",
        )


def cancel(sweep: str) -> None:
    """End the measurements of a sweep here, and measure nothing more for it."""
    with _guard:
        _cancelled.add(sweep)
        doomed: Sequence[subprocess.Popen[bytes]] = [each for each, whose in _running.items() if whose == sweep]
    for process in doomed:
        process.kill()
