# SPDX-License-Identifier: Apache-2.0
"""Packets between a guest's sockets and the host's: their header, to and from bytes (virtio 1.2, 5.10.6).

Data only. Numbers are as wide as in the header; a header is taken apart without judging it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

CID_HOST: Final = 2
CID_FIRST: Final = 3
"""The lowest cid a guest can have."""
CID_LAST: Final = (1 << 32) - 2
"""The highest: 64 bits are in the header, but the upper half is reserved, and 2^32 - 1 is VMADDR_CID_ANY."""
PORT_ANY: Final = (1 << 32) - 1

STREAM: Final = 1
"""The type of connection that is an ordered stream of bytes."""

OP_REQUEST: Final = 1
OP_RESPONSE: Final = 2
OP_RST: Final = 3
OP_SHUTDOWN: Final = 4
OP_RW: Final = 5
OP_CREDIT_UPDATE: Final = 6
OP_CREDIT_REQUEST: Final = 7

SHUTDOWN_RECEIVE: Final = 1
"""Its sender receives no more."""
SHUTDOWN_SEND: Final = 2
"""Its sender sends no more."""
SHUTDOWN_BOTH: Final = SHUTDOWN_RECEIVE | SHUTDOWN_SEND

_HEADER: Final = struct.Struct("<QQIIIHHIII")
HEADER_SIZE: Final = _HEADER.size


def check_cid(cid: int) -> None:
    """Raise UsageError for a cid that no guest can have."""
    if not CID_FIRST <= cid <= CID_LAST:
        raise UsageError(f"vsock cid {cid}: a guest's is {CID_FIRST} to {CID_LAST}; 2 is the host's own")


@dataclass(frozen=True, slots=True)
class Header:
    """``struct virtio_vsock_hdr``; ``size`` is the number of bytes that follow it."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    size: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Take ``HEADER_SIZE`` bytes apart."""
        return cls(*_HEADER.unpack(data))

    def pack(self) -> bytes:
        """Put the header together."""
        return _HEADER.pack(
            self.src_cid,
            self.dst_cid,
            self.src_port,
            self.dst_port,
            self.size,
            self.type,
            self.op,
            self.flags,
            self.buf_alloc,
            self.fwd_cnt,
        )

    def reset(self) -> Header:
        """Return what tells the sender of this packet that there is no such connection (5.10.6.4)."""
        return Header(self.dst_cid, self.src_cid, self.dst_port, self.src_port, 0, self.type, OP_RST, 0, 0, 0)
