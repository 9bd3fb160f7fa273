# SPDX-License-Identifier: Apache-2.0
"""Give up capabilities, the way back to them, and what limits allow. Owns nothing.

Capabilities belong to a thread. So drop them before there is a second one.
"""

from __future__ import annotations

import resource
import struct

from pyvmm.confine import kernel
from pyvmm.uapi.capability import _LINUX_CAPABILITY_VERSION_3, CAP_IPC_LOCK
from pyvmm.uapi.prctl import PR_SET_NO_NEW_PRIVS


def gain_no_more() -> None:
    """Never get privileges by executing a program (no_new_privs)."""
    kernel.prctl(PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities(*, lock_memory: bool = False) -> None:
    """Drop this thread's capabilities; ``lock_memory`` keeps CAP_IPC_LOCK, if the thread has it. Raises OSError."""
    kept = held() & 1 << CAP_IPC_LOCK if lock_memory else 0
    header = kernel.bytes_of(struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0))
    # Effective, permitted and inheritable: the low words of each, then the high ones.
    sets = kernel.bytes_of(struct.pack("=6I", kept, kept, 0, 0, 0, 0))
    kernel.call("capset", header, sets)


def held() -> int:
    """Return the capabilities that this thread can use, a bit each."""
    header = kernel.bytes_of(struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0))
    sets = kernel.bytes_of(bytes(24))
    kernel.call("capget", header, sets)
    low, _, _, high, _, _ = struct.unpack("=6I", sets.raw)
    return int(high) << 32 | int(low)


def limit(descriptors: int) -> None:
    """Open no more than ``descriptors`` at a time, and leave no core dump."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = descriptors if hard == resource.RLIM_INFINITY else min(descriptors, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most if soft == resource.RLIM_INFINITY else min(soft, most), most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
