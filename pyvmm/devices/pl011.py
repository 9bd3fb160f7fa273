# SPDX-License-Identifier: Apache-2.0
"""The UART: a PL011 whose registers and FIFOs the native loop serves, and the threads that move its bytes.

Owns ``struct pv_pl011`` with both FIFOs, an eventfd and up to two threads. One writes the guest's output to a file
descriptor. The other passes input from a second descriptor to the guest. Neither descriptor is closed here.

Output waits up to ``LINGER`` seconds for more, so that a line costs one wake-up, not one per byte. When the FIFO is
full, the vCPU waits for room (:meth:`Pl011.wait_for_room`). So nothing is lost, and a flood of output slows the guest
instead of filling host memory. Only the console's own thread waits for a reader, so a vCPU can always be stopped.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

from pyvmm._native import ffi, lib
from pyvmm.devices.base import Device
from pyvmm.errors import UsageError
from pyvmm.outlet import Outlet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from pyvmm._native import Array, pv_fifo

    class HeldLine(Protocol):
        """A level interrupt line for KVM_IRQ_LINE; see pyvmm.machine.irq."""

        @property
        def vm_fd(self) -> int:
            """The VM's descriptor, or -1."""
            ...

        @property
        def irq(self) -> int:
            """The line's number."""
            ...


LINGER = 0.01
PATIENCE = 1.0
TX_BYTES = 1 << 12
RX_BYTES = 1 << 10
REGISTERS = ("cr", "lcr_h", "ibrd", "fbrd", "ifls", "imsc", "ris", "dmacr", "ilpr")


