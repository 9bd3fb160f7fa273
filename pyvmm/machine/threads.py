# SPDX-License-Identifier: Apache-2.0
"""The vCPU threads of a machine: start, pause (with the devices), resume and stop them together.

Owns the threads. Any thread may call. A vCPU's own thread may call only methods that say so, because it would wait for
itself.
"""

from __future__ import annotations

import contextlib
import threading

from pyvmm.errors import PyvmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pyvmm.devices.base import Device
    from pyvmm.machine.clock import GuestClock
    from pyvmm.vcpu.thread import VcpuThread


class Threads:
    """One a vCPU, in their order; ``devices`` are what a pause stops besides, and ``clock`` the guest's time."""

    def __init__(self, devices: Callable[[], Iterable[Device]], clock: Callable[[], GuestClock]) -> None:
        self._devices, self._clock = devices, clock
        self._threads: list[VcpuThread] = []
        self._pausing = threading.Lock()
        self._pauses = 0

    def __iter__(self) -> Iterator[VcpuThread]:
        return iter(self._threads)

    def __getitem__(self, index: int) -> VcpuThread:
        return self._threads[index]

    def add(self, thread: VcpuThread) -> None:
        """Add the unstarted thread of the next vCPU."""
        self._threads.append(thread)

    def start(self) -> None:
        """Start every vCPU."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End every thread, and return when all have ended. Idempotent."""
        for thread in self._threads:
            thread.stop()
        for thread in self._threads:
            thread.join()

    def clear(self) -> None:
        """Forget them, once they have stopped."""
        self._threads.clear()

    def pause(self) -> None:
        """Pause every vCPU and then every device, and return when all are paused.

        Pauses nest: the machine runs again after as many resumes. If a device cannot be paused, nothing is, and its
        exception is raised.
        """
        self.pause_alone()
        # Release the lock last: no other thread may see devices paused that are about to resume.
        with self._pausing, contextlib.ExitStack() as half:
            half.callback(self._resume_alone)
            if not self._pauses:
                self._clock().stop()
                half.callback(self._clock().go)
                for device in self._devices():
                    device.pause()
                    half.callback(device.resume)
            self._pauses += 1
            half.pop_all()

    def pause_alone(self) -> None:
        """Pause every vCPU, but no device."""
        if any(thread.is_current for thread in self._threads):
            raise PyvmmError("a vCPU's own thread cannot pause the machine: it would wait for itself")
        for thread in self._threads:
            thread.pause()
        for thread in self._threads:
            thread.wait_paused()

    def resume(self) -> None:
        """Resume every device and vCPU."""
        with self._pausing:
            if not self._pauses:
                raise PyvmmError("the machine is not paused: there is nothing to resume")
            self._pauses -= 1
            if not self._pauses:
                for device in self._devices():
                    device.resume()
                self._clock().go()
        self._resume_alone()

    def _resume_alone(self) -> None:
        for thread in self._threads:
            thread.resume()

    @property
    def paused(self) -> bool:
        """Whether they are paused."""
        return self._pauses > 0

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep every vCPU out of the guest, except the caller's own if it is one."""
        others = [thread for thread in self._threads if not thread.is_current]
        for thread in others:
            thread.pause()
        try:
            for thread in others:
                thread.wait_outside()
            yield
        finally:
            for thread in others:
                thread.resume()
