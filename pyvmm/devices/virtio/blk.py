# SPDX-License-Identifier: Apache-2.0
"""The block device (virtio 1.2, 5.2) over a :class:`~pyvmm.devices.virtio.disk.DiskFile`.

One thread for each queue that the driver uses. Reads, writes and flushes are C's (native/virtio/blk.c); here is what is
policy: what is offered, the rarer requests, and what is said of a medium that fails.

Threats: a request beyond the disk or of odd length (checked in C, fails), one that is private to the guest (the copy
ends there, the request fails), a flood of failing ones (told of at a bounded rate), one that is huge (a limit on each,
and a reset does not wait for its end).
"""

from __future__ import annotations

import errno
import os
import struct
from enum import IntEnum, IntFlag

from pyvmm._native import ffi, lib
from pyvmm.devices.virtio.disk import SECTOR, SERIAL_SIZE, DiskFile
from pyvmm.devices.virtio.queue import Chain, ChainFault, Queue, QueueBroken
from pyvmm.devices.virtio.worker import WorkerDevice
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final

QUEUE_SIZE: Final = lib.PV_BLK_SEGMENTS
"""So that a MiB of scattered pages is one request."""
SEGMENT_MOST: Final = 1 << 20
"""Bytes of one segment that drivers are told to keep to."""
SEGMENTS_MOST: Final = QUEUE_SIZE - 2
"""Of data, in one request: header and status take one each."""
POOL_SEGMENT: Final = 64 << 10
"""Instead of SEGMENT_MOST where data goes through a pool of the guest's: a piece that is found in a crowded one. No
less, as Linux takes no disk whose segments do not hold a page of its own (blk_validate_limits), which may have 64 KiB.
Nor could it be more than 256 KiB: what swiotlb gives at once (IO_TLB_SEGSIZE)."""
POOL_SHARE: Final = 4
"""And a request may take one part in so many of the pool: one that does not fit is made again and again, for ever."""
POOL_SEGMENTS: Final = 16
"""So many a request may have all the same: in a pool of less than 4 MiB they are smaller for that."""
DISCARD_SEGMENTS: Final = 64
DISCARD_SECTORS: Final = 1 << 22
ZEROES_SECTORS: Final = 1 << 16
"""Of one segment. Where the medium cannot do it itself they are written, while a reset waits."""
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
    """Types of requests (5.2.6); those that are C's are here for messages."""

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
    """A disk with 1 to 16 ``queues``; it closes ``disk`` with itself.

    ``serial`` is what the guest's /dev/disk/by-id knows it by. ``private``: guest memory can be closed to the host.
    ``pool`` is bytes of the guest's DMA pool, whole MiB, 0 for none.
    """

    device_id = 2
    name = "blk"

    def __init__(
        self, disk: DiskFile, *, queues: int = 1, serial: str = "", private: bool = False, pool: int = 0
    ) -> None:
        super().__init__()
        self.disk = disk
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
        """Take the driver's choice whether writes may be cached (CONFIG_WCE); the rest is not its to change."""
        if offset == _WRITEBACK and len(data) == 1 and self._features & BlkFeature.CONFIG_WCE:
            self.writeback = bool(data[0])
            for server in self._servers:
                server.native.flags = self.flags

    @property
    def flags(self) -> int:
        """Of enum pv_blk_flag."""
        flags: int = lib.PV_BLK_REGULAR if self.disk.regular else 0
        if self.disk.read_only:
            flags |= lib.PV_BLK_READ_ONLY
        # A driver that knows no flush takes every write that is answered to be safe (5.2.6.2).
        if not (self.writeback and self._features & BlkFeature.FLUSH):
            flags |= lib.PV_BLK_THROUGH
        return flags

    @property
    def most(self) -> int:
        """Bytes of data in one request: what the driver has been told of pieces counts where it has listened."""
        size = self.segment_most if self._features & BlkFeature.SIZE_MAX else SEGMENT_MOST
        return size * (self.segments_most if self._features & BlkFeature.SEG_MAX else SEGMENTS_MOST)

    # -- life

    def negotiate(self, features: int) -> str | None:
        """Cache writes for a driver that can have the cache flushed, and no other (5.2.5.2)."""
        self._features = BlkFeature(features & self.features)
        self.writeback = BlkFeature.FLUSH in self._features
        return None

    def start(self, queues: Sequence[Queue], features: int) -> None:  # noqa: ARG002 - negotiated
        """Serve every queue that is there, each in a thread of its own."""
        for queue in queues:
            if queue.ready:
                server = _Server(self, queue)
                self._servers.append(server)  # stop() ends those that there are where the next one cannot be had
                server.worker.start([queue])

    def stop(self) -> None:
        """Leave what is under way, and end the threads."""
        for server in self._servers:
            server.native.abandon = 1
        self.end_workers()
        self._servers = []
        self._features = BlkFeature(0)
        self.writeback = True

    def save(self) -> dict[str, Any]:
        """Return what the driver has chosen, and how large it thinks the disk is."""
        return {"sectors": self.disk.sectors, "writeback": self.writeback}

    def load(self, saved: dict[str, Any]) -> None:
        """Take the driver's choice; UsageError where the disk is not what the driver knows."""
        if saved["sectors"] != self.disk.sectors:
            raise UsageError(
                f"disk {self.disk.path!r} has {self.disk.sectors} sectors, and had {saved['sectors']} when it was saved"
            )
        self.writeback = bool(saved["writeback"])

    def close(self) -> None:
        """Close the disk too."""
        self.stop()
        self.disk.close()

    def counters(self) -> dict[str, int]:
        """Return what was counted since the driver started the device."""
        names = ("done", "failed", "denied", "bytes_read", "bytes_written")
        return {name: sum(int(getattr(server.native, name)) for server in self._servers) for name in names}

    # -- requests that C leaves to us

    def carry_out(self, kind: int, chain: Chain, abandoned: Callable[[], bool]) -> tuple[int, int]:
        """Do what a request asks; returns its status, and the bytes it got. Once ``abandoned`` it need not be whole."""
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
        # All of them are looked at before one is touched (5.2.6.2).
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
                self.disk.write_zeroes(first * SECTOR, count * SECTOR, unmap=bool(flags & _UNMAP))
            else:
                self.disk.discard(first * SECTOR, count * SECTOR)
        if zero and self.flags & lib.PV_BLK_THROUGH:
            os.fdatasync(self.disk.fd)
        return OK

    def medium_failed(self, what: str, code: int) -> None:
        """Say that the medium failed a request: the guest is told by its status, its owner here."""
        reason = os.strerror(code)
        hint = "the guest was told that the request failed"
        if code == errno.ENODATA:
            reason = f"it has become shorter than its {self.disk.sectors * SECTOR} bytes"
            hint += "; the disk of a running guest must not be cut"
        elif code in (errno.ENOSPC, errno.EDQUOT):
            hint += "; make room where the disk's file is"
        self.complaints.warn(
            "disk_failed",
            path=self.disk.path,
            request=what,
            errno=errno.errorcode.get(code, code),
            reason=reason,
            hint=hint,
        )


def _pieces(share: int) -> tuple[int, int]:
    """Return the bytes of a segment and how many a request may have, together at most ``share`` bytes of a pool."""
    size = min(POOL_SEGMENT, share // POOL_SEGMENTS)
    return size, min(SEGMENTS_MOST, share // size)


class _Server:
    """One queue of a disk, its thread, and what C needs to serve it."""

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
