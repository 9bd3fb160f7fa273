# SPDX-License-Identifier: Apache-2.0
"""Names the host an atlas is of: kernel, KVM's mode, machine; everything that verdicts may depend on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from pyvmm import __version__
from pyvmm.errors import PyvmmError
from pyvmm.experiment.record import Value
from pyvmm.kvm.system import System
from pyvmm.labenv import in_lab


def host() -> dict[str, Value]:
    """Return what is known of this host, the same at every call. Asking taints a pKVM host (TAINT_USER)."""
    uname = os.uname()
    return {
        "kernel": uname.release,
        "version": uname.version,
        "machine": uname.machine,
        "mode": mode(),
        "protected VMs": protected_vms(),
        "cpu": _cpu(),
        "cpus": os.cpu_count() or 0,
        "emulated": in_lab(),
        "page size": os.sysconf("SC_PAGE_SIZE"),
        "command line": _read("/proc/cmdline"),
        "pyvmm": __version__,
        "python": platform.python_version(),
    }


def mode() -> str:
    """Say in which mode KVM runs, as it told when it started: protected, nvhe or vhe; else what was asked for."""
    for line in _kernel_log():
        if "kvm" in line and "initialized" in line:
            if "Protected" in line:
                return "protected"
            if "VHE mode" in line or "nVHE" in line or "Hyp mode" in line:
                return "vhe" if re.search(r"\bVHE mode", line) else "nvhe"
    asked = re.search(r"kvm-arm\.mode=(\w+)", _read("/proc/cmdline"))
    return asked[1] if asked else "unknown"


def protected_vms() -> str:
    """Say whether this host makes protected VMs: yes, or why not."""
    try:
        with System.open() as system:
            return "yes" if system.supports_protected() else "no: KVM_CREATE_VM refuses bit 31 (EINVAL)"
    except PyvmmError as error:
        return f"no: {error.message}"


def _kernel_log() -> list[str]:
    """Return the kernel's log from its start, as much of it as is left; nothing without the right to read it."""
    lines: list[str] = []
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return lines
    try:
        while True:
            try:
                lines.append(os.read(fd, 8192).decode(errors="replace"))
            except BrokenPipeError:  # what would have come next was overwritten meanwhile
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


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
