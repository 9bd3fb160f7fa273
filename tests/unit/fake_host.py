# SPDX-License-Identifier: Apache-2.0
"""``pyvmm`` on a fake KVM that accepts every request and runs nothing, to test starts, failures and ends anywhere.

    python tests/unit/fake_host.py [--files SOFT[:HARD]] [--no-thread N] VERB ...

``--files`` is the limit of descriptors. ``--no-thread`` is the number, from 1, of the thread that fails to start.
KVM_RUN of the fake vCPU fails with ENOTTY, which ends a run that gets there with status 1.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from typing import Any

import pyvmm.confine.kernel  # knows the machine's calls before another machine is pretended
import pyvmm.kvm.fd
from pyvmm.cli import main

PAGE = 4096


def file() -> int:
    """Open a file in place of a KVM descriptor."""
    number = os.memfd_create("kvm")
    os.ftruncate(number, 2 * PAGE)
    return number


def ioctl(_kernel: object, _fd: object, request: Any, argument: Any, _values: object) -> tuple[int, int]:
    """Accept the request."""
    if request.name == "KVM_CREATE_DEVICE":
        argument.fd = file()
    if request.name in ("KVM_CREATE_VM", "KVM_CREATE_VCPU"):
        return file(), 0
    answers = {"KVM_GET_API_VERSION": 12, "KVM_CHECK_EXTENSION": 40, "KVM_GET_VCPU_MMAP_SIZE": 2 * PAGE}
    return answers.get(request.name, 0), 0


def refuse_thread(number: int) -> None:
    """Have the start of one thread fail as CPython's does when clone() returns EAGAIN."""
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
