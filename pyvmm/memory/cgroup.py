# SPDX-License-Identifier: Apache-2.0
"""Warns before a run whose memory the kernel will not let this process have: it is then killed, and cannot say why.

What a protected guest touches is pinned, and prefaulted memory is there at once: neither can be reclaimed when a cgroup
of the process reaches its limit. Owns nothing.
"""

from __future__ import annotations

import os

from pyvmm.log import get_logger
from pyvmm.memory.address import MIB
from pyvmm.typed import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

OWN: Final = "/proc/self/cgroup"
ROOT: Final = "/sys/fs/cgroup"

log = get_logger("memory")


class _Version(NamedTuple):
    root: str
    limit: str
    used: str
    cache: str
    shmem: str


class Room(NamedTuple):
    """What a cgroup has, in bytes; ``kept`` is of what is used as much as cannot be reclaimed."""

    cgroup: str
    limit: int
    kept: int

    @property
    def left(self) -> int:
        """How much more there may be."""
        return max(self.limit - self.kept, 0)


def warn_of_cgroup(need: int) -> None:
    """Warn where ``need`` bytes more, of guest memory, are more than a cgroup of this process may have."""
    least = min(rooms(), key=lambda room: room.left, default=None)
    if least is not None and least.left < need:
        log.warning(
            "cgroup_too_small",
            cgroup=least.cgroup,
            limit_mib=least.limit // MIB,
            left_mib=least.left // MIB,
            guest_mib=need // MIB,
            meaning="when the guest has touched as much as is left, the kernel kills this process (SIGKILL)",
            hint="raise memory.max (of a service: MemoryMax=), or give the guest less memory",
        )


def rooms() -> Iterator[Room]:
    """Yield what each cgroup with a limit has that this process is in, itself or with others; none that is not told."""
    for version, path in _memberships():
        while True:
            room = _room(version, path)
            if room is not None:
                yield room
            if path in ("", "/"):
                break
            path = os.path.dirname(path)


def _memberships() -> Iterator[tuple[_Version, str]]:
    # cgroups(7): hierarchy, controllers, path; version 2 has hierarchy 0 and no controllers.
    for line in _read(OWN).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield _Version(ROOT, "memory.max", "memory.current", "file", "shmem"), path
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"
            yield _Version(f"{ROOT}/memory", *names), path


def _room(version: _Version, path: str) -> Room | None:
    place = version.root + path.rstrip("/")
    try:
        limit, used = (int(_read(f"{place}/{name}")) for name in (version.limit, version.used))
    except ValueError:  # "max", or no such file
        return None
    stat = dict(line.split(" ", 1) for line in _read(f"{place}/memory.stat").splitlines() if " " in line)
    reclaimable = int(stat.get(version.cache, 0)) - int(stat.get(version.shmem, 0))
    return Room(path, limit, used - max(reclaimable, 0))


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
