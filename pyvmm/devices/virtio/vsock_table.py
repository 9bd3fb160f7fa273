# SPDX-License-Identifier: Apache-2.0
"""All connections of one guest: dispatch packets, take turns, and limit the number of connections.

A :class:`Table` owns the streams and their sockets, and is used by one thread. Packets go in with :meth:`from_guest`
and come out of :meth:`to_guest`, one connection after the other; sockets are watched by whoever gave ``watch``.

=======================================  ==========================================================================
what a hostile guest may do              what happens
=======================================  ==========================================================================
ask for ever more connections            reset beyond ``MOST_STREAMS``; one that it does not confirm to be over is
                                         forgotten instead, or else the oldest whose bytes only wait for a reader
never take packets                       at most ``MOST_REFUSALS`` answers wait, then nothing more of it is heard
name other cids, types, connections      reset; what it says it did not send itself is dropped
=======================================  ==========================================================================
"""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Callable
from itertools import chain

from pyvmm.devices.virtio.vsock_packet import CID_HOST, OP_REQUEST, OP_RST, STREAM, Header
from pyvmm.devices.virtio.vsock_stream import State, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

MOST_STREAMS: Final = 256
MOST_REFUSALS: Final = 64
_FIRST_HOST_PORT: Final = 1 << 30
"""Connections that the host begins have ports from here on; guests see them as the peer's."""
HOST_PORTS: Final = 1 << 30

Watch = Callable[[int, int | None], None]
"""Watches a descriptor for poll events (0: only whether it is closed), or with None no more."""


