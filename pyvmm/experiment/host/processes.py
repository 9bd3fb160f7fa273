# SPDX-License-Identifier: Apache-2.0
"""Accesses of other processes to a page of this one: a child that inherits it, a debugger, a core dump.

Each forks a child that ends before the function returns. The mapping of guest memory is excluded from forks, so the
functions include its page in theirs explicitly. Each returns an :class:`Answer`. None raises for an error of the
kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pyvmm.experiment.host.elf import core_page
from pyvmm.experiment.host.syscalls import (
    NR_PTRACE,
    PTRACE_ATTACH,
    PTRACE_DETACH,
    PTRACE_PEEKDATA,
    Answer,
    call,
    madvise,
    prctl,
)
from pyvmm.pages import HOST_PAGE
from pyvmm.uapi.mman import MADV_DODUMP, MADV_DOFORK, MADV_DONTFORK
from pyvmm.uapi.prctl import PR_SET_PTRACER

EIO = 5
WALL = 0x4000_0000
"""__WALL of linux/wait.h"""
SHARED_ONLY = "0xa"
"""coredump_filter: shared mappings, of files or not, and nothing else (core(5))."""


def in_child(work: Callable[[int], object]) -> tuple[int, bytes]:
    """Run ``work(fd)`` in a forked child that may write to fd. Returns its exit code (-signal) and its output.

    This process may have vCPU threads, since a guest's memory is what the child looks at. Only the calling thread is in
    the child, so ``work`` must not wait for what another thread may hold: locks, queues, the log.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
                signal.signal(number, signal.SIG_DFL)
            work(write)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said


@contextlib.contextmanager
def _inherited(address: int) -> Iterator[None]:
    madvise(address, HOST_PAGE, MADV_DOFORK)
    try:
        yield
    finally:
        madvise(address, HOST_PAGE, MADV_DONTFORK)


def _ended(code: int, said: bytes) -> Answer:
    if code:
        return Answer(-1, 0, b"", signal.Signals(-code).name if code < 0 else f"exit status {code}")
    return Answer(0, 0, said)


def child_load(address: int) -> Answer:
    """Fork a child that inherits the page and loads a word. Returns the word, or the signal that ended the child."""
    with _inherited(address):
        return _ended(*in_child(lambda fd: os.write(fd, ctypes.string_at(address, 8))))


def core_dump(address: int) -> Answer:
    """Fork a child that inherits the page, includes it in core dumps, and aborts. Returns the page in the core file."""
    with tempfile.TemporaryDirectory() as directory:

        def crash(_fd: int) -> None:
            os.chdir(directory)
            madvise(address, HOST_PAGE, MADV_DODUMP)
            resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            Path("/proc/self/coredump_filter").write_text(SHARED_ONLY)
            os.abort()

        with _inherited(address):
            code, _ = in_child(crash)
        core = next(Path(directory).iterdir(), None)
        if code != -signal.SIGABRT or core is None:
            return Answer(-1, 0, b"", "no core file")
        return core_page(core, address)


def ptrace_peek(address: int) -> Answer:
    """Have a child attach to this process with ptrace(2) and read a word of it, as a debugger does."""
    parent = os.getpid()
    prctl(PR_SET_PTRACER, -1)

    def peek(fd: int) -> None:
        answer, word = call(NR_PTRACE, PTRACE_ATTACH, parent, 0, 0), ctypes.c_uint64()
        if answer.ok:
            os.waitpid(parent, WALL)
            answer = call(NR_PTRACE, PTRACE_PEEKDATA, parent, address, ctypes.byref(word))
            call(NR_PTRACE, PTRACE_DETACH, parent, 0, 0)
        os.write(fd, struct.pack("<iQ", answer.errno, word.value))

    code, said = in_child(peek)
    if code or len(said) != 12:
        return Answer(-1, EIO)
    errno, word = struct.unpack("<iQ", said)
    return Answer(-1, errno) if errno else Answer(0, 0, word.to_bytes(8, "little"))
