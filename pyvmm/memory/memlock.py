# SPDX-License-Identifier: Apache-2.0
"""Check before a pkvm run that the kernel can pin every donated page.

Owns nothing. Each page of a protected guest is charged to the VMM's locked memory when it is donated, until the VM ends
(``account_locked_vm`` in ``pkvm_mem_abort``). Over RLIMIT_MEMLOCK, KVM_RUN fails with ENOMEM in the middle of the run.
So the limit is checked before the run.
"""

from __future__ import annotations

import os
import resource

from pyvmm.errors import HostError
from pyvmm.memory.address import MIB, align_up
from pyvmm.pages import HOST_PAGE
from pyvmm.typed import NamedTuple
from pyvmm.uapi.capability import CAP_IPC_LOCK

INITIAL_USER_NAMESPACE = 0xEFFFFFFD
"""Inode of /proc/PID/ns/user of the first user namespace: PROC_USER_INIT_INO in include/linux/proc_ns.h."""

STATUS = "/proc/self/status"
NAMESPACE = "/proc/self/ns/user"


class LockedMemory(NamedTuple):
    """This process's limits of pinned memory, in bytes; None is "unlimited"."""

    locked: int
    soft: int | None
    hard: int | None
    exempt: bool
    """Has CAP_IPC_LOCK in the namespace that the kernel checks, so no limit applies."""

    @classmethod
    def read(cls) -> LockedMemory:
        """Read the state of this process from the kernel."""
        with open(STATUS) as status:
            fields = dict(line.split(":", 1) for line in status if ":" in line)
        soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        capable = bool(int(fields["CapEff"], 16) >> CAP_IPC_LOCK & 1)
        return cls(
            locked=int(fields["VmLck"].split()[0]) * 1024,
            soft=_finite(soft),
            hard=_finite(hard),
            exempt=capable and _in_initial_user_namespace(),
        )

    def __str__(self) -> str:
        limit = "no limit applies (CAP_IPC_LOCK)" if self.exempt else f"the limit is {_limit(self.soft)}"
        return f"{self.locked} bytes ({_mib(self.locked)}) are locked, {limit}"

    def covers(self, need: int) -> bool:
        """Whether ``need`` more bytes may be locked now."""
        # The kernel compares whole pages, and rounds the limit down.
        return self.exempt or self.soft is None or self.locked + need <= self.soft // HOST_PAGE * HOST_PAGE


def require_memlock(guest_bytes: int) -> LockedMemory:
    """Ensure that ``guest_bytes`` of guest memory can be donated, raising the soft limit if allowed.

    Returns the resulting state. Raises :class:`HostError` with the exact need if the limit is too small.
    """
    need = align_up(guest_bytes)
    state = LockedMemory.read()
    if state.covers(need):
        return state
    total = align_up(state.locked + need)
    _raise_limit(total, state.hard)
    state = LockedMemory.read()
    if state.covers(need):
        return state
    kib = total // 1024
    raise HostError(
        f"RLIMIT_MEMLOCK is too small for a protected guest: {total} bytes ({_mib(total)}) must be lockable "
        f"({need} of guest memory, {state.locked} locked already), but the limit is {_limit(state.soft)} "
        f"(hard limit {_limit(state.hard)}), because every page that the guest accesses is pinned until the VM ends",
        hint=f"as root: ulimit -l {kib}; for a service: LimitMEMLOCK={total}; for a login: 'NAME hard memlock {kib}' "
        f"in /etc/security/limits.conf; for this process: prlimit --pid {os.getpid()} --memlock={total}; or setcap "
        "cap_ipc_lock+ep on the Python that runs it; or give the guest less memory",
    )


def _raise_limit(total: int, hard: int | None) -> None:
    # Exceeding the hard limit needs CAP_SYS_RESOURCE. Trying is the only test.
    attempts = [(total, hard)] if hard is None or hard >= total else [(total, total), (hard, hard)]
    for soft, new_hard in attempts:
        limits = soft, resource.RLIM_INFINITY if new_hard is None else new_hard
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, limits)
        except (ValueError, OSError):
            continue
        return


def _in_initial_user_namespace() -> bool:
    # The kernel asks capable(), which counts capabilities of the first user namespace only: root in a rootless
    # container has CAP_IPC_LOCK and is still limited.
    try:
        return os.stat(NAMESPACE).st_ino == INITIAL_USER_NAMESPACE
    except OSError:
        return True  # a kernel without user namespaces has only one


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def _limit(limit: int | None) -> str:
    return "unlimited" if limit is None else f"{limit} bytes ({_mib(limit)})"


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB" if size % MIB else f"{size // MIB} MiB"
