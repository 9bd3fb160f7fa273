# SPDX-License-Identifier: Apache-2.0
"""The vCPUs' threads of a machine: let go together, kept out of the guest, paused with the devices, stopped.

Owns the threads. Any thread may call, but a vCPU's own only what says so: it would wait for itself.
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
        """Take the thread of the next vCPU, not started yet."""
        self._threads.append(thread)

    def start(self) -> None:
        """Let every vCPU go."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End every thread, and return when all have; idempotent."""
        for thread in self._threads:
            thread.stop()
        for thread in self._threads:
            thread.join()

    def clear(self) -> None:
        """Forget them, once they have stopped."""
        self._threads.clear()

    def pause(self) -> None:
        """Stop every vCPU and then every device, and return when all stand still.

        Pauses nest: all goes on when each has been resumed. Where a device does not come to rest nothing is paused, and
        what it raises says so.
        """
        self.pause_alone()
        # The lock is let go of last: nobody else may find devices at rest that are about to go on.
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
        """Stop every vCPU, and no device."""
        if any(thread.is_current for thread in self._threads):
            raise PyvmmError("a vCPU's own thread cannot pause the machine: it would wait for itself")
        for thread in self._threads:
            thread.pause()
        for thread in self._threads:
            thread.wait_paused()

    def resume(self) -> None:
        """Let every device and vCPU go on."""
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
        """Whether :meth:`pause` holds them."""
        return self._pauses > 0

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep every vCPU but the caller's own, who may be one, out of the guest."""
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
