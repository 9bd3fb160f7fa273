# SPDX-License-Identifier: Apache-2.0
"""Output to readers that do not read: no write blocks, and the user's descriptor is unchanged."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
import tty
from collections.abc import Callable, Iterator

import pytest

from pyvmm.devices import pl011
from pyvmm.devices.pl011 import Pl011
from pyvmm.devices.virtio.console import PART, VirtioConsole
from pyvmm.outlet import Outlet
from tests.unit.plain_guest import BASE, PAGE, Segment
from tests.unit.queue_driver import Driver

ODD = 1000
"""Bytes that do not end where a terminal's buffers do, so that it comes to have some room and not enough."""
FLOOD = 20 * PAGE
"""More than a terminal holds for who does not read it, and not so much more than a pipe."""


@contextlib.contextmanager
def ends(kind: str) -> Iterator[tuple[int, int]]:
    """Return the read end and the write end. Both must stay blocking."""
    if kind == "socket":
        left, right = socket.socketpair()
        fds = left.detach(), right.detach()
    elif kind == "pty":
        fds = os.openpty()
        tty.setraw(fds[1])
    else:
        fds = os.pipe()
    yield fds
    assert not any(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK for fd in fds)
    for fd in fds:
        os.close(fd)


def within(seconds: float, work: Callable[[], object]) -> None:
    """Fail if ``work`` takes longer: then it blocks."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive()


def fill(outlet: Outlet) -> bytes:
    """Write until there is no room left."""
    sent = b""
    for size in (PAGE, 1):
        part = bytes(range(256)) * (size // 256) or b"."
        while taken := outlet.write(part):
            sent += part[:taken]
    return sent


@pytest.mark.parametrize("kind", ["pty", "pipe", "socket"])
def test_the_outlet_does_not_wait_for_a_reader_that_later_gets_everything(kind: str) -> None:
    before = os.listdir("/proc/self/fd")
    with ends(kind) as (reader, writer):
        outlet = Outlet(writer)
        sent: list[bytes] = []
        within(20, lambda: sent.append(fill(outlet)))
        got = b""
        while len(got) < len(sent[0]):
            got += os.read(reader, 1 << 16)
        assert got == sent[0]
        assert outlet.write(b"more") == 4
        outlet.close()
        outlet.close()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("kind", ["pty", "pipe"])
def test_a_file_that_cannot_be_reopened_is_written_one_byte_at_a_time(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, _flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    with ends(kind) as (reader, writer):
        outlet = Outlet(writer)
        assert outlet.write(b"ab") == 1
        within(20, lambda: fill(outlet))
        assert os.read(reader, 1) == b"a"
        outlet.close()


def test_the_master_of_a_terminal_is_not_reopened_as_another_terminal() -> None:
    with ends("pty") as (master, slave):
        outlet = Outlet(master)
        assert outlet.write(b"keys") == 1
        assert os.read(slave, 16) == b"k"
        outlet.close()


def test_a_reader_that_has_gone_is_an_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    outlet = Outlet(writer)
    with pytest.raises(BrokenPipeError):
        outlet.write(b"x")
    outlet.close()
    os.close(writer)


# ---- the consoles


def test_a_virtio_console_on_an_unread_terminal_pauses_at_once() -> None:
    with ends("pty") as (_, terminal):
        console = VirtioConsole(terminal)
        with Driver(console) as driver:
            driver.write(BASE + 0x1_0000, b"x" * FLOOD)
            for at in range(0, FLOOD, PAGE):
                driver.rings[1].give(Segment(BASE + 0x1_0000 + at, PAGE))
            driver.until(lambda: bool(console._left))
            for _ in range(PART):
                within(20, lambda: console.write_config(8, b"!"))
            within(20, console.pause)
            within(20, console.resume)
            within(20, console.stop)
            console.abort()


def test_a_pl011_on_an_unread_terminal_ends_when_ordered() -> None:
    with ends("pty") as (_, terminal):
        console = Pl011(terminal)
        console.start()
        fifo = console._uart.tx
        stuck = threading.Event()

        def guest() -> None:
            while not stuck.is_set():
                fifo.head += min(fifo.size - (fifo.head - fifo.tail), ODD)
                os.eventfd_write(console._wake, 1)
                console.wait_for_room(stuck.is_set)

        printing = threading.Thread(target=guest)
        printing.start()
        # The byte was taken from the guest, and the terminal has no room for it.
        time.sleep(0.2)
        stuck.set()
        console.wake()
        printing.join()
        console.abort()
        within(20, console.drain)
        within(20, console.close)


def test_a_faster_writer_on_the_same_terminal_does_not_keep_a_pl011_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pl011, "PATIENCE", 0.01)
    monkeypatch.setattr(Outlet, "write", lambda _self, _data: 0)
    with ends("pipe") as (_, writer):
        console = Pl011(writer)
        console._uart.tx.head = 5
        console.abort()
        within(20, console.close)
