# SPDX-License-Identifier: Apache-2.0
"""Describe the host of experiments: properties that verdicts depend on, and further ones that times depend on.

Owns nothing.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from pyvmm import __version__
from pyvmm.errors import PyvmmError
from pyvmm.experiment.record import TCG, Value
from pyvmm.kvm.system import System
from pyvmm.labenv import COUNTS, EMULATOR, in_lab

TIME, INSTRUCTIONS = "time", "instructions"
"""What a host's clock counts; see :func:`counts`."""


def host() -> dict[str, Value]:
    """Return the properties that verdicts may depend on. They are constant. Taints a pKVM host (TAINT_USER)."""
    uname = os.uname()
    return {
        "kernel": uname.release,
        "version": uname.version,
        "machine": uname.machine,
        "mode": mode(),
        "protected VMs": protected_vms(),
        "cpu": _cpu(),
        "cpus": os.cpu_count() or 0,
        TCG: in_lab(),
        "page size": os.sysconf("SC_PAGE_SIZE"),
        "command line": _read("/proc/cmdline"),
        "pyvmm": __version__,
        "python": platform.python_version(),
    }


def conditions() -> dict[str, Value]:
    """Return the properties that times depend on besides the code: :func:`host`, clocks, pinning and memory."""
    found = host()
    found |= {
        "counts": counts(str(found["command line"])),
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
    """Return the unit of this host's time: INSTRUCTIONS in a lab with icount, else TIME. ``line`` is the kernel's."""
    found = re.search(rf"(?:^|\s){re.escape(COUNTS)}=(\S+)", _read("/proc/cmdline") if line is None else line)
    return found[1] if found else TIME


def mode() -> str:
    """Return KVM's mode from the kernel log: protected, nvhe or vhe; else the requested mode."""
    for line in _kernel_log():
        if "kvm" in line and "initialized" in line:
            if "Protected" in line:
                return "protected"
            if "VHE mode" in line or "nVHE" in line or "Hyp mode" in line:
                return "vhe" if re.search(r"\bVHE mode", line) else "nvhe"
    asked = re.search(r"kvm-arm\.mode=(\w+)", _read("/proc/cmdline"))
    return asked[1] if asked else "unknown"


def protected_vms() -> str:
    """Return "yes" if this host makes protected VMs, else the reason."""
    try:
        with System.open() as system:
            return "yes" if system.supports_protected() else "no: KVM_CREATE_VM refuses bit 31 (EINVAL)"
    except PyvmmError as error:
        return f"no: {error.message}"


def _kernel_log() -> list[str]:
    """Return the rest of the kernel's boot log; empty without permission to read it."""
    lines: list[str] = []
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return lines
    try:
        while True:
            try:
                lines.append(os.read(fd, 8192).decode(errors="replace"))
            except BrokenPipeError:  # the next record was overwritten meanwhile
                continue
    except OSError:  # the end
        return lines
    finally:
        os.close(fd)


def _cpu() -> str:
    """Name the CPU by its main ID register: implementer and part, as /proc/cpuinfo has them."""
    lines = (line.partition(":") for line in _read("/proc/cpuinfo").splitlines())
    found = {name.strip(): value.strip() for name, _, value in lines}
    if "CPU part" in found:
        return f"implementer {found.get('CPU implementer', '?')} part {found['CPU part']}"
    return found.get("model name", "unknown")


def _chosen(path: str) -> str:
    found = re.search(r"\[(\w+)\]", _read(path))
    return found[1] if found else "unknown"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
