# SPDX-License-Identifier: Apache-2.0
"""The thread of a device: wait for kicks and other descriptors, and pause on request.

A worker lives from the device's start to its stop. It has two forms. With callbacks (:meth:`Worker.watch`,
:meth:`Worker.add`) it waits itself. With ``serve`` it calls that, over and over: a loop in C that waits for its queues'
kicks, for ``stop_fd`` and for what else it needs, and returns to Python for everything that is policy.

To pause a worker, the caller sets ``stop`` of its queues and makes ``stop_fd`` readable. The worker ends the current
request, and then waits.

A :class:`WorkerDevice` is a device with workers: it stops, pauses, resumes and closes them.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading

from pyvmm.devices.virtio.device import VirtioDevice
from pyvmm.errors import PyvmmError, within_limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final

    from pyvmm.devices.virtio.queue import Queue

PATIENCE: Final = 30.0
"""Seconds that the current request may take before the device counts as stuck."""


class Stuck(PyvmmError):
    """A device's request does not end, so its queues cannot be released."""

    def __init__(self, name: str, patience: float) -> None:
        super().__init__(
            f"{name} has not finished its request within {patience:g} s",
            hint="what it waits for does not answer: the storage of a disk, or who is at the other end of a console",
        )


class Worker:
    """One thread named ``name``; what it serves must not raise, or it ends and tells ``failed`` why.

    ``failed`` is called in the thread. Methods are for other threads, :meth:`add` and :meth:`remove` for any.
    """

    def __init__(self, name: str, failed: Callable[[Exception], None], serve: Callable[[], None] | None = None) -> None:
        self.name = name
        self._failed = failed
        self._serve = serve
        self._queues: Sequence[Queue] = ()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._changed = threading.Condition()
        self._halted = self._ending = False
        self._resting = True
        self._thread: threading.Thread | None = None
        with contextlib.ExitStack() as files:
            self.stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            files.callback(os.close, self.stop_fd)
            self._epoll: Any = select.epoll()
            files.callback(self._epoll.close)
            self._epoll.register(self.stop_fd, select.EPOLLIN)
            self._files = files.pop_all()

    # -- what to wait for

    def add(self, fd: int, callback: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """Call ``callback`` with what poll says of ``fd`` whenever it says one of ``events``; again changes both."""
        new = fd not in self._callbacks
        self._callbacks[fd] = callback
        if new:
            self._epoll.register(fd, events)
        else:
            self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget ``fd``, before it is closed; nothing if it is not known."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def watch(self, queue: Queue, callback: Callable[[], None]) -> None:
        """Call ``callback`` when ``queue`` was kicked, and once whenever the worker starts or resumes."""

        def kicked(_events: int) -> None:
            queue.take()
            callback()

        self.add(queue.kick, kicked)

    # -- life

    @property
    def alive(self) -> bool:
        """Whether the thread is there: it was started, and nothing has failed."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, queues: Sequence[Queue]) -> None:
        """Begin to serve; ``queues`` are those that are looked at first, and told of when the worker is to stop.

        Raises HostError where the host gives no thread.
        """
        self._queues = [queue for queue in queues if queue.ready]
        self._ending = False
        self._release()
        thread = threading.Thread(target=self._main, name=self.name, daemon=True)
        self._resting = False
        try:
            with within_limits():
                thread.start()
        except BaseException:
            self._resting = True
            raise
        self._thread = thread

    def pause(self, patience: float = PATIENCE) -> None:
        """Return when the thread stands still, having finished what was at hand.

        Raises Stuck after ``patience`` seconds: then it goes on when that has ended, as if it had not been asked.
        """
        with self._changed:
            self._halted = True
            self._halt()
            if not self._changed.wait_for(lambda: self._resting, patience):
                self.resume()
                raise Stuck(self.name, patience)

    def resume(self) -> None:
        """Go on; every queue is looked at."""
        with self._changed:
            self._halted = False
            if self._ending:
                return
            self._release()
            self._changed.notify_all()

    def stop(self, patience: float = PATIENCE) -> None:
        """End the thread, having finished what was at hand; idempotent, may start again. Raises Stuck."""
        thread = self._thread
        if thread is None:
            return
        with self._changed:
            self._ending = True
            self._halt()
            self._changed.notify_all()
        thread.join(patience)
        if thread.is_alive():
            raise Stuck(self.name, patience)
        self._thread = None
        self._halted = False
        for fd in list(self._callbacks):
            self.remove(fd)

    def close(self) -> None:
        """Stop, and close what is the worker's own; idempotent."""
        self.stop()
        self._files.close()

    def _halt(self) -> None:
        for queue in self._queues:
            queue.native.stop = 1
        os.eventfd_write(self.stop_fd, 1)

    def _release(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.stop_fd)
        for queue in self._queues:
            queue.native.stop = 0
            queue.wake()

    # -- the thread

    def _main(self) -> None:
        try:
            while self._may_go_on():
                if self._serve is not None:
                    self._serve()
                else:
                    self._wait()
        except Exception as error:
            self._failed(error)
        finally:
            with self._changed:
                self._resting = True
                self._changed.notify_all()

    def _may_go_on(self) -> bool:
        with self._changed:
            while self._halted and not self._ending:
                self._resting = True
                self._changed.notify_all()
                self._changed.wait()
            self._resting = False
            return not self._ending

    def _wait(self) -> None:
        for fd, events in self._epoll.poll():
            if self._ending or self._halted:
                return
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback(events)


class WorkerDevice(VirtioDevice):
    """A device whose queues are served by workers, one or several, that live and rest together.

    A kind of device makes its workers with :meth:`new_worker` and starts them itself. What it does besides at a stop or
    a pause, it does around this class's.
    """

    def __init__(self) -> None:
        super().__init__()
        self._workers: list[Worker] = []

    def new_worker(self, serve: Callable[[], None] | None = None, *, queue: int = 0) -> Worker:
        """Make a worker. Its thread runs ``serve``; None: it serves the queues that it watches.

        ``queue`` is the number of the one that it serves where each queue has a worker.
        """
        worker = Worker(self._thread_name(queue), self.failed, serve)
        self._workers.append(worker)
        return worker

    def name_it(self, label: str) -> None:
        """Be called ``label`` from now on, its threads too."""
        super().name_it(label)
        for number, worker in enumerate(self._workers):
            worker.name = self._thread_name(number)

    def _thread_name(self, number: int) -> str:
        return f"pyvmm-{self.label}.{number}" if number else f"pyvmm-{self.label}"

    def stop(self) -> None:
        """Stop serving. Raises Stuck."""
        for worker in self._workers:
            worker.stop()

    def pause(self) -> None:
        """Stand still between two requests, all workers or none. Raises Stuck."""
        with contextlib.ExitStack() as half:
            for worker in self._workers:
                worker.pause()
                half.callback(worker.resume)
            half.pop_all()

    def resume(self) -> None:
        """Go on."""
        for worker in self._workers:
            worker.resume()

    def end_workers(self) -> None:
        """End the threads, and forget the workers. Raises Stuck, with those left that could not be ended."""
        while self._workers:
            self._workers[0].close()
            del self._workers[0]

    def close(self) -> None:
        """End the threads."""
        self.end_workers()
