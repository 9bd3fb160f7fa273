# SPDX-License-Identifier: Apache-2.0
"""The socket device (virtio 1.2, 5.10): connect the guest's stream sockets to Unix sockets of the host.

A program of the host connects to ``PATH`` and names a port of the guest (:mod:`pyvmm.devices.virtio.vsock_host`); a
guest that connects to port P of cid 2 reaches the program that listens at ``PATH_P``. The device owns its worker, the
door, and through the table every connection. Only the worker uses them while it runs.

=======================================  ==========================================================================
what a hostile guest may do              what happens
=======================================  ==========================================================================
break its rings                          every connection is closed, the device needs a reset
give buffers that cannot be written      the connection whose packet is lost is reset
send more than is taken                  it is not heard while ``MOST_REFUSALS`` answers wait; see also
                                         :mod:`~pyvmm.devices.virtio.vsock_table` and ``vsock_stream``
=======================================  ==========================================================================
"""

from __future__ import annotations

import contextlib
import os
import struct

from pyvmm.devices.roles import Reach
from pyvmm.devices.virtio.queue import Chain, ChainFault, Queue, QueueBroken
from pyvmm.devices.virtio.vsock_host import Door
from pyvmm.devices.virtio.vsock_packet import HEADER_SIZE, OP_RW, Header, check_cid
from pyvmm.devices.virtio.vsock_stream import MOST_PAYLOAD
from pyvmm.devices.virtio.vsock_table import Table
from pyvmm.devices.virtio.worker import WorkerDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Final

F_STREAM: Final = 1 << 0
RX, TX, EVENT = 0, 1, 2
_BATCH: Final = 64
"""Packets in one direction before the other direction gets a turn."""
_TRANSPORT_RESET: Final = struct.pack("<I", 0)


