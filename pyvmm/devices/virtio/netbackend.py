# SPDX-License-Identifier: Apache-2.0
"""Backends of a network card: a descriptor for native/virtio/net.c, and its features."""

from __future__ import annotations

import os
from enum import IntFlag

from pyvmm._native import lib
from pyvmm.devices.roles import Reach
from pyvmm.errors import HostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Final

HEADER: Final = 12
"""Bytes of ``struct virtio_net_hdr_v1``, in front of every frame of a guest and of a tap."""


class NetFeature(IntFlag):
    """Feature bits of the network device that are used here (virtio 1.2, 5.1.3)."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    MTU = 1 << 3
    MAC = 1 << 5
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16


class NetBackend:
    """Owns ``fd``. ``kind`` is of enum pv_net_backend, ``offloads`` its features of NetFeature, ``mtu`` in bytes."""

    kind: ClassVar[int]
    offloads: NetFeature = NetFeature(0)
    mtu: int = 1500

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.fd = fd

    def use(self, features: NetFeature) -> None:
        """Enable the offloads that the negotiated ``features`` allow. Raises HostError."""

    def claim(self, mac: bytes) -> None:
        """Take the address of the guest's card, instead of the last one. Raises HostError if another guest has it."""

    def reach(self) -> Reach:
        """Return what it asks of the host while the guest runs."""
        return Reach()

    def last_words(self) -> str:
        """Return why the backend has gone, if known. Waits for a moment at most."""
        return ""

    def close(self) -> None:
        """Close the descriptor, and end started programs. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Stream(NetBackend):
    """A program's socket, with a 4-byte big-endian length before each frame: the protocol of passt and QEMU."""

    kind = lib.PV_NET_STREAM
    mtu = 65520
    """The largest IPv4 packet of passt, which it reports to its guests."""

    @classmethod
    def connect(cls, path: str) -> Stream:
        """Connect to the Unix socket of a running program. Raises UsageError or HostError."""
        import socket

        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            try:
                connection.connect(path)
            except OSError as error:
                if not os.path.exists(path):
                    raise UsageError(f"no socket is at {path!r}", hint=f"passt --socket {path}") from error
                raise HostError(
                    f"nothing answers at the socket {path!r}: {error.strerror or error}",
                    hint="is passt still running there? It serves one guest, and ends with it",
                ) from error
            return cls(path, connection.detach())
