"""Every way a host's kernel can be made to touch a page: by system calls, by other processes, by devices.

Each function takes the address of a page in this process (or its file and offset) and returns an :class:`Answer` with
what was read; none of them raises for what the kernel answers. Those that need another process fork one: the mapping of
guest memory is kept out of forks, and is let into this one on purpose.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import signal
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pyvmm.atlas.host.syscalls import (
    FUTEX_WAIT,
    NR_FUTEX,
    NR_PREAD64,
    NR_PROCESS_VM_READV,
    NR_PROCESS_VM_WRITEV,
    NR_PTRACE,
    NR_PWRITE64,
    NR_READ,
    NR_VMSPLICE,
    NR_WRITE,
    PAGE,
    PR_SET_PTRACER,
    PTRACE_ATTACH,
    PTRACE_DETACH,
    PTRACE_PEEKDATA,
    Answer,
    Iovec,
    call,
    madvise,
    prctl,
)
from pyvmm.uapi.mman import MADV_DODUMP, MADV_DOFORK, MADV_DONTDUMP, MADV_DONTFORK

PATTERN = bytes(range(256)) * 16
"""A page's worth of bytes to write."""


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        yield read, write
    finally:
        os.close(read)
        os.close(write)


def read_into(address: int) -> Answer:
    """read(2) from a pipe into the page: copy_to_user, by the kernel at the page's user address."""
    with _pipe() as (read, write):
        os.write(write, PATTERN)
        return call(NR_READ, read, address, PAGE)


def write_from(address: int) -> Answer:
    """write(2) from the page into a pipe: copy_from_user."""
    with _pipe() as (read, write):
        answer = call(NR_WRITE, write, address, PAGE)
        return Answer(answer.result, answer.errno, os.read(read, PAGE) if answer.result > 0 else b"")


def process_vm_readv(address: int) -> Answer:
    """process_vm_readv(2) of this process: the kernel pins the page and copies through its own mapping."""
    buffer = ctypes.create_string_buffer(PAGE)
    local, remote = Iovec(ctypes.addressof(buffer), PAGE), Iovec(address, PAGE)
    pointers = ctypes.byref(local), 1, ctypes.byref(remote), 1
    return call(NR_PROCESS_VM_READV, os.getpid(), *pointers, 0, data=buffer)


def process_vm_writev(address: int) -> Answer:
    """process_vm_writev(2) into this process."""
    buffer = ctypes.create_string_buffer(PATTERN, PAGE)
    local, remote = Iovec(ctypes.addressof(buffer), PAGE), Iovec(address, PAGE)
    return call(NR_PROCESS_VM_WRITEV, os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)


def proc_mem(address: int) -> Answer:
    """pread(2) of /proc/self/mem."""
    fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return pread_file(fd, address)
    finally:
        os.close(fd)


def pread_file(fd: int, offset: int) -> Answer:
    """pread(2) of a file, such as the memfd behind the page."""
    buffer = ctypes.create_string_buffer(PAGE)
    return call(NR_PREAD64, fd, ctypes.byref(buffer), PAGE, offset, data=buffer)


def pwrite_file(fd: int, offset: int) -> Answer:
    """pwrite(2) of a file."""
    buffer = ctypes.create_string_buffer(PATTERN, PAGE)
    return call(NR_PWRITE64, fd, ctypes.byref(buffer), PAGE, offset)


def splice_file(fd: int, offset: int) -> Answer:
    """splice(2) of a file's page into a pipe, then read(2) of that: the page itself travels, and is copied last."""
    with _pipe() as (read, write):
        try:
            moved = os.splice(fd, write, PAGE, offset_src=offset)
            return Answer(moved, 0, os.read(read, PAGE))
        except OSError as error:
            return Answer(-1, error.errno or 0)


def vmsplice(address: int) -> Answer:
    """vmsplice(2) of the page into a pipe, then read(2) of that."""
    with _pipe() as (read, write):
        vector = Iovec(address, PAGE)
        answer = call(NR_VMSPLICE, write, ctypes.byref(vector), 1, 0)
        if not answer.ok:
            return answer
        try:
            return Answer(answer.result, 0, os.read(read, PAGE))
        except OSError as error:
            return Answer(-1, error.errno or 0)


def futex(address: int) -> Answer:
    """futex(2) FUTEX_WAIT on the page's first word, for a value it does not have: the kernel loads the word.

    EAGAIN is the answer of one who could; the wait is bounded should the value happen to be there.
    """
    timeout = struct.pack("qq", 0, 1_000_000)
    return call(NR_FUTEX, address, FUTEX_WAIT, 0x5A5A_5A5A, ctypes.c_char_p(timeout), 0, 0)


