# SPDX-License-Identifier: Apache-2.0
"""The block device (virtio 1.2, 5.2) over a :class:`~pyvmm.devices.virtio.disk.DiskFile`.

One thread for each queue that the driver uses. C handles reads, writes and flushes (native/virtio/blk.c). Python
decides the policy: offered features, rarer requests, and messages about a failing medium.

Threats: a request beyond the disk or of odd length fails (checked in C). The copy to a private page stops there, and
the request fails. Messages about failing requests are rate-limited. A request's size is limited, and a reset does not
wait for its end.
"""

from __future__ import annotations

import errno
import os
import struct
from enum import IntEnum, IntFlag

from pyvmm._native import ffi, lib
from pyvmm.devices.roles import Reach
from pyvmm.devices.virtio.disk import SECTOR, SERIAL_SIZE, DiskFile
from pyvmm.devices.virtio.limit import Limit
from pyvmm.devices.virtio.queue import Chain, ChainFault, Queue, QueueBroken
from pyvmm.devices.virtio.worker import WorkerDevice
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final

QUEUE_SIZE: Final = lib.PV_BLK_SEGMENTS
"""Segments of a request: enough for 1 MiB of scattered pages."""
SEGMENT_MOST: Final = 1 << 20
"""Maximum bytes of one segment, as offered to drivers."""
SEGMENTS_MOST: Final = QUEUE_SIZE - 2
"""Data segments of a request. Header and status take one segment each."""
POOL_SEGMENT: Final = 64 << 10
"""Replaces SEGMENT_MOST with a DMA pool, where large free pieces are rare. Linux refuses a disk whose segments cannot
hold one of its pages (blk_validate_limits), up to 64 KiB. swiotlb allows at most 256 KiB (IO_TLB_SEGSIZE)."""
POOL_SHARE: Final = 4
"""A request may use at most pool / this. The driver would repeat a request that does not fit forever."""
POOL_SEGMENTS: Final = 16
"""Minimum segments per request. With a pool under 4 MiB, segments are smaller instead."""
DISCARD_SEGMENTS: Final = 64
DISCARD_SECTORS: Final = 1 << 22
ZEROES_SECTORS: Final = 1 << 16
"""Maximum sectors of one write-zeroes segment. If the medium cannot zero, they are written while a reset waits."""
BOUNCE: Final = 256 << 10


class BlkFeature(IntFlag):
    """Feature bits (5.2.3)."""

    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14


