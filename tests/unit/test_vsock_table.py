# SPDX-License-Identifier: Apache-2.0
"""Connections between a guest and the host's sockets, packet by packet: the table, its streams, the door."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.devices.virtio import vsock_packet as vs
from pyvmm.devices.virtio.vsock_host import MOST_GUESTS, Door
from pyvmm.devices.virtio.vsock_packet import (
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    Header,
)
from pyvmm.devices.virtio.vsock_stream import BUFFER
from pyvmm.devices.virtio.vsock_table import MOST_REFUSALS, MOST_STREAMS
from pyvmm.errors import UsageError
from tests.unit.vsock_peer import CID, Peer


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    peer = Peer(tmp_path)
    yield peer
    peer.table.clear()
    assert not peer.watched


@pytest.fixture
def host(peer: Peer) -> Iterator[socket.socket]:
    """Return the host's end of a connection from port 1000 of the guest to port 5."""
    with peer.listen(5) as listener:
        peer.send(OP_REQUEST, 1000, 5)
        assert peer.ops() == [OP_RESPONSE]
        with listener.accept()[0] as end:
            end.settimeout(5)
            yield end


def by_host(peer: Peer, port: int = 7) -> tuple[socket.socket, int]:
    """Return the host's end and port of a connection that the host opened and the guest accepted."""
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    assert peer.table.connect(theirs, port)
    [(asked, _)] = peer.turn()
    assert (asked.op, asked.dst_port, asked.src_cid, asked.dst_cid) == (OP_REQUEST, port, 2, CID)
    peer.send(OP_RESPONSE, port, asked.src_port)
    assert ours.recv(64) == f"OK {asked.src_port}\n".encode()
    return ours, asked.src_port


def test_the_header_has_44_bytes_in_the_specified_layout() -> None:
    header = Header(3, 2, 0x11, 0x22, 5, 1, 6, 7, 8, 9)
    data = header.pack()
    assert len(data) == vs.HEADER_SIZE == 44
    assert Header.unpack(data) == header
    assert data[16:20] == b"\x11\0\0\0"
    assert data[28:32] == b"\x01\0\x06\0"


def test_a_guest_and_a_host_socket_exchange_data(peer: Peer, host: socket.socket) -> None:
    peer.send(OP_RW, 1000, 5, b"hello")
    assert host.recv(64) == b"hello"
    host.sendall(b"world")
    [(header, data)] = peer.turn()
    assert (header.op, header.size, data) == (OP_RW, 5, b"world")
    assert (header.src_port, header.dst_port, header.fwd_cnt) == (5, 1000, 5)


def test_the_host_connects_to_a_listening_guest(peer: Peer) -> None:
    end, port = by_host(peer)
    with end:
        end.sendall(b"ping")
        assert [data for _, data in peer.turn()] == [b"ping"]
        peer.send(OP_RW, 7, port, b"pong")
        assert end.recv(64) == b"pong"


def test_a_port_without_a_listener_gets_a_reset(peer: Peer) -> None:
    peer.send(OP_REQUEST, 1000, 6)
    [(header, _)] = peer.turn()
    assert (header.op, header.src_port, header.dst_port) == (OP_RST, 6, 1000)


def test_a_guest_that_refuses_closes_the_hosts_socket_without_an_ok(peer: Peer) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        peer.table.connect(theirs, 7)
        [(asked, _)] = peer.turn()
        peer.send(OP_RST, 7, asked.src_port)
        assert ours.recv(64) == b""
    assert len(peer.table) == 0


@pytest.mark.parametrize("fields", [{"dst_cid": 4}, {"type": 2}, {"type": 0}])
def test_other_cids_and_types_are_reset(peer: Peer, host: socket.socket, fields: dict[str, int]) -> None:
    peer.send(OP_RW, 1000, 5, b"x", **fields)
    [(header, _)] = peer.turn()
    assert header.op == OP_RST
    assert {key: {"dst_cid": header.src_cid, "type": header.type}[key] for key in fields} == fields
    host.setblocking(False)
    with pytest.raises(BlockingIOError):
        host.recv(1)


