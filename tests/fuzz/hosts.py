# SPDX-License-Identifier: Apache-2.0
"""The surroundings of each fuzzed device: its constructor, the requests of its driver, the host's other end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyvmm._native import lib
from pyvmm.devices.virtio.balloon import VirtioBalloon
from pyvmm.devices.virtio.blk import VirtioBlk
from pyvmm.devices.virtio.console import F_SIZE, MOST_KEPT, PART, VirtioConsole
from pyvmm.devices.virtio.device import VirtioDevice
from pyvmm.devices.virtio.disk import DiskFile
from pyvmm.devices.virtio.net import VirtioNet
from pyvmm.devices.virtio.netbackend import NetBackend, NetFeature
from pyvmm.devices.virtio.rng import VirtioRng
from pyvmm.devices.virtio.vsock import VirtioVsock
from pyvmm.devices.virtio.vsock_packet import CID_HOST, OP_RW, STREAM, Header
from pyvmm.devices.virtio.vsock_table import MOST_REFUSALS, MOST_STREAMS
from tests.memory_helper import BASE
from tests.virtqueue_rig import PAGE, SIZE, Guest

if TYPE_CHECKING:
    from tests.fuzz.devices import Input

CID, PORT = 3, 5000
SECTORS: Final = 64


class Host:
    """The host of the entropy device, which has no other end. Hosts of other devices override methods.

    One host serves all inputs. :meth:`make` begins an input; :meth:`end` is called after the device was closed.
    """

    device: VirtioDevice

    def __init__(self, folder: Path, guest: Guest) -> None:
        self.folder, self.guest = folder, guest

    def make(self, how: int) -> VirtioDevice:  # noqa: ARG002
        self.device = VirtioRng()
        return self.device

    def request(self, input: Input) -> tuple[int, bytes, int]:
        """Return a driver's request: its queue, the bytes to read, and how many bytes may be written."""
        return 0, b"", input.u16() % 9000

    def act(self, input: Input) -> None:
        """Do something on the host's end."""

    def check(self) -> None:
        """Check the invariants between two steps."""

    def take(self) -> None:
        """Read the device's output at the host's end, so that the device need not wait."""

    def leave(self) -> None:
        """Close the host's end before the device is closed: closing may wait for its reader."""

    def end(self) -> None:
        """Close what was opened for this device."""

    def close(self) -> None:
        """Close everything else."""


