"""One vCPU's thread: the only caller of ``pv_run`` for that vCPU, and its state machine.

    running ──(pause, kick)──> paused ──(resume)──> running ──(stop, kick | the handler says so)──> finished

Three functions, one a state. Anyone may call :meth:`VcpuThread.pause`, :meth:`resume` and :meth:`stop`: each sets what
is wanted first and kicks afterwards; the vCPU's thread forgets the kick first and looks at what is wanted afterwards,
so no request is lost. The condition guards the two flags and nothing else; no other lock is taken under it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from pyvmm._native import lib


class VcpuThread:
    """Runs ``native`` (a ``struct pv_vcpu``) and hands every stop but a kick to ``handle``.

    ``handle(stop)`` runs in this thread and says whether the vCPU goes on; ``failed(error)`` hears what it raises.
    ``woken`` is called after every request, to wake whatever the handler may be waiting in.
    """

    def __init__(
        self,
        native: Any,
        handle: Callable[[int], bool],
        failed: Callable[[BaseException], None],
        woken: Callable[[], None],
    ) -> None:
        self.native = native
        self._handle, self._failed, self._woken = handle, failed, woken
        self._changed = threading.Condition()
        self._pausing = self._stopping = self._paused = False
        self._thread = threading.Thread(target=self._main, name=f"pyvmm-vcpu{native.index}", daemon=True)

    # -- any thread

    def start(self) -> None:
        """Start in the running state."""
        self._thread.start()

    def pause(self) -> None:
        """Ask the vCPU to leave the guest and wait; :meth:`wait_paused` says when it has."""
        self._want(pausing=True)

    def resume(self) -> None:
        """Let a paused vCPU go on."""
        self._want(pausing=False)

    def stop(self) -> None:
        """Ask the vCPU to leave the guest for good."""
        self._want(stopping=True)

    def wait_paused(self, timeout: float | None = None) -> bool:
        """Wait until the vCPU is out of the guest; False after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._paused or not self._thread.is_alive(), timeout)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread to end; False after ``timeout`` seconds. A thread never started counts as ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def wanted(self) -> bool:
        """Whether the vCPU has been asked to pause or stop: what a handler that waits must watch."""
        return self._stopping or self._pausing

    def _want(self, *, pausing: bool | None = None, stopping: bool | None = None) -> None:
        with self._changed:
            if pausing is not None:
                self._pausing = pausing
            if stopping is not None:
                self._stopping = stopping
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
                if self._pausing:
                    return True
            elif not handle(stop):
                return False

    def _wait_out_pause(self) -> None:
        with self._changed:
            self._paused = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopping or not self._pausing)
            self._paused = False
