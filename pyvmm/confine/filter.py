# SPDX-License-Identifier: Apache-2.0
"""Install the filter of system calls (seccomp) for all threads. It lasts until the process ends."""

from __future__ import annotations

import os
from ctypes import Structure, byref, c_ushort, c_void_p, cast

from pyvmm.confine import kernel
from pyvmm.confine.program import assemble
from pyvmm.confine.rules import SELF, rules_of
from pyvmm.errors import HostError
from pyvmm.uapi.seccomp import (
    SECCOMP_FILTER_FLAG_NEW_LISTENER,
    SECCOMP_FILTER_FLAG_TSYNC,
    SECCOMP_FILTER_FLAG_TSYNC_ESRCH,
    SECCOMP_GET_ACTION_AVAIL,
    SECCOMP_RET_ERRNO,
    SECCOMP_RET_USER_NOTIF,
    SECCOMP_SET_MODE_FILTER,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Final

    from pyvmm.confine.rules import Rule


_ALL_THREADS: Final = SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_TSYNC_ESRCH
"""Without the second, the kernel would answer with the ID of a thread that cannot follow."""


class _Program(Structure):
    """``struct sock_fprog``."""

    _fields_ = (("len", c_ushort), ("filter", c_void_p))


def seal(parts: Iterable[str], values: Mapping[str, Sequence[int]] | None = None) -> None:
    """From now on, refuse what no rule of ``parts`` allows, in every thread. Needs no_new_privs or root.

    ``values`` are numbers that rules name. Raises HostError where the kernel has no such filters.
    """
    _install(rules_of(parts), values or {}, _ALL_THREADS)


def listen(rules: Iterable[Rule], values: Mapping[str, Sequence[int]] | None = None) -> int:
    """From now on, let the holder of the returned descriptor decide what no rule allows. Raises HostError."""
    flags = _ALL_THREADS | SECCOMP_FILTER_FLAG_NEW_LISTENER
    return _install(rules, values or {}, flags, otherwise=SECCOMP_RET_USER_NOTIF)


def available() -> bool:
    """Whether this kernel has filters, and this process may ask."""
    try:
        kernel.call("seccomp", SECCOMP_GET_ACTION_AVAIL, None, kernel.bytes_of(SECCOMP_RET_ERRNO.to_bytes(4, "little")))
    except OSError:
        return False
    return True


def _install(rules: Iterable[Rule], values: Mapping[str, Sequence[int]], flags: int, **how: int) -> int:
    code = assemble(rules, kernel.MACHINE, {SELF: (os.getpid(),), **values}, **how)
    memory = kernel.bytes_of(code)
    program = _Program(len(code) // 8, cast(memory, c_void_p))
    try:
        return kernel.call("seccomp", SECCOMP_SET_MODE_FILTER, flags, byref(program))
    except OSError as error:
        raise HostError(
            f"system calls cannot be filtered: {error.strerror}",
            hint="boot a kernel with CONFIG_SECCOMP_FILTER, or run with --confine off",
        ) from None
