# SPDX-License-Identifier: Apache-2.0
"""Devices without a guest: the bus refuses overlaps, the console loses nothing, echo refuses unshared pages."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm import abi
from pyvmm._native import ffi, lib
from pyvmm.devices.bus import Bus
from pyvmm.devices.echo import Echo
from pyvmm.devices.exit_targets import ExitTargets
from pyvmm.devices.mailbox import Mailboxes
from pyvmm.devices.pl011 import Pl011
from pyvmm.devices.share_bell import ShareBell
from pyvmm.errors import GuestMemoryError, UsageError
from pyvmm.memory.address import Gpa
from pyvmm.memory.ledger import PageState
from pyvmm.memory.relay import ShareEvent, ShareRelay, ShareSource


def test_the_bus_refuses_overlapping_devices_by_name() -> None:
    bus = Bus(ffi.new("struct pv_vm *"))
    bus.add(Mailboxes(4), 0x920_0000)
    with pytest.raises(UsageError, match=r"share-doorbell at \[0x920_3000, 0x920_4000\) overlaps mailbox"):
        bus.add(ShareBell(), 0x920_3000)


def test_the_published_table_is_sorted_and_names_every_part() -> None:
    vm = ffi.new("struct pv_vm *")
    bus = Bus(vm)
    bench = ExitTargets()
    bus.add(bench, 0x930_0000)
    bus.add(ShareBell(), 0x910_0000)
    bus.publish()
    table = vm.bus
    assert [table.ranges[i].base for i in range(table.count)] == [
        0x910_0000,
        0x930_0000,
        0x930_1000,
        0x930_2000,
        0x930_3000,
    ]
    bus.close()
    assert vm.bus == ffi.NULL


def _print(uart: Any, text: bytes) -> None:
    """Do what the loop does for a store to DR, one byte at a time."""
    fifo = uart.tx
    for byte in text:
        fifo.data[fifo.head % fifo.size] = byte
        fifo.head += 1
        if fifo.armed:
            fifo.armed = 0
            os.eventfd_write(fifo.wake_fd, 1)


def test_console_output_arrives_whole_and_in_order() -> None:
    reader, writer = os.pipe()
    console = Pl011(out=writer)
    console.start()
    text = bytes(range(256)) * 60
    _print(console.state, text)
    console.close()
    os.close(writer)
    got = b""
    while chunk := os.read(reader, 1 << 16):
        got += chunk
    os.close(reader)
    assert got == text


def test_a_full_console_makes_its_guest_wait_for_room_and_loses_nothing() -> None:
    reader, writer = os.pipe()
    console = Pl011(out=writer)
    console.start()
    text = bytes(range(256)) * 1024  # more than the FIFO and the pipe hold together
    printed = threading.Event()

    def guest() -> None:
        for byte in text:
            while console._uart.tx.head - console._uart.tx.tail >= console._uart.tx.size:
                console.wait_for_room(lambda: False)
            _print(console.state, bytes([byte]))
        printed.set()

    threading.Thread(target=guest, daemon=True).start()
    assert not printed.wait(0.3)  # nobody reads yet
    got = b""
    while len(got) < len(text):
        got += os.read(reader, 1 << 16)
    assert printed.wait(5)
    assert got == text
    console.close()
    os.close(writer)
    os.close(reader)


def test_a_guest_that_waits_for_a_reader_can_be_interrupted() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"x" * 4096):
            pass
    console = Pl011(out=writer)
    console.start()
    leave = threading.Event()

    def guest() -> None:
        while not leave.is_set():
            _print(console.state, b"x" * (console._uart.tx.size - (console._uart.tx.head - console._uart.tx.tail)))
            console.wait_for_room(leave.is_set)

    waiting = threading.Thread(target=guest, daemon=True)
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    leave.set()
    console.wake()
    waiting.join(5)
    assert not waiting.is_alive()
    started = time.monotonic()
    console.abort()
    console.close()
    assert time.monotonic() - started < 5
    os.close(reader)
    os.close(writer)


def test_an_abort_during_the_close_uses_no_closed_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Pl011()
    aborting = threading.Thread(target=console.abort)
    close, closed, errors = os.close, [], []  # type: ignore[var-annotated]
    monkeypatch.setattr(threading, "excepthook", errors.append)

    def closing(fd: int) -> None:
        close(fd)
        closed.append(fd)
        if len(closed) == 3:
            aborting.start()
            aborting.join(0.2)

    monkeypatch.setattr(os, "close", closing)
    console.close()
    aborting.join(5)
    assert (len(closed), errors) == (3, [])


def test_output_that_cannot_be_written_is_reported() -> None:
    told: list[OSError] = []
    with open("/dev/full", "wb") as full:
        console = Pl011(out=full.fileno(), unheard=told.append)
        console.start()
        _print(console.state, b"into the void")
        console.close()
    assert [error.errno for error in told] == [errno.ENOSPC]


def test_a_closed_reader_is_reported_once() -> None:
    told: list[OSError] = []
    reader, writer = os.pipe()
    os.close(reader)
    console = Pl011(out=writer, unheard=told.append)
    console.start()
    _print(console.state, b"nobody listens")
    console.drain()
    _print(console.state, b"still not")
    console.close()
    assert [type(error) for error in told] == [BrokenPipeError]
    os.close(writer)


def test_console_input_reaches_the_guests_fifo() -> None:
    reader, writer = os.pipe()
    console = Pl011(out=None, source=reader)
    console.start()
    os.write(writer, b"hi")
    taken = ffi.new("uint8_t[]", 8)
    got = b""
    deadline = time.monotonic() + 5
    while len(got) < 2 and time.monotonic() < deadline:
        n = lib.pv_fifo_read(ffi.addressof(console._uart, "rx"), taken, 8)
        got += bytes(ffi.buffer(taken, n))
    assert got == b"hi"
    console.close()
    os.close(writer)
    os.close(reader)


class FakeMemory:
    """RAM of four pages at 0x8000_0000, some of them closed to the host."""

    def __init__(self) -> None:
        self.bytes = bytearray(4 * 4096)
        self.closed: set[int] = set()

    def contains(self, gpa: int, size: int) -> bool:
        return gpa >= 0x8000_0000 and gpa + size <= 0x8000_4000

    def _at(self, gpa: int) -> int:
        if gpa & -4096 in self.closed:
            raise GuestMemoryError("test", gpa, 0, "private")
        return gpa - 0x8000_0000

    def read(self, gpa: int, n: int) -> bytes:
        at = self._at(gpa)
        return bytes(self.bytes[at : at + n])

    def write(self, gpa: int, data: bytes) -> None:
        at = self._at(gpa)
        self.bytes[at : at + len(data)] = data


class FakeLedger:
    """States set by hand."""

    def __init__(self) -> None:
        self.states: dict[int, PageState] = {}

    def state(self, gpa: int) -> PageState:
        return self.states.get(gpa & -4096, PageState.PRIVATE)

    def set(self, gpa: int, state: PageState) -> None:
        self.states[gpa] = state


@pytest.fixture
def echo() -> Any:
    memory, ledger = FakeMemory(), FakeLedger()
    relay = ShareRelay(ffi.new("struct pv_vm *"), ledger)  # type: ignore[arg-type]
    return SimpleNamespace(
        device=Echo(memory, relay),  # type: ignore[arg-type]
        memory=memory,
        ledger=ledger,
        relay=relay,
    )


PAGE = Gpa(0x8000_1000)


def _share(echo: Any, shared: bool) -> None:
    echo.ledger.states[PAGE] = PageState.SHARED if shared else PageState.PRIVATE
    echo.relay.deliver(ShareEvent(shared, PAGE, 1, ShareSource.DOORBELL, 0))


def _store(echo: Any, register: int, value: int) -> int:
    echo.device.write(register, 8, value, 0)
    status: int = echo.device.read(abi.ECHO_STATUS, 8, 0)
    return status


def test_echo_answers_through_a_shared_page(echo: Any) -> None:
    _share(echo, True)
    assert _store(echo, abi.ECHO_PAGE, PAGE) == abi.ECHO_OK
    echo.memory.write(PAGE, b"hello")
    assert _store(echo, abi.ECHO_REQUEST, 5) == abi.ECHO_OK
    assert echo.memory.read(PAGE + 2048, 5) == b"HELLO"
    assert echo.device.read(abi.ECHO_COUNT, 8, 0) == 1


@pytest.mark.parametrize(
    ("gpa", "status"),
    [
        (PAGE, abi.ECHO_NOT_SHARED),
        (PAGE + 8, abi.ECHO_BAD),
        (0x7FFF_F000, abi.ECHO_BAD),
        (0x8000_4000, abi.ECHO_BAD),
        ((1 << 64) - 4096, abi.ECHO_BAD),
    ],
)
def test_echo_refuses_any_page_it_may_not_use(echo: Any, gpa: int, status: int) -> None:
    assert _store(echo, abi.ECHO_PAGE, gpa) == status
    assert echo.device.page == 0


def test_echo_releases_an_unshared_page(echo: Any) -> None:
    _share(echo, True)
    assert _store(echo, abi.ECHO_PAGE, PAGE) == abi.ECHO_OK
    _share(echo, False)
    assert _store(echo, abi.ECHO_REQUEST, 5) == abi.ECHO_NO_PAGE


def test_echo_survives_a_guest_that_only_claims_to_share(echo: Any) -> None:
    _share(echo, True)
    assert _store(echo, abi.ECHO_PAGE, PAGE) == abi.ECHO_OK
    echo.memory.closed.add(PAGE)
    assert _store(echo, abi.ECHO_REQUEST, 5) == abi.ECHO_NOT_SHARED
    assert _store(echo, abi.ECHO_REQUEST, 5) == abi.ECHO_NO_PAGE


def test_echo_refuses_a_request_longer_than_half_a_page(echo: Any) -> None:
    _share(echo, True)
    _store(echo, abi.ECHO_PAGE, PAGE)
    assert _store(echo, abi.ECHO_REQUEST, 2049) == abi.ECHO_BAD
    assert _store(echo, abi.ECHO_REQUEST, (1 << 64) - 1) == abi.ECHO_BAD


def test_the_loop_stops_at_shares_only_while_a_device_subscribes(echo: Any) -> None:
    assert echo.relay.native.subscribers == 0
    _share(echo, True)
    _store(echo, abi.ECHO_PAGE, PAGE)
    assert echo.relay.native.subscribers == 1
    _store(echo, abi.ECHO_PAGE, PAGE)
    assert echo.relay.native.subscribers == 1
    _share(echo, False)
    assert echo.relay.native.subscribers == 0
    _store(echo, abi.ECHO_PAGE, PAGE)
    assert echo.device.read(abi.ECHO_STATUS, 8, 0) == abi.ECHO_NOT_SHARED
    assert echo.relay.native.subscribers == 0


@pytest.mark.parametrize("kind", ["pl011", "mailbox", "bench", "share-doorbell"])
def test_a_restored_device_continues_with_the_saved_state(kind: str) -> None:
    def make() -> Any:
        kinds: dict[str, Callable[[], Any]] = {
            "pl011": Pl011,
            "mailbox": lambda: Mailboxes(2),
            "bench": ExitTargets,
            "share-doorbell": ShareBell,
        }
        return kinds[kind]()

    one, other = make(), make()
    with contextlib.closing(one), contextlib.closing(other):
        match one:
            case Pl011():
                one._uart.imsc, one._uart.ibrd = 0x10, 13
                one._uart.rx.head = one._uart.rx.tail = (1 << 32) - 2
                one.feed(b"ty")
                assert one.send_break(b"ped")
            case Mailboxes():
                one._boxes[1].order[3], one._boxes[1].note[0] = 7, 9
            case ExitTargets():
                one._registers[5], one._counter[0], one.cold = 1, 2, 3
        saved = json.loads(json.dumps(one.save()))
        assert other.save() != saved or kind == "share-doorbell"
        other.load(saved)
        assert other.save() == saved
        if kind == "pl011":
            assert other._uart.level == 1


def test_a_paused_console_gives_the_guest_nothing_to_read() -> None:
    source, typist = os.pipe()
    console = Pl011(source=source)
    console.start()
    console.pause()
    os.write(typist, b"x")
    assert not console.offer(b"y")
    time.sleep(0.05)
    assert console.save()["rx"] == ""
    console.resume()
    deadline = time.monotonic() + 20
    while console.save()["rx"] != b"x".hex() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert console.save()["rx"] == b"x".hex()
    console.pause()
    os.write(typist, b"z")
    console.close()
    os.close(source)
    os.close(typist)


def test_a_break_reaches_the_guest_between_the_keys_around_it() -> None:
    with contextlib.closing(Pl011()) as console:
        console.feed(b"a")
        assert console.send_break(b"h")
        assert not console.send_break()  # one is waiting
        console.pause()
        assert not console.send_break()
        console.resume()
        saved = console.save()
        assert (saved["rx"], saved["break"]) == (b"a\0h".hex(), 1)
        with contextlib.closing(Pl011()) as other:
            other.load(saved)
            assert other.save() == saved
        console.feed(bytes(1024 - 3))
        assert not console.offer(b"z")


def test_a_full_console_takes_no_break() -> None:
    with contextlib.closing(Pl011()) as console:
        console.feed(bytes(1023))
        assert not console.send_break(b"h")
        assert console.save()["rx"] == bytes(1023).hex()
        assert console.send_break()
