# SPDX-License-Identifier: Apache-2.0
"""Confine this process as ``sys.argv`` says, try forbidden and allowed acts, and print each one's errno as JSON.

``confined.py WALLS USER DIRECTORY [PART ...]``: WALLS are words of caps, landlock and seccomp with commas between.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyvmm.confine import filter as seccomp
from pyvmm.confine import landlock, privileges
from pyvmm.uapi.unistd import MACHINES

LIBC = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"
AT = MACHINES.index(os.uname().machine)

# Calls that no rule has, on aarch64 and x86-64.
OTHERS = {
    "acct": (89, 163),
    "add_key": (217, 248),
    "bpf": (280, 321),
    "chroot": (51, 161),
    "delete_module": (106, 176),
    "execveat": (281, 322),
    "fanotify_init": (262, 300),
    "init_module": (105, 175),
    "io_uring_setup": (425, 425),
    "keyctl": (219, 250),
    "memfd_create": (279, 319),
    "mkdirat": (34, 258),
    "mount": (40, 165),
    "open_by_handle_at": (265, 304),
    "openat2": (437, 437),
    "perf_event_open": (241, 298),
    "personality": (92, 135),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pivot_root": (41, 155),
    "process_vm_writev": (271, 311),
    "ptrace": (117, 101),
    "reboot": (142, 169),
    "renameat2": (276, 316),
    "seccomp": (277, 317),
    "setns": (268, 308),
    "setuid": (146, 105),
    "symlinkat": (36, 266),
    "umount2": (39, 166),
    "unshare": (97, 272),
    "userfaultfd": (282, 323),
}
KVM_CREATE_VM, TIOCSTI = 0xAE01, 0x5412
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
EXECUTABLE = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
FAILED = ctypes.c_void_p(-1).value

LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
LIBC.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
LIBC.syscall.restype = ctypes.c_long


def mapped(protection: int) -> int | None:
    address: int | None = LIBC.mmap(None, 4096, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    return address


class Acts:
    """What is tried, with what had to be opened before."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.parent = os.getppid()
        self.file = os.open(f"{directory}/open", os.O_RDWR)
        self.unbound = socket.socket(socket.AF_UNIX)
        self.unconnected = socket.socket(socket.AF_UNIX)
        self.page = mapped(mmap.PROT_READ | mmap.PROT_WRITE)
        self.one, self.other = socket.socketpair()
        self.words = ctypes.create_string_buffer(64)

    def forbidden(self) -> dict[str, Callable[[], int]]:
        """Return what no run does. Each returns the call's result."""
        place = self.directory.encode()
        acts: dict[str, Callable[[], Any]] = {
            "open to read": lambda: LIBC.open(place + b"/secret", os.O_RDONLY),
            "open to write": lambda: LIBC.open(place + b"/secret", os.O_WRONLY),
            "open a directory": lambda: LIBC.open(b"/", os.O_RDONLY | os.O_DIRECTORY),
            "make a file": lambda: LIBC.open(place + b"/new", os.O_RDWR | os.O_CREAT, 0o600),
            "connect": lambda: LIBC.connect(self.unconnected.fileno(), b"\1\0" + place + b"/listening\0", 108),
            "bind": lambda: LIBC.bind(self.unbound.fileno(), b"\1\0" + place + b"/bound\0", 108),
            "an internet socket": lambda: LIBC.socket(socket.AF_INET, socket.SOCK_STREAM, 0),
            "a netlink socket": lambda: LIBC.socket(16, socket.SOCK_RAW, 0),
            "a unix socket": lambda: LIBC.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0),
            "fork": self.fork,
            "mmap with PROT_EXEC": lambda: -1 if mapped(EXECUTABLE) == FAILED else 0,
            "mprotect with PROT_EXEC": lambda: LIBC.mprotect(self.page, 4096, EXECUTABLE),
            "kill another process": lambda: LIBC.kill(self.parent, 0),
            "kill all processes": lambda: LIBC.kill(-1, 0),
            "a KVM ioctl that is not listed": lambda: LIBC.ioctl(self.file, KVM_CREATE_VM, None),
            "type on the terminal": lambda: LIBC.ioctl(self.file, TIOCSTI, ctypes.addressof(self.words)),
            "prctl that makes memory readable": lambda: LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0),
            "prctl that undoes something": lambda: LIBC.prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0),
            "read another process": lambda: LIBC.process_vm_readv(self.parent, None, 0, None, 0, 0),
            "a higher limit": lambda: LIBC.setrlimit(7, ctypes.byref((ctypes.c_ulong * 2)(4096, 4096))),
            "signal another process's thread": lambda: LIBC.syscall((131, 234)[AT], self.parent, self.parent, 0),
        }
        return acts

    @staticmethod
    def others() -> dict[str, Callable[[], int]]:
        """Return the calls that no rule has. Some of them would do harm where nothing refuses them."""
        return {
            call: lambda nr=numbers[AT]: LIBC.syscall(nr, 0, 0, 0, 0, 0, 0)  # type: ignore[misc]
            for call, numbers in OTHERS.items()
        }

    def allowed(self) -> dict[str, Callable[[], int]]:
        """Return what every run does."""
        return {
            "map memory": lambda: 0 if mapped(mmap.PROT_READ) != FAILED else -1,
            "protect memory": lambda: LIBC.mprotect(self.page, 4096, mmap.PROT_READ),
            "a thread": self.thread,
            "read an open file": lambda: len(os.pread(self.file, 4, 0)),
            "write an open file": lambda: os.pwrite(self.file, b"text", 0),
            "truncate an open file": lambda: LIBC.ftruncate(self.file, 0),
            "a connection": lambda: self.one.send(b"text") + len(self.other.recv(4)),
            "signal itself": lambda: LIBC.syscall((131, 234)[AT], os.getpid(), threading.get_native_id(), 0),
            "random numbers": lambda: len(os.urandom(8)),
            "wake a thread": lambda: os.eventfd(0),
        }

    @staticmethod
    def fork() -> int:
        if (child := int(LIBC.fork())) == 0:
            os._exit(0)
        return child

    @staticmethod
    def thread() -> int:
        seen: list[int] = []
        thread = threading.Thread(target=seen.append, args=(1,))
        thread.start()
        thread.join()
        return seen[0]


