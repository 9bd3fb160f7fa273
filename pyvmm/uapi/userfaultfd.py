# SPDX-License-Identifier: Apache-2.0
"""linux/userfaultfd.h: page faults reported to user space, and userfaultfd(2)'s number.

The kernel's ``struct uffd_msg`` is packed; its fields lie as they would without that.
"""

from __future__ import annotations

from ctypes import Structure, Union, c_uint64
from enum import IntEnum
from types import MappingProxyType

from pyvmm.uapi.ioctl import IO, IOR, IOW, IOWR
from pyvmm.uapi.layout import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.uapi.layout import s64, u8, u16, u32, u64

NR_USERFAULTFD = MappingProxyType({"aarch64": 282, "x86_64": 323})
"""Number of the system call by ``uname -m`` (__NR_userfaultfd of asm/unistd.h)."""

UFFD_USER_MODE_ONLY = 1

UFFD_API = 0xAA

# ---- features ----------------------------------------------------------------------------------------------------

UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
UFFD_FEATURE_EVENT_FORK = 1 << 1
UFFD_FEATURE_EVENT_REMAP = 1 << 2
UFFD_FEATURE_EVENT_REMOVE = 1 << 3
UFFD_FEATURE_MISSING_HUGETLBFS = 1 << 4
UFFD_FEATURE_MISSING_SHMEM = 1 << 5
UFFD_FEATURE_EVENT_UNMAP = 1 << 6
UFFD_FEATURE_SIGBUS = 1 << 7
UFFD_FEATURE_THREAD_ID = 1 << 8
UFFD_FEATURE_MINOR_HUGETLBFS = 1 << 9
UFFD_FEATURE_MINOR_SHMEM = 1 << 10
UFFD_FEATURE_EXACT_ADDRESS = 1 << 11
UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
UFFD_FEATURE_WP_UNPOPULATED = 1 << 13
UFFD_FEATURE_POISON = 1 << 14
UFFD_FEATURE_WP_ASYNC = 1 << 15
UFFD_FEATURE_MOVE = 1 << 16
UFFD_FEATURE_RWP = 1 << 17
UFFD_FEATURE_RWP_ASYNC = 1 << 18
UFFD_API_FEATURES = (1 << 19) - 1

# ---- messages ----------------------------------------------------------------------------------------------------


class UffdEvent(IntEnum):
    """``uffd_msg.event``."""

    UFFD_EVENT_PAGEFAULT = 0x12
    UFFD_EVENT_FORK = 0x13
    UFFD_EVENT_REMAP = 0x14
    UFFD_EVENT_REMOVE = 0x15
    UFFD_EVENT_UNMAP = 0x16


UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0
UFFD_PAGEFAULT_FLAG_WP = 1 << 1
UFFD_PAGEFAULT_FLAG_MINOR = 1 << 2
UFFD_PAGEFAULT_FLAG_RWP = 1 << 3


@layout()
class _feat(Union):
    ptid: u32


@layout()
class _pagefault(Structure):
    flags: u64
    address: u64
    feat: _feat


@layout()
class _fork(Structure):
    ufd: u32


class _remap(Structure):
    # ``from`` is a keyword here: getattr(remap, "from").
    _fields_ = (("from", c_uint64), ("to", c_uint64), ("len", c_uint64))


@layout()
class _remove(Structure):
    start: u64
    end: u64


@layout()
class _reserved(Structure):
    reserved1: u64
    reserved2: u64
    reserved3: u64


@layout()
class _arg(Union):
    pagefault: _pagefault
    fork: _fork
    remap: _remap
    remove: _remove
    reserved: _reserved


@layout()
class uffd_msg(Structure):
    """A message that read(2) of a userfaultfd returns, one or several at once."""

    event: u8
    reserved1: u8
    reserved2: u16
    reserved3: u32
    arg: _arg


# ---- requests ----------------------------------------------------------------------------------------------------

UFFDIO_REGISTER_MODE_MISSING = 1 << 0
UFFDIO_REGISTER_MODE_WP = 1 << 1
UFFDIO_REGISTER_MODE_MINOR = 1 << 2
UFFDIO_REGISTER_MODE_RWP = 1 << 3
UFFD_API_REGISTER_MODES = (1 << 4) - 1

UFFDIO_COPY_MODE_DONTWAKE = 1 << 0
UFFDIO_COPY_MODE_WP = 1 << 1
UFFDIO_ZEROPAGE_MODE_DONTWAKE = 1 << 0
UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0
UFFDIO_WRITEPROTECT_MODE_DONTWAKE = 1 << 1
UFFDIO_CONTINUE_MODE_DONTWAKE = 1 << 0
UFFDIO_CONTINUE_MODE_WP = 1 << 1
UFFDIO_POISON_MODE_DONTWAKE = 1 << 0
UFFDIO_RWPROTECT_MODE_RWP = 1 << 0
UFFDIO_RWPROTECT_MODE_DONTWAKE = 1 << 1
UFFDIO_MOVE_MODE_DONTWAKE = 1 << 0
UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES = 1 << 1

