"""The console: a PL011 whose registers and FIFOs are the native loop's, and the threads that move its bytes.

Owns ``struct pv_pl011`` with both FIFOs, an eventfd and up to two threads: one writes what the guest prints to a file
descriptor, one feeds what arrives on another to the guest. Neither descriptor is closed here.

Output waits up to ``LINGER`` seconds for more before it is written, so that a line costs one wake-up, not one a byte;
when the FIFO is full the vCPU waits until it is drained (:meth:`Pl011.drain`), so nothing is lost and a flood costs
the guest, not the host's memory.
"""

from __future__ import annotations

import os
import select
import threading
from typing import Any

from pyvmm._native import ffi, lib
from pyvmm.devices.base import Device

LINGER = 0.01
TX_BYTES = 1 << 12
RX_BYTES = 1 << 10


class Pl011(Device):
    """Arm PrimeCell UART, DDI 0183; ``out`` and ``source`` are file descriptors or None."""

    name = "pl011"
    compatible = "arm,pl011"
    kind = lib.PV_KIND_PL011

    def __init__(self, out: int | None = None, source: int | None = None) -> None:
        super().__init__()
        self._out, self._source = out, source
        self.state = self._uart = ffi.new("struct pv_pl011 *")
        self._buffers = [self._fifo(self._uart.tx, TX_BYTES), self._fifo(self._uart.rx, RX_BYTES)]
        self._uart.irq_fd = -1
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._uart.tx.wake_fd = self._wake
        self._draining = threading.Lock()
        self._chunk = ffi.new("uint8_t[]", TX_BYTES)
        self._closing = threading.Event()
        self._broken: OSError | None = None
        self._threads: list[threading.Thread] = []

    @staticmethod
    def _fifo(fifo: Any, size: int) -> Any:
        data = ffi.new("uint8_t[]", size)
        fifo.size, fifo.data, fifo.wake_fd = size, data, -1
        return data

    def start(self) -> None:
        """Start moving bytes; call before the first run."""
        jobs = [("pyvmm-console-out", self._write_loop)]
        if self._source is not None:
            jobs.append(("pyvmm-console-in", self._read_loop))
        for name, job in jobs:
            thread = threading.Thread(target=job, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def drain(self) -> int:
        """Write out what the guest has printed; returns the bytes taken. Any thread."""
        with self._draining:
            taken = 0
            while n := lib.pv_fifo_read(ffi.addressof(self._uart, "tx"), self._chunk, TX_BYTES):
                taken += n
                self._put(memoryview(ffi.buffer(self._chunk, n)))
            return taken

    def _put(self, data: memoryview) -> None:
        poll = select.poll()
        if self._out is not None:
            poll.register(self._out, select.POLLOUT)
        poll.register(self._stop_read, select.POLLIN)
        while data and self._out is not None and self._broken is None:
            ready = dict(poll.poll())
            if self._stop_read in ready and self._out not in ready:
                return
            try:
                # POLLOUT promises room for PIPE_BUF bytes; more could block where no stop would be heard.
                data = data[os.write(self._out, data[: select.PIPE_BUF]) :]
            except OSError as error:
                # Whoever read the console has gone. The guest goes on; the run's outcome is not the reader's business.
                self._broken = error

    def _write_loop(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        while not self._closing.is_set():
            if lib.pv_fifo_arm(ffi.addressof(self._uart, "tx")):
                poll.poll()
                os.eventfd_read(self._wake)
            self._closing.wait(LINGER)
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
        """Give the guest ``data`` to read, waiting for room as long as the console is open."""
        done = 0
        while done < len(data) and not self._closing.is_set():
            taken = lib.pv_pl011_feed(self._uart, data[done:], len(data) - done)
            done += taken
            if not taken:
                self._closing.wait(LINGER)

    def abort(self) -> None:
        """Stop waiting for whoever reads the console: what cannot be written at once from now on is lost."""
        if self._wake >= 0:
            self._closing.set()
            os.write(self._stop_write, b"x")

    def close(self) -> None:
        """Write out the rest, waiting for the reader unless aborted, and end the threads."""
        if self._wake < 0:
            return
        self._closing.set()
        os.eventfd_write(self._wake, 1)
        self._join("pyvmm-console-out")
        self.drain()
        os.write(self._stop_write, b"x")
        self._join("pyvmm-console-in")
        for fd in (self._wake, self._stop_read, self._stop_write):
            os.close(fd)
        self._wake = -1

    def _join(self, name: str) -> None:
        for thread in self._threads:
            if thread.name == name:
                thread.join()
