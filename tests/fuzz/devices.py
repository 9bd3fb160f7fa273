# SPDX-License-Identifier: Apache-2.0
"""Fuzz targets in Python, one for each device: the device behind its transport, and a driver that may do anything.

The first bytes of an input choose the device's options and the features its driver accepts. Steps follow: correct
and wrong requests, words written over rings, registers, pages closed to the host, actions of the host,
resets, saved states. The invariants are checked after each step. At the end the device must serve a driver that
follows the specification, and must have released every descriptor and thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final
from unittest import mock

from pyvmm.devices import virtio
from pyvmm.devices.virtio import device as device_module
from pyvmm.devices.virtio import net, vsock_table
from pyvmm.devices.virtio.device import Feature
from pyvmm.devices.virtio.registers import CONFIG, Register, Status
from pyvmm.errors import UsageError
from tests.fuzz import guided, hosts
from tests.fuzz.hosts import HOSTS
from tests.fuzz.stepped import Stepped, stepped
from tests.memory_helper import BASE
from tests.twin_virtqueue import AVAILABLE, DESCRIPTOR, INDIRECT, NEXT, USED, WRITE, Fault
from tests.virtio_board import RUNNING, Board
from tests.virtqueue_rig import HALF, PAGE, SIZE, Guest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fuzz.fuzzer import Result
    from tests.fuzz.hosts import Host

TARGETS: Final = tuple(HOSTS)
ENTRIES: Final = 8
TABLES, DATA = BASE + 8 * PAGE, BASE + 10 * PAGE
_WATCHED: Final = Path(str(virtio.__file__)).parent
_PLACES: Final = (
    DATA, DATA + PAGE, BASE, TABLES, BASE + HALF - 8, BASE + SIZE - 8, BASE + SIZE, 0x0A00_0050, 0, (1 << 64) - 8,
)  # fmt: skip
_LENGTHS: Final = (64, 16, 1, 0, 512, 4096, 9000, 1 << 20, 1 << 31, 0xFFFF_FFFF)
_REGISTERS: Final = tuple(offset for name, offset in vars(Register).items() if name.isupper())
_VALUES: Final = (0, 1, 2, 3, 4, 8, 15, 128, 255, 65535, 0xFFFF_FFFF, 1 << 31)
#: Limits on the socket device's connections and answers, small enough for an input to reach them.
_FEW: Final = 6


class Input:
    """Bytes, then zeros."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def left(self) -> int:
        return len(self._data) - self._at

    def u8(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def u16(self) -> int:
        return self.u8() | self.u8() << 8

    def u32(self) -> int:
        return self.u16() | self.u16() << 16


class Log:
    """In the place of the devices' log: only counts."""

    def __init__(self) -> None:
        self.warnings = 0

    def info(self, _event: str, **_values: object) -> None:
        pass

    def warning(self, _event: str, **_values: object) -> None:
        self.warnings += 1

    def error(self, event: str, **values: object) -> None:
        raise AssertionError(f"{event}: {values}")


class Play:
    """One input's device."""

    def __init__(self, guest: Guest, host: Host, input: Input) -> None:
        self.guest, self.host, self.input = guest, host, input
        made, how = input.u8(), input.u8()
        self.packed, event_idx, indirect, private = (bool(how & 1 << bit) for bit in range(4))
        self.features = Feature.VERSION_1 | Feature.RING_PACKED * self.packed | Feature.EVENT_IDX * event_idx
        self.features |= Feature.INDIRECT_DESC * indirect | Feature.ACCESS_PLATFORM * private
        device = host.make(made)
        self.features |= device.features & (0 if how & 0x10 else 0xFF_FFFF)
        self.board = Board(guest, device, private=private)
        self.next: list[tuple[int, int]] = []
        if not how & 0x20:
            self.drive(self.features)

    # -- what drivers do

    def drive(self, features: int) -> bool:
        """Set up all queues correctly, with rings of zeros, and start. Returns whether the features were granted."""
        board = self.board
        queues = len(board.transport.queues)
        if not board.negotiate(features):
            return False
        with guided.unwatched():
            for number in range(queues):
                at = BASE + number * PAGE
                self.write(at, bytes(PAGE))
                board.set_queue(number, ENTRIES, at, at + 0x400, at + 0x800)
        self.next = [(0, 1)] * queues
        board.store(Register.STATUS, RUNNING)
        return True

    def write(self, gpa: int, data: bytes) -> None:
        # The guest's CPUs may write anywhere, except to a page that is closed to the host.
        with contextlib.suppress(Fault):
            self.guest.write(gpa, data)

    def offer(self, number: int, segments: list[tuple[int, int, int]]) -> None:
        """Make a chain of (gpa, size, flags) available, at the next entries of the ring."""
        at, (slot, wrap) = BASE + number * PAGE, self.next[number]
        last = len(segments) - 1
        if self.packed:
            entries = []
            for place, (gpa, size, flags) in enumerate(segments):
                flags |= (AVAILABLE if wrap else USED) | NEXT * (place < last)
                entries.append((at + DESCRIPTOR * slot, struct.pack("<QIHH", gpa, size, number, flags)))
                slot, wrap = (0, wrap ^ 1) if slot + 1 == ENTRIES else (slot + 1, wrap)
            self.next[number] = slot, wrap
            for where, entry in reversed(entries):  # the first, written last, makes all available
                self.write(where, entry)
            return
        head = slot * 4 % ENTRIES
        for place, (gpa, size, flags) in enumerate(segments):
            flags |= NEXT * (place < last)
            entry = struct.pack("<QIHH", gpa, size, flags, (head + place + 1) % ENTRIES)
            self.write(at + DESCRIPTOR * ((head + place) % ENTRIES), entry)
        self.write(at + 0x404 + 2 * (slot % ENTRIES), struct.pack("<H", head))
        self.next[number] = slot + 1 & 0xFFFF, wrap
        self.write(at + 0x402, struct.pack("<H", slot + 1 & 0xFFFF))

    def request(self) -> None:
        """Make a correct request, and kick."""
        number, data, room = self.host.request(self.input)
        if number >= len(self.next):
            return
        self.write(DATA, data)
        segments = [(DATA, len(data), 0)] * bool(data) + [(DATA + 4 * PAGE, room, WRITE)] * bool(room)
        if segments:
            self.offer(number, segments)
            self.board.store(Register.QUEUE_NOTIFY, number)

    def place(self) -> int:
        which = self.input.u8()
        return _PLACES[which % len(_PLACES)] + (self.input.u8() if which & 0x80 else 0) & (1 << 64) - 1

    def length(self) -> int:
        which = self.input.u8()
        return _LENGTHS[which % len(_LENGTHS)] if which < 0xF0 else self.input.u16()

    # -- steps

    def step(self) -> None:
        input, board = self.input, self.board
        match input.u8() % 14:
            case 0 | 1 | 2:
                self.request()
            case 3:
                for worker in tuple(Stepped.live):
                    worker.turn()
            case 4:
                self.host.act(input)
            case 5:
                how = input.u8()
                count, readable = 1 + (how & 3), how >> 2 & 3
                flags = INDIRECT if how & 0x80 else 0
                segments = [(self.place(), self.length(), flags | WRITE * (each >= readable)) for each in range(count)]
                if (number := how >> 4 & 7) < len(self.next):
                    self.offer(number, segments)
            case 6:
                where = input.u16()
                self.write(BASE + where % (5 * PAGE // 2) * 2, struct.pack("<H", input.u16()))
            case 7:
                gpa = (TABLES if input.u8() & 1 else DATA) + 16 * (input.u8() % 128)
                self.write(gpa, struct.pack("<QIHH", self.place(), self.length(), input.u8(), input.u8()))
            case 8:
                self.guest.close_pages(self.guest.closed ^ {input.u8() % 20})
            case 9:
                board.store(Register.QUEUE_NOTIFY, input.u8() % 8)
            case 10:
                where, how = input.u16() % 0x208, input.u8()
                value = _VALUES[how >> 2 & 15] if how >> 2 & 15 < len(_VALUES) else input.u32()
                size = 1 << (how & 3)
                match how >> 6:  # a register as wide as they are, configuration, or anything
                    case 0 | 1:
                        where, size = _REGISTERS[where % len(_REGISTERS)], 4
                    case 2:
                        where = CONFIG + where % 0x44
                board.load(where, size)
                board.store(where, value, size)
            case 11:
                if self.drive(self.features ^ (input.u32() & 0xFF_FFFF if input.u8() & 3 == 0 else 0)):
                    self.write(DATA, bytes(PAGE))
            case 12:
                self.save(load=bool(input.u8() & 1))
            case _:
                board.store(Register.STATUS, input.u8())

    def save(self, *, load: bool) -> None:
        """Save it as it stands, and go on: as it was, or as another that was made from what was saved."""
        transport, saved = self.board.transport, None
        transport.pause()
        with contextlib.suppress(UsageError):
            saved = transport.save()
        transport.resume()
        if load and saved is not None:
            self.board.store(Register.STATUS, 0)
            with contextlib.suppress(UsageError):
                transport.load(json.loads(json.dumps(saved)))

    def check(self) -> None:
        self.host.check()
        transport = self.board.transport
        for queue in transport.queues:
            assert not queue.native.error or queue.problem
        assert len(Stepped.live) < 8

    def end(self) -> None:
        """Have the device be of use again."""
        self.guest.close_pages(())
        assert self.drive(Feature.VERSION_1 | self.features & (Feature.ACCESS_PLATFORM | Feature.RING_PACKED))
        for _ in range(2):
            for worker in tuple(Stepped.live):
                worker.turn()
        assert self.board.status == Status(RUNNING)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def play(guest: Guest, host: Host, log: Log, data: bytes) -> None:
    """Try one input. Whatever it raises is a fault."""
    guest.close_pages(())
    for address in (BASE, BASE + HALF):
        ctypes.memset(guest.memory.hva(address), 0, HALF)
    Stepped.live.clear()
    log.warnings = 0
    before = _descriptors(), threading.active_count()
    input = Input(data)
    play = Play(guest, host, input)
    try:
        while input.left() > 0:
            play.step()
            play.check()
        play.end()
    finally:
        host.leave()
        play.board.close()
        host.end()
    # Of the device and what is behind it, each with a few at once.
    assert log.warnings <= 2 * device_module.Complaints.BURST
    assert (_descriptors(), threading.active_count()) == before, "it has kept descriptors or threads"


@contextlib.contextmanager
def _target(name: str) -> Iterator[tuple[Guest, Host, Log]]:
    log = Log()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyvmm-fuzz-")))
        stack.enter_context(stepped())
        for logging in (device_module, net):
            stack.enter_context(mock.patch.object(logging, "log", log))
        for module in (vsock_table, hosts):
            stack.enter_context(mock.patch.object(module, "MOST_STREAMS", _FEW))
            stack.enter_context(mock.patch.object(module, "MOST_REFUSALS", _FEW))
        guest = Guest()
        stack.callback(guest.close)
        host = HOSTS[name](folder, guest)
        stack.callback(host.close)
        yield guest, host, log


def run(target: str, inputs: Path, seconds: float, seed: int, keep: Path | None = None) -> Result:
    """Fuzz one device, as :func:`tests.fuzz.fuzzer.run` does."""
    with _target(target) as (guest, host, log):
        return guided.run(target, lambda data: play(guest, host, log, data), _WATCHED, inputs, seconds, seed, keep)
