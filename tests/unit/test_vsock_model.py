# SPDX-License-Identifier: Apache-2.0
"""Connections between a guest and the host's sockets, all at once, checked against a model."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, MultipleResults, RuleBasedStateMachine, consumes, invariant, multiple, rule

from pyvmm.devices.virtio.vsock_packet import (
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
)
from pyvmm.devices.virtio.vsock_stream import BUFFER
from tests.unit.vsock_peer import Peer


class Guest:
    """The model of one connection."""

    def __init__(self, port: int, host_port: int, end: socket.socket) -> None:
        self.port, self.host_port, self.end = port, host_port, end
        self.to_host = self.to_guest = b""
        self.sent = self.taken = self.freed = 0
        self.room = 1 << 16
        self.fwd_cnt = 0
        self.over = False


class Connections(RuleBasedStateMachine):
    """Bytes arrive complete and in order, the host respects credit, and ended connections are released."""

    streams: Bundle[Guest] = Bundle("streams")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp()
        self.peer = Peer(Path(self.directory))
        self.listener = self.peer.listen(5)
        self.alive: dict[tuple[int, int], Guest] = {}
        self.port = 1000

    def teardown(self) -> None:
        self.peer.table.clear()
        assert not self.peer.watched
        assert len(self.peer.table) == 0
        for guest in self.alive.values():
            guest.end.close()
        self.listener.close()
        shutil.rmtree(self.directory)

    def step(self, rounds: int = 8, room: int = 512) -> None:
        for header, data in self.peer.turn(rounds, room):
            guest = self.alive.get((header.dst_port, header.src_port))
            if guest is None:
                assert header.op in (OP_RST, OP_RESPONSE, OP_REQUEST)
                continue
            guest.fwd_cnt = header.fwd_cnt
            assert header.fwd_cnt <= guest.sent
            if header.op == OP_RW:
                assert guest.to_guest.startswith(data)
                guest.to_guest = guest.to_guest[len(data) :]
                guest.taken += len(data)
                assert guest.taken - guest.freed <= guest.room
            elif header.op == OP_RST or (header.op == OP_SHUTDOWN and header.flags == SHUTDOWN_BOTH):
                guest.over = True

    @rule(target=streams)
    def guest_asks(self) -> Guest:
        self.port += 1
        self.peer.send(OP_REQUEST, self.port, 5)
        end = self.listener.accept()[0]
        return self.born(Guest(self.port, 5, end))

    @rule(target=streams)
    def host_asks(self) -> Guest | MultipleResults[Guest]:
        end, theirs = socket.socketpair()
        self.peer.table.connect(theirs, 7)
        self.step(64)
        asked = self.peer.got[-1][0]
        if asked.op != OP_REQUEST:
            end.close()
            return multiple()
        self.peer.send(OP_RESPONSE, 7, asked.src_port)
        assert end.recv(64) == f"OK {asked.src_port}\n".encode()
        return self.born(Guest(7, asked.src_port, end))

    def born(self, guest: Guest) -> Guest:
        guest.end.setblocking(False)
        self.alive[guest.port, guest.host_port] = guest
        return guest

    @rule(guest=streams, data=st.binary(min_size=1, max_size=2000))
    def guest_sends(self, guest: Guest, data: bytes) -> None:
        if not guest.over and guest.sent + len(data) - guest.fwd_cnt <= BUFFER:
            self.packet(guest, OP_RW, data)
            guest.sent += len(data)
            guest.to_host += data

    @rule(guest=streams)
    def guest_overruns(self, guest: Guest) -> None:
        for _ in range(80):
            self.packet(guest, OP_RW, b"z" * 8192)
        guest.to_host = b""
        guest.sent = 1 << 40
        self.step(100)  # each packet of an ended connection is answered with a reset
        assert guest.over

    @rule(guest=streams, data=st.binary(min_size=1, max_size=2000))
    def host_sends(self, guest: Guest, data: bytes) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            guest.to_guest += data[: guest.end.send(data)]

    @rule(guest=streams, size=st.integers(1, 5000))
    def host_reads(self, guest: Guest, size: int) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            data = guest.end.recv(size)
            if guest.sent < 1 << 40:
                assert guest.to_host.startswith(data)
                guest.to_host = guest.to_host[len(data) :]

    @rule(guest=streams, room=st.integers(0, 4000))
    def guest_makes_room(self, guest: Guest, room: int) -> None:
        guest.freed = guest.taken
        guest.room = max(room, guest.room if room % 2 else 0)
        self.packet(guest, OP_CREDIT_UPDATE)

    @rule(guest=streams, op=st.integers(0, 9), flags=st.integers(0, 7), size=st.integers(0, 9))
    def guest_babbles(self, guest: Guest, op: int, flags: int, size: int) -> None:
        if op in (OP_RW, OP_SHUTDOWN) or size:
            guest.over = True
            guest.sent = 1 << 40
        self.packet(guest, op, flags=flags, size=size)
        # If the connection had ended, it requested a new one, which must not be taken for the next guest's.
        if op == OP_REQUEST and select.select([self.listener], [], [], 0)[0]:
            guest.over = True
            guest.sent = 1 << 40
            self.listener.accept()[0].close()

    @rule(guest=consumes(streams))
    def guest_gives_up(self, guest: Guest) -> None:
        """The guest sends all it may and leaves. The host's reader loses no byte, and its writer does not wait."""
        self.packet(guest, OP_CREDIT_REQUEST)  # its answer has the free space, or says that the connection ended
        self.step(100)
        while not guest.over and guest.sent + 4096 - guest.fwd_cnt <= BUFFER:
            self.guest_sends(guest, b"y" * 4096)
            self.step()
        if guest.over:
            return
        self.packet(guest, OP_SHUTDOWN, flags=SHUTDOWN_BOTH)
        self.packet(guest, OP_RST)
        guest.over = True
        with pytest.raises(BrokenPipeError):
            guest.end.send(b"x")
        with contextlib.suppress(ConnectionResetError):
            while data := guest.end.recv(1 << 16):
                assert guest.to_host.startswith(data)
                guest.to_host = guest.to_host[len(data) :]
                self.step()
        assert not guest.to_host

    @rule(guest=consumes(streams))
    def host_closes(self, guest: Guest) -> None:
        guest.end.close()

    @rule()
    def turns(self) -> None:
        self.step()

    def packet(self, guest: Guest, op: int, data: bytes = b"", **fields: int) -> None:
        room = {"buf_alloc": guest.room, "fwd_cnt": guest.freed}
        self.peer.send(op, guest.port, guest.host_port, data, **room, **fields)

    @invariant()
    def watches_only_what_is_open(self) -> None:
        for fd in self.peer.watched:
            os.fstat(fd)
        assert len(self.peer.watched) <= len(self.peer.table)


Connections.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]  # to it each is the metaclass's
)
TestConnections = Connections.TestCase