class Pl011(Device):
    """Arm PrimeCell UART, DDI 0183; ``out`` and ``source`` are file descriptors or None, ``line`` its interrupt.

    ``unheard`` is called once, with the reason, when output can no longer be written. Later output is dropped.
    """

    name = "pl011"
    # Linux Documentation/devicetree/bindings/serial/pl011.yaml
    node = "serial"
    compatible = ("arm,pl011", "arm,primecell")
    clocks = ("uartclk", "apb_pclk")
    kind = lib.PV_KIND_PL011

    def __init__(
        self,
        out: int | None = None,
        source: int | None = None,
        unheard: Callable[[OSError], None] = lambda _: None,
        line: HeldLine | None = None,
    ) -> None:
        super().__init__()
        self._unheard = unheard
        self._source = source
        self.state = self._uart = ffi.new("struct pv_pl011 *")
        self._buffers = [self._fifo(self._uart.tx, TX_BYTES), self._fifo(self._uart.rx, RX_BYTES)]
        self._uart.vm_fd = -1
        if line is not None:
            self._uart.vm_fd, self._uart.irq = line.vm_fd, line.irq
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        except OSError:
            os.close(self._stop_read)
            os.close(self._stop_write)
            raise
        self._uart.tx.wake_fd = self._wake
        self._out = None if out is None else Outlet(out)
        self._draining = threading.Lock()
        self._chunk = ffi.new("uint8_t[]", TX_BYTES)
        self._room = threading.Condition()
        self._hurry = threading.Event()
        self._closing = threading.Event()
        self._feeding = threading.Lock()
        # Orders abort and close: the number of a closed descriptor may be reused at once.
        self._ends = threading.Lock()
        self._give_up_at: float | None = None
        self._broken: OSError | None = None
        self._threads: list[threading.Thread] = []

    @staticmethod
    def _fifo(fifo: pv_fifo, size: int) -> Array[int]:
        data = ffi.new("uint8_t[]", size)
        fifo.size, fifo.data, fifo.wake_fd = size, data, -1
        return data

    def start(self) -> None:
        """Start moving bytes. Call it before the first run."""
        jobs = [("pyvmm-console-out", self._write_loop)]
        if self._source is not None:
            jobs.append(("pyvmm-console-in", self._read_loop))
        for name, job in jobs:
            thread = threading.Thread(target=job, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def wait_for_room(self, leave: Callable[[], bool]) -> None:
        """Wait until the transmit FIFO has room, or ``leave()`` is true. Called by a vCPU whose FIFO is full."""
        fifo = self._uart.tx
        self._hurry.set()
        with self._room:
            while (fifo.head - fifo.tail) % (1 << 32) >= fifo.size and not leave():
                self._room.wait()

    def wake(self) -> None:
        """Make every vCPU that waits for room check ``leave()`` again."""
        with self._room:
            self._room.notify_all()

    def drain(self) -> None:
        """Write the guest's pending output, waiting for the reader unless aborted."""
        with self._draining:
            while n := lib.pv_fifo_read(ffi.addressof(self._uart, "tx"), self._chunk, TX_BYTES):
                self.wake()
                self._put(memoryview(ffi.buffer(self._chunk, n)))

    def _put(self, data: memoryview) -> None:
        out = self._out
        while data and out is not None and self._broken is None and self._writable(out):
            try:
                taken = out.write(data)
            except OSError as error:
                self._broken = error
                self._unheard(error)
                return
            data = data[taken:]
            if not taken:  # another writer was quicker
                time.sleep(LINGER)
                if self._give_up_at is not None and time.monotonic() > self._give_up_at:
                    return

    def _writable(self, out: Outlet) -> bool:
        """Wait for the reader: forever, or at most ``PATIENCE`` seconds once aborted."""
        poll = select.poll()
        poll.register(out, select.POLLOUT)
        if self._give_up_at is None:
            poll.register(self._stop_read, select.POLLIN)
            if out.fileno() in dict(poll.poll()):
                return True
            poll.unregister(self._stop_read)
        left = (self._give_up_at or 0) - time.monotonic()
        return bool(poll.poll(max(left, 0) * 1000))

    def _write_loop(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        while not self._closing.is_set():
            if lib.pv_fifo_arm(ffi.addressof(self._uart, "tx")):
                poll.poll()
                os.eventfd_read(self._wake)
            self._hurry.wait(LINGER)
            self._hurry.clear()
            self.drain()

    def _read_loop(self) -> None:
        source = self._source
        if source is None:
            return
        poll = select.poll()
        poll.register(source, select.POLLIN)
        poll.register(self._stop_read, select.POLLIN)
        while not self._closing.is_set():
            ready = dict(poll.poll())
            if self._stop_read in ready:
                return
            try:
                data = os.read(source, RX_BYTES)
            except OSError:
                return
            if not data:
                return
            self.feed(data)

    def feed(self, data: bytes) -> None:
        """Pass ``data`` to the guest, waiting for room while the console is open."""
        done = 0
        while done < len(data) and not self._closing.is_set():
            taken = 0
            if self._feeding.acquire(timeout=LINGER):
                taken = lib.pv_pl011_feed(self._uart, data[done:], len(data) - done)
                self._feeding.release()
            done += taken
            if not taken:
                self._closing.wait(LINGER)

    def offer(self, data: bytes) -> bool:
        """Pass ``data`` to the guest if there is room for it now. Any thread. Not while paused."""
        if not self._feeding.acquire(blocking=False):
            return False
        try:
            fifo = self._uart.rx
            room = fifo.size - (fifo.head - fifo.tail) % (1 << 32)
            return len(data) <= room and bool(lib.pv_pl011_feed(self._uart, data, len(data)) == len(data))
        finally:
            self._feeding.release()

    def send_break(self, keys: bytes = b"") -> bool:
        """Send a BREAK, and ``keys`` right behind it, if there is room for all. Any thread. Not while paused."""
        if not self._feeding.acquire(blocking=False):
            return False
        try:
            fifo = self._uart.rx
            room = fifo.size - (fifo.head - fifo.tail) % (1 << 32)
            if room < 1 + len(keys) or not lib.pv_pl011_break(self._uart):
                return False
            return bool(lib.pv_pl011_feed(self._uart, keys, len(keys)) == len(keys))
        finally:
            self._feeding.release()

    def pause(self) -> None:
        """Stop passing input to the guest. Its output is still written."""
        self._feeding.acquire()

    def resume(self) -> None:
        """Pass input again."""
        self._feeding.release()

    def save(self) -> dict[str, Any]:
        """Return registers and unread input. Output already belongs to the host."""
        fifo = self._uart.rx
        there = (fifo.head - fifo.tail) % (1 << 32)
        waiting = bytes(fifo.data[at % fifo.size] for at in range(fifo.tail, fifo.tail + there))
        broken = (self._uart.break_at - fifo.tail) % (1 << 32) if self._uart.broken else None
        return {name: int(getattr(self._uart, name)) for name in REGISTERS} | {"rx": waiting.hex(), "break": broken}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the state and the interrupt line. Raises UsageError for too much input."""
        from pyvmm.schema import BYTES, NOTHING, U32, Either, check

        check(saved, {**dict.fromkeys(REGISTERS, U32), "rx": BYTES, "break": Either(NOTHING, U32)}, self.name)
        data = bytes.fromhex(saved["rx"])
        for name in REGISTERS:
            setattr(self._uart, name, saved[name])
        if lib.pv_pl011_feed(self._uart, data, len(data)) != len(data):
            raise UsageError(f"{len(data)} bytes of console input were saved, but a console holds at most {RX_BYTES}")
        if saved["break"] is not None:
            self._uart.broken, self._uart.break_at = 1, (self._uart.rx.tail + saved["break"]) % (1 << 32)

    def abort(self) -> None:
        """Stop waiting for the console's reader. Output that it does not read within ``PATIENCE`` seconds is lost."""
        with self._ends:
            if self._wake >= 0 and self._give_up_at is None:
                self._give_up_at = time.monotonic() + PATIENCE
                os.write(self._stop_write, b"x")

    def close(self) -> None:
        """Write out the rest, waiting for the reader unless aborted, and end the threads."""
        if self._wake < 0:
            return
        self._closing.set()
        self._hurry.set()
        os.eventfd_write(self._wake, 1)
        self._join("pyvmm-console-out")
        self.drain()
        os.write(self._stop_write, b"x")
        self._join("pyvmm-console-in")
        with self._ends:
            for fd in (self._wake, self._stop_read, self._stop_write):
                os.close(fd)
            self._wake = -1
        if self._out is not None:
            self._out.close()

    def _join(self, name: str) -> None:
        for thread in self._threads:
            if thread.name == name:
                thread.join()
