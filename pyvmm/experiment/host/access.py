# SPDX-License-Identifier: Apache-2.0
"""All ways for this process to make its kernel access a page: system calls, a device, the kernel's own mapping.

Each function takes the address of a page in this process (or its file and offset) and returns an :class:`Answer` with
the bytes read. None raises for an error of the kernel. ``processes`` has the ways that need another process.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from pyvmm.experiment.host.processes import child_load
from pyvmm.experiment.host.syscalls import (
    FUTEX_WAIT,
    NR_FUTEX,
    NR_PREAD64,
    NR_PROCESS_VM_READV,
    NR_PROCESS_VM_WRITEV,
    NR_PWRITE64,
    NR_READ,
    NR_VMSPLICE,
    NR_WRITE,
    Answer,
    Iovec,
    call,
    pread_file,
)
from pyvmm.pages import HOST_PAGE

PATTERN = bytes(range(1, 9)) * (HOST_PAGE // 8)
"""A page's worth of bytes to write."""
EAGAIN, ETIMEDOUT = 11, 110


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield read, write
    finally:
        os.close(read)
        os.close(write)


@contextlib.contextmanager
def _opened(path: str | Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _drained(fd: int, moved: Answer) -> Answer:
    """Add the bytes that a pipe now holds to a successful answer, or return the error of reading them."""
    if not moved.ok:
        return moved
    buffer = ctypes.create_string_buffer(HOST_PAGE)
    read = call(NR_READ, fd, ctypes.byref(buffer), HOST_PAGE)
    return Answer(read.result, read.errno, buffer.raw[: read.result] if read.ok else b"")


# -- by the page's address


def read_into(address: int) -> Answer:
    """read(2) from a pipe into the page: copy_to_user, by the kernel at the page's user address."""
    with _pipe() as (read, write):
        os.write(write, PATTERN)
        return call(NR_READ, read, address, HOST_PAGE)


def write_from(address: int) -> Answer:
    """write(2) from the page into a pipe: copy_from_user."""
    with _pipe() as (read, write):
        return _drained(read, call(NR_WRITE, write, address, HOST_PAGE))


def process_vm_readv(address: int) -> Answer:
    """process_vm_readv(2) of this process: the kernel pins the page and copies through its own mapping."""
    buffer = ctypes.create_string_buffer(HOST_PAGE)
    local, remote = Iovec(ctypes.addressof(buffer), HOST_PAGE), Iovec(address, HOST_PAGE)
    pointers = ctypes.byref(local), 1, ctypes.byref(remote), 1
    return call(NR_PROCESS_VM_READV, os.getpid(), *pointers, 0, data=buffer)


def process_vm_writev(address: int) -> Answer:
    """process_vm_writev(2) into this process."""
    buffer = ctypes.create_string_buffer(PATTERN, HOST_PAGE)
    local, remote = Iovec(ctypes.addressof(buffer), HOST_PAGE), Iovec(address, HOST_PAGE)
    return call(NR_PROCESS_VM_WRITEV, os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)


def proc_mem_read(address: int) -> Answer:
    """pread(2) of /proc/self/mem, which ignores the mapping's protection."""
    with _opened("/proc/self/mem", os.O_RDONLY) as fd:
        return pread_file(fd, address)


def proc_mem_write(address: int) -> Answer:
    """pwrite(2) to /proc/self/mem."""
    with _opened("/proc/self/mem", os.O_RDWR) as fd:
        return pwrite_file(fd, address)


def vmsplice(address: int) -> Answer:
    """vmsplice(2) of the page into a pipe, then read(2) of that: the page is pinned first and copied last."""
    with _pipe() as (read, write):
        vector = Iovec(address, HOST_PAGE)
        return _drained(read, call(NR_VMSPLICE, write, ctypes.byref(vector), 1, 0))


def futex(address: int) -> Answer:
    """futex(2) FUTEX_WAIT on the page's first word, for a value it does not have: the kernel loads the word.

    The kernel's EAGAIN means success, and is ok here. The wait is bounded in case the word has that value.
    """
    timeout = struct.pack("qq", 0, 1_000_000)
    answer = call(NR_FUTEX, address, FUTEX_WAIT, 0x5A5A_5A5A, ctypes.c_char_p(timeout), 0, 0)
    return Answer(0, 0) if answer.errno in (EAGAIN, ETIMEDOUT) else answer


def direct_write(address: int, device: Path) -> Answer:
    """An O_DIRECT write of the page to a block device, by its physical address. Returns the bytes that arrived."""
    with _opened(device, os.O_RDWR | os.O_DIRECT) as fd:
        answer = call(NR_PWRITE64, fd, address, HOST_PAGE, 0)
        return Answer(answer.result, answer.errno, _device_page(fd)) if answer.ok else answer


def direct_read(address: int, device: Path) -> Answer:
    """An O_DIRECT read into the page from a block device, which holds PATTERN."""
    with _opened(device, os.O_RDWR | os.O_DIRECT) as fd:
        with mmap.mmap(-1, HOST_PAGE) as room:
            room[:] = PATTERN
            os.pwritev(fd, [room], 0)
        return call(NR_PREAD64, fd, address, HOST_PAGE, 0)


def _device_page(fd: int) -> bytes:
    with mmap.mmap(-1, HOST_PAGE) as room:
        os.preadv(fd, [room], 0)
        return room[:]


# -- by the page's file


def pwrite_file(fd: int, offset: int) -> Answer:
    """pwrite(2) of a file."""
    buffer = ctypes.create_string_buffer(PATTERN, HOST_PAGE)
    return call(NR_PWRITE64, fd, ctypes.byref(buffer), HOST_PAGE, offset)


def splice_file(fd: int, offset: int) -> Answer:
    """splice(2) of a file's page into a pipe, then read(2) of that: the page itself travels, and is copied last."""
    with _pipe() as (read, write):
        try:
            moved = os.splice(fd, write, HOST_PAGE, offset_src=offset)
        except OSError as error:
            return Answer(-1, error.errno or 0)
        return _drained(read, Answer(moved, 0))


def map_file(fd: int, offset: int) -> Answer:
    """Map the file's page again and write(2) from there into a pipe, to test a new mapping."""
    try:
        with mmap.mmap(fd, HOST_PAGE, offset=offset) as mapping:
            room = ctypes.c_char.from_buffer(mapping)
            answer = write_from(ctypes.addressof(room))
            del room
            return answer
    except OSError as error:
        return Answer(-1, error.errno or 0)


def fork_load(address: int) -> tuple[str, bytes]:
    """Have a forked child that inherits the page load a word. Returns the child's end, and the word."""
    answer = child_load(address)
    return answer.name, answer.data