class Request(IntEnum):
    """Types of requests (5.2.6). Those that C handles are listed for messages."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


OK, IOERR, UNSUPP = 0, 1, 2

_HEADER: Final = 16
_CONFIG: Final = struct.Struct("<QII4xIBBHIBxHIIIIIB3x12x")
_WRITEBACK: Final = 32
"""Offset in the configuration space."""
_RANGE: Final = struct.Struct("<QII")
_UNMAP: Final = 1


class VirtioBlk(WorkerDevice):
    """A disk with 1 to 16 ``queues``. Closing it closes ``disk``.

    ``serial`` is its name in the guest's /dev/disk/by-id. ``private``: guest memory can be private. ``pool`` is the
    size of the guest's DMA pool in bytes, whole MiB, 0 for none. ``limit`` is what it may move, all queues together.
    """

    device_id = 2
    name = "blk"

    def __init__(
        self,
        disk: DiskFile,
        *,
        queues: int = 1,
        serial: str = "",
        private: bool = False,
        pool: int = 0,
        limit: Limit | None = None,
    ) -> None:
        super().__init__()
        self.disk = disk
        self.limit = limit or Limit()
        self.serial = serial.encode()
        self.queue_sizes = (QUEUE_SIZE,) * queues
        self.bounce = private and not disk.copies
        self.segment_most, self.segments_most = _pieces(pool // POOL_SHARE) if pool else (SEGMENT_MOST, SEGMENTS_MOST)
        self.writeback = True
        self._features = BlkFeature(0)
        self._servers: list[_Server] = []
        offered = BlkFeature.SIZE_MAX | BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE | BlkFeature.TOPOLOGY
        offered |= BlkFeature.FLUSH | BlkFeature.MQ
        if disk.read_only:
            offered |= BlkFeature.RO
        else:
            offered |= BlkFeature.CONFIG_WCE | BlkFeature.WRITE_ZEROES
        if disk.can_discard:
            offered |= BlkFeature.DISCARD
        self.features = offered.value

    # -- configuration space

    def config(self) -> bytes:
        """Return struct virtio_blk_config."""
        blocks = self.disk.physical_size // self.disk.block_size
        return _CONFIG.pack(
            self.disk.sectors,
            self.segment_most,
            self.segments_most,
            self.disk.block_size,
            blocks.bit_length() - 1,
            0,
            blocks,
            0,
            self.writeback,
            len(self.queue_sizes),
            DISCARD_SECTORS,
            DISCARD_SEGMENTS,
            self.disk.physical_size // SECTOR,
            ZEROES_SECTORS,
            1,
            1,
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """Take the driver's choice of write caching (CONFIG_WCE). The driver cannot change other fields."""
        if offset == _WRITEBACK and len(data) == 1 and self._features & BlkFeature.CONFIG_WCE:
            self.writeback = bool(data[0])
            for server in self._servers:
                server.native.flags = self.flags

    @property
    def flags(self) -> int:
        """Flags of enum pv_blk_flag."""
        flags: int = lib.PV_BLK_REGULAR if self.disk.regular else 0
        if self.disk.read_only:
            flags |= lib.PV_BLK_READ_ONLY
        # A driver without FLUSH expects every completed write to be stable (5.2.6.2).
        if not (self.writeback and self._features & BlkFeature.FLUSH):
            flags |= lib.PV_BLK_THROUGH
        return flags

    @property
    def most(self) -> int:
        """Maximum data bytes of one request, with the offered segment limits if the driver accepted them."""
        size = self.segment_most if self._features & BlkFeature.SIZE_MAX else SEGMENT_MOST
        return size * (self.segments_most if self._features & BlkFeature.SEG_MAX else SEGMENTS_MOST)

    # -- life

    def negotiate(self, features: int) -> str | None:
        """Cache writes only for a driver that can flush the cache (5.2.5.2)."""
        self._features = BlkFeature(features & self.features)
        self.writeback = BlkFeature.FLUSH in self._features
        return None

    def reach(self) -> Reach:
        """Return that a block device discards by an ioctl."""
        return Reach(parts=() if self.disk.regular else ("disk",))

    def start(self, queues: Sequence[Queue], features: int) -> None:  # noqa: ARG002 - negotiated
        """Serve every ready queue, each in its own thread."""
        for queue in queues:
            if queue.ready:
                server = _Server(self, queue)
                self._servers.append(server)  # stop() ends the started threads if the next one cannot start
                server.worker.start([queue])

    def stop(self) -> None:
        """Abandon pending requests, and end the threads."""
        for server in self._servers:
            server.native.abandon = 1
        self.end_workers()
        self._servers = []
        self._features = BlkFeature(0)
        self.writeback = True

    def save(self) -> dict[str, Any]:
        """Return the driver's choice of caching, and the disk's size and blocks."""
        return {"sectors": self.disk.sectors, "block": self.disk.block_size, "writeback": self.writeback}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the driver's choice. Raises UsageError if the disk's size or that of its blocks has changed."""
        from pyvmm.schema import BOOL, NUMBER, check

        check(saved, {"sectors": NUMBER, "block": NUMBER, "writeback": BOOL}, self.label)
        if saved["sectors"] != self.disk.sectors:
            raise UsageError(
                f"disk {self.disk.path!r} has {self.disk.sectors} sectors, but had {saved['sectors']} when it was saved"
            )
        if saved["block"] != self.disk.block_size:
            raise UsageError(
                f"disk {self.disk.path!r} has blocks of {self.disk.block_size} bytes, but had {saved['block']} when it "
                "was saved",
                hint=f"block={saved['block']}",
            )
        self.writeback = saved["writeback"]

    def close(self) -> None:
        """Stop, and close the disk."""
        self.stop()
        self.disk.close()

    def counters(self) -> dict[str, int]:
        """Return the counters since the driver started the device."""
        names = ("done", "failed", "denied", "bytes_read", "bytes_written")
        return {name: sum(int(getattr(server.native, name)) for server in self._servers) for name in names}

    # -- requests that C leaves to Python

    def carry_out(self, kind: int, chain: Chain, abandoned: Callable[[], bool]) -> tuple[int, int]:
        """Carry out a request. Returns its status and the bytes written. Once ``abandoned`` it may stay incomplete."""
        try:
            match kind:
                case Request.GET_ID:
                    room = min(SERIAL_SIZE, chain.writable_size - 1)
                    return OK, chain.write(0, self.serial.ljust(SERIAL_SIZE, b"\0")[:room])
                case Request.DISCARD if self._features & BlkFeature.DISCARD:
                    return self._drop(chain, DISCARD_SEGMENTS, DISCARD_SECTORS, abandoned, zero=False), 0
                case Request.WRITE_ZEROES if self._features & BlkFeature.WRITE_ZEROES:
                    return self._drop(chain, 1, ZEROES_SECTORS, abandoned, zero=True), 0
        except ChainFault:
            return IOERR, 0
        except OSError as error:
            self.medium_failed(Request(kind).name, error.errno or errno.EIO)
            return IOERR, 0
        return UNSUPP, 0

    def _drop(self, chain: Chain, most: int, sectors_most: int, abandoned: Callable[[], bool], *, zero: bool) -> int:
        size = chain.readable_size - _HEADER
        if size <= 0 or size % _RANGE.size or size > most * _RANGE.size:
            return IOERR
        ranges = list(_RANGE.iter_unpack(chain.read(_HEADER, size)))
        # All segments are checked before the first is changed (5.2.6.2).
        if any(flags & ~(_UNMAP if zero else 0) for _, _, flags in ranges):
            return UNSUPP
        if any(count > sectors_most or first + count > self.disk.sectors for first, count, _ in ranges):
            return IOERR
        for first, count, flags in ranges:
            if abandoned():
                return IOERR
            if not count:
                continue
            if zero:
                self.limit.take(count * SECTOR)  # a medium may have to write them
                self.disk.write_zeroes(first * SECTOR, count * SECTOR, unmap=bool(flags & _UNMAP))
            else:
                self.disk.discard(first * SECTOR, count * SECTOR)
        if zero and self.flags & lib.PV_BLK_THROUGH:
            os.fdatasync(self.disk.fd)
        return OK

    def medium_failed(self, what: str, code: int) -> None:
        """Log that the medium failed a request. The guest gets the request's status."""
        reason = os.strerror(code)
        hint = "the guest was told that the request failed"
        if code == errno.ENODATA:
            reason = f"it was truncated below its {self.disk.sectors * SECTOR} bytes"
            hint += "; do not truncate the disk of a running guest"
        elif code in (errno.ENOSPC, errno.EDQUOT):
            hint += "; make room in the file system of the disk's file"
        self.complaints.warn(
            "disk_failed",
            path=self.disk.path,
            request=what,
            errno=errno.errorcode.get(code, code),
            reason=reason,
            hint=hint,
        )


