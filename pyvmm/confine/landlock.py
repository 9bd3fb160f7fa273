# SPDX-License-Identifier: Apache-2.0
"""Landlock: give up every access to files, networks and other processes that the running kernel can withhold.

What is open stays open. It binds the calling thread and the threads that it makes later, and on newer kernels the
threads that there are. Owns nothing after a call.
"""

from __future__ import annotations

import os
import struct

from pyvmm.confine import kernel
from pyvmm.uapi import landlock as ll

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

FIRST_WITH_UNIX: Final = 9
"""The version of the interface that limits which Unix sockets a process connects to."""
_FIRST_WITH_THREADS: Final = 8

_FILES: Final = (
    (1, (1 << 13) - 1),  # everything up to LANDLOCK_ACCESS_FS_MAKE_SYM
    (2, ll.LANDLOCK_ACCESS_FS_REFER),
    (3, ll.LANDLOCK_ACCESS_FS_TRUNCATE),
    (5, ll.LANDLOCK_ACCESS_FS_IOCTL_DEV),
    (FIRST_WITH_UNIX, ll.LANDLOCK_ACCESS_FS_RESOLVE_UNIX),
)
_NETWORK: Final = (
    (4, ll.LANDLOCK_ACCESS_NET_BIND_TCP | ll.LANDLOCK_ACCESS_NET_CONNECT_TCP),
    (10, ll.LANDLOCK_ACCESS_NET_BIND_UDP | ll.LANDLOCK_ACCESS_NET_CONNECT_SEND_UDP),
)
_SCOPES: Final = ((6, ll.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | ll.LANDLOCK_SCOPE_SIGNAL),)
"""Rights by the version that first has them."""


def version() -> int:
    """Return the version of the kernel's interface. Raises OSError where the kernel has none, or has it turned off."""
    return kernel.call("landlock_create_ruleset", None, None, ll.LANDLOCK_CREATE_RULESET_VERSION)


def restrict(removing: Iterable[str] = (), connecting: Iterable[str] = (), *, signals: bool = False) -> int:
    """Give up all rights, and return the interface's version. Raises OSError. Needs no_new_privs or root.

    Files and sockets may still be removed from the directories ``removing``, and Unix sockets in the directories
    ``connecting`` be connected to. ``signals``: processes outside may still be signalled.
    """
    abi = version()
    scopes = _since(_SCOPES, abi) & ~(ll.LANDLOCK_SCOPE_SIGNAL if signals else 0)
    files = _since(_FILES, abi)
    attributes = struct.pack("=QQQ", files, _since(_NETWORK, abi), scopes)
    # An older kernel takes a longer structure if what it does not know is zero.
    ruleset = kernel.call("landlock_create_ruleset", kernel.bytes_of(attributes), len(attributes), None)
    try:
        for right, directories in (
            (ll.LANDLOCK_ACCESS_FS_REMOVE_FILE, removing),
            (ll.LANDLOCK_ACCESS_FS_RESOLVE_UNIX, connecting),
        ):
            for directory in dict.fromkeys(directories) if files & right else ():
                _allow(ruleset, right, directory)
        all_threads = ll.LANDLOCK_RESTRICT_SELF_TSYNC if abi >= _FIRST_WITH_THREADS else 0
        kernel.call("landlock_restrict_self", ruleset, all_threads)
    finally:
        os.close(ruleset)
    return abi


def _since(rights: Iterable[tuple[int, int]], abi: int) -> int:
    """Return the rights that version ``abi`` has."""
    return sum(bits for first, bits in rights if first <= abi)


def _allow(ruleset: int, right: int, directory: str) -> None:
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # struct landlock_path_beneath_attr is packed.
        beneath = kernel.bytes_of(struct.pack("=Qi", right, fd))
        kernel.call("landlock_add_rule", ruleset, ll.LANDLOCK_RULE_PATH_BENEATH, beneath, None)
    finally:
        os.close(fd)
