# SPDX-License-Identifier: Apache-2.0
"""The system calls that a run makes once its guest runs, each with its reason. Everything else is refused.

A call may be in several rules: any of them allows it. Rules that are asked most often come first. Owns nothing.
"""

from __future__ import annotations

from pyvmm.typed import NamedTuple
from pyvmm.uapi import fs, if_tun, kvm, kvm_arm64_vcpu, kvm_irq, kvm_memory, kvm_state, mman, userfaultfd
from pyvmm.uapi.prctl import PR_SET_NAME

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Final

    from pyvmm.uapi.ioctl import Ioctl

WORD: Final = 0xFFFF_FFFF
"""The low half of an argument, which is all that the kernel reads of an int."""

SELF: Final = "self"
"""A value of a :class:`Condition`: this process's ID."""


class Condition(NamedTuple):
    """A test of one argument: its bits of ``mask`` are ``value``. ``says`` tells that to people.

    A ``value`` that is a name stands for numbers that are known only when the filter is made. No number: never true.
    """

    argument: int
    mask: int
    value: int | str
    says: str


class Rule(NamedTuple):
    """Allow the system call ``call`` where all tests of ``when`` are true, in runs with ``part``; empty: in all."""

    call: str
    why: str
    when: tuple[Condition, ...] = ()
    part: str = ""


def _of(request: Ioctl) -> tuple[str, int]:
    return request.name, request.number


_IOCTLS: Final = (
    (*_of(kvm.KVM_RUN), "a vCPU enters its guest", ""),
    (*_of(kvm_irq.KVM_IRQ_LINE), "a device raises or lowers its interrupt", ""),
    (*_of(kvm_irq.KVM_IRQFD), "a device's interrupt is connected, and let go of at the end", ""),
    (*_of(kvm_irq.KVM_IOEVENTFD), "a driver's queue gets its doorbell", ""),
    (*_of(kvm.KVM_CHECK_EXTENSION), "whether the kernel takes doorbells", ""),
    (*_of(kvm.KVM_SET_USER_MEMORY_REGION), "memory slots are moved, and removed at the end", ""),
    (*_of(kvm_memory.KVM_SET_USER_MEMORY_REGION2), "the same for a guest_memfd", ""),
    (*_of(kvm.KVM_GET_ONE_REG), "registers for a crash, a pause, a snapshot", ""),
    (*_of(kvm.KVM_SET_ONE_REG), "the guest's clock is set after a pause", ""),
    (*_of(kvm_state.KVM_GET_REG_LIST), "the registers that a snapshot has", ""),
    (*_of(kvm_state.KVM_GET_MP_STATE), "whether a vCPU is on", ""),
    (*_of(kvm_state.KVM_SET_MP_STATE), "a vCPU is turned on or off", ""),
    (*_of(kvm_arm64_vcpu.KVM_GET_VCPU_EVENTS), "pending exceptions for a snapshot", ""),
    (*_of(kvm_arm64_vcpu.KVM_SET_VCPU_EVENTS), "an external abort for an address without a device", ""),
    (*_of(kvm.KVM_GET_DEVICE_ATTR), "the interrupt controller's state for a snapshot", ""),
    (*_of(kvm.KVM_SET_DEVICE_ATTR), "the interrupt controller stores its tables for a snapshot", ""),
    (*_of(kvm_arm64_vcpu.KVM_SET_GUEST_DEBUG), "breakpoints and single steps of arm64", "gdb"),
    ("TCGETS", 0x5401, "whether a descriptor is a terminal, and its mode", ""),
    ("TCSETS", 0x5402, "the terminal's mode is set", ""),
    ("TCSETSW", 0x5403, "the terminal's mode is restored", ""),
    ("TCGETS2", 0x802C_542A, "the same, of newer C libraries", ""),
    ("TCSETS2", 0x402C_542B, "the same, of newer C libraries", ""),
    ("TCSETSW2", 0x402C_542C, "the same, of newer C libraries", ""),
    ("TIOCGPGRP", 0x540F, "whether the terminal is ours before it is restored", ""),
    ("TIOCGWINSZ", 0x5413, "the size of the console's terminal", ""),
    ("FIONBIO", 0x5421, "a connection does not block", ""),
    (*_of(fs.BLKDISCARD), "a disk that is a block device discards", "disk"),
    (*_of(if_tun.TUNSETOFFLOAD), "a driver agrees on what the tap computes", "tap"),
    (*_of(if_tun.TUNSETVNETHDRSZ), "the tap's header", "tap"),
    (*_of(userfaultfd.UFFDIO_COPY), "a page of the snapshot is loaded", "restore"),
    (*_of(userfaultfd.UFFDIO_ZEROPAGE), "a page of zeros", "restore"),
    (*_of(userfaultfd.UFFDIO_CONTINUE), "a page that is loaded already", "restore"),
    (*_of(userfaultfd.UFFDIO_WAKE), "a fault is answered", "restore"),
    (*_of(userfaultfd.UFFDIO_UNREGISTER), "all pages are loaded", "restore"),
)
"""Name, number, reason and part of each command. The ioctls of a snapshot's load are over before the filter."""

