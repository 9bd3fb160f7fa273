# SPDX-License-Identifier: Apache-2.0
"""Workers without threads: the fuzzer runs the work of a device's thread, a little at a time.

So an input has the same effect each time, and exceptions of a device are seen. Loops in C only return when told to,
so they are stopped after a moment.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

from pyvmm.devices.virtio import mmio, worker
from pyvmm.devices.virtio.queue import Chain, Queue, QueueBroken
from pyvmm.devices.virtio.worker import PATIENCE, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROUNDS: Final = 8
"""Descriptors that are waited for in a turn, one after another."""
POPS: Final = 48
"""Requests in a turn: a ring that feeds itself is the guest's own affair, and has no end."""
MOMENT: Final = 0.0005
"""Seconds that a loop in C has."""


class Budgeted(Queue):
    """Tells its server to leave after ``POPS`` requests in a turn."""

    left = POPS

    def pop(self) -> Chain | None:
        self.left -= 1
        if self.left <= 0:
            self.native.stop = 1
        return super().pop()


class Stepped(Worker):
    """Serves only in :meth:`turn`."""

    live: list[Stepped] = []  # noqa: RUF012 - of the current input

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._running = False
        self.live.append(self)

    @property
    def alive(self) -> bool:
        return self._running

    def start(self, queues: Sequence[Queue]) -> None:
        self._queues = [queue for queue in queues if queue.ready]
        self._running = True
        self._release()

    def pause(self, patience: float = PATIENCE) -> None:  # noqa: ARG002
        self._halted = True
        self._halt()

    def resume(self) -> None:
        self._halted = False
        self._release()

    def stop(self, patience: float = PATIENCE) -> None:  # noqa: ARG002
        self._running = self._halted = False
        self._halt()
        for fd in list(self._callbacks):
            self.remove(fd)

    def close(self) -> None:
        if self in self.live:
            self.stop()
            self.live.remove(self)
        self._files.close()

    def turn(self) -> None:
        """Do the pending work. Raises exceptions that a device must not raise."""
        if not self._running or self._halted:
            return
        for queue in self._queues:
            assert isinstance(queue, Budgeted)
            queue.left, queue.native.stop = POPS, 0
        try:
            if self._serve is None:
                self._call_back()
            else:
                self._loop()
        except QueueBroken as error:
            self._running = False
            self._failed(error)

    def _call_back(self) -> None:
        for _ in range(ROUNDS):
            events = [(fd, found) for fd, found in self._epoll.poll(0) if fd in self._callbacks]
            if not events:
                break
            for fd, found in events:
                callback = self._callbacks.get(fd)
                if callback is not None:
                    callback(found)

    def _loop(self) -> None:
        assert self._serve is not None
        told = threading.Event()

        def tell() -> None:
            time.sleep(MOMENT)
            self._halt()
            told.set()

        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.stop_fd)
        teller = threading.Thread(target=tell)
        teller.start()
        try:
            while not told.is_set():
                self._serve()
        finally:
            teller.join()


@contextlib.contextmanager
def stepped() -> Iterator[None]:
    """Give devices stepped workers."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(worker, "Worker", Stepped))
        patches.enter_context(mock.patch.object(mmio, "Queue", Budgeted))
        yield