class VirtioVsock(WorkerDevice):
    """The guest's sockets. ``cid`` is its address, ``path`` the socket for the host's programs.

    Raises UsageError for an invalid cid, or an unusable path. Without ``listen`` the path is only checked, and the
    device cannot start.
    """

    device_id = 19
    name = "vsock"
    queue_sizes = (256, 256, 64)
    features = F_STREAM

    def __init__(self, path: str, cid: int, *, listen: bool = True) -> None:
        check_cid(cid)
        super().__init__()
        self._cid = cid
        self._path = path
        self._table = Table(cid, path, self._watch)
        self._door = Door(path, self._table.connect, self._watch, listen=listen)
        try:
            self._worker = self.new_worker()
            # Rings by itself: what a turn has not got done is the next one's, after whatever else is due.
            self._more = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except BaseException:
            self.end_workers()
            self._door.close()
            raise
        self._queues: Sequence[Queue] = ()
        self._buffer: Chain | None = None
        self._held = False
        self._closed = 0
        self._reset_due = False

    def config(self) -> bytes:
        """Return the guest's cid."""
        return struct.pack("<Q", self._cid)

    def reach(self) -> Reach:
        """Return that it connects to programs beside its own socket, which it removes at its end."""
        directory = os.path.dirname(os.path.abspath(self._path))
        return Reach(parts=("vsock",), removes=(directory,), connects=(directory,))

    def start(self, queues: Sequence[Queue], features: int) -> None:  # noqa: ARG002
        """Accept connections from both sides."""
        self._queues = queues
        self._buffer = None
        self._held = False
        self._worker.add(self._more, lambda _events: self._go_on())
        if queues[RX].ready and queues[TX].ready:
            self._worker.watch(queues[RX], self._to_guest)
            self._worker.watch(queues[TX], self._from_guest)
            self._open_door()
        if queues[EVENT].ready:
            self._worker.watch(queues[EVENT], self._tell)
        self._worker.start(queues)

    def stop(self) -> None:
        """Close every connection."""
        super().stop()
        self._let_go()
        self._queues, self._buffer = (), None

    def pause(self) -> None:
        """Pause; connections stay. The current buffer returns to the guest, empty."""
        super().pause()
        if self._buffer is not None:
            buffer, self._buffer = self._buffer, None
            with contextlib.suppress(QueueBroken):  # the worker is told, too, when it goes on
                self._queues[RX].push(buffer)
                self._queues[RX].interrupt()

    def save(self) -> dict[str, Any]:
        """Return which port of the host is next: connections do not move, but the guest keeps their ports."""
        return {"next_port": self._table.next_port}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the device without its connections, and tell the guest that they are gone (5.10.6.7)."""
        from pyvmm.schema import U32, Either, check

        check(saved, Either({}, {"next_port": U32}), self.label)
        # A guest refuses a port whose connection its program has not closed yet. Which these are, is not in every save.
        self._table.next_port = saved.get("next_port", int.from_bytes(os.urandom(4), "little"))
        self._reset_due = True

    def close(self) -> None:
        """Stop listening, and release everything."""
        super().close()
        self._let_go()
        self._door.close()
        os.close(self._more)

    def failed(self, error: Exception) -> None:
        """End every connection, because no thread serves them now."""
        self._let_go()
        super().failed(error)

    def _let_go(self) -> None:
        self._door.shut()
        self._table.clear()

    # -- in the worker's thread

    def _watch(self, fd: int, events: int | None) -> None:
        if events is None:
            self._worker.remove(fd)
        else:
            self._worker.add(fd, lambda found: self._socket(fd, found), events)

    def _socket(self, fd: int, events: int) -> None:
        if not self._door.ready(fd):
            self._table.ready(fd, events)
        self._to_guest()

    def _go_on(self) -> None:
        os.eventfd_read(self._more)
        # It may have been rung before a reset, and the driver have set up less since.
        if all(queue.ready for queue in self._queues[:EVENT]):
            self._from_guest()

    def _from_guest(self) -> None:
        queue = self._queues[TX]
        self._open_door()  # others may have let go of descriptors, of which nobody tells
        for _ in range(_BATCH):
            self._held = self._table.congested
            if self._held or queue.leaving:
                break
            chain = queue.pop()
            if chain is None:
                if queue.arm():
                    break
                continue
            self._packet(chain)
            queue.push(chain)
        else:
            os.eventfd_write(self._more, 1)
        queue.interrupt()
        self._to_guest()

    def _packet(self, chain: Chain) -> None:
        try:
            head = chain.read(0, HEADER_SIZE)
            if len(head) < HEADER_SIZE:
                self.complaints.warn("packet_dropped", reason=f"its header has {len(head)} bytes")
                return
            header = Header.unpack(head)
        except ChainFault as fault:
            self.complaints.warn("packet_dropped", reason=str(fault))
            return
        payload = b""
        if header.op == OP_RW and header.size <= MOST_PAYLOAD:
            try:
                payload = chain.read(HEADER_SIZE, header.size)
            except ChainFault as fault:
                self.complaints.warn("packet_failed", reason=str(fault))
        self._table.from_guest(header, payload)

    def _to_guest(self) -> None:
        queue = self._queues[RX]
        for _ in range(_BATCH):
            if not self._table.pending or queue.leaving:
                break
            buffer, self._buffer = self._buffer or queue.pop(), None
            if buffer is None:
                if queue.arm():
                    break
                continue
            room = buffer.writable_size - HEADER_SIZE
            packet = self._table.to_guest(room) if room > 0 else None
            if packet is None and room > 0:
                self._buffer = buffer
                break
            queue.push(buffer, self._put(buffer, packet) if packet else 0)
        else:
            os.eventfd_write(self._more, 1)
        queue.interrupt()
        if self._held and not self._table.congested:
            self._held = False
            os.eventfd_write(self._more, 1)
        if self._closed != self._table.closed:
            self._closed = self._table.closed
            self._open_door()

    def _put(self, buffer: Chain, packet: tuple[Header, bytes]) -> int:
        header, payload = packet
        try:
            return buffer.write(0, header.pack() + payload)
        except ChainFault as fault:
            self.complaints.warn("packet_lost", reason=str(fault))
            self._table.lost(header)
            return 0

    def _tell(self) -> None:
        queue = self._queues[EVENT]
        while self._reset_due and not queue.leaving:
            buffer = queue.pop()
            if buffer is None:
                if queue.arm():
                    break
                continue
            try:
                written = buffer.write(0, _TRANSPORT_RESET)
            except ChainFault:
                written = 0
            self._reset_due = written < len(_TRANSPORT_RESET)
            queue.push(buffer, written)
        queue.interrupt()
        if all(each.ready for each in self._queues[:EVENT]):
            self._open_door()

    def _open_door(self) -> None:
        # A connection that came before the guest hears of the reset would be reset by it.
        if not (self._reset_due and self._queues[EVENT].ready):
            self._door.open()
