# SPDX-License-Identifier: Apache-2.0
"""linux/fs.h: requests of block devices. linux/magic.h: the file system types of statfs(2)."""

from __future__ import annotations

from pyvmm.uapi.ioctl import IO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

BLKDISCARD = IO("BLKDISCARD", 0x12, 119)
"""From a pair of 64-bit words: first byte, bytes."""
BLKSSZGET = IO("BLKSSZGET", 0x12, 104)
"""Bytes of a logical block, into an int."""
BLKPBSZGET = IO("BLKPBSZGET", 0x12, 123)
"""Bytes of a physical block, into an unsigned int."""

EXT4_SUPER_MAGIC: Final = 0xEF53
XFS_SUPER_MAGIC: Final = 0x5846_5342
BTRFS_SUPER_MAGIC: Final = 0x9123_683E
TMPFS_MAGIC: Final = 0x0102_1994
RAMFS_MAGIC: Final = 0x8584_58F6