_ADVICE: Final = (
    ("MADV_DONTNEED", mman.MADV_DONTNEED, "a page is given back: a conversion, a balloon, a thread's stack"),
    ("MADV_FREE", mman.MADV_FREE, "the C library gives memory back"),
    ("MADV_REMOVE", mman.MADV_REMOVE, "a page of a file is given back"),
    ("MADV_HUGEPAGE", mman.MADV_HUGEPAGE, "the C library or guest memory wants huge pages"),
    ("MADV_DONTFORK", mman.MADV_DONTFORK, "guest memory stays out of children"),
    ("MADV_DONTDUMP", mman.MADV_DONTDUMP, "guest memory stays out of core dumps"),
    ("MADV_POPULATE_WRITE", mman.MADV_POPULATE_WRITE, "guest memory is populated"),
)

_COMMANDS: Final = (
    ("F_GETFD", 1, "a descriptor's flags"),
    ("F_SETFD", 2, "a descriptor is not inherited"),
    ("F_GETFL", 3, "a descriptor's mode"),
    ("F_SETFL", 4, "a descriptor does not block"),
    ("F_DUPFD_CLOEXEC", 1030, "a descriptor of our own for a console"),
)

THREAD: Final = 0x003D_0F00
"""The flags with which the C libraries make a thread: CLONE_VM, _FS, _FILES, _SIGHAND, _THREAD, _SYSVSEM, _SETTLS,
_PARENT_SETTID and _CHILD_CLEARTID. musl adds the obsolete CLONE_DETACHED."""
_DETACHED: Final = 0x0040_0000

NO_EXEC: Final = Condition(2, mman.PROT_EXEC, 0, "without PROT_EXEC")

