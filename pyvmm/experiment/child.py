# SPDX-License-Identifier: Apache-2.0
"""Work in a child process, with a deadline, so that whatever it does to itself it does to nobody else.

The child is forked from this one, which must have no other thread; what it returns comes back through a pipe, as JSON.
Owns the child while it runs; then it is reaped, and what it started and left is killed. What one child has to import,
this process imports after it, so that the next ones find it there.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from pyvmm import log
from pyvmm.errors import PyvmmError
from pyvmm.experiment.host.syscalls import prctl
from pyvmm.interrupt import ENDING
from pyvmm.uapi.prctl import PR_SET_PDEATHSIG

LAST_WORDS = 2000
"""Bytes kept of what a process said on stderr before it crashed."""

_SHARED = frozenset({"pyvmm", *sys.stdlib_module_names})
"""Packages whose modules do nothing but define things when they are imported, so that any process may."""


class CrashedError(PyvmmError):
    """The process died without a result, or was killed at its deadline: the message says which, and its last words."""


def run_in_child(work: Callable[[], Any], deadline: float) -> Any:
    """Return what ``work()`` returns in a child process, as JSON makes it.

    CrashedError where that process dies first, or has not ended after ``deadline`` seconds.
    """
    with _Child(work) as child:
        said = child.wait(time.monotonic() + deadline)
        if said is None:
            raise CrashedError(f"not done after {deadline:g} s, and killed{child.last_words()}")
        try:
            value, modules = json.loads(said)
        except ValueError:
            raise CrashedError(f"the process {child.ending()}{child.last_words()}") from None
    _import(modules)
    return value


def _import(modules: Iterable[str]) -> None:
    """Import what a child had to import, as far as that may be done here."""
    for name in modules:
        if name.partition(".")[0] in _SHARED:
            with contextlib.suppress(ImportError):  # it may have been made there, or its file be gone meanwhile
                importlib.import_module(name)


class _Child:
    """A forked process; on exit it is dead and reaped, and so is, in time, everything of its process group."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._stderr = os.memfd_create("stderr")
        self._code: int | None = None

    def __enter__(self) -> _Child:
        self._results, write = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        # A signal's handler that raises between the fork and what follows would lose the child, or run in it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        # A collection in the child leaves alone what it has inherited: each page it wrote to would be copied.
        gc.freeze()
        try:
            self.pid = os.fork()
            if self.pid == 0:
                self._become(write, parent)
        finally:
            gc.unfreeze()
        os.close(write)
        self._pidfd = os.pidfd_open(self.pid)
        # Both sides do it, so that it is done whoever is first.
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, 0)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _become(self, write: int, parent: int) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            os.dup2(self._stderr, 2)
            # The handlers of guarded copies come later, and hand on what is not theirs.
            faulthandler.enable(2, all_threads=False)
            for number in ENDING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
            log.configure(-1, json=False)
            imported = frozenset(sys.modules)
            value = self._work()
            data = json.dumps([value, [name for name in sys.modules if name not in imported]]).encode()
            while data:
                data = data[os.write(write, data) :]
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def __exit__(self, *_: object) -> None:
        self._reap()
        for fd in (self._results, self._stderr, self._pidfd):
            os.close(fd)

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
        os.set_blocking(self._results, False)
        watched = [self._pidfd, self._results]
        while True:
            ready, _, _ = select.select(watched, [], [], max(until - time.monotonic(), 0))
            if not ready:
                return None
            with contextlib.suppress(BlockingIOError):
                while data := os.read(self._results, 1 << 16):
                    said += data
                watched = [self._pidfd]
            # What it has started may hold the pipe open; when it is dead there is no more to come.
            if self._pidfd in ready:
                return bytes(said)

    def ending(self) -> str:
        """Say how the process ended without a result."""
        code = self._reap()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    def last_words(self) -> str:
        """Return what it said on stderr, if anything, as the end of a sentence."""
        size = os.fstat(self._stderr).st_size
        text = os.pread(self._stderr, LAST_WORDS, max(0, size - LAST_WORDS)).decode(errors="replace").strip()
        return f"; it said: {text}" if text else ""
