# SPDX-License-Identifier: Apache-2.0
"""The system calls of pyvmm.kvm, pyvmm.memory and the devices, through ctypes, with errno. Owns nothing.

Addresses are integers and errors are numbers. Callers explain them. fcntl.ioctl is not used: it parses its argument as
a C int, so that KVM_CREATE_VM(1 << 31) raises OverflowError.
"""

from __future__ import annotations

import errno as _errno
from ctypes import CDLL, byref, c_int, c_int64, c_long, c_size_t, c_ulong, c_void_p, get_errno

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_libc = CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (c_int, c_ulong, c_void_p)
_libc.syscall.argtypes = (c_long, c_ulong)
_libc.syscall.restype = c_long
_libc.mmap.argtypes = (c_void_p, c_size_t, c_int, c_int, c_int, c_int64)
_libc.mmap.restype = c_void_p
_libc.munmap.argtypes = (c_void_p, c_size_t)
_libc.mprotect.argtypes = (c_void_p, c_size_t, c_int)
_libc.madvise.argtypes = (c_void_p, c_size_t, c_int)
_libc.fallocate.argtypes = (c_int, c_int, c_int64, c_int64)
_libc.fstatfs.argtypes = (c_int, c_void_p)

_MAP_FAILED = c_void_p(-1).value


def ioctl(fd: int, number: int, argument: Any) -> tuple[int, int]:
    """Return ioctl's result, or -1, and errno, or 0. ``argument`` is an integer or a ctypes reference."""
    result: int = _libc.ioctl(fd, number, argument)
    return result, get_errno() if result < 0 else 0


def syscall(number: int, argument: int) -> tuple[int, int]:
    """Make a one-argument system call without a libc function. Returns the result (or -1) and errno (or 0)."""
    result: int = _libc.syscall(number, argument)
    return result, get_errno() if result < 0 else 0


def mmap(size: int, prot: int, flags: int, fd: int, offset: int, address: int = 0) -> tuple[int, int]:
    """Return the address of a new mapping, or 0, and errno, or 0."""
    result: int | None = _libc.mmap(address, size, prot, flags, fd, offset)
    return (0, get_errno()) if result is None or result == _MAP_FAILED else (result, 0)


def munmap(address: int, size: int) -> int:
    """Return errno, or 0."""
    return _errno_of(_libc.munmap(address, size))


def mprotect(address: int, size: int, prot: int) -> int:
    """Return errno, or 0."""
    return _errno_of(_libc.mprotect(address, size, prot))


def madvise(address: int, size: int, advice: int) -> int:
    """Return errno, or 0."""
    return _errno_of(_libc.madvise(address, size, advice))


def fallocate(fd: int, mode: int, offset: int, size: int) -> int:
    """Return errno, or 0. Repeats a call that a signal interrupted."""
    while error := _errno_of(_libc.fallocate(fd, mode, offset, size)):
        if error != _errno.EINTR:
            return error
    return 0


def file_system(fd: int) -> tuple[int, int]:
    """Return the number of the file system that holds ``fd`` (linux/magic.h), or 0, and errno, or 0."""
    status = (c_long * 32)()  # struct statfs, whose first word it is, and then some
    error = _errno_of(_libc.fstatfs(fd, byref(status)))
    return (0, error) if error else (status[0] & 0xFFFF_FFFF, 0)


def _errno_of(result: int) -> int:
    return get_errno() if result else 0