RULES: Final[tuple[Rule, ...]] = (
    *(Rule("ioctl", why, (Condition(1, WORD, number, name),), part) for name, number, why, part in _IOCTLS),
    Rule("futex", "threads wait for each other"),
    Rule("ppoll", "devices wait for kicks"),
    Rule("read", "open files, eventfds, the console's input"),
    Rule("write", "open files, eventfds, the console's output"),
    Rule("readv", "frames"),
    Rule("writev", "frames"),
    Rule("pread64", "open files at a place"),
    Rule("pwrite64", "open files at a place"),
    Rule("preadv", "disks"),
    Rule("preadv2", "disks"),
    Rule("pwritev2", "disks, past the page cache where the guest asked for that"),
    Rule("fdatasync", "a disk's flush"),
    Rule("fsync", "a file is whole on its disk"),
    Rule("fallocate", "holes: a disk's discard, private memory, a balloon"),
    Rule("ftruncate", "an output file is written from its start"),
    Rule("lseek", "open files"),
    Rule("fstat", "what an open descriptor is"),
    Rule("newfstatat", "the same; also tells size and times of other files, but not what is in them"),
    Rule("close", "what is over"),
    Rule("poll", "threads wait for descriptors"),
    Rule("epoll_create1", "a device's thread waits for descriptors"),
    Rule("epoll_ctl", "a device's thread waits for descriptors"),
    Rule("epoll_pwait", "a device's thread waits for descriptors"),
    Rule("epoll_wait", "a device's thread waits for descriptors"),
    Rule("eventfd2", "threads wake each other"),
    Rule("pipe2", "threads hand bytes to each other"),
    *(Rule("fcntl", why, (Condition(1, WORD, number, name),)) for name, number, why in _COMMANDS),
    Rule("mmap", "memory and thread stacks", (NO_EXEC,)),
    Rule("mprotect", "memory, and pages that a guest takes or gives", (NO_EXEC,)),
    Rule("munmap", "memory"),
    Rule("mremap", "memory"),
    Rule("brk", "memory"),
    *(Rule("madvise", why, (Condition(2, WORD, number, name),)) for name, number, why in _ADVICE),
    Rule("rt_sigaction", "signals end a run"),
    Rule("rt_sigprocmask", "signals end a run, and stop a vCPU"),
    Rule("rt_sigreturn", "signals end a run, and stop a vCPU"),
    Rule("sigaltstack", "a handler's stack is removed with its thread"),
    Rule("tgkill", "vCPUs are stopped", (Condition(0, WORD, SELF, "this process"),)),
    Rule("restart_syscall", "the kernel continues what a stop interrupted"),
    Rule(
        "clone",
        "threads",
        (Condition(0, WORD ^ _DETACHED, THREAD, "with the flags of a thread, so no process"),),
    ),
    Rule("set_robust_list", "threads"),
    Rule("rseq", "threads"),
    Rule("prctl", "a thread's name", (Condition(0, WORD, PR_SET_NAME, "PR_SET_NAME"),)),
    Rule("sched_yield", "threads"),
    Rule("sched_getaffinity", "the C library counts CPUs for its memory pools"),
    Rule("getpid", "which process this is"),
    Rule("gettid", "which thread this is"),
    Rule("getuid", "which user this is"),
    Rule("geteuid", "which user this is"),
    Rule("getpgid", "whether the terminal is ours before it is restored", (Condition(0, WORD, 0, "of this process"),)),
    Rule("getpgrp", "whether the terminal is ours before it is restored"),
    Rule("getrandom", "an entropy device, and hashes"),
    Rule("clock_gettime", "time, where the kernel's page does not tell it"),
    Rule("clock_getres", "time, where the kernel's page does not tell it"),
    Rule("gettimeofday", "time, where the kernel's page does not tell it"),
    Rule("clock_nanosleep", "rates of devices, and waits"),
    Rule("nanosleep", "rates of devices, and waits"),
    Rule("getcwd", "paths in a snapshot"),
    Rule(
        "prlimit64",
        "limits are read, for an error's text",
        (Condition(0, WORD, 0, "of this process"), Condition(2, 2**64 - 1, 0, "without new ones")),
    ),
    Rule("exit", "a thread ends"),
    Rule("exit_group", "the run ends"),
    Rule("unlinkat", "our own sockets are removed at the end; Landlock limits it to their directories"),
    Rule("unlink", "the same"),
    Rule("accept4", "clients of pyvmm ctl, of a debugger, of a vsock"),
    Rule("recvfrom", "connections"),
    Rule("sendto", "connections"),
    Rule("recvmsg", "connections"),
    Rule("sendmsg", "connections"),
    Rule("getsockname", "what kind of connection a descriptor is"),
    Rule("getpeername", "what kind of connection a descriptor is"),
    Rule("getsockopt", "what kind of connection a descriptor is"),
    Rule("setsockopt", "gdb's answers are not delayed", (), "gdb"),
    Rule("shutdown", "one side of a connection ends"),
    Rule("socket", "a guest connects to a program of the host", (Condition(0, WORD, 1, "AF_UNIX"),), "vsock"),
    Rule("connect", "a guest connects to a program of the host", (), "vsock"),
    Rule("wait4", "how passt ended", (), "passt"),
    Rule("kill", "a passt that does not end", (Condition(0, WORD, "passt", "passt"),), "passt"),
)
"""Every rule, those first that vCPUs and queues ask for."""

MISSING: Final = ("clone3",)
"""Calls that fail as if the kernel did not have them. The flags of clone3 are in memory, which a filter cannot read.
The C libraries take clone then."""


def rules_of(parts: Iterable[str]) -> Iterator[Rule]:
    """Yield the rules of a run with these parts."""
    present = {"", *parts}
    return (rule for rule in RULES if rule.part in present)