# Bit numbers in uffdio_api.ioctls and uffdio_register.ioctls.
_UFFDIO_REGISTER = 0x00
_UFFDIO_UNREGISTER = 0x01
_UFFDIO_WAKE = 0x02
_UFFDIO_COPY = 0x03
_UFFDIO_ZEROPAGE = 0x04
_UFFDIO_MOVE = 0x05
_UFFDIO_WRITEPROTECT = 0x06
_UFFDIO_CONTINUE = 0x07
_UFFDIO_POISON = 0x08
_UFFDIO_RWPROTECT = 0x09
_UFFDIO_SET_MODE = 0x0A
_UFFDIO_API = 0x3F

UFFD_API_IOCTLS = 1 << _UFFDIO_REGISTER | 1 << _UFFDIO_UNREGISTER | 1 << _UFFDIO_SET_MODE | 1 << _UFFDIO_API
UFFD_API_RANGE_IOCTLS_BASIC = (
    1 << _UFFDIO_WAKE
    | 1 << _UFFDIO_COPY
    | 1 << _UFFDIO_WRITEPROTECT
    | 1 << _UFFDIO_CONTINUE
    | 1 << _UFFDIO_POISON
    | 1 << _UFFDIO_RWPROTECT
)
UFFD_API_RANGE_IOCTLS = UFFD_API_RANGE_IOCTLS_BASIC | 1 << _UFFDIO_ZEROPAGE | 1 << _UFFDIO_MOVE


@layout()
class uffdio_api(Structure):
    api: u64
    features: u64
    ioctls: u64


@layout()
class uffdio_range(Structure):
    start: u64
    len: u64


@layout()
class uffdio_register(Structure):
    range: uffdio_range
    mode: u64
    ioctls: u64


@layout()
class uffdio_copy(Structure):
    dst: u64
    src: u64
    len: u64
    mode: u64
    copy: s64


@layout()
class uffdio_zeropage(Structure):
    range: uffdio_range
    mode: u64
    zeropage: s64


@layout()
class uffdio_writeprotect(Structure):
    range: uffdio_range
    mode: u64


@layout()
class uffdio_continue(Structure):
    range: uffdio_range
    mode: u64
    mapped: s64


@layout()
class uffdio_poison(Structure):
    range: uffdio_range
    mode: u64
    updated: s64


@layout()
class uffdio_rwprotect(Structure):
    range: uffdio_range
    mode: u64


@layout()
class uffdio_move(Structure):
    dst: u64
    src: u64
    len: u64
    mode: u64
    move: s64


@layout()
class uffdio_set_mode(Structure):
    enable: u64
    disable: u64


USERFAULTFD_IOC = 0xAA
USERFAULTFD_IOC_NEW = IO("USERFAULTFD_IOC_NEW", USERFAULTFD_IOC, 0x00)
"""On /dev/userfaultfd; its argument is userfaultfd(2)'s flags."""

UFFDIO = 0xAA
UFFDIO_API = IOWR("UFFDIO_API", UFFDIO, _UFFDIO_API, uffdio_api)
UFFDIO_REGISTER = IOWR("UFFDIO_REGISTER", UFFDIO, _UFFDIO_REGISTER, uffdio_register)
UFFDIO_UNREGISTER = IOR("UFFDIO_UNREGISTER", UFFDIO, _UFFDIO_UNREGISTER, uffdio_range)
UFFDIO_WAKE = IOR("UFFDIO_WAKE", UFFDIO, _UFFDIO_WAKE, uffdio_range)
UFFDIO_COPY = IOWR("UFFDIO_COPY", UFFDIO, _UFFDIO_COPY, uffdio_copy)
UFFDIO_ZEROPAGE = IOWR("UFFDIO_ZEROPAGE", UFFDIO, _UFFDIO_ZEROPAGE, uffdio_zeropage)
UFFDIO_MOVE = IOWR("UFFDIO_MOVE", UFFDIO, _UFFDIO_MOVE, uffdio_move)
UFFDIO_WRITEPROTECT = IOWR("UFFDIO_WRITEPROTECT", UFFDIO, _UFFDIO_WRITEPROTECT, uffdio_writeprotect)
UFFDIO_CONTINUE = IOWR("UFFDIO_CONTINUE", UFFDIO, _UFFDIO_CONTINUE, uffdio_continue)
UFFDIO_POISON = IOWR("UFFDIO_POISON", UFFDIO, _UFFDIO_POISON, uffdio_poison)
UFFDIO_RWPROTECT = IOWR("UFFDIO_RWPROTECT", UFFDIO, _UFFDIO_RWPROTECT, uffdio_rwprotect)
UFFDIO_SET_MODE = IOW("UFFDIO_SET_MODE", UFFDIO, _UFFDIO_SET_MODE, uffdio_set_mode)
