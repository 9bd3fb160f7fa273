# SPDX-License-Identifier: Apache-2.0
"""What numbers depend on besides the code: the machine, its kernel, its clock; recorded with every run.

Owns nothing.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pyvmm.bench.model import Value
from pyvmm.experiment import environment as about
from pyvmm.labenv import COUNTS, EMULATOR

TIME, INSTRUCTIONS = "time", "instructions"
SAME = ("machine", "cpu", "cpus", "emulated", "emulator", "counts", "page size")
"""What must be the same in two runs for their numbers to be comparable."""


def environment() -> dict[str, Value]:
    """Return what is known of this host, the same at every call."""
    found: dict[str, Value] = {**about.host()}
    line = str(found["command line"])
    found |= {
        "counts": counts(line),
        "emulator": os.environ.get(EMULATOR, ""),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "none",
        "pinning": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "clock source": _read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "shmem huge pages": _chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "EL2 trace": "yes" if os.path.isdir("/sys/kernel/tracing/remotes/hypervisor") else "no",
        "memory MiB": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
    }
    return found


def counts(line: str | None = None) -> str:
    """Say what this host's time counts: instructions in a lab with icount, else time."""
    text = _read("/proc/cmdline") if line is None else line
    return _parameter(text, COUNTS) or TIME


def _parameter(line: str, name: str) -> str:
    """Return a parameter of the kernel's command line, which the lab leaves for us."""
    found = re.search(rf"(?:^|\s){re.escape(name)}=(\S+)", line)
    return found[1] if found else ""


def _chosen(path: str) -> str:
    found = re.search(r"\[(\w+)\]", _read(path))
    return found[1] if found else "unknown"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
