# SPDX-License-Identifier: Apache-2.0
"""Both ends of a vsock table in tests: a guest that sends packets, and host programs with real sockets."""

from __future__ import annotations

import select
import socket
from pathlib import Path

from pyvmm.devices.virtio import vsock_packet as vs
from pyvmm.devices.virtio.vsock_packet import Header
from pyvmm.devices.virtio.vsock_table import Table

CID = 3


class Peer:
    """A table with its watched sockets, and a guest that keeps its packets."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "v")
        self.watched: dict[int, int] = {}
        self.table = Table(CID, self.path, self.watch)
        self.got: list[tuple[Header, bytes]] = []

    def watch(self, fd: int, events: int | None) -> None:
        if events is None:
            del self.watched[fd]
        else:
            self.watched[fd] = events

    def listen(self, port: int) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{self.path}_{port}")
        listener.listen(64)
        listener.settimeout(5)
        return listener

    def send(self, op: int, port: int, to: int, payload: bytes = b"", **fields: int) -> None:
        """Send a packet from the guest's ``port`` to the host's port ``to``."""
        header = {
            "src_cid": CID,
            "dst_cid": vs.CID_HOST,
            "src_port": port,
            "dst_port": to,
            "size": len(payload),
            "type": vs.STREAM,
            "op": op,
            "flags": 0,
            "buf_alloc": 1 << 16,
            "fwd_cnt": 0,
            **fields,
        }
        self.table.from_guest(Header(**header), payload)

    def turn(self, rounds: int = 64, room: int = 4096) -> list[tuple[Header, bytes]]:
        """Let data flow between sockets and the guest. Returns the guest's new packets, and adds them to ``got``."""
        new = []
        for _ in range(rounds):
            poll = select.poll()
            for fd, events in self.watched.items():
                poll.register(fd, events)
            ready = poll.poll(0)
            for fd, events in ready:
                if fd in self.watched:
                    self.table.ready(fd, events)
            packet = self.table.to_guest(room)
            if packet is not None:
                new.append(packet)
            elif not ready:
                break
        self.got += new
        return new

    def ops(self, rounds: int = 64) -> list[int]:
        return [header.op for header, _ in self.turn(rounds)]
