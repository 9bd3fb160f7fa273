# SPDX-License-Identifier: Apache-2.0
"""One connection between a guest port and a host socket: its state, its credit, its buffered bytes.

A :class:`Stream` has a socket, which never blocks and which its table watches and closes, and at most ``BUFFER``
bytes that the guest has sent and the host's reader has not taken yet. Bytes for the guest stay in the socket until the
guest has room for them. Used by one thread, that of the :class:`~pyvmm.devices.virtio.vsock_table.Table` it is in.

=======================================  ==========================================================================
what a hostile guest may do              what happens
=======================================  ==========================================================================
send more than it has credit for         the connection is reset
never take what it is sent               the host's writer waits in its own socket's buffer
lie about its credit or its buffers      it gets less or more than it can take: of its own receive buffers
=======================================  ==========================================================================
"""

from __future__ import annotations

import contextlib
import select
import socket
from enum import Enum

from pyvmm.devices.virtio.vsock_packet import (
    CID_HOST,
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
    STREAM,
    Header,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

BUFFER: Final = 1 << 16
"""Bytes the guest may have on the way to the host's reader."""
MOST_PAYLOAD: Final = 1 << 16
"""Bytes of the longest packet in either direction; what Linux splits at too."""
_UPDATE: Final = BUFFER // 4
"""The guest gets a credit update when room has grown by this since the last one."""
_M32: Final = (1 << 32) - 1


class State(Enum):
    """Where a connection is in its life."""

    REQUESTED = "requested"
    """The host asked, the guest has not answered."""
    OPEN = "open"
    CLOSING = "closing"
    """The host's side has gone, the guest was told, and has not confirmed."""
    LINGERING = "lingering"
    """The guest's side has gone, its last bytes wait for the host's reader; packets do not belong to it any more."""
    DEAD = "dead"
    """Nothing is to be sent or expected any more."""


class Stream:
    """A connection; made for a guest that asks (the socket is connected) or for a host that does (``by_host``)."""

    def __init__(self, sock: socket.socket, guest_cid: int, guest_port: int, host_port: int, *, by_host: bool) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.fd = sock.fileno()
        self.guest_port, self.host_port = guest_port, host_port
        self.state = State.REQUESTED if by_host else State.OPEN
        self.readable = False
        """Whether the socket is believed to have bytes or its end; set by whoever watches it."""
        self.queued = False
        """Whether the table has it in its turn; the table's."""
        self._cid = guest_cid
        self._first: int | None = OP_REQUEST if by_host else OP_RESPONSE
        self._refused = False
        self._out = bytearray()
        self._peer_room = self._peer_taken = 0
        self._sent = self._taken = self._told = 0
        self._asked = False
        self._guest_over = 0
        """SHUTDOWN_ flags of what the guest does no more."""
        self._host_over = 0
        self._host_told = 0
        self._half_closed = 0

    def __repr__(self) -> str:
        return f"<guest port {self.guest_port}, host port {self.host_port}: {self.state.value}>"

    # -- from the guest

    def begin(self, header: Header) -> None:
        """Take over what the guest's request says of its buffers."""
        self._peer(header)

    def receive(self, header: Header, payload: bytes) -> None:
        """Take a packet of this connection from the guest."""
        self._peer(header)
        op = header.op
        if op == OP_RST:
            self._abandoned()
        elif self._refused:
            pass  # it hears of it with the next packet
        elif self.state is State.CLOSING:
            if op == OP_SHUTDOWN and header.flags & SHUTDOWN_BOTH == SHUTDOWN_BOTH:
                self.refuse()
        elif self.state is State.REQUESTED:
            self._answered(op)
        elif self.state is State.OPEN:
            self._proceed(header, payload)

    def _abandoned(self) -> None:
        # A guest that has sent all it will, and is told by nobody that it was read, gives up with a reset after a while
        # (VSOCK_CLOSE_TIMEOUT of Linux): that must not cost a slow reader the end of what was sent.
        if self.state is State.OPEN and self._guest_over & SHUTDOWN_SEND and self._out:
            self.state = State.LINGERING
            # A program that writes all it has before it reads would wait for us to read, as we for it.
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RD)
        else:
            self.die()

    def _answered(self, op: int) -> None:
        if op != OP_RESPONSE or self._first is not None:
            self.refuse()
            return
        self.state = State.OPEN
        line = f"OK {self.host_port}\n".encode()
        try:
            whole = self.socket.send(line) == len(line)
        except OSError:
            whole = False
        if not whole:
            self.refuse()

    def _proceed(self, header: Header, payload: bytes) -> None:
        match header.op:
            case _ if self._first is not None:
                self.refuse()  # it has not seen our answer, so it cannot go on
            case x if x == OP_RW:
                self._take(payload)
            case x if x == OP_SHUTDOWN:
                self._guest_over |= header.flags & SHUTDOWN_BOTH
                self._settle()
            case x if x == OP_CREDIT_REQUEST:
                self._told = self._taken - _UPDATE
            case x if x == OP_CREDIT_UPDATE:
                pass
            case _:
                self.refuse()

    def _take(self, payload: bytes) -> None:
        if self._guest_over & SHUTDOWN_SEND or len(self._out) + len(payload) > BUFFER:
            self.refuse()
            return
        if self._host_over & SHUTDOWN_RECEIVE:
            self._taken += len(payload)  # nobody is there to read it, which the guest is being told
            return
        self._out += payload
        self.flush()

    def _peer(self, header: Header) -> None:
        self._peer_room, self._peer_taken = header.buf_alloc, header.fwd_cnt
        # Only what can be used ends a wait for credit: a guest that has none would be asked again by its every answer.
        self._asked = self._asked and not self.credit

    # -- to and from the host

    def flush(self) -> None:
        """Give the host's reader what it takes of what the guest has sent."""
        while self._out and self.state in (State.OPEN, State.LINGERING):
            try:
                done = self.socket.send(self._out)
            except BlockingIOError:
                break
            except OSError:
                done = len(self._out)
                self._host_over |= SHUTDOWN_RECEIVE
            self._taken += done
            del self._out[:done]
        self._settle()

    def hung_up(self) -> None:
        """Be told that the host's end has been closed: nobody reads there, but there may be bytes left."""
        if self.state is State.REQUESTED:
            self.refuse()
            return
        self._host_over |= SHUTDOWN_RECEIVE
        self.flush()
        if self._guest_over & SHUTDOWN_RECEIVE or self._host_over & SHUTDOWN_SEND:
            self._host_over |= SHUTDOWN_SEND
        else:
            self.readable = True

    def _read(self, room: int) -> bytes:
        try:
            data = self.socket.recv(min(room, self.credit, MOST_PAYLOAD))
        except BlockingIOError:
            self.readable = False
            return b""
        except OSError:
            data = b""
        if not data:
            self.readable = False
            self._host_over |= SHUTDOWN_SEND | (SHUTDOWN_RECEIVE if _closed(self.fd) else 0)
        return data

    def _settle(self) -> None:
        """Act after the guest's last byte was forwarded."""
        if self._out:
            return
        if self.state is State.LINGERING:
            self.die()
        if self.state is not State.OPEN:
            return
        if self._guest_over == SHUTDOWN_BOTH:
            self.refuse()
            return
        if due := self._guest_over & ~self._half_closed:
            self._half_closed |= due
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR if due == SHUTDOWN_SEND else socket.SHUT_RD)

    # -- to the guest

    @property
    def credit(self) -> int:
        """Bytes the guest has said it has room for, and was not sent."""
        return max(0, self._peer_room - (self._sent - self._peer_taken & _M32))

    @property
    def _may_read(self) -> bool:
        over = self._host_over & SHUTDOWN_SEND or self._guest_over & SHUTDOWN_RECEIVE
        return self.state is State.OPEN and self._first is None and not over

    @property
    def _shutdown_due(self) -> bool:
        return self.state is State.OPEN and bool(self._host_over & ~self._host_told)

    @property
    def _update_due(self) -> bool:
        return self.state is State.OPEN and self._taken - self._told >= _UPDATE

    @property
    def _starved(self) -> bool:
        return self._may_read and not self.credit and not self._asked

    @property
    def pending(self) -> bool:
        """Whether :meth:`next_packet` may have one."""
        if self.gone:
            return False
        return bool(
            self._refused
            or self._first is not None
            or (self.readable and self._may_read and self.credit)
            or (self.state is State.OPEN and (self._shutdown_due or self._update_due or self._starved))
        )

    def next_packet(self, room: int) -> tuple[Header, bytes] | None:
        """Return a header and up to ``room`` (at least 1) bytes for the guest; None where there is nothing to say."""
        if self.gone:
            return None
        if self._refused:
            self.die()
            return self._header(OP_RST), b""
        if self._first is not None:
            op, self._first = self._first, None
            return self._header(op), b""
        if self.state is not State.OPEN:
            return None
        if self.readable and self._may_read and self.credit and (data := self._read(room)):
            self._sent += len(data)
            return self._header(OP_RW, size=len(data)), data
        if self._shutdown_due:
            self._host_told = self._host_over
            if self._host_told == SHUTDOWN_BOTH:
                self.state = State.CLOSING
            return self._header(OP_SHUTDOWN, flags=self._host_told), b""
        if self._starved:
            self._asked = True
            return self._header(OP_CREDIT_REQUEST), b""
        return (self._header(OP_CREDIT_UPDATE), b"") if self._update_due else None

    def _header(self, op: int, *, size: int = 0, flags: int = 0) -> Header:
        self._told = self._taken
        return Header(
            CID_HOST, self._cid, self.host_port, self.guest_port, size, STREAM, op, flags, BUFFER, self._taken & _M32
        )

    # -- the end

    @property
    def interest(self) -> int | None:
        """The poll events to watch the socket for (0: only that it is closed), None for none at all."""
        if self.done:
            return None
        if self.state is State.REQUESTED:
            return 0
        if self.state is State.LINGERING:
            return select.POLLOUT
        events = (select.POLLIN if self._may_read and self.credit and not self.readable else 0) | (
            select.POLLOUT if self._out else 0
        )
        if events:
            return events
        # Not while there is something to read: an end that is closed stays so, and would be told again and again.
        over = not self._may_read and not self._host_over & SHUTDOWN_RECEIVE
        return 0 if over and self._first is None else None

    @property
    def gone(self) -> bool:
        """Whether the guest no longer has this connection, so that its ports may be reused."""
        return self.state in (State.LINGERING, State.DEAD)

    @property
    def done(self) -> bool:
        """Whether the socket is of no more use, and may be closed by whoever watches it."""
        return self._refused or self.state in (State.CLOSING, State.DEAD)

    def refuse(self) -> None:
        """Reset the connection. The next packet tells the guest."""
        if self.state is not State.DEAD:
            self._refused = True
            self._out.clear()

    def die(self) -> None:
        """End it silently."""
        self.state = State.DEAD
        self._refused = False
        self._out.clear()


def _closed(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))
