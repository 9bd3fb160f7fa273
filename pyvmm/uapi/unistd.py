# SPDX-License-Identifier: Apache-2.0
"""asm/unistd.h: numbers of system calls, where libc has no function or a filter needs them."""

from __future__ import annotations

from types import MappingProxyType

MACHINES = ("aarch64", "x86_64")
"""``uname -m`` of each column of :data:`NUMBERS`."""

NUMBERS = MappingProxyType(
    {
        "accept4": (242, 288),
        "brk": (214, 12),
        "capget": (90, 125),
        "capset": (91, 126),
        "clock_getres": (114, 229),
        "clock_gettime": (113, 228),
        "clock_nanosleep": (115, 230),
        "clone": (220, 56),
        "clone3": (435, 435),
        "close": (57, 3),
        "close_range": (436, 436),
        "connect": (203, 42),
        "epoll_create1": (20, 291),
        "epoll_ctl": (21, 233),
        "epoll_pwait": (22, 281),
        "epoll_wait": (None, 232),
        "eventfd2": (19, 290),
        "exit": (93, 60),
        "exit_group": (94, 231),
        "fallocate": (47, 285),
        "fcntl": (25, 72),
        "fdatasync": (83, 75),
        "fstat": (80, 5),
        "fsync": (82, 74),
        "ftruncate": (46, 77),
        "futex": (98, 202),
        "getcwd": (17, 79),
        "geteuid": (175, 107),
        "getpeername": (205, 52),
        "getpid": (172, 39),
        "getrandom": (278, 318),
        "getsockname": (204, 51),
        "getsockopt": (209, 55),
        "gettid": (178, 186),
        "gettimeofday": (169, 96),
        "getuid": (174, 102),
        "ioctl": (29, 16),
        "kill": (129, 62),
        "landlock_add_rule": (445, 445),
        "landlock_create_ruleset": (444, 444),
        "landlock_restrict_self": (446, 446),
        "lseek": (62, 8),
        "madvise": (233, 28),
        "mmap": (222, 9),
        "mprotect": (226, 10),
        "mremap": (216, 25),
        "munmap": (215, 11),
        "nanosleep": (101, 35),
        "newfstatat": (79, 262),
        "pipe2": (59, 293),
        "poll": (None, 7),
        "ppoll": (73, 271),
        "prctl": (167, 157),
        "pread64": (67, 17),
        "preadv": (69, 295),
        "preadv2": (286, 327),
        "prlimit64": (261, 302),
        "pwrite64": (68, 18),
        "pwritev2": (287, 328),
        "read": (63, 0),
        "readv": (65, 19),
        "recvfrom": (207, 45),
        "recvmsg": (212, 47),
        "restart_syscall": (128, 219),
        "rseq": (293, 334),
        "rt_sigaction": (134, 13),
        "rt_sigprocmask": (135, 14),
        "rt_sigreturn": (139, 15),
        "sched_getaffinity": (123, 204),
        "sched_yield": (124, 24),
        "seccomp": (277, 317),
        "sendmsg": (211, 46),
        "sendto": (206, 44),
        "set_robust_list": (99, 273),
        "setsockopt": (208, 54),
        "shutdown": (210, 48),
        "sigaltstack": (132, 131),
        "socket": (198, 41),
        "tgkill": (131, 234),
        "unlink": (None, 87),
        "unlinkat": (35, 263),
        "wait4": (260, 61),
        "write": (64, 1),
        "writev": (66, 20),
    }
)
"""Each call's number by its name (``__NR_`` and the name). None: that machine does not have the call."""


def number(call: str, machine: str) -> int | None:
    """Return the number of a system call; None where the machine has none. Raises ValueError for other machines."""
    return NUMBERS[call][MACHINES.index(machine)]
