# SPDX-License-Identifier: Apache-2.0
"""Host-wide settings that experiments change temporarily, and restoring them.

An experiment restores its changes. If its process was killed, the runner restores them from a :class:`SavedSettings`.
Only the settings in KNOWN are changed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from pyvmm.experiment.host import zram

THP = "/sys/kernel/mm/transparent_hugepage"
SHMEM_ENABLED = f"{THP}/shmem_enabled"
SHMEM_64K = f"{THP}/hugepages-64kB/shmem_enabled"
HUGE_PAGES = "/proc/sys/vm/nr_hugepages"
CORE_PATTERN = "/proc/sys/kernel/core_pattern"
KSM = "/sys/kernel/mm/ksm"
HYP_TRACING = "/sys/kernel/tracing/remotes/hypervisor/tracing_on"
"""If it stays on, every entry to EL2 costs more."""

KNOWN = (SHMEM_ENABLED, SHMEM_64K, HUGE_PAGES, CORE_PATTERN, HYP_TRACING, *(f"{KSM}/{name}" for name in (
    "run", "sleep_millisecs", "pages_to_scan", "smart_scan", "use_zero_pages", "advisor_mode",
)))  # fmt: skip


def read(path: str) -> str:
    """Return a setting's value; from a list of choices, the selected one. Raises OSError."""
    value = Path(path).read_text().strip()
    return value.partition("[")[2].partition("]")[0] if "[" in value else value


def write(path: str, value: str) -> None:
    """Set a value. Raises OSError if the kernel refuses, ValueError for a path outside of KNOWN."""
    if path not in KNOWN:
        raise ValueError(f"{path} is not a setting that SavedSettings restores")
    Path(path).write_text(value)


class SavedSettings:
    """The current values of readable settings, and the existing zram devices."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        for path in KNOWN:
            with contextlib.suppress(OSError):
                self._values[path] = read(path)
        self._zram = zram.devices()

    def restore(self) -> None:
        """Restore every changed setting, and remove new zram devices."""
        for number in zram.devices() - self._zram:
            with contextlib.suppress(OSError):
                zram.remove(number)
        for path, value in self._values.items():
            with contextlib.suppress(OSError):
                if read(path) != value:
                    write(path, value)
