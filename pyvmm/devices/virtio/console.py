# SPDX-License-Identifier: Apache-2.0
"""The console device (virtio 1.2, 5.3): one port, ``hvc0`` of a Linux guest, between a guest and two descriptors.

Owns its worker, at most ``PART`` bytes of output and as many of input. The rest stays in the guest's memory and in the
descriptor. Neither descriptor is closed here. Only the worker, :meth:`VirtioConsole.close` and
:meth:`VirtioConsole.drain` wait for a reader.

=======================================  ==========================================================================
what a hostile guest may do              what happens
=======================================  ==========================================================================
print faster than the reader reads       its requests wait in guest memory
print without end by emergency writes    beyond ``PART`` unread bytes, output is dropped
never take input                         the descriptor is not read
=======================================  ==========================================================================
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import threading
import time

from pyvmm.devices.virtio.queue import Chain, ChainFault, Queue, QueueBroken
from pyvmm.devices.virtio.worker import WorkerDevice
from pyvmm.outlet import Outlet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final

F_SIZE: Final = 1 << 0
F_EMERG_WRITE: Final = 1 << 2
RX, TX = 0, 1
PART: Final = 4096
MOST_KEPT: Final = 1 << 16
"""Bytes of a request that are kept while paused. Linux's have at most 4096."""
PATIENCE: Final = 1.0
"""Seconds to wait for the reader after an abort."""
_BATCH: Final = 64
_BREATH: Final = 0.01
"""Seconds until a retry when another writer has used the room."""
_CONFIG: Final = struct.Struct("<HHII")
_EMERGENCY: Final = 8
"""The offset of ``emerg_wr`` in the configuration space."""