class Table:
    """The connections of the guest ``cid``; those it asks for go to the sockets ``PATH_PORT``."""

    def __init__(self, cid: int, path: str, watch: Watch) -> None:
        self._cid = cid
        self._path = path
        self._watch = watch
        self._streams: dict[tuple[int, int], Stream] = {}
        self._lingering: dict[Stream, None] = {}
        """Those whose ports are free, the oldest first: only the host's reader has yet to take the last bytes."""
        self._by_fd: dict[int, Stream] = {}
        self._watched: dict[int, int] = {}
        self._turns: deque[Stream] = deque()
        self._refusals: deque[Header] = deque()
        self.next_port = 0
        """Of the host's ports, from 0: what the next connection gets that the host begins, unless it is taken."""
        self.dropped = 0
        """Packets that nobody can have meant: of another sender."""
        self.refused = 0
        """Packets answered with a reset, for there is no such connection or there can be none."""
        self.closed = 0
        """Sockets that were let go of."""

    def __len__(self) -> int:
        return len(self._streams) + len(self._lingering)

    @property
    def congested(self) -> bool:
        """Whether too many answers wait for the guest: its packets are ignored until it takes some."""
        return len(self._refusals) >= MOST_REFUSALS

    @property
    def pending(self) -> bool:
        """Whether :meth:`to_guest` may have something."""
        return bool(self._refusals or self._turns)

    # -- from the guest

    def from_guest(self, header: Header, payload: bytes) -> None:
        """Take one packet. ``payload`` shorter than the header says is one whose length lies: a reset."""
        if header.src_cid != self._cid:
            self.dropped += 1
            return
        stream = self._streams.get((header.src_port, header.dst_port))
        if stream is not None and stream.state is State.CLOSING and header.op == OP_REQUEST:
            # The guest has forgotten the old connection: its port is free for a new one.
            stream.die()
            self._settle(stream)
            stream = None
        if header.dst_cid != CID_HOST or header.type != STREAM or stream is None:
            self._stray(header)
            return
        if len(payload) < header.size and header.op != OP_RST:
            stream.refuse()
        else:
            stream.receive(header, payload)
        self._settle(stream)

    def _stray(self, header: Header) -> None:
        if header.op == OP_RST:
            return
        if header.op == OP_REQUEST and header.dst_cid == CID_HOST and header.type == STREAM and self._room():
            sock = _connect(f"{self._path}_{header.dst_port}")
            if sock is not None:
                stream = Stream(sock, self._cid, header.src_port, header.dst_port, by_host=False)
                stream.begin(header)
                self._add(stream)
                return
        self.refused += 1
        self._refusals.append(header.reset())

    # -- from the host

    def connect(self, sock: socket.socket, port: int) -> bool:
        """Ask the guest for a connection of its ``port`` with ``sock``, which is the table's from now on.

        False, and it is closed, where there are too many connections.
        """
        if not self._room():
            sock.close()
            self.closed += 1
            return False
        self.next_port %= HOST_PORTS
        host_port = _FIRST_HOST_PORT + self.next_port
        while (port, host_port) in self._streams:
            self.next_port = (self.next_port + 1) % HOST_PORTS
            host_port = _FIRST_HOST_PORT + self.next_port
        self.next_port = (self.next_port + 1) % HOST_PORTS
        self._add(Stream(sock, self._cid, port, host_port, by_host=True))
        return True

    def ready(self, fd: int, events: int) -> None:
        """Be told that a watched socket is as it was watched for."""
        stream = self._by_fd.get(fd)
        if stream is None:
            return
        watched = self._watched.get(fd, 0)
        if events & select.POLLOUT:
            stream.flush()
        if watched & select.POLLIN and events & (select.POLLIN | select.POLLHUP | select.POLLERR):
            stream.readable = True
        elif events & (select.POLLHUP | select.POLLERR):
            stream.hung_up()
        self._settle(stream)

    # -- to the guest

    def to_guest(self, room: int) -> tuple[Header, bytes] | None:
        """Return the next packet, at most ``room`` bytes (at least 1) behind its header; None where none is due."""
        if self._refusals:
            return self._refusals.popleft(), b""
        while self._turns:
            stream = self._turns.popleft()
            stream.queued = False
            packet = stream.next_packet(room)
            self._settle(stream)
            if packet is not None:
                return packet
        return None

    def lost(self, header: Header) -> None:
        """Be told that a packet did not reach the guest, which could not say so: its connection is reset."""
        stream = self._streams.get((header.dst_port, header.src_port))
        if stream is not None:
            stream.refuse()
            self._settle(stream)

    def clear(self) -> None:
        """Close every connection without a word: the guest has been reset."""
        for stream in (*self._streams.values(), *self._lingering):
            stream.die()
            self._settle(stream)
        self._turns.clear()
        self._refusals.clear()

    # -- inside

    def _add(self, stream: Stream) -> None:
        if len(self) >= MOST_STREAMS and (least := self._least()):
            least.die()
            self._settle(least)
        self._streams[stream.guest_port, stream.host_port] = stream
        self._by_fd[stream.fd] = stream
        self._settle(stream)

    def _room(self) -> bool:
        """Whether one more connection can be, if at another's cost: which only one that comes about is worth."""
        return len(self) < MOST_STREAMS or self._least() is not None

    def _least(self) -> Stream | None:
        """Return what goes first for another: what only lacks the guest's word, or else has waited longest for a
        reader, who may never come.
        """
        closing = (stream for stream in self._streams.values() if stream.state is State.CLOSING)
        return next(chain(closing, self._lingering), None)

    def _settle(self, stream: Stream) -> None:
        """After anything was done to ``stream``: watch for what it waits for, give it its turn, or let go of it."""
        if self._by_fd.get(stream.fd) is stream:
            wanted = stream.interest
            if wanted != self._watched.get(stream.fd):
                self._watch(stream.fd, wanted)
                if wanted is None:
                    self._watched.pop(stream.fd, None)
                else:
                    self._watched[stream.fd] = wanted
            if stream.done:
                del self._by_fd[stream.fd]
                stream.socket.close()
                self.closed += 1
        if stream.gone:
            ports = stream.guest_port, stream.host_port
            if self._streams.get(ports) is stream:
                del self._streams[ports]
            if stream.state is State.LINGERING:
                self._lingering[stream] = None
            else:
                self._lingering.pop(stream, None)
            if stream.queued:  # while the guest takes nothing, nobody else would take it out
                stream.queued = False
                self._turns.remove(stream)
        elif stream.pending and not stream.queued:
            stream.queued = True
            self._turns.append(stream)


def _connect(path: str) -> socket.socket | None:
    """Connect to who listens at ``path``; None where nobody does, or is quick enough."""
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError:
        return None
    try:
        sock.connect(os.fsencode(path))
    except OSError:
        sock.close()
        return None
    return sock
