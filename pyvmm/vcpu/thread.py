# SPDX-License-Identifier: Apache-2.0
"""One vCPU's thread: the only caller of ``pv_run`` for that vCPU, and its state machine.

    running ──(pause)──> paused ──(resume)──> running ──(stop, or the handler says so)──> finished

Pauses nest: a vCPU runs again after as many resumes. Any thread may call :meth:`VcpuThread.pause`, :meth:`resume` and
:meth:`stop`. Each sets the request first and kicks afterwards. The vCPU's thread clears the kick first and reads the
request afterwards, so no request is lost. The condition guards the requests only. No other lock is taken under it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pyvmm._native import lib
from pyvmm.errors import PyvmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import pv_vcpu


class VcpuThread:
    """Runs ``native`` (a ``struct pv_vcpu``) and hands every stop but a kick to ``handle``.

    ``handle(stop)`` runs in this thread and says whether the vCPU runs on. ``failed(error)`` gets its exception.
    ``woken`` is called after every request, to wake a handler that waits.
    """

    def __init__(
        self,
        native: pv_vcpu,
        handle: Callable[[int], bool],
        failed: Callable[[BaseException], None],
        woken: Callable[[], None],
    ) -> None:
        self.native = native
        self._handle, self._failed, self._woken = handle, failed, woken
        self._changed = threading.Condition()
        self._pauses = 0
        self._stopping = self._paused = False
        self._thread = threading.Thread(target=self._main, name=f"pyvmm-vcpu{native.index}", daemon=True)

    # -- any thread

    def start(self) -> None:
        """Start in the running state."""
        self._thread.start()

    def pause(self) -> None:
        """Ask the vCPU to leave the guest and wait. :meth:`wait_paused` waits until it has."""
        self._want(pauses=1)

    def resume(self) -> None:
        """Resume a paused vCPU. Raises PyvmmError if it was not paused."""
        self._want(pauses=-1)

    def stop(self) -> None:
        """Ask the vCPU to leave the guest for good."""
        self._want(stopping=True)

    def wait_paused(self, timeout: float | None = None) -> bool:
        """Wait until the vCPU is paused or its thread has ended. Returns False after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._paused or not self._thread.is_alive(), timeout)

    def wait_outside(self) -> None:
        """Wait until the vCPU is out of the guest, paused or in a handler. It stays out during a pause."""
        # The kick stays pending until the vCPU's own thread clears it, so a vCPU outside cannot enter again.
        while self.native.tid:
            time.sleep(0)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread to end; False after ``timeout`` seconds. A thread that never started counts as ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def wanted(self) -> bool:
        """Whether the vCPU has been asked to pause or stop. A handler that waits must check it."""
        return self._stopping or self._pauses > 0

    @property
    def is_current(self) -> bool:
        """Whether the caller runs in this very thread."""
        return threading.current_thread() is self._thread

    def _want(self, *, pauses: int = 0, stopping: bool = False) -> None:
        with self._changed:
            if self._pauses + pauses < 0:
                raise PyvmmError(f"vCPU {self.native.index} is not paused: there is nothing to resume")
            self._pauses += pauses
            self._stopping |= stopping
            self._changed.notify_all()
        lib.pv_kick(self.native)
        self._woken()

    # -- its own thread

    def _main(self) -> None:
        try:
            while self._running():
                self._wait_out_pause()
        except BaseException as error:
            self._failed(error)
        finally:
            with self._changed:
                self._paused = True
                self._changed.notify_all()

    def _running(self) -> bool:
        """Run until a pause is wanted (True) or the vCPU has finished (False)."""
        run, unkick, handle, native = lib.pv_run, lib.pv_unkick, self._handle, self.native
        while True:
            stop = run(native)
            if stop == lib.PV_STOP_KICK:
                unkick(native)
                if self._stopping:
                    return False
                if self._pauses > 0:
                    return True
            elif not handle(stop):
                return False

    def _wait_out_pause(self) -> None:
        with self._changed:
            self._paused = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopping or self._pauses <= 0)
            self._paused = False
