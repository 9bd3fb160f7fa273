# SPDX-License-Identifier: Apache-2.0
"""A file or block device as a virtual disk's medium: its properties, its lock, and dropping parts of it.

A ``DiskFile`` owns its descriptor and, through that, a lock on the whole file. :meth:`DiskFile.close` releases both. C
reads and writes through the descriptor (native/virtio/blk.c). Any thread may call the methods here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from ctypes import byref, c_int, c_uint, c_uint64

from pyvmm.errors import UsageError
from pyvmm.kvm import libc
from pyvmm.log import get_logger
from pyvmm.uapi import fs
from pyvmm.uapi.falloc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Self

log = get_logger("disk")

SECTOR: Final = 512
"""Bytes: virtio's unit of capacity and positions, for every medium (virtio 1.2, 5.2.4)."""

SERIAL_SIZE: Final = 20
"""Bytes of the answer to GET_ID (5.2.6)."""

_ZEROS: Final = 1 << 20
_FLOCK: Final = "hhqqi4x"
"""struct flock: type, whence, start, length (0: to the end of time), pid (0 for a lock of the open file)."""

#: File systems that copy reads and writes through the page cache, so that an inaccessible user address is an error.
#: Others may pin the pages (9p and FUSE can), and the kernel takes a pinned private page by force.
_COPYING: Final = frozenset(
    (fs.EXT4_SUPER_MAGIC, fs.XFS_SUPER_MAGIC, fs.BTRFS_SUPER_MAGIC, fs.TMPFS_MAGIC, fs.RAMFS_MAGIC)
)


#: First bytes of image formats other than raw.
_FORMATS: Final = {b"QFI\xfb": "qcow2", b"KDMV": "VMDK", b"vhdxfile": "VHDX"}