class BalloonHost(Host):
    balloon: VirtioBalloon

    def make(self, how: int) -> VirtioDevice:
        ram = range(BASE, BASE + SIZE)
        self.device = self.balloon = VirtioBalloon(self.guest.memory, ram, how % 32 * PAGE)
        return self.device

    def request(self, input: Input) -> tuple[int, bytes, int]:
        queue, count = input.u8() % 6, input.u8() % 32
        pages = (BASE // PAGE + input.u8() % 40 if input.left() else input.u32() for _ in range(count))
        return queue, struct.pack(f"<{count}I", *pages), input.u16() if queue > 1 else 0

    def act(self, input: Input) -> None:
        self.balloon.hold(input.u8() % 33 * PAGE)

    def check(self) -> None:
        assert self.balloon.actual <= SIZE


class ConsoleHost(Host):
    console: VirtioConsole

    def make(self, how: int) -> VirtioDevice:
        self._mine = [*os.pipe2(os.O_NONBLOCK), *os.pipe2(os.O_NONBLOCK)]
        self._out, out, source, self._typed = self._mine
        fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, 4096)
        size = (80, 25) if how & 1 else None
        self.device = self.console = VirtioConsole(None if how & 2 else out, None if how & 4 else source, size=size)
        return self.device

    def request(self, input: Input) -> tuple[int, bytes, int]:
        queue = input.u8()
        return (1, bytes(input.u16() % 6000), 0) if queue & 1 else (0, b"", input.u16() % 5000)

    def act(self, input: Input) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            match input.u8() % 6:
                case 0 if self._typed in self._mine:
                    os.write(self._typed, bytes(input.u16() % 5000))
                case 1 if self._out in self._mine:
                    os.read(self._out, 1 << 16)
                case 2 if self.console.features & F_SIZE:
                    self.console.resize(input.u32(), input.u32())
                case 3:
                    self._shut(self._typed)
                case 4:
                    self._shut(self._out)
                case _:
                    self.console.abort()

    def _shut(self, fd: int) -> None:
        if fd in self._mine:
            self._mine.remove(fd)
            os.close(fd)

    def check(self) -> None:
        device = self.console
        assert max(len(device._emergency), len(device._typed)) <= PART
        assert len(device._left) <= PART + MOST_KEPT

    def take(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if self._out in self._mine:
                os.read(self._out, 1 << 16)

    def leave(self) -> None:
        self._shut(self._out)

    def end(self) -> None:
        for fd in self._mine:
            os.close(fd)


class BlkHost(Host):
    disk: VirtioBlk

    def __init__(self, folder: Path, guest: Guest) -> None:
        super().__init__(folder, guest)
        self._path = folder / "disk"

    def make(self, how: int) -> VirtioDevice:
        self._path.write_bytes(bytes(SECTORS * 512))
        disk = DiskFile(str(self._path), read_only=bool(how & 1), lock=False)
        self.device = self.disk = VirtioBlk(disk, queues=1 + (how >> 4) % 3, serial="a disk", private=bool(how & 2))
        self.disk.bounce = bool(how & 4)
        return self.device

    def request(self, input: Input) -> tuple[int, bytes, int]:
        how = input.u8()
        kind = (0, 1, 4, 8, 11, 13, how, 13)[how & 7]
        data = struct.pack("<IIQ", kind, 0, input.u8() % (SECTORS + 4))
        for _ in range(how >> 3 & 3 if kind > 8 else 0):
            data += struct.pack("<QII", input.u8() % (SECTORS + 4), input.u8() % 70, input.u8() & 1)
        if kind == 1:
            data += bytes(512 * (input.u8() & 7))
        return how >> 6, data, 1 + (512 * (input.u8() & 7) if kind == 0 else 20 if kind == 8 else 0)

    def act(self, input: Input) -> None:
        os.truncate(self._path, 512 * (input.u8() % (SECTORS + 1)))

    def check(self) -> None:
        assert self._path.stat().st_size <= SECTORS * 512


class Wire(NetBackend):
    """One end of a socket pair. With frames as datagrams it replaces a tap."""

    def __init__(self, fd: int, kind: int) -> None:
        super().__init__("wire", fd)
        self.kind = kind  # type: ignore[misc]
        if kind == lib.PV_NET_TAP:
            self.offloads = NetFeature.CSUM | NetFeature.GUEST_CSUM | NetFeature.GUEST_TSO4 | NetFeature.HOST_TSO4


class NetHost(Host):
    card: VirtioNet

    def make(self, how: int) -> VirtioDevice:
        self._stream = bool(how & 1)
        kind = socket.SOCK_STREAM if self._stream else socket.SOCK_DGRAM
        self._peer, other = socket.socketpair(socket.AF_UNIX, kind)
        self._peer.setblocking(False)
        other.setblocking(False)
        backend = Wire(other.detach(), lib.PV_NET_STREAM if self._stream else lib.PV_NET_TAP)
        self.device = self.card = VirtioNet(backend, bytes(range(2, 8)))
        return self.device

    def request(self, input: Input) -> tuple[int, bytes, int]:
        queue = input.u8()
        return (1, bytes(input.u16() % 4000), 0) if queue & 1 else (0, b"", input.u16() % 4000)

    def act(self, input: Input) -> None:
        with contextlib.suppress(OSError):
            match input.u8() % 4:
                case 0:
                    self._peer.recv(1 << 17)
                case 1:
                    self._peer.shutdown(socket.SHUT_RDWR)
                case _:
                    frame = bytes(input.u16() % 3000)
                    self._peer.send(struct.pack(">I", len(frame)) + frame if self._stream else frame)

    def end(self) -> None:
        self._peer.close()


class VsockHost(Host):
    vsock: VirtioVsock

    def __init__(self, folder: Path, guest: Guest) -> None:
        super().__init__(folder, guest)
        self._path = str(folder / "v")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{self._path}_{PORT}")
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._programs: list[socket.socket] = []

    def make(self, how: int) -> VirtioDevice:  # noqa: ARG002
        self.device = self.vsock = VirtioVsock(self._path, CID)
        return self.device

    def request(self, input: Input) -> tuple[int, bytes, int]:
        how = input.u8()
        if how & 3 == 0:
            return 0, b"", input.u16() % 5000
        if how & 3 == 1:
            return 2, b"", input.u8()
        op, flags = input.u8() % 10, input.u8()
        size = input.u16() % 4000 if op == OP_RW else 0
        host_port = PORT if how & 4 else (1 << 30) + (how >> 6)
        header = Header(
            CID if how & 8 or how & 0x10 else flags,
            CID_HOST,
            1 + (how >> 5 & 1),
            host_port,
            size,
            STREAM,
            op,
            flags & 3,
            input.u32() if flags & 0x80 else 1 << 16,
            input.u16(),
        )
        return 1, header.pack() + bytes(size), 0

    def act(self, input: Input) -> None:
        how = input.u8()
        program = self._programs[how >> 4 & 3 if how >> 4 & 3 < len(self._programs) else 0] if self._programs else None
        with contextlib.suppress(OSError):
            match how & 7:
                case 0:
                    self._programs.append(self._listener.accept()[0])
                    self._programs[-1].setblocking(False)
                case 1 | 2:
                    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                    self._programs.append(client)
                    client.connect(self._path)
                    client.send(b"CONNECT %d\n" % (1 + (how >> 4 & 1)) if how & 1 else b"CONNECT")
                case 3 | 4 if program is not None:
                    program.send(bytes(input.u16() % 5000))
                case 5 if program is not None:
                    program.recv(1 << 16)
                case 6 if program is not None:
                    program.shutdown(how >> 6 & 1)
                case 7 if program is not None:
                    self._programs.remove(program)
                    program.close()

    def check(self) -> None:
        table = self.vsock._table
        # A stream may be reported again after the queue of streams was full.
        assert len(table) <= MOST_STREAMS
        assert len(table._refusals) <= MOST_REFUSALS
        assert len(table._turns) <= MOST_STREAMS

    def end(self) -> None:
        for program in self._programs:
            program.close()
        self._programs = []
        with contextlib.suppress(BlockingIOError):
            while True:
                self._listener.accept()[0].close()

    def close(self) -> None:
        self._listener.close()


HOSTS: Final[dict[str, type[Host]]] = {
    "rng": Host,
    "balloon": BalloonHost,
    "console": ConsoleHost,
    "disk": BlkHost,
    "card": NetHost,
    "vsock": VsockHost,
}
"""By the name of the target."""
