# SPDX-License-Identifier: Apache-2.0
"""The network device (virtio 1.2, 5.1): one queue each way, moved by native/virtio/net.c in the device's own thread.

================================================  ===============================================================
what a hostile guest may do                       what happens
================================================  ===============================================================
send an invalid frame or header                   dropped and counted; a tap's kernel checks the header
name private pages, or no memory                  the kernel's copy ends there: the frame is lost, and counted
give no receive buffers                           the backend is not read: it queues and drops the frames
================================================  ===============================================================
"""

from __future__ import annotations

import os
import struct

from pyvmm._native import ffi, lib
from pyvmm.devices.virtio.limit import Limit
from pyvmm.devices.virtio.netbackend import HEADER, NetBackend, NetFeature
from pyvmm.devices.virtio.queue import QueueBroken
from pyvmm.devices.virtio.worker import WorkerDevice
from pyvmm.errors import HostError, UsageError
from pyvmm.log import get_logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Final

    from pyvmm._native import CData
    from pyvmm.devices.roles import Reach
    from pyvmm.devices.virtio.queue import Queue

log = get_logger("net")

RECEIVE, SEND = 0, 1
LINK_UP: Final = 1
ETHERNET: Final = 14 + 4
"""Bytes of a frame besides its packet: the header, and a tag."""
LONGEST: Final = HEADER + ETHERNET + 65535
"""Bytes of what a tap gives a guest that does the segmentation itself."""

_SEGMENTS_RECEIVED: Final = NetFeature.GUEST_TSO4 | NetFeature.GUEST_TSO6
_SEGMENTS_SENT: Final = NetFeature.HOST_TSO4 | NetFeature.HOST_TSO6
_NEEDS: Final = {
    _SEGMENTS_SENT: NetFeature.CSUM,
    _SEGMENTS_RECEIVED: NetFeature.GUEST_CSUM,
    NetFeature.HOST_ECN: _SEGMENTS_SENT,
    NetFeature.GUEST_ECN: _SEGMENTS_RECEIVED,
}
"""Features that require one of several others (virtio 1.2, 5.1.3.1)."""


def default_mac(name: str) -> bytes:
    """Return an address that is stable for ``name`` on this host, and probably unique."""
    import hashlib  # not needed for a card with a given address

    digest = hashlib.sha256(f"{os.uname().nodename}/{name}".encode()).digest()
    return bytes([0x02]) + digest[:5]


class VirtioNet(WorkerDevice):
    """A card with the address ``mac``, by default derived from names. It closes ``backend``.

    ``sends`` and ``receives`` are what its guest may move each way.
    """

    device_id = 1
    name = "net"
    queue_sizes = (256, 256)

    def __init__(
        self,
        backend: NetBackend,
        mac: bytes | None = None,
        *,
        sends: Limit | None = None,
        receives: Limit | None = None,
    ) -> None:
        super().__init__()
        self._limits = sends or Limit(), receives or Limit()
        self.backend = backend
        self._own_mac = mac
        self.mac = mac or default_mac(f"{backend.name}/{self.label}")
        self.link_up = True
        own = NetFeature.MAC | NetFeature.STATUS | NetFeature.MTU | NetFeature.MRG_RXBUF
        self.features = int(own | backend.offloads)
        self._keep: list[CData] = [ffi.new("uint8_t[]", lib.pv_net_room())]
        self.native = ffi.new("struct pv_net *")
        self.native.work = self._keep[0]
        self.native.send_limit, self.native.receive_limit = (each.native for each in self._limits)
        self.native.fd, self.native.backend = backend.fd, backend.kind
        self._queues: Sequence[Queue] = ()
        self._worker = self.new_worker(self._serve)
        self.native.stop_fd = self._worker.stop_fd

    def name_it(self, label: str) -> None:
        """Set the name, and an address derived from names."""
        super().name_it(label)
        self.mac = self._own_mac or default_mac(f"{self.backend.name}/{label}")
        self.backend.claim(self.mac)

    def config(self) -> bytes:
        """Return address, link, the number of queue pairs and the MTU."""
        return struct.pack("<6sHHH", self.mac, LINK_UP if self.link_up else 0, 1, self.backend.mtu)

    def negotiate(self, features: int) -> str | None:
        """Refuse a feature without the one it requires."""
        for feature, one_of in _NEEDS.items():
            if features & feature and not features & one_of:
                return f"{NetFeature(features & feature)!r} without {one_of!r}"
        return None

    def reach(self) -> Reach:
        """Return what the backend asks of the host."""
        return self.backend.reach()

    def start(self, queues: Sequence[Queue], features: int) -> None:
        """Move frames."""
        native, wanted = self.native, NetFeature(features & self.features)
        self._queues = queues
        if self.link_up:
            self.backend.use(wanted)
        native.rx, native.tx = (queue.native if queue.ready else ffi.NULL for queue in queues)
        native.mergeable = bool(wanted & NetFeature.MRG_RXBUF)
        native.longest = LONGEST if wanted & _SEGMENTS_RECEIVED else HEADER + ETHERNET + self.backend.mtu
        room = max(queue.room for queue in queues)
        segments = ffi.new("struct pv_segment[]", room)
        chain = ffi.new("struct pv_chain *", {"room": room, "segments": segments})
        self._keep[1:] = [segments, chain]
        native.chain = chain
        self._worker.start(queues)

    def _serve(self) -> None:
        """Move frames until a stop, or until Python must decide."""
        end = lib.pv_net_serve(self.native)
        if end == lib.PV_NET_BROKEN:
            broken = [queue.problem for queue in self._queues if queue.problem]
            raise QueueBroken("; ".join(broken))
        if end == lib.PV_NET_GONE:
            self._link_lost(self.native.error)
        elif end == lib.PV_NET_FAILED:
            raise HostError(f"{self.label}: poll: {os.strerror(self.native.error)}")

    def _link_lost(self, error: int) -> None:
        """Continue without a backend, and notify the guest and the user."""
        why = "; ".join(filter(None, [os.strerror(error) if error else "it hung up", self.backend.last_words()]))
        log.warning("link_down", device=self.label, backend=self.backend.name, reason=why)
        self.native.fd, self.native.backend = -1, lib.PV_NET_NONE
        self.link_up = False
        self.config_changed()

    def stop(self) -> None:
        """Stop moving frames."""
        super().stop()
        lib.pv_net_settle(self.native)
        self.native.rx = self.native.tx = ffi.NULL

    def pause(self) -> None:
        """Pause. All buffers of the guest are returned to their queues."""
        super().pause()
        lib.pv_net_settle(self.native)

    def save(self) -> dict[str, Any]:
        """Return the configuration that the driver has read."""
        return {"mac": self.mac.hex()}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the card. Its backend may be another, but the driver keeps the address that it has read.

        Raises UsageError if another address was asked for, HostError if another guest has it.
        """
        from pyvmm.schema import BYTES, check

        check(saved, {"mac": BYTES}, self.label)
        if len(mac := bytes.fromhex(saved["mac"])) != len(self.mac):
            raise ValueError(f"its address has {len(mac)} bytes")
        if self._own_mac not in (None, mac):
            raise UsageError(
                f"{self.label} of the saved guest has the address {mac.hex(':')}, which a restore cannot change",
                hint="drop mac=; in Linux, ip link set eth0 address MAC changes it",
            )
        self.mac = mac
        self.backend.claim(mac)

    def close(self) -> None:
        """End the thread, and close the backend."""
        super().close()
        self.backend.close()