class DiskFile:
    """An open medium of ``size`` bytes, whole sectors.

    ``block_size`` and ``physical_size`` are bytes of a logical and of a physical block. ``regular`` is true for a file,
    false for a block device. ``copies`` says whether the kernel copies reads and writes (else it may pin the memory).
    """

    def __init__(self, path: str, *, read_only: bool = False, lock: bool = True, block: int = 0) -> None:
        """Open ``path``, and lock it by default. ``block`` replaces the size of a logical block unless 0.

        Raises UsageError with the reason and a hint.
        """
        self.path = path
        self.read_only = read_only
        self.fd = _open(path, read_only)
        try:
            self.regular = stat.S_ISREG(os.fstat(self.fd).st_mode)
            self.size = self._measure()
            self._tell_format()
            if lock:
                self._lock()
            self.block_size, self.physical_size = self._blocks(block)
            self.copies = not self.regular or libc.file_system(self.fd)[0] in _COPYING
            self.can_discard = not read_only and self._can_discard()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def sectors(self) -> int:
        """Its size in sectors of 512 bytes."""
        return self.size // SECTOR

    def close(self) -> None:
        """Close and unlock. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def discard(self, offset: int, size: int) -> None:
        """Discard the bytes, which then have undefined contents. Raises OSError."""
        if self.regular:
            self._fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)
            return
        result, code = libc.ioctl(self.fd, fs.BLKDISCARD.number, byref((c_uint64 * 2)(offset, size)))
        if result < 0:
            raise OSError(code, os.strerror(code))

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """Zero the bytes; with ``unmap``, also free their space. Raises OSError.

        Raises ENODATA if the file was truncated: zeros behind its end would extend it again.
        """
        if self.regular and os.fstat(self.fd).st_size < self.size:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        # On a block device the kernel zeroes it itself (blkdev_fallocate, block/fops.c).
        ways = [FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE]
        if unmap:
            ways.insert(0, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
        for mode in ways:
            try:
                self._fallocate(mode, offset, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
            else:
                return
        zeros = bytes(min(size, _ZEROS))
        end = offset + size
        while offset < end:
            offset += os.pwrite(self.fd, zeros[: end - offset], offset)

    def _fallocate(self, mode: int, offset: int, size: int) -> None:
        if code := libc.fallocate(self.fd, mode, offset, size):
            raise OSError(code, os.strerror(code))

    def _measure(self) -> int:
        size = os.lseek(self.fd, 0, os.SEEK_END)
        if not size:
            raise UsageError(f"disk {self.path!r} is empty", hint=f"give it a size: truncate -s 1G {self.path}")
        if size % SECTOR:
            raise UsageError(
                f"disk {self.path!r} has {size} bytes, not whole sectors of {SECTOR} bytes",
                hint=f"is it an image in another format than raw? If not: truncate -s %{SECTOR} {self.path}",
            )
        return size

    def _tell_format(self) -> None:
        """Warn about another image format. A guest may have written those bytes, so the disk is not refused."""
        begins = os.pread(self.fd, 8, 0)
        for magic, name in _FORMATS.items():
            if begins.startswith(magic):
                log.warning(
                    "disk_served_raw",
                    path=self.path,
                    looks_like=name,
                    hint="the guest sees the file's raw bytes; to convert it: qemu-img convert -O raw",
                )

    def _lock(self) -> None:
        # The lock belongs to the open file, not to the process, so two disks of one VM also exclude each other. QEMU
        # locks single bytes in the same way, and a lock on all bytes conflicts with them.
        lock = struct.pack(_FLOCK, fcntl.F_RDLCK if self.read_only else fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, lock)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UsageError(
                    f"disk {self.path!r} is in use: another VM, or another disk of this one, "
                    + ("writes to it" if self.read_only else "has it open"),
                    hint="copy the disk, and name the copy: -d COPY, also with --restore; several users may share a "
                    "disk if all use ,ro",
                ) from None
            log.warning(
                "disk_not_locked",
                path=self.path,
                reason=error.strerror,
                hint="another VM could write to it at the same time",
            )

    def _blocks(self, asked: int) -> tuple[int, int]:
        logical, physical = self._own_blocks()
        if asked and asked < logical:
            raise UsageError(
                f"disk {self.path!r} has blocks of {logical} bytes, so a guest's cannot have {asked}",
                hint=f"block={logical}, or drop block=",
            )
        logical = asked or logical
        if self.size % logical:
            raise UsageError(
                f"disk {self.path!r} has {self.size} bytes, not whole blocks of {logical} bytes",
                hint=f"truncate -s %{logical} {self.path}" if self.regular else "use a smaller block=",
            )
        return logical, max(logical, physical)

    def _own_blocks(self) -> tuple[int, int]:
        if self.regular:
            return SECTOR, 4096
        logical, physical = c_int(SECTOR), c_uint(SECTOR)
        libc.ioctl(self.fd, fs.BLKSSZGET.number, byref(logical))
        libc.ioctl(self.fd, fs.BLKPBSZGET.number, byref(physical))
        return logical.value, physical.value

    def _can_discard(self) -> bool:
        if self.regular:
            # Test after the file's end, where no data can be lost.
            mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            return not libc.fallocate(self.fd, mode, self.size, SECTOR)
        number = os.fstat(self.fd).st_rdev
        device = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
        for queue in (f"{device}/queue", f"{device}/../queue"):  # a partition uses its disk's
            try:
                with open(f"{queue}/discard_max_bytes") as file:
                    return int(file.read()) > 0
            except (OSError, ValueError):
                continue
        return False


def _open(path: str, read_only: bool) -> int:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        hint = f"make one: truncate -s 1G {path}" if isinstance(error, FileNotFoundError) else None
        raise UsageError(f"disk {path!r} cannot be opened: {reason}", hint=hint) from None
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        what = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
        hint = f"make an image of it: mke2fs -t ext4 -d {path} IMAGE 1G" if stat.S_ISDIR(mode) else None
        raise UsageError(f"disk {path!r} is {what}", hint=hint)
    try:
        return os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        readable = not read_only and os.access(path, os.R_OK)
        raise UsageError(
            f"disk {path!r} cannot be opened for {'reading' if read_only else 'reading and writing'}: {error.strerror}",
            hint=f"for a read-only disk: --disk {path},ro" if readable else None,
        ) from None