def _pieces(share: int) -> tuple[int, int]:
    """Return a segment's bytes and a request's segments, together at most ``share`` bytes of a pool."""
    size = min(POOL_SEGMENT, share // POOL_SEGMENTS)
    return size, min(SEGMENTS_MOST, share // size)


class _Server:
    """One queue of a disk, its thread, and its state for C."""

    def __init__(self, device: VirtioBlk, queue: Queue) -> None:
        self.device = device
        self.queue = queue
        self.chain = Chain(queue.native, lib.PV_BLK_SEGMENTS)
        self.worker = device.new_worker(self._serve, queue=queue.index)
        self.native = ffi.new(
            "struct pv_blk *",
            {
                "queue": queue.native,
                "chain": self.chain.native,
                "limit": device.limit.native,
                "file": device.disk.fd,
                "stop_fd": self.worker.stop_fd,
                "flags": device.flags,
                "capacity": device.disk.sectors,
                "most": device.most,
            },
        )
        if device.bounce:
            self._bounce = ffi.new("uint8_t[]", BOUNCE)
            self.native.bounce, self.native.bounce_size = self._bounce, BOUNCE

    def _serve(self) -> None:
        native = self.native
        stop = lib.pv_blk_serve(native)
        if stop == lib.PV_BLK_BROKEN:
            raise QueueBroken(self.queue.problem or f"queue {self.queue.index} is broken")
        if stop == lib.PV_BLK_REQUEST:
            status, native.data = self.device.carry_out(native.type, self.chain, lambda: bool(native.abandon))
            lib.pv_blk_answer(native, status)
        elif stop == lib.PV_BLK_FAILED:
            self.device.medium_failed(Request(native.type).name, native.error)
            lib.pv_blk_answer(native, IOERR)
