# SPDX-License-Identifier: Apache-2.0
"""The socket device over its rings: the packets to the table, the guest's buffers, and failures."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.devices.virtio import vsock_packet as vs
from pyvmm.devices.virtio.vsock import EVENT, RX, TX, VirtioVsock
from pyvmm.devices.virtio.vsock_packet import (
    HEADER_SIZE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    Header,
)
from pyvmm.devices.virtio.vsock_table import MOST_REFUSALS
from pyvmm.errors import UsageError
from tests.unit.plain_guest import BASE, PAGE, Segment
from tests.unit.queue_driver import Driver
from tests.unit.vsock_peer import CID

SEND = BASE + 0x10_0000
RECEIVE = BASE + 0x20_0000
ROOM = 4096


class Guest:
    """A driver of the device that sends and receives packets, one page each."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "v")
        self.device = VirtioVsock(self.path, CID)
        self.driver = Driver(self.device)
        self.rx, self.tx, self.event = (self.driver.rings[index] for index in (RX, TX, EVENT))
        self.buffers: dict[int, int] = {}
        self.sent = self.given = 0

    def send(self, op: int, port: int, to: int, payload: bytes = b"", *, cut: int | None = None, **fields: int) -> None:
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
        data = Header(**header).pack() + payload
        gpa = SEND + self.sent % 64 * PAGE
        self.sent += 1
        self.driver.write(gpa, data)
        self.tx.give(Segment(gpa, len(data) if cut is None else cut))

    def offer(self, count: int = 1) -> None:
        for _ in range(count):
            gpa = RECEIVE + self.given % 64 * PAGE
            self.given += 1
            self.buffers[self.rx.give(Segment(gpa, ROOM, True))] = gpa

    def packet(self) -> tuple[Header, bytes]:
        """Give a buffer, and wait for its packet."""
        self.offer()
        return self.next()

    def next(self) -> tuple[Header, bytes]:
        [(head, written)] = self.rx.wait()
        data = self.driver.read(self.buffers[head], written)
        header = Header.unpack(data[:HEADER_SIZE])
        assert header.size == written - HEADER_SIZE
        return header, data[HEADER_SIZE:]

    def listen(self, port: int) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{self.path}_{port}")
        listener.listen(16)
        listener.settimeout(20)
        return listener


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(tmp_path)
    with guest.driver:
        yield guest
    assert not os.path.lexists(guest.path)


def connected(guest: Guest, listener: socket.socket, port: int = 1000) -> socket.socket:
    guest.send(OP_REQUEST, port, 5)
    end = listener.accept()[0]
    end.settimeout(20)
    assert guest.packet()[0].op == OP_RESPONSE
    return end


def test_the_cid_is_in_the_configuration_space_and_must_be_valid_for_a_guest(guest: Guest, tmp_path: Path) -> None:
    assert guest.device.config() == struct.pack("<Q", CID)
    for cid in (0, 2, (1 << 32) - 1, 1 << 40):
        with pytest.raises(UsageError, match="cid"):
            VirtioVsock(str(tmp_path / "w"), cid)


def test_a_guest_that_connects_gets_its_echo(guest: Guest) -> None:
    with guest.listen(5) as listener, connected(guest, listener) as end:
        guest.send(OP_RW, 1000, 5, b"hello")
        assert end.recv(64) == b"hello"
        end.sendall(b"world")
        header, data = guest.packet()
        assert (header.op, data, header.fwd_cnt) == (OP_RW, b"world", 5)


def test_a_host_that_connects_gets_its_echo(guest: Guest) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(guest.path)
        client.sendall(b"CONNECT 7\n")
        asked, _ = guest.packet()
        assert (asked.op, asked.dst_port) == (OP_REQUEST, 7)
        guest.send(OP_RESPONSE, 7, asked.src_port)
        assert client.recv(64) == f"OK {asked.src_port}\n".encode()
        client.sendall(b"ping")
        assert guest.packet()[1] == b"ping"


