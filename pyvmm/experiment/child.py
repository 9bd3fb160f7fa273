# SPDX-License-Identifier: Apache-2.0
"""Run work in a child process with a deadline, to isolate its crashes.

The child is forked from this process, which must have no other thread. Its result comes back through a pipe, as JSON.
Owns the child while it runs. Then it is reaped, and processes that it left are killed. Modules that a child imported
are then imported here, so that the next children have them.
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
"""Bytes to keep of a crashed process's stderr."""

_SHARED = frozenset({"pyvmm", *sys.stdlib_module_names})
"""Packages whose modules only define names when imported, so that any process may import them."""


class CrashedError(PyvmmError):
    """The process died without a result, or was killed at its deadline. The message has the reason and stderr's end."""


def run_in_child(work: Callable[[], Any], deadline: float) -> Any:
    """Run ``work()`` in a child process and return its result, converted by JSON.

    Raises CrashedError if that process dies first, or runs longer than ``deadline`` seconds.
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
    """Import the modules that a child imported, if they are safe to import here."""
    for name in modules:
        if name.partition(".")[0] in _SHARED:
            with contextlib.suppress(ImportError):  # the child may have created it, or its file may be gone
                importlib.import_module(name)


class _Child:
    """A forked process. On exit it is killed and reaped, together with its process group."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._stderr = os.memfd_create("stderr")
        self._code: int | None = None

    def __enter__(self) -> _Child:
        self._results, write = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        # A signal handler that raises right after the fork would lose the child, or run in it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        # Exclude inherited objects from garbage collection in the child, which would copy each written page.
        gc.freeze()
        try:
            self.pid = os.fork()
            if self.pid == 0:
                self._become(write, parent)
        finally:
            gc.unfreeze()
        os.close(write)
        self._pidfd = os.pidfd_open(self.pid)
        # Both sides call it, so that it is done in either order.
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
            # The handlers of guarded copies are installed later, and pass foreign faults on.
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
        """Kill remaining processes, reap the child, and return its exit code; a signal's number is negative."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has no group yet, or no process is left
                os.killpg(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, until: float) -> bytes | None:
        """Return all output of the process, or None if it has not ended by ``until`` (CLOCK_MONOTONIC seconds)."""
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
            # Its children may hold the pipe open. After its death, no more data follows.
            if self._pidfd in ready:
                return bytes(said)

    def ending(self) -> str:
        """Say how the process ended without a result."""
        code = self._reap()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    def last_words(self) -> str:
        """Return its stderr output, if any, as the end of a sentence."""
        size = os.fstat(self._stderr).st_size
        text = os.pread(self._stderr, LAST_WORDS, max(0, size - LAST_WORDS)).decode(errors="replace").strip()
        return f"; it said: {text}" if text else ""
