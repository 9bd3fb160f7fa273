# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole host that experiments change for a while, and how they get back what they were.

An experiment restores what it changed, unless its process was killed: whoever killed it then restores from a
:class:`SavedSettings`. Only the settings in KNOWN are ever changed.
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
"""Left on, every entry to EL2 costs more from then on."""

KNOWN = (SHMEM_ENABLED, SHMEM_64K, HUGE_PAGES, CORE_PATTERN, HYP_TRACING, *(f"{KSM}/{name}" for name in (
    "run", "sleep_millisecs", "pages_to_scan", "smart_scan", "use_zero_pages", "advisor_mode",
)))  # fmt: skip


def read(path: str) -> str:
    """Return a setting's value, the chosen one where it lists them all; OSError where it cannot be read."""
    value = Path(path).read_text().strip()
    return value.partition("[")[2].partition("]")[0] if "[" in value else value


def write(path: str, value: str) -> None:
    """Set a value; OSError where that is refused, ValueError for what is not in KNOWN."""
    if path not in KNOWN:
        raise ValueError(f"{path} is no setting that SavedSettings would restore")
    Path(path).write_text(value)


class SavedSettings:
    """What the settings are now, as far as they can be read, and which zram devices there are."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        for path in KNOWN:
            with contextlib.suppress(OSError):
                self._values[path] = read(path)
        self._zram = zram.devices()

    def restore(self) -> None:
        """Put back every setting that is another by now, and remove the zram devices that came since."""
        for number in zram.devices() - self._zram:
            with contextlib.suppress(OSError):
                zram.remove(number)
        for path, value in self._values.items():
            with contextlib.suppress(OSError):
                if read(path) != value:
                    write(path, value)
