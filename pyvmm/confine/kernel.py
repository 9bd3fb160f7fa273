# SPDX-License-Identifier: Apache-2.0
"""The system calls of confinement, through ctypes, with errno. Owns nothing."""

from __future__ import annotations

import os
from ctypes import CDLL, Array, c_char, c_int, c_long, c_ulong, c_void_p, create_string_buffer, get_errno

from pyvmm.uapi.unistd import number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_libc = CDLL(None, use_errno=True)
_libc.prctl.argtypes = (c_int, c_ulong, c_ulong, c_ulong, c_ulong)
_libc.syscall.argtypes = (c_long, c_void_p, c_void_p, c_void_p, c_void_p)
_libc.syscall.restype = c_long

MACHINE: Final = os.uname().machine


def bytes_of(data: bytes) -> Array[c_char]:
    """Return memory with these bytes, to pass to a call."""
    return create_string_buffer(data, len(data))


def call(name: str, *arguments: object) -> int:
    """Make the system call ``name``, with up to four words or pointers. Raises OSError."""
    four = (*arguments, None, None, None, None)[:4]
    result: int = _libc.syscall(number(name, MACHINE), *four)
    if result < 0:
        code = get_errno()
        raise OSError(code, os.strerror(code), name)
    return result


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process or thread. Raises OSError."""
    if _libc.prctl(option, value, 0, 0, 0):
        code = get_errno()
        raise OSError(code, os.strerror(code), "prctl")