def test_a_packet_of_another_sender_is_dropped(peer: Peer, host: socket.socket) -> None:
    peer.send(OP_RW, 1000, 5, b"x", src_cid=9)
    assert peer.turn() == []
    assert peer.table.dropped == 1
    assert host


@pytest.mark.parametrize("op", [0, OP_REQUEST, OP_RESPONSE, 8, 0xFFFF])
def test_a_packet_that_an_open_connection_does_not_expect_resets_it(peer: Peer, host: socket.socket, op: int) -> None:
    peer.send(op, 1000, 5)
    assert peer.ops() == [OP_RST]
    assert host.recv(1) == b""
    assert len(peer.table) == 0


def test_a_false_length_resets_the_connection(peer: Peer, host: socket.socket) -> None:
    peer.send(OP_RW, 1000, 5, b"x", size=100)
    assert peer.ops() == [OP_RST]
    assert host.recv(1) == b""


def test_a_reset_is_never_answered_with_a_reset(peer: Peer) -> None:
    peer.send(OP_RST, 1, 2)
    assert peer.turn() == []


def test_the_guest_gets_only_as_many_bytes_as_it_has_room_for(peer: Peer, host: socket.socket) -> None:
    peer.send(OP_CREDIT_UPDATE, 1000, 5, buf_alloc=10, fwd_cnt=0)
    host.sendall(b"0123456789abcdef")
    packets = peer.turn()
    assert [(header.op, data) for header, data in packets] == [(OP_RW, b"0123456789"), (OP_CREDIT_REQUEST, b"")]
    peer.send(OP_CREDIT_UPDATE, 1000, 5, buf_alloc=10, fwd_cnt=0)
    assert peer.turn() == [], "an answer without credit must not cause another credit request"
    peer.send(OP_CREDIT_UPDATE, 1000, 5, buf_alloc=10, fwd_cnt=4)
    assert [data for _, data in peer.turn()] == [b"abcd", b""]


def test_a_guest_that_claims_more_bytes_than_it_was_sent_has_no_credit(peer: Peer, host: socket.socket) -> None:
    peer.send(OP_CREDIT_UPDATE, 1000, 5, buf_alloc=100, fwd_cnt=50)
    host.sendall(b"x" * 200)
    assert peer.ops() == [OP_CREDIT_REQUEST]


def test_a_slow_reader_on_the_host_bounds_what_the_guest_may_send(peer: Peer, host: socket.socket) -> None:
    sent = 0
    while OP_RST not in peer.ops():
        peer.send(OP_RW, 1000, 5, b"x" * 4096)
        sent += 4096
        assert sent < 1 << 21
    # The kernel's socket buffers and one BUFFER hold these bytes; the packet beyond them is not counted.
    assert sent > BUFFER
    assert host.recv(1) == b"x"


