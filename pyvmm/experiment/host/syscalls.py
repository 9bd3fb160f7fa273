# SPDX-License-Identifier: Apache-2.0
"""System calls without a Python function, or with one that takes a buffer. Here addresses are integers.

Owns nothing. Each call returns an :class:`Answer`, because experiments expect failures. System call numbers come from
include/uapi/asm-generic/unistd.h, or are given for both architectures if they differ.
"""

from __future__ import annotations

import ctypes
import errno as _errno
import os
import platform
from dataclasses import dataclass
from typing import Any

from pyvmm.pages import HOST_PAGE
from pyvmm.uapi.mman import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

ARM64 = platform.machine() == "aarch64"
NR_FUTEX = 98 if ARM64 else 202
NR_VMSPLICE = 75 if ARM64 else 278
NR_PROCESS_VM_READV = 270 if ARM64 else 310
NR_PROCESS_VM_WRITEV = 271 if ARM64 else 311
NR_READ = 63 if ARM64 else 0
NR_WRITE = 64 if ARM64 else 1
NR_PREAD64 = 67 if ARM64 else 17
NR_PWRITE64 = 68 if ARM64 else 18
NR_MADVISE = 233 if ARM64 else 28
NR_MMAP = 222 if ARM64 else 9
NR_MREMAP = 216 if ARM64 else 25
NR_MLOCK = 228 if ARM64 else 149
NR_MINCORE = 232 if ARM64 else 27
NR_PRCTL = 167 if ARM64 else 157
NR_PTRACE = 117 if ARM64 else 101
NR_CAPGET = 90 if ARM64 else 125
NR_CAPSET = 91 if ARM64 else 126
NR_SWAPON = 224 if ARM64 else 167
NR_SWAPOFF = 225 if ARM64 else 168
NR_IO_URING_SETUP, NR_IO_URING_ENTER, NR_IO_URING_REGISTER = 425, 426, 427

FUTEX_WAIT = 0
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
PTRACE_PEEKDATA, PTRACE_ATTACH, PTRACE_DETACH = 2, 16, 17
CAPABILITY_VERSION_3 = 0x2008_0522


@dataclass(frozen=True, slots=True)
class Answer:
    """The kernel's answer: the result (-1: failed), errno (0: succeeded), and the bytes read.

    ``died`` is the name of the signal that ended the trying process, or the reason of an empty answer.
    """

    result: int
    errno: int
    data: bytes = b""
    died: str = ""

    @property
    def ok(self) -> bool:
        """Whether the access succeeded."""
        return not self.errno and not self.died

    @property
    def name(self) -> str:
        """``ok``, the errno's name, or how it died."""
        return self.died or (_errno.errorcode.get(self.errno, str(self.errno)) if self.errno else "ok")

    @property
    def word(self) -> int:
        """The first 64 bits of the data."""
        return int.from_bytes(self.data[:8], "little")


class Iovec(ctypes.Structure):
    """``struct iovec``"""

    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


def call(number: int, *arguments: Any, data: Any = None) -> Answer:
    """Make a system call with integers and ctypes pointers. The bytes of the buffer ``data`` go into the answer."""
    words = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result = _libc.syscall(ctypes.c_long(number), *words)
    errno = ctypes.get_errno() if result == -1 else 0
    return Answer(result, errno, b"" if data is None or errno else bytes(data))


def pread_file(fd: int, offset: int) -> Answer:
    """pread(2) of a page of a file, such as the memfd behind guest memory."""
    buffer = ctypes.create_string_buffer(HOST_PAGE)
    answer = call(NR_PREAD64, fd, ctypes.byref(buffer), HOST_PAGE, offset)
    return Answer(answer.result, answer.errno, buffer.raw[: answer.result] if answer.ok else b"")


def madvise(address: int, size: int, advice: int) -> Answer:
    """madvise(2)"""
    return call(NR_MADVISE, address, size, advice)


def mremap(address: int, size: int, to: int) -> Answer:
    """mremap(2) of a mapping to a fixed other address, whose mapping it replaces."""
    return call(NR_MREMAP, address, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to)


def anonymous(size: int) -> int:
    """Map private anonymous memory and return its address. The caller unmaps it."""
    answer = call(NR_MMAP, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if not answer.ok:
        raise OSError(answer.errno, f"mmap: {os.strerror(answer.errno)}")
    return answer.result


def prctl(option: int, argument: int) -> Answer:
    """prctl(2) with one argument."""
    return call(NR_PRCTL, option, argument, 0, 0, 0)


def drop_capabilities(*numbers: int) -> None:
    """Drop capabilities (CAP_*) of this thread and its future children, permanently. Raises OSError."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; low words, then high words
    for number, what in ((NR_CAPGET, "capget"), (NR_CAPSET, "capset")):
        if number == NR_CAPSET:
            for capability in numbers:
                sets[capability // 32 * 3] &= ~(1 << capability % 32)
        answer = call(number, ctypes.byref(header), ctypes.byref(sets))
        if not answer.ok:
            raise OSError(answer.errno, f"{what}: {os.strerror(answer.errno)}")


def page_frame(address: int) -> int | None:
    """Return the physical page number of an address; None without a page or without permission."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        entry = int.from_bytes(os.pread(file.fileno(), 8, address // HOST_PAGE * 8), "little")
    frame = entry & (1 << 55) - 1
    return frame if entry >> 63 and frame else None
