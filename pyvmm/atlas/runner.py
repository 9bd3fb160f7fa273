"""Runs experiments, each in a process of its own with a deadline, so that none can hurt its neighbours.

The process is forked from this one, which has everything imported and must have no other thread; it sends its result
through a pipe and is gone. One that dies, or is past its deadline and killed with all it started, has that for its
verdict. Owns the child while it runs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from pyvmm import log
from pyvmm.atlas.claim import Claim, Place
from pyvmm.atlas.experiment import Experiment, Untold
from pyvmm.atlas.host.syscalls import PR_SET_PDEATHSIG, prctl
from pyvmm.atlas.model import Event, Result, Verdict
from pyvmm.errors import PyvmmError

LAST_WORDS = 2000
"""Bytes kept of what a process said on stderr before it crashed."""


class Task(NamedTuple):
    """One claim in one place."""

    claim: Claim
    place: Place


def tasks(claims: Iterable[Claim], protections: Iterable[str] = (), backings: Iterable[str] = ()) -> list[Task]:
    """Return what there is to run, in order; the filters name protections and backings to keep, none keeps all."""
    protections, backings = set(protections), set(backings)
    return [
        Task(claim, place)
        for claim in claims
        for place in claim.places
        if (not protections or place.protection.value in protections) and (not backings or place.backing in backings)
    ]


def run(todo: Iterable[Task], *, deadline: float | None = None) -> Iterator[Result]:
    """Run one task after the other and yield the results as they come; ``deadline`` replaces the claims' own."""
    for task in todo:
        yield run_apart(task, task.claim.seconds if deadline is None else deadline)


def conduct(task: Task) -> Result:
    """Run an experiment in this very process and return its result, whatever the experiment does."""
    claim, place = task
    x = Experiment(place.protection, place.backing, **claim.options)
    begun = time.monotonic()
    verdict, reason = Verdict.UNTOLD, ""
    events: tuple[Event, ...] = ()
    ns: list[int] = []
    try:
        with x:
            claim.function(x)
            events, ns = x.events()
        verdict = x.verdict
    except Untold as untold:
        reason = untold.message
    except PyvmmError as error:
        reason = f"the experiment stopped: {error.message}"
    except Exception as error:
        verdict = Verdict.CRASHED
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"the experiment raised {type(error).__name__}: {error} (line {where.lineno} of {where.name})"
    times = {"seconds": round(time.monotonic() - begun, 3), "ticks": x.ticks, "events": ns}
    return replace(
        _result(task, verdict, reason),
        evidence=tuple(x.evidence), pictures=tuple(x.pictures), events=events, times=times,
    )  # fmt: skip


def run_apart(task: Task, deadline: float) -> Result:
    """Run an experiment in a process of its own and return its result, or how that process ended."""
    begun = time.monotonic()
    with _Child(task) as child:
        said = child.wait(begun + deadline)
        if said is None:
            return _crashed(task, begun, f"not done after {deadline:g} s, and killed{child.last_words()}")
        try:
            return Result.from_json(json.loads(said))
        except ValueError:
            return _crashed(task, begun, f"the process {child.ending()}{child.last_words()}")


def _crashed(task: Task, begun: float, reason: str) -> Result:
    return replace(_result(task, Verdict.CRASHED, reason), times={"seconds": round(time.monotonic() - begun, 3)})


def _result(task: Task, verdict: Verdict, reason: str) -> Result:
    claim, place = task
    return Result(
        claim.id, claim.group, claim.says, claim.origin, place.protection.value, place.backing, verdict, reason
    )


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Child:
    """A forked process that runs one experiment; on exit it is dead, with everything it started, and reaped."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._stderr = os.memfd_create("stderr")
        self._code: int | None = None

    def __enter__(self) -> _Child:
        self._results, write = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        # A signal's handler that raises between the fork and what follows would lose the child, or run in it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        self.pid = os.fork()
        if self.pid == 0:
            self._become(self._task, write, parent)
        os.close(write)
        # Both sides do it, so that it is done whoever is first.
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, 0)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _become(self, task: Task, write: int, parent: int) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            os.dup2(self._stderr, 2)
            # The handlers of guarded copies come later, and hand on what is not theirs.
            faulthandler.enable(2, all_threads=False)
            for number in _ENDING:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
            resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
            log.configure(-1, json=False)
            data = json.dumps(conduct(task).to_json()).encode()
            while data:
                data = data[os.write(write, data) :]
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def __exit__(self, *_: object) -> None:
        self._reap()
        os.close(self._results)
        os.close(self._stderr)

    def _reap(self) -> int:
        """Kill whatever is left, collect the child, and return its exit code; a signal's number is negative."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # not its own group's yet, or none left
                os.killpg(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, until: float) -> bytes | None:
        """Return all that the process sent until it ended, None if it has not by then (CLOCK_MONOTONIC seconds)."""
        said = bytearray()
        while True:
            ready, _, _ = select.select([self._results], [], [], max(until - time.monotonic(), 0))
            if not ready:
                return None
            data = os.read(self._results, 1 << 16)
            if not data:
                return bytes(said)
            said += data

    def ending(self) -> str:
        """Say how the process ended without a result."""
        code = self._reap()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    def last_words(self) -> str:
        """Return what it said on stderr, if anything, as the end of a sentence."""
        size = os.fstat(self._stderr).st_size
        text = os.pread(self._stderr, LAST_WORDS, max(0, size - LAST_WORDS)).decode(errors="replace").strip()
        return f"; it said: {text}" if text else ""