def test_the_guest_hears_of_room_as_the_host_reads(peer: Peer, host: socket.socket) -> None:
    peer.send(OP_RW, 1000, 5, b"x" * (BUFFER // 2))
    assert len(host.recv(BUFFER)) == BUFFER // 2
    [(header, _)] = peer.turn()
    assert (header.op, header.buf_alloc, header.fwd_cnt) == (OP_CREDIT_UPDATE, BUFFER, BUFFER // 2)
    peer.send(OP_CREDIT_REQUEST, 1000, 5)
    assert peer.ops() == [OP_CREDIT_UPDATE]


def test_a_close_by_the_host_reaches_the_guest_after_its_last_byte(peer: Peer, host: socket.socket) -> None:
    host.sendall(b"last words")
    host.close()
    packets = peer.turn()
    assert [(header.op, data) for header, data in packets] == [(OP_RW, b"last words"), (OP_SHUTDOWN, b"")]
    assert packets[-1][0].flags == SHUTDOWN_BOTH
    assert not peer.watched
    peer.send(OP_RST, 1000, 5)
    assert len(peer.table) == 0


def test_a_half_close_by_the_host_leaves_the_other_half_open(peer: Peer, host: socket.socket) -> None:
    host.shutdown(socket.SHUT_WR)
    [(header, _)] = peer.turn()
    assert (header.op, header.flags) == (OP_SHUTDOWN, SHUTDOWN_SEND)
    peer.send(OP_RW, 1000, 5, b"still here")
    assert host.recv(64) == b"still here"
    host.close()
    [(header, _)] = peer.turn()
    assert (header.op, header.flags) == (OP_SHUTDOWN, SHUTDOWN_BOTH)


def test_a_half_close_by_the_guest_leaves_the_other_half_open(peer: Peer, host: socket.socket) -> None:
    peer.send(OP_RW, 1000, 5, b"question")
    peer.send(OP_SHUTDOWN, 1000, 5, flags=SHUTDOWN_SEND)
    assert host.recv(64) == b"question"
    assert host.recv(64) == b""
    host.sendall(b"answer")
    assert [data for _, data in peer.turn()] == [b"answer"]
    peer.send(OP_SHUTDOWN, 1000, 5, flags=SHUTDOWN_RECEIVE)
    assert peer.ops() == [OP_RST]
    assert len(peer.table) == 0


def test_a_close_by_the_guest_is_confirmed_when_the_host_has_all_its_bytes(peer: Peer, host: socket.socket) -> None:
    host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sent = 0
    while not any(select.POLLOUT & events for events in peer.watched.values()):
        peer.send(OP_RW, 1000, 5, b"y" * 4096)
        sent += 4096
    peer.send(OP_SHUTDOWN, 1000, 5, flags=SHUTDOWN_BOTH)
    assert OP_RST not in peer.ops()
    got = 0
    while data := host.recv(1 << 16):
        got += len(data)
        peer.turn()
    assert got == sent
    assert peer.got[-1][0].op == OP_RST


def stall(peer: Peer, port: int = 1000, to: int = 5) -> int:
    """Send until the host's reader takes no more, and bytes wait in the table; returns the number of bytes sent."""
    sent = 0
    while not any(select.POLLOUT & events for events in peer.watched.values()):
        peer.send(OP_RW, port, to, b"y" * 4096)
        sent += 4096
    return sent


def rest(end: socket.socket, peer: Peer) -> int:
    """Read to the end; returns the number of bytes."""
    got = 0
    while data := end.recv(1 << 16):
        got += len(data)
        peer.turn()
    return got


@pytest.mark.parametrize("flags", [SHUTDOWN_BOTH, SHUTDOWN_SEND])
def test_a_guest_whose_close_times_out_loses_no_byte(peer: Peer, host: socket.socket, flags: int) -> None:
    sent = stall(peer)
    peer.send(OP_SHUTDOWN, 1000, 5, flags=flags)
    peer.send(OP_RST, 1000, 5)  # Linux does so after VSOCK_CLOSE_TIMEOUT, 8 s
    peer.got.clear()
    assert rest(host, peer) == sent
    assert peer.got == [], "the guest got a packet for a connection it has closed"
    assert not peer.watched
    assert len(peer.table) == 0


def test_the_table_does_not_wait_for_a_guest_that_resets(peer: Peer, host: socket.socket) -> None:
    sent = stall(peer)
    peer.send(OP_RST, 1000, 5)
    assert len(peer.table) == 0
    assert rest(host, peer) < sent


def test_waiting_bytes_are_dropped_when_their_reader_closes(peer: Peer, host: socket.socket) -> None:
    stall(peer)
    peer.send(OP_SHUTDOWN, 1000, 5, flags=SHUTDOWN_BOTH)
    peer.send(OP_RST, 1000, 5)
    host.close()
    assert peer.turn() == []
    assert not peer.watched
    assert len(peer.table) == 0


def test_a_service_that_writes_first_hears_that_nobody_reads(peer: Peer, host: socket.socket) -> None:
    sent = stall(peer)
    host.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            host.send(b"x" * 65536)
    peer.send(OP_SHUTDOWN, 1000, 5, flags=SHUTDOWN_BOTH, buf_alloc=0)
    peer.send(OP_RST, 1000, 5)
    with pytest.raises(BrokenPipeError):
        host.send(b"x")
    got = 0
    with contextlib.suppress(ConnectionResetError):  # its own data were never read
        while data := host.recv(1 << 16):
            got += len(data)
            peer.turn()
    assert got == sent
    assert len(peer.table) == 0


def test_ports_are_free_while_bytes_still_wait_and_waiting_connections_are_bounded(peer: Peer) -> None:
    with contextlib.ExitStack() as stack, peer.listen(5) as listener:
        ends, sent = [], 0
        for _ in range(MOST_STREAMS):
            peer.send(OP_REQUEST, 1000, 5)
            ends.append(stack.enter_context(listener.accept()[0]))
            assert peer.ops() == [OP_RESPONSE]
            sent = 0
            while len(peer.watched) < len(peer.table) or not select.POLLOUT & [*peer.watched.values()][-1]:
                peer.send(OP_RW, 1000, 5, b"y" * (BUFFER - 4096))
                sent += BUFFER - 4096
            peer.send(OP_SHUTDOWN, 1000, 5, flags=SHUTDOWN_BOTH)
            peer.send(OP_RST, 1000, 5)
        assert len(peer.table) == MOST_STREAMS
        peer.send(OP_REQUEST, 1000, 6)
        assert peer.ops() == [OP_RST], "a port without a listener must get a reset"
        assert peer.table.closed == 0
        peer.send(OP_REQUEST, 1000, 5)
        assert peer.ops() == [OP_RESPONSE]
        assert len(peer.table) == MOST_STREAMS
        assert peer.table.closed == 1
        # A connection that lacks only the guest's confirmation is dropped before any whose bytes wait.
        listener.accept()[0].close()
        assert peer.ops() == [OP_SHUTDOWN]
        by_host(peer)[0].close()
        assert len(peer.table) == MOST_STREAMS
        for end in ends:
            end.settimeout(5)
        assert rest(ends[0], peer) < sent, "the connection that waited longest must be dropped"
        assert [rest(end, peer) for end in ends[1:]] == [sent] * (MOST_STREAMS - 1)


def test_clients_that_give_up_before_the_guest_answers_are_removed(peer: Peer) -> None:
    ours, theirs = socket.socketpair()
    peer.table.connect(theirs, 7)
    assert peer.ops() == [OP_REQUEST]
    ours.close()
    assert peer.ops() == [OP_RST]
    assert len(peer.table) == 0


def test_a_flood_of_requests_is_bounded(peer: Peer) -> None:
    with peer.listen(5) as listener:
        ends = []
        for port in range(MOST_STREAMS + 3):
            peer.send(OP_REQUEST, port, 5)
            if port < MOST_STREAMS:
                ends.append(listener.accept()[0])
        assert len(peer.table) == MOST_STREAMS
        assert peer.ops(2 * MOST_STREAMS).count(OP_RST) == 3
        ends[0].close()
        assert peer.ops() == [OP_SHUTDOWN]
        # The guest has not confirmed the end of this one: it is dropped for another.
        peer.send(OP_REQUEST, 5000, 5)
        assert peer.ops() == [OP_RESPONSE]
        assert len(peer.table) == MOST_STREAMS
        for end in ends:
            end.close()


def test_unanswered_connections_leave_nothing(peer: Peer) -> None:
    with peer.listen(5) as listener:
        for _ in range(3):
            peer.send(OP_REQUEST, 7, 5)
            listener.accept()[0].close()
            peer.send(OP_RST, 7, 5)
            assert not len(peer.table)
            assert not peer.table.pending
        # The end of an old connection does not end a new one with the same ports.
        peer.send(OP_REQUEST, 7, 5)
        with listener.accept()[0]:
            assert peer.ops() == [OP_RESPONSE]
            assert len(peer.table) == 1


def test_packets_of_a_guest_that_takes_no_answers_are_bounded(peer: Peer) -> None:
    while not peer.table.congested:
        peer.send(OP_RW, 1, 2, b"x")
    assert peer.ops(1000) == [OP_RST] * MOST_REFUSALS
    assert not peer.table.congested


# ---- the door


@pytest.fixture
def door(peer: Peer) -> Iterator[Door]:
    door = Door(peer.path, peer.table.connect, peer.watch)
    yield door
    door.close()
    assert not os.path.lexists(peer.path)


def enter(peer: Peer, door: Door, *lines: bytes) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5)
    client.connect(peer.path)
    turn(peer, door)
    for line in lines:
        with contextlib.suppress(BrokenPipeError):
            client.sendall(line)
        turn(peer, door)
    return client


def turn(peer: Peer, door: Door) -> None:
    poll = select.poll()
    for fd, events in peer.watched.items():
        poll.register(fd, events)
    for fd, _ in poll.poll(0):
        if fd in peer.watched:
            door.ready(fd)


@pytest.mark.parametrize(
    "lines", [(b"CONNECT 7\n",), (b"connect 7\r\n",), (b"CONN", b"ECT 7", b"\n"), (b"CONNECT 7\nearly",)]
)
def test_a_client_names_a_port_and_the_guest_gets_what_follows(
    peer: Peer, door: Door, lines: tuple[bytes, ...]
) -> None:
    door.open()
    with enter(peer, door, *lines) as client:
        [(asked, _)] = peer.turn()
        assert (asked.op, asked.dst_port) == (OP_REQUEST, 7)
        peer.send(OP_RESPONSE, 7, asked.src_port)
        assert client.recv(64) == f"OK {asked.src_port}\n".encode()
        assert b"".join(data for _, data in peer.turn()) == (b"early" if b"early" in lines[0] else b"")


@pytest.mark.parametrize(
    "line", [b"GET / HTTP/1.1\n", b"CONNECT\n", b"CONNECT -1\n", b"CONNECT 4294967295\n", b"CONNECT 7" + b" " * 40]
)
def test_a_client_with_an_invalid_request_is_disconnected(peer: Peer, door: Door, line: bytes) -> None:
    door.open()
    with enter(peer, door, line) as client, contextlib.suppress(ConnectionResetError):
        assert client.recv(64) == b""
    assert len(peer.table) == 0
    assert len(peer.watched) == 1


def test_silent_clients_are_bounded_and_the_oldest_is_disconnected(peer: Peer, door: Door) -> None:
    door.open()
    clients = [enter(peer, door) for _ in range(MOST_GUESTS + 1)]
    assert len(peer.watched) == 1 + MOST_GUESTS
    assert clients[0].recv(1) == b""
    for client in clients:
        client.close()


def test_a_client_waits_for_a_guest_that_is_not_up(peer: Peer, door: Door) -> None:
    with enter(peer, door, b"CONNECT 7\n"):
        assert not peer.watched
        door.open()
        turn(peer, door)
        turn(peer, door)
        assert peer.ops() == [OP_REQUEST]


def test_a_path_in_use_is_refused_and_a_stale_one_is_replaced(peer: Peer, door: Door) -> None:
    with pytest.raises(UsageError, match="in use"):
        Door(peer.path, peer.table.connect, peer.watch)
    stale = f"{peer.path}-stale"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(stale)
    again = Door(stale, peer.table.connect, peer.watch)
    assert stat.S_ISSOCK(os.lstat(stale).st_mode)
    os.unlink(stale)
    Path(stale).write_text("somebody else's by now")
    again.close()
    assert Path(stale).read_text()
    with pytest.raises(UsageError, match="is not a socket"):
        Door(stale, peer.table.connect, peer.watch)
    assert door


@pytest.mark.parametrize("path", ["x" * 98, "/nowhere/there/is/v"])
def test_an_invalid_path_is_refused(peer: Peer, path: str) -> None:
    with pytest.raises(UsageError, match=r"bytes|No such file"):
        Door(path, peer.table.connect, peer.watch)
