# SPDX-License-Identifier: Apache-2.0
"""The system calls that a run makes once its guest runs, each with its reason. Everything else is refused.

A call may be in several rules: any of them allows it. Rules that are asked most often come first. Owns nothing.
"""

from __future__ import annotations

from pyvmm.typed import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Final

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


_IOCTLS: Final = (
    ("KVM_RUN", 0xAE80, "a vCPU enters its guest", ""),
    ("KVM_IRQ_LINE", 0x4008_AE61, "a device raises or lowers its interrupt", ""),
    ("KVM_IRQFD", 0x4020_AE76, "a device's interrupt is connected, and let go of at the end", ""),
    ("KVM_IOEVENTFD", 0x4040_AE79, "a driver's queue gets its doorbell", ""),
    ("KVM_CHECK_EXTENSION", 0xAE03, "whether the kernel takes doorbells", ""),
    ("KVM_SET_USER_MEMORY_REGION", 0x4020_AE46, "memory slots are moved, and removed at the end", ""),
    ("KVM_SET_USER_MEMORY_REGION2", 0x40A0_AE49, "the same for a guest_memfd", ""),
    ("KVM_GET_ONE_REG", 0x4010_AEAB, "registers for a crash, a pause, a snapshot", ""),
    ("KVM_SET_ONE_REG", 0x4010_AEAC, "the guest's clock is set after a pause", ""),
    ("KVM_GET_REG_LIST", 0xC008_AEB0, "the registers that a snapshot has", ""),
    ("KVM_GET_MP_STATE", 0x8004_AE98, "whether a vCPU is on", ""),
    ("KVM_SET_MP_STATE", 0x4004_AE99, "a vCPU is turned on or off", ""),
    ("KVM_GET_VCPU_EVENTS", 0x8040_AE9F, "pending exceptions for a snapshot", ""),
    ("KVM_SET_VCPU_EVENTS", 0x4040_AEA0, "an external abort for an address without a device", ""),
    ("KVM_GET_DEVICE_ATTR", 0x4018_AEE2, "the interrupt controller's state for a snapshot", ""),
    ("KVM_SET_DEVICE_ATTR", 0x4018_AEE1, "the interrupt controller stores its tables for a snapshot", ""),
    ("KVM_SET_GUEST_DEBUG", 0x4208_AE9B, "breakpoints and single steps of arm64", "gdb"),
    ("TCGETS", 0x5401, "whether a descriptor is a terminal, and its mode", ""),
    ("TCSETS", 0x5402, "the terminal's mode is set", ""),
    ("TCSETSW", 0x5403, "the terminal's mode is restored", ""),
    ("TCGETS2", 0x802C_542A, "the same, of newer C libraries", ""),
    ("TCSETS2", 0x402C_542B, "the same, of newer C libraries", ""),
    ("TCSETSW2", 0x402C_542C, "the same, of newer C libraries", ""),
    ("TIOCGPGRP", 0x540F, "whether the terminal is ours before it is restored", ""),
    ("TIOCGWINSZ", 0x5413, "the size of the console's terminal", ""),
    ("FIONBIO", 0x5421, "a connection does not block", ""),
    ("BLKDISCARD", 0x1277, "a disk that is a block device discards", "disk"),
    ("TUNSETOFFLOAD", 0x4004_54D0, "a driver agrees on what the tap computes", "tap"),
    ("TUNSETVNETHDRSZ", 0x4004_54D8, "the tap's header", "tap"),
    ("UFFDIO_COPY", 0xC028_AA03, "a page of the snapshot is loaded", "restore"),
    ("UFFDIO_ZEROPAGE", 0xC020_AA04, "a page of zeros", "restore"),
    ("UFFDIO_CONTINUE", 0xC020_AA07, "a page that is loaded already", "restore"),
    ("UFFDIO_WAKE", 0x8010_AA02, "a fault is answered", "restore"),
    ("UFFDIO_UNREGISTER", 0x8010_AA01, "all pages are loaded", "restore"),
)
"""Name, number, reason and part of each command. The ioctls of a snapshot's load are over before the filter."""

_ADVICE: Final = (
    ("MADV_DONTNEED", 4, "a page is given back: a conversion, a balloon, a thread's stack"),
    ("MADV_FREE", 8, "the C library gives memory back"),
    ("MADV_REMOVE", 9, "a page of a file is given back"),
    ("MADV_HUGEPAGE", 14, "the C library or guest memory wants huge pages"),
    ("MADV_DONTFORK", 10, "guest memory stays out of children"),
    ("MADV_DONTDUMP", 16, "guest memory stays out of core dumps"),
    ("MADV_POPULATE_WRITE", 23, "guest memory is populated"),
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

NO_EXEC: Final = Condition(2, 0x4, 0, "without PROT_EXEC")

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
    Rule("prctl", "a thread's name", (Condition(0, WORD, 15, "PR_SET_NAME"),)),
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