def test_more_data_than_the_credit_arrives_whole_in_single_buffers(guest: Guest) -> None:
    data = os.urandom(1 << 18)
    with guest.listen(5) as listener, connected(guest, listener) as end:
        end.setblocking(False)
        sent, got = 0, b""
        while len(got) < len(data):
            if sent < len(data):
                with contextlib.suppress(BlockingIOError):
                    sent += end.send(data[sent:])
            header, part = guest.packet()
            got += part
            if header.op != OP_RW or len(got) % 5 == 0 or len(got) > 1 << 15:
                guest.send(vs.OP_CREDIT_UPDATE, 1000, 5, fwd_cnt=len(got))
        assert got == data


def test_a_packet_without_a_full_header_is_dropped_and_a_false_length_resets(guest: Guest) -> None:
    with guest.listen(5) as listener, connected(guest, listener) as end:
        guest.send(OP_RW, 1000, 5, b"hello", cut=HEADER_SIZE - 1)
        guest.send(OP_RW, 1000, 5, b"hello", cut=HEADER_SIZE + 4)
        assert guest.packet()[0].op == OP_RST
        assert end.recv(64) == b""


def test_a_payload_in_a_private_page_resets_the_connection(guest: Guest) -> None:
    with guest.listen(5) as listener, connected(guest, listener) as end:
        guest.driver.hide(SEND + 0x3F_000)
        header = Header(CID, 2, 1000, 5, 4, vs.STREAM, OP_RW, 0, 1 << 16, 0).pack()
        guest.driver.write(SEND + 0x3E_000, header)
        guest.tx.give(Segment(SEND + 0x3E_000, HEADER_SIZE), Segment(SEND + 0x3F_000, 4))
        assert guest.packet()[0].op == OP_RST
        assert end.recv(64) == b""


def test_a_private_buffer_resets_the_connection_that_loses_bytes(guest: Guest) -> None:
    with guest.listen(5) as listener, connected(guest, listener) as end:
        guest.driver.hide(RECEIVE + 0x3F_000)
        end.sendall(b"lost")
        guest.rx.give(Segment(RECEIVE + 0x3F_000, ROOM, True))
        assert guest.rx.wait()[0][1] == 0
        assert guest.packet()[0].op == OP_RST


def test_buffers_too_small_for_a_header_are_returned_empty(guest: Guest) -> None:
    with guest.listen(5) as listener, connected(guest, listener) as end:
        guest.rx.give(Segment(RECEIVE, HEADER_SIZE, True))
        end.sendall(b"x")
        assert guest.rx.wait()[0][1] == 0
        assert guest.packet()[1] == b"x"


def test_packets_of_a_guest_that_takes_no_answers_wait_until_it_does(guest: Guest) -> None:
    for _ in range(MOST_REFUSALS + 20):
        guest.send(OP_RW, 1, 2, b"x")
    back = guest.tx.wait(MOST_REFUSALS)
    assert len(back) == MOST_REFUSALS
    ops = [guest.packet()[0].op for _ in range(MOST_REFUSALS + 20)]
    assert set(ops) == {OP_RST}
    assert len(guest.tx.wait(20)) == 20


def turns(device: VirtioVsock) -> int:
    """Do the work of a paused device's thread until none is left; returns how many turns it took, at most 10."""
    worker = device._worker
    for turn in range(10):
        found = [(fd, events) for fd, events in worker._epoll.poll(0) if fd in worker._callbacks]
        if not found:
            return turn
        for fd, events in found:
            worker._callbacks[fd](events)
    return 10


