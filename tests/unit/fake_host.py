# SPDX-License-Identifier: Apache-2.0
"""``pyvmm`` on a KVM that says yes to everything and runs nothing: how a run starts, fails and ends, on any machine.

    python tests/unit/fake_host.py [--files SOFT[:HARD]] [--no-thread N] VERB ...

``--files`` is the limit of descriptors, ``--no-thread`` the number of the thread, from 1, that the host does not give.
KVM_RUN of what stands for a vCPU fails with ENOTTY, which ends a run that has come so far, with status 1.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from typing import Any

import pyvmm.kvm.fd
from pyvmm.cli import main

PAGE = 4096


def file() -> int:
    """Open what stands for a descriptor of KVM's."""
    number = os.memfd_create("kvm")
    os.ftruncate(number, 2 * PAGE)
    return number


def ioctl(_kernel: object, _fd: object, request: Any, argument: Any, _values: object) -> tuple[int, int]:
    """Say yes."""
    if request.name == "KVM_CREATE_DEVICE":
        argument.fd = file()
    if request.name in ("KVM_CREATE_VM", "KVM_CREATE_VCPU"):
        return file(), 0
    answers = {"KVM_GET_API_VERSION": 12, "KVM_CHECK_EXTENSION": 40, "KVM_GET_VCPU_MMAP_SIZE": 2 * PAGE}
    return answers.get(request.name, 0), 0


def refuse_thread(number: int) -> None:
    """Have the start of one thread fail as CPython's does where clone() says EAGAIN."""
    started, left = threading.Thread.start, [number]

    def start(thread: threading.Thread) -> None:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("can't start new thread")
        started(thread)

    threading.Thread.start = start  # type: ignore[method-assign,assignment]


def run(words: list[str]) -> int:
    """Run a command line."""
    os.uname = lambda: os.uname_result(("Linux", "here", "7.3", "", "aarch64"))
    pyvmm.kvm.fd.Kernel.open = lambda *_: file()  # type: ignore[method-assign]
    pyvmm.kvm.fd.Kernel.ioctl = ioctl  # type: ignore[assignment,method-assign]
    while words and words[0].startswith("--"):
        option, value, *words = words
        if option == "--files":
            soft, _, hard = value.partition(":")
            resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), int(hard or soft)))
        else:
            refuse_thread(int(value))
    return main(words)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