def tried(acts: dict[str, Callable[[], int]]) -> dict[str, int]:
    """Return the errno of each act; 0 where it worked."""
    found = {}
    for name, act in acts.items():
        try:
            found[name] = ctypes.get_errno() if act() < 0 else 0
        except OSError as error:
            found[name] = error.errno or -1
        except RuntimeError:
            found[name] = errno.EAGAIN
    return found


class Elder:
    """A thread that is older than the filter. It opens a file when told."""

    def __init__(self, path: str) -> None:
        self._told = threading.Event()
        self.errno = -1
        self._path = path.encode()
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def _main(self) -> None:
        self._told.wait()
        self.errno = ctypes.get_errno() if LIBC.open(self._path, os.O_RDONLY) < 0 else 0

    def ask(self) -> int:
        self._told.set()
        self._thread.join()
        return self.errno


def main() -> None:
    walls, user, directory, *parts = sys.argv[1:]
    acts = Acts(directory)
    status = open("/proc/self/status")  # noqa: SIM115 - read once the process cannot open it
    if user == "nobody":
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    privileges.gain_no_more()
    if "caps" in walls:
        privileges.drop_capabilities(lock_memory="lock" in walls)
    abi = landlock.restrict(removing=[f"{directory}/ours"]) if "landlock" in walls else 0
    elder = Elder(f"{directory}/secret")
    if "seccomp" in walls:
        seccomp.seal(parts)
    forbidden = acts.forbidden()
    if "landlock" in walls or "seccomp" in walls:
        forbidden["execve"] = lambda: LIBC.execve(b"/bin/true", None, None)
    if "seccomp" in walls:
        forbidden |= acts.others()
    report = {
        "forbidden": tried(forbidden),
        "allowed": tried(acts.allowed()),
        "elder": elder.ask(),
        "abi": abi,
        "remove ours": tried({"it": lambda: LIBC.unlink(f"{directory}/ours/socket".encode())})["it"],
        "remove another": tried({"it": lambda: LIBC.unlink(f"{directory}/secret".encode())})["it"],
        "status": status.read(),
    }
    os.write(1, json.dumps(report).encode())


if __name__ == "__main__":
    assert Path(__file__).exists()
    main()