def test_clients_without_a_descriptor_wait_until_one_is_free(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(_: socket.socket) -> tuple[socket.socket, object]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with guest.listen(5) as listener, connected(guest, listener) as end, socket.socket(socket.AF_UNIX) as client:
        guest.device.pause()
        client.connect(guest.path)
        client.sendall(b"CONNECT 7\n")
        with monkeypatch.context() as full:
            full.setattr(socket.socket, "accept", accept)
            assert turns(guest.device) == 1
            assert turns(guest.device) == 0
        end.close()
        guest.send(OP_RST, 1000, 5)
        turns(guest.device)
        guest.device.resume()
        asked, _ = guest.packet()
        if asked.op == OP_SHUTDOWN:  # about the end that closed, sent before the guest's reset was read
            asked, _ = guest.packet()
        assert (asked.op, asked.dst_port) == (OP_REQUEST, 7)


def test_a_reset_by_the_guest_closes_its_connections_and_new_ones_work(guest: Guest) -> None:
    with guest.listen(5) as listener, connected(guest, listener) as end:
        guest.driver.restart()
        assert end.recv(64) == b""
        with connected(guest, listener) as again:
            again.sendall(b"x")
            assert guest.packet()[1] == b"x"


def test_broken_rings_close_every_connection(guest: Guest) -> None:
    with guest.listen(5) as listener, connected(guest, listener) as end:
        guest.tx.give(Segment(SEND, 0))
        assert end.recv(64) == b""
        guest.driver.until(lambda: guest.driver.transport.reset_needed)


def test_a_pause_keeps_connections_and_returns_the_current_buffer(guest: Guest) -> None:
    with guest.listen(5) as listener, connected(guest, listener) as end:
        # A socket that is reported readable but has no data leaves the device with a buffer.
        guest.offer()
        stream = next(iter(guest.device._table._streams.values()))
        guest.device.pause()
        stream.readable = True
        guest.device._table._settle(stream)
        guest.device.resume()
        guest.driver.until(lambda: guest.device._buffer)
        guest.device.pause()
        assert not guest.driver.queues[RX].held
        assert guest.device.save() == {"next_port": 0}
        end.sendall(b"meanwhile")
        assert [written for _, written in guest.rx.used()] == [0]
        guest.device.resume()
        assert guest.packet()[1] == b"meanwhile"


def test_a_restored_guest_hears_that_its_connections_are_gone(guest: Guest) -> None:
    guest.device.stop()
    guest.device.load({})
    guest.driver.restart()
    guest.event.give(Segment(RECEIVE, 4, True))
    assert guest.event.wait() == [(0, 4)]
    assert guest.driver.read(RECEIVE, 4) == bytes(4)
    # Only once: the next buffer waits for another such event.
    guest.event.give(Segment(RECEIVE, 4, True))
    guest.send(OP_RW, 1, 2, b"x")
    assert guest.packet()[0].op == OP_RST
    assert guest.event.used() == []


def ask(guest: Guest, port: int = 7) -> tuple[socket.socket, Header]:
    """Have a client on the host connect to a port of the guest; returns its socket, and the request to the guest."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(guest.path)
    client.sendall(f"CONNECT {port}\n".encode())
    return client, guest.packet()[0]


@pytest.mark.parametrize("told", [True, False])
def test_the_first_connection_after_a_restore_uses_ports_new_to_the_guest(guest: Guest, told: bool) -> None:
    # The guest keeps a connection's ports until its program closes it, and refuses them until then.
    remembered = []
    for _ in range(2):
        client, asked = ask(guest)
        client.close()
        remembered.append(asked.src_port)
    saved = guest.device.save()
    guest.device.stop()
    guest.device.load(saved if told else {})  # as in an older snapshot, which does not have it
    guest.driver.restart()
    guest.event.give(Segment(RECEIVE, 4, True))
    client, asked = ask(guest)
    with client:
        assert asked.op == OP_REQUEST
        assert asked.src_port not in remembered


def test_ports_start_at_random_after_a_snapshot_without_ports(guest: Guest) -> None:
    guest.device.stop()
    begun = set()
    for _ in range(4):
        guest.device.load({})
        begun.add(guest.device._table.next_port)
    assert len(begun) > 1
    guest.driver.restart()


def test_no_client_connects_before_the_guest_hears_of_the_reset(guest: Guest) -> None:
    guest.device.stop()
    guest.device.load({})
    guest.driver.restart()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(guest.path)
        client.sendall(b"CONNECT 7\n")
        guest.offer()
        guest.send(OP_RW, 1, 2, b"x")  # this waits for a turn of the worker
        assert guest.next()[0].op == OP_RST
        guest.offer()
        assert not guest.device._door._open
        guest.event.give(Segment(RECEIVE, 4, True))
        assert guest.event.wait() == [(0, 4)]
        assert guest.next()[0].op == OP_REQUEST