def direct(address: int, path: Path, *, write: bool) -> Answer:
    """O_DIRECT write from, or read into, the page: a device's DMA is given its physical address."""
    fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        if not write:
            return call(NR_PREAD64, fd, address, PAGE, 0)
        answer = call(NR_PWRITE64, fd, address, PAGE, 0)
    finally:
        os.close(fd)
    return Answer(answer.result, answer.errno, path_bytes(path)) if answer.ok else answer


def path_bytes(path: Path) -> bytes:
    """Read a page of a device past every cache, into memory of our own."""
    with mmap.mmap(-1, PAGE) as room:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            os.preadv(fd, [room], 0)
        finally:
            os.close(fd)
        return room[:]


# -- by another process


def _in_child(work: object) -> tuple[int, bytes]:
    """Run ``work(fd)`` in a forked child that may write to fd; returns its wait status and what it wrote."""
    read, write = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            work(write)  # type: ignore[operator]
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return status, said


@contextlib.contextmanager
def _inherited(address: int) -> Iterator[None]:
    madvise(address, PAGE, MADV_DOFORK)
    try:
        yield
    finally:
        madvise(address, PAGE, MADV_DONTFORK)


def fork_load(address: int) -> tuple[str, bytes]:
    """Fork, and have the child load from its inherited mapping; returns how that ended, and the word it saw."""

    def load(fd: int) -> None:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        os.write(fd, ctypes.string_at(address, 8))

    with _inherited(address):
        status, said = _in_child(load)
    code = os.waitstatus_to_exitcode(status)
    return (signal.Signals(-code).name if code < 0 else "ok"), said


def core_dump(address: int) -> tuple[str, bytes]:
    """Fork a child that inherits the page, lets it into core dumps, and aborts; returns ok and the page in its core."""
    with tempfile.TemporaryDirectory() as directory:

        def crash(_fd: int) -> None:
            os.chdir(directory)
            madvise(address, PAGE, MADV_DODUMP)
            resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            Path("/proc/self/coredump_filter").write_text("0x7f")
            signal.signal(signal.SIGABRT, signal.SIG_DFL)
            os.abort()

        soft = resource.getrlimit(resource.RLIMIT_CORE)
        try:
            with _inherited(address):
                status, _ = _in_child(crash)
        finally:
            madvise(address, PAGE, MADV_DONTDUMP)
            resource.setrlimit(resource.RLIMIT_CORE, soft)
        cores = list(Path(directory).iterdir())
        if not cores:
            return f"no core file (status {os.waitstatus_to_exitcode(status)})", b""
        return _page_in_core(cores[0], address)


def _page_in_core(path: Path, address: int) -> tuple[str, bytes]:
    """Find an address in an ELF core file by its program headers."""
    with path.open("rb") as core:
        header = core.read(64)
        offset, size, count = *struct.unpack_from("<Q", header, 32), *struct.unpack_from("<HH", header, 54)
        for number in range(count):
            core.seek(offset + number * size)
            kind, _, start, base, _, file_size, _, _ = struct.unpack("<IIQQQQQQ", core.read(56))
            if kind == 1 and base <= address < base + file_size:
                core.seek(start + address - base)
                return "ok", core.read(PAGE)
    return "the page is not in the core file", b""


def ptrace_peek(address: int) -> Answer:
    """Have a child attach to this process with ptrace(2) and read a word of it, as a debugger does."""
    parent = os.getpid()
    prctl(PR_SET_PTRACER, -1)

    def peek(fd: int) -> None:
        answer = call(NR_PTRACE, PTRACE_ATTACH, parent, 0, 0)
        if answer.ok:
            os.waitpid(parent, 0x4000_0000)  # __WALL
            word = ctypes.c_uint64()
            answer = call(NR_PTRACE, PTRACE_PEEKDATA, parent, address, ctypes.byref(word))
            call(NR_PTRACE, PTRACE_DETACH, parent, 0, 0)
            os.write(fd, struct.pack("<iQ", answer.errno, word.value))
        else:
            os.write(fd, struct.pack("<iQ", answer.errno, 0))

    _, said = _in_child(peek)
    if len(said) != 12:
        return Answer(-1, 5)
    errno, word = struct.unpack("<iQ", said)
    return Answer(-1 if errno else 0, errno, word.to_bytes(8, "little"))
