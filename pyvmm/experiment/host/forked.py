# SPDX-License-Identifier: Apache-2.0
"""A child process that works until it is told to end, or is killed. Owns the child, and reaps it.

Fork before this process has other threads, such as a guest's vCPUs.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import traceback
from collections.abc import Callable
from typing import Self

from pyvmm.experiment.host.syscalls import prctl
from pyvmm.uapi.prctl import PR_SET_PDEATHSIG


class Forked:
    """A forked child that calls ``work`` with this object. A context manager in the parent."""

    def __init__(self, work: Callable[[Forked], object]) -> None:
        self._work = work
        self._reaped = False

    def __enter__(self) -> Self:
        self._heard, said = os.pipe2(os.O_CLOEXEC)
        told, self._tell = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._heard)
            os.close(self._tell)
            self._become(said, told)
        os.close(said)
        os.close(told)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._reaped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()
        os.close(self._heard)
        os.close(self._tell)

    # -- in the child

    def _become(self, said: int, told: int) -> None:
        code = 1
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            self._said, self._told = said, told
            self._work(self)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def say(self) -> None:
        """Tell the parent that the work has reached its goal."""
        os.write(self._said, b"!")

    def wait_for_end(self) -> None:
        """Wait until the parent tells this process to end, or is gone."""
        os.read(self._told, 1)

    # -- in the parent

    def heard(self, timeout: float) -> bool:
        """Wait for the child's :meth:`say`. False if it is late, or the child has ended."""
        ready, _, _ = select.select([self._heard], [], [], timeout)
        return bool(ready) and os.read(self._heard, 1) == b"!"

    def end(self) -> None:
        """Tell the child to end, and wait until it has."""
        os.write(self._tell, b"!")
        self.wait()

    def wait(self) -> None:
        """Wait until the child has ended."""
        os.waitpid(self.pid, 0)
        self._reaped = True