class VirtioConsole(WorkerDevice):
    """``out`` and ``source`` are file descriptors or None; ``size`` a terminal's columns and rows, or None.

    ``unheard`` is called once, with the reason, when output can no longer be written. Later output is dropped.
    """

    device_id = 3
    name = "console"
    queue_sizes = (64, 64)

    def __init__(
        self,
        out: int | None = None,
        source: int | None = None,
        *,
        size: tuple[int, int] | None = None,
        unheard: Callable[[OSError], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self._out = None if out is None else Outlet(out)
        self._source = source
        self.interactive = source is not None
        self._broken = False
        self._size = size or (0, 0)
        self.features = F_EMERG_WRITE | (F_SIZE if size is not None else 0)
        self.unheard = unheard
        self._worker = self.new_worker()
        self._more = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._queues: Sequence[Queue] = ()
        self._chain: Chain | None = None
        self._offset = 0
        self._left = b""
        self._typed = b""
        # Guards writes to ``out`` by two threads. Neither waits while holding it.
        self._writing = threading.Lock()
        self._emergency = bytearray()
        self._serving = self._reading = self._busy = False
        self._offered = bytearray()
        self._idle = threading.Condition(threading.RLock())
        self._give_up_at: float | None = None

    # -- configuration space

    def config(self) -> bytes:
        """Return columns, rows, the number of ports, and the emergency register, which reads as zero."""
        return _CONFIG.pack(*self._size, 1, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        """Print a character from the emergency register, even before the driver has started."""
        if offset != _EMERGENCY:
            return
        with self._writing:
            if len(self._emergency) < PART:
                self._emergency += data[:1]
            self._put_emergency()

    def resize(self, columns: int, rows: int) -> None:
        """Report the terminal's size to the guest, each value up to 65535. Any thread."""
        self._size = min(columns, 0xFFFF), min(rows, 0xFFFF)
        self.config_changed()

    # -- life

    def start(self, queues: Sequence[Queue], features: int) -> None:  # noqa: ARG002
        """Start to move bytes in both directions."""
        self._queues = queues
        self._worker.add(self._more, lambda _events: self._go_on())
        if queues[RX].ready:
            self._worker.watch(queues[RX], self._to_guest)
            self._reading = True
        if queues[TX].ready:
            self._worker.watch(queues[TX], self._from_guest)
            self._serving = True
        self._worker.start(queues)

    def stop(self) -> None:
        """Stop using the guest's queues. Output that was already taken is still written."""
        super().stop()
        self._leave()
        self._queues, self._chain = (), None

    def pause(self) -> None:
        """Pause. The current request ends, and its rest is kept here."""
        super().pause()
        if self._chain is not None:
            with contextlib.suppress(ChainFault):
                self._left += self._chain.read(self._offset, MOST_KEPT)
            with contextlib.suppress(QueueBroken):  # the resumed worker is also notified
                self._finish(self._queues[TX], self._chain)
                self._queues[TX].interrupt()

    def save(self) -> dict[str, Any]:
        """Return the kept bytes of both directions."""
        with self._idle:
            typed = self._typed + self._offered
        return {"printed": self._left.hex(), "typed": typed.hex()}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the kept bytes of both directions."""
        from pyvmm.schema import BYTES, check

        check(saved, {"printed": BYTES, "typed": BYTES}, self.label)
        self._left, self._typed = bytes.fromhex(saved["printed"]), bytes.fromhex(saved["typed"])

    def failed(self, error: Exception) -> None:
        """Release threads that wait for output that will not be written."""
        self._leave()
        super().failed(error)

    def abort(self) -> None:
        """Stop waiting for the reader. Output that it does not read within ``PATIENCE`` seconds is lost. Any thread."""
        with self._idle:
            if self._give_up_at is None:
                self._give_up_at = time.monotonic() + PATIENCE
            self._idle.notify_all()

    def drain(self) -> None:
        """Return when all output of the guest is written or dropped. Not while paused."""
        with self._idle:
            if not self._serving:
                return
            self._busy = True
            os.eventfd_write(self._more, 1)
            while self._serving and self._busy and self._time_left() > 0:
                self._idle.wait(min(self._time_left(), PATIENCE))

    def close(self) -> None:
        """Write the kept output, waiting for the reader unless aborted, and end the thread."""
        self.stop()
        super().close()
        with self._writing:
            self._left = bytes(self._emergency) + self._left
            self._emergency.clear()
            if self._out is not None:
                self._write_out(self._out)
                self._out.close()
                self._out = None
        os.close(self._more)

    def _write_out(self, out: Outlet) -> None:
        poll = select.poll()
        poll.register(out, select.POLLOUT)
        while (before := self._left) and (patience := self._time_left()) > 0:
            if poll.poll(patience * 1000):
                self._left = self._write(before)
                if self._left == before:  # another writer was quicker
                    time.sleep(_BREATH)

    def offer(self, keys: bytes) -> bool:
        """Type ``keys`` before further input. Without room, type none and return False. Any thread."""
        with self._idle:
            if not self._reading or len(self._offered) + len(keys) > PART:
                return False
            self._offered += keys
            # Only while the worker reads: later the descriptor is closed, and its number may be reused.
            os.eventfd_write(self._more, 1)
        return True

    def _time_left(self) -> float:
        """Return the seconds to wait before the next check; 0 at the end."""
        with self._idle:
            return PATIENCE if self._give_up_at is None else max(0.0, self._give_up_at - time.monotonic())

    def _leave(self) -> None:
        with self._idle:
            self._serving = self._reading = False
            self._idle.notify_all()

    # -- in the worker's thread: from the guest

    def _go_on(self) -> None:
        os.eventfd_read(self._more)
        if self._queues[TX].ready:
            self._from_guest()
        if self._queues[RX].ready:
            self._to_guest()

    def _from_guest(self) -> None:
        queue = self._queues[TX]
        for _ in range(_BATCH):
            if queue.leaving or not self._put():
                break
            if self._chain is None:
                self._chain, self._offset = queue.pop(), 0
            if self._chain is not None:
                self._take(queue, self._chain)
            elif queue.arm():
                with self._idle:
                    self._busy = False
                    self._idle.notify_all()
                break
        else:
            os.eventfd_write(self._more, 1)
        queue.interrupt()

    def _take(self, queue: Queue, chain: Chain) -> None:
        try:
            self._left = chain.read(self._offset, PART)
        except ChainFault as fault:
            self.complaints.warn("output_lost", reason=str(fault))
            self._offset = chain.readable_size
        self._offset += len(self._left)
        if self._offset >= chain.readable_size:
            self._finish(queue, chain)

    def _finish(self, queue: Queue, chain: Chain) -> None:
        self._chain = None
        queue.push(chain)

    def _put(self) -> bool:
        """Write pending output until the reader would block; False in that case."""
        with self._writing:
            while before := self._left:
                self._left = self._write(before)
                if self._left == before and self._out is not None:
                    self._worker.add(self._out.fileno(), lambda _events: self._taken(), select.EPOLLOUT)
                    return False
            self._put_emergency()
        return True

    def _taken(self) -> None:
        if self._out is not None:
            self._worker.remove(self._out.fileno())
        self._from_guest()

    def _put_emergency(self) -> None:
        if self._emergency:
            self._emergency[:] = self._write(bytes(self._emergency))

    def _write(self, data: bytes) -> bytes:
        """Write without waiting. Returns the unwritten rest, or nothing without a reader."""
        if self._out is None or self._broken:
            return b""
        try:
            return data[self._out.write(data) :]
        except OSError as error:
            self._broken = True
            self.unheard(error)
            return b""

    # -- in the worker's thread: to the guest

    def _to_guest(self) -> None:
        queue = self._queues[RX]
        for _ in range(_BATCH):
            if queue.leaving or (not self._typed and not self._read()):
                break
            buffer = queue.pop()
            if buffer is None:
                if queue.arm():
                    break
                continue
            queue.push(buffer, self._give(buffer))
        else:
            os.eventfd_write(self._more, 1)
        queue.interrupt()

    def _give(self, buffer: Chain) -> int:
        try:
            given = buffer.write(0, self._typed)
        except ChainFault as fault:
            self.complaints.warn("input_delayed", reason=str(fault))
            return 0
        self._typed = self._typed[given:]
        return given

    def _read(self) -> bool:
        """Read input, or start to wait for it. Returns whether there is some."""
        with self._idle:
            self._typed = bytes(self._offered)
            self._offered.clear()
        if self._typed:
            return True
        source = self._source
        if source is None:
            return False
        poll = select.poll()
        poll.register(source, select.POLLIN)
        if not poll.poll(0):
            self._worker.add(source, lambda _events: self._arrived(source))
            return False
        with contextlib.suppress(OSError):
            self._typed = os.read(source, PART)
        if not self._typed:
            self._source = None
        return bool(self._typed)

    def _arrived(self, source: int) -> None:
        self._worker.remove(source)
        self._to_guest()
