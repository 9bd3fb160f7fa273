# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, in words: every error says what was tried, with which values, why it failed, and what to do.

The library raises; only the CLI prints and exits (with ``exit_status``).
"""

from __future__ import annotations

import errno as _errno
import os


class PyvmmError(Exception):
    """Anything pyvmm refuses or fails to do; ``hint`` is the next step, if one is known."""

    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class UsageError(PyvmmError):
    """The request itself makes no sense (a missing kernel file, overlapping slots, an unknown payload)."""

    exit_status = 2


class OptionError(UsageError):
    """What options say makes no sense, alone or together; ``options`` are those that it is about.

    Each is a long name without dashes, ``cpus``. Of an option that is repeated it may name the element, ``disk[1]``,
    and of one with parts the part, ``net.host`` or ``disk[1].queues``.
    """

    def __init__(self, message: str, *options: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.options = options


class HostError(PyvmmError):
    """This host cannot do what was asked (no /dev/kvm, not pKVM, the wrong architecture)."""

    exit_status = 5


class KvmError(PyvmmError):
    """A system call on one of KVM's file descriptors failed.

    ``call`` is its kernel name, ``values`` its arguments as text, ``errno`` the kernel's answer.
    """

    def __init__(self, call: str, values: str, errno: int, cause: str | None = None, hint: str | None = None) -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(f"{call}({values}): {name}: {cause or os.strerror(errno)}", hint=hint)
        self.call = call
        self.values = values
        self.errno = errno


class GuestMemoryError(PyvmmError):
    """Guest memory could not be reached: ``gpa`` is the first byte not done, ``state`` the ledger's word for it."""

    def __init__(self, what: str, gpa: int, done: int, state: str, *, hint: str | None = None) -> None:
        super().__init__(f"{what}: stopped at gpa {hex_(gpa)} after {done} bytes: the page is {state}", hint=hint)
        self.gpa = gpa
        self.done = done
        self.state = state


def hex_(value: int) -> str:
    """Write an address as the documentation does: ``0x8000_0000``."""
    digits = f"{value:x}"
    head = len(digits) % 4
    groups = ([digits[:head]] if head else []) + [digits[i : i + 4] for i in range(head, len(digits), 4)]
    return "0x" + "_".join(groups)
