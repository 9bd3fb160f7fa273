# SPDX-License-Identifier: Apache-2.0
"""The probes of ``doctor``. Each examines one property of the system and always returns a finding.

Owns nothing after a probe. No probe may raise for a property of the machine, or need the native loop.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyvmm.errors import PyvmmError, pip_install
from pyvmm.memory.choices import DEFAULT_MEMORY
from pyvmm.pages import GUEST_PAGE, HOST_PAGE
from pyvmm.uapi.unistd import MACHINES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.kvm.system import System

OK: Final = "ok"
INFO: Final = "info"
WARN: Final = "warn"
FAIL: Final = "fail"

ARM64: Final = "aarch64"


@dataclass(frozen=True)
class Finding:
    """One answer: ``status`` is ok, info, warn or fail; ``hint`` is what to do about it."""

    section: str
    name: str
    status: str
    value: str
    hint: str | None = None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


# ---- this host ---------------------------------------------------------------------------------------------------


def host() -> Iterable[Finding]:
    """Examine the machine and its kernel."""
    machine = platform.machine()
    if machine == ARM64:
        yield Finding("host", "architecture", OK, machine)
    else:
        yield Finding("host", "architecture", INFO, f"{machine}: arm64 guests run in the lab, an emulated arm64 host")
    yield Finding("host", "kernel", INFO, f"{platform.system()} {platform.release()}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    yield Finding("host", "cpus, memory", INFO, f"{os.cpu_count()} CPUs, {memory} MiB")
    if HOST_PAGE == GUEST_PAGE:
        yield Finding("host", "page size", OK, f"{HOST_PAGE} bytes")
    else:
        value = f"{HOST_PAGE} bytes: plain and emulated guests run; a protected Linux does not get far"
        yield Finding("host", "page size", WARN, value, "boot a kernel with pages of 4 KiB for protected Linux guests")


def confinement() -> Iterable[Finding]:
    """Examine the walls of ``run --confine on``."""
    from pyvmm.confine import filter as calls
    from pyvmm.confine import landlock

    hint = "boot a kernel with CONFIG_SECCOMP_FILTER"
    if platform.machine() not in MACHINES:
        yield Finding("host", "seccomp", INFO, f"pyvmm has no rules for {platform.machine()}")
    elif calls.available():
        yield Finding("host", "seccomp", OK, "yes: system calls are filtered with --confine on")
    else:
        yield Finding("host", "seccomp", WARN, "no: runs with --confine on do not start", hint)
    try:
        abi = landlock.version()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        value = f"no ({why}): with --confine on, files are kept from a run by seccomp alone"
        yield Finding("host", "landlock", WARN, value, "boot with lsm=landlock, and CONFIG_SECURITY_LANDLOCK")
        return
    value = f"version {abi}"
    if abi < landlock.FIRST_WITH_UNIX:
        value += f": a guest's vsock reaches all Unix sockets of its user, until version {landlock.FIRST_WITH_UNIX}"
    yield Finding("host", "landlock", OK, value)


# ---- KVM ---------------------------------------------------------------------------------------------------------


def kvm() -> Iterable[Finding]:
    """Examine /dev/kvm, and on arm64 whether its hypervisor is pKVM."""
    from pyvmm.kvm.system import System

    arm64 = platform.machine() == ARM64
    try:
        system = System.open()
    except PyvmmError as error:
        # On other architectures KVM only serves native tests: its absence is not a fault there.
        yield Finding("kvm", "/dev/kvm", FAIL if arm64 else INFO, error.message, error.hint if arm64 else None)
        return
    with system:
        yield Finding("kvm", "/dev/kvm", OK, "can be opened, API version 12")
        if arm64:
            yield _mode()
            yield _protected(system)
        yield from _capabilities(system, arm64)
    yield _locked_memory(arm64)
    yield _huge_pages()
    yield _userfaultfd()


def _mode() -> Finding:
    words = (_read("/proc/cmdline") or "").split()
    modes = [word.partition("=")[2] for word in words if word.startswith("kvm-arm.mode=")]
    return Finding("kvm", "mode asked for", INFO, modes[-1] if modes else "none: the kernel's default")


#: The finding that tells whether this host runs protected guests.
PROTECTED_VMS = "protected VMs"


def _protected(system: System) -> Finding:
    try:
        protected = system.supports_protected()
    except PyvmmError as error:
        return Finding("kvm", PROTECTED_VMS, FAIL, error.message, error.hint)
    if protected:
        return Finding("kvm", PROTECTED_VMS, OK, "yes, this host runs pKVM (asking taints the kernel: TAINT_USER)")
    return Finding(
        "kvm",
        PROTECTED_VMS,
        WARN,
        "no: plain and emulated guests run here, protected ones do not",
        "boot a kernel that has them (7.3 does) with kvm-arm.mode=protected, which needs a GICv3; or use pyvmm --lab",
    )


def _capabilities(system: System, arm64: bool) -> Iterable[Finding]:
    from pyvmm.uapi import kvm_cap as caps

    yield Finding("kvm", "vCPUs", INFO, f"{system.check(caps.KVM_CAP_MAX_VCPUS)} at most in a VM")
    if arm64:
        yield _interrupt_controller()
        yield Finding("kvm", "guest addresses", INFO, f"{system.max_ipa_bits or 40} bits")
    flags = system.check(caps.KVM_CAP_GUEST_MEMFD_FLAGS)
    if not system.check(caps.KVM_CAP_GUEST_MEMFD):
        yield Finding("kvm", "guest_memfd", INFO, "no: --backing guest_memfd and private do not work on this host")
    else:
        names = [name for bit, name in ((1, "MMAP"), (2, "INIT_SHARED")) if flags & bit]
        yield Finding("kvm", "guest_memfd", OK, f"yes, flags {' '.join(names) or 'none'} ({flags:#x})")


def _interrupt_controller() -> Finding:
    from pyvmm.machine.gic import host_gic
    from pyvmm.machine.layout import MAX_VCPUS, MAX_VCPUS_GICV2

    name = "interrupt controller"
    try:
        version = host_gic()
    except PyvmmError as error:
        return Finding("kvm", name, FAIL, error.message, error.hint)
    if version is None:
        return Finding("kvm", name, WARN, "none that KVM makes for guests: Linux guests do not boot here")
    if version == 2:
        return Finding("kvm", name, OK, f"GICv2: guests have up to {MAX_VCPUS_GICV2} vCPUs, and none is protected")
    return Finding("kvm", name, OK, f"GICv3: guests have up to {MAX_VCPUS} vCPUs")


def _locked_memory(arm64: bool) -> Finding:
    from pyvmm.memory.memlock import LockedMemory

    state, mib = LockedMemory.read(), DEFAULT_MEMORY >> 20
    if state.exempt:
        return Finding("kvm", "locked memory", OK, "no limit applies (CAP_IPC_LOCK)")
    if state.covers(DEFAULT_MEMORY) or state.hard is None or state.hard >= state.locked + DEFAULT_MEMORY:
        limit = "unlimited" if state.hard is None else f"{state.hard >> 20} MiB"
        return Finding("kvm", "locked memory", OK, f"the hard limit is {limit}; a protected guest needs all its memory")
    return Finding(
        "kvm",
        "locked memory",
        WARN if arm64 else INFO,
        f"the hard limit is {state.hard >> 10} KiB; a protected guest of {mib} MiB needs {DEFAULT_MEMORY >> 10} KiB",
        f"as root: ulimit -l {DEFAULT_MEMORY >> 10}; or hard memlock in /etc/security/limits.conf" if arm64 else None,
    )


def _huge_pages() -> Finding:
    fields = dict(line.split(":", 1) for line in (_read("/proc/meminfo") or "").splitlines() if ":" in line)
    free, size = (fields.get(name, "0").split()[0] for name in ("HugePages_Free", "Hugepagesize"))
    shmem = (_read("/sys/kernel/mm/transparent_hugepage/shmem_enabled") or "never").partition("[")[2].partition("]")[0]
    value = f"hugetlb: {free} free of {int(size) >> 10} MiB; THP for memfds: {shmem or 'never'}"
    return Finding("kvm", "huge pages", INFO, value)


def _userfaultfd() -> Finding:
    allowed = _read("/proc/sys/vm/unprivileged_userfaultfd")
    if allowed is None:
        return Finding("kvm", "userfaultfd", INFO, "not in this kernel")
    who = "everyone" if allowed == "1" else "root" if os.geteuid() == 0 else "not this user"
    return Finding("kvm", "userfaultfd", INFO, f"kernel faults may be served by {who} (sysctl is {allowed})")


# ---- Python ------------------------------------------------------------------------------------------------------


def python() -> Iterable[Finding]:
    """Examine the interpreter, the native loop and the modules."""
    from pyvmm._native_source import require_fresh_native

    yield Finding("python", "interpreter", OK, f"{platform.python_version()} at {sys.executable}")
    try:
        require_fresh_native()
    except PyvmmError as error:
        yield Finding("python", "native loop", FAIL, error.message, error.hint)
    else:
        yield Finding("python", "native loop", OK, "built from the current sources")
    for name, module in (("cffi", "_cffi_backend"), ("structlog", "structlog"), ("pyelftools", "elftools")):
        if importlib.util.find_spec(module) is not None:
            yield Finding("python", name, OK, _version(name))
        elif name == "pyelftools":
            yield Finding("python", name, WARN, "not installed: ELF kernels cannot be read", pip_install(name))
        else:
            yield Finding("python", name, FAIL, "not installed", pip_install(name))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        # Distributions may omit the metadata.
        return "installed"


# ---- the lab -----------------------------------------------------------------------------------------------------


def lab() -> Iterable[Finding]:
    """Examine whether the lab can be built and booted here."""
    from pyvmm.lab.cache import Cache
    from pyvmm.lab.image import usable_image
    from pyvmm.lab.lab import require_native
    from pyvmm.lab.qemu import require_qemu

    try:
        yield Finding("lab", "QEMU", OK, require_qemu())
    except PyvmmError as error:
        yield Finding("lab", "QEMU", FAIL, error.message, error.hint)
    try:
        require_native()
        yield Finding("lab", "native loop", OK, "built for the lab")
    except PyvmmError as error:
        yield Finding("lab", "native loop", FAIL, error.message, error.hint)
    compiler = "gcc" if platform.machine() == ARM64 else "aarch64-linux-gnu-gcc"
    path = shutil.which(compiler)
    hint = None if path else f"apt install {'gcc' if compiler == 'gcc' else 'gcc-aarch64-linux-gnu'}"
    lacking = f"no {compiler}: neither payloads nor the project's kernel can be built"
    yield Finding("lab", "compiler", OK if path else WARN, path or lacking, hint)
    cache = Cache()
    if image := usable_image(cache):
        value = f"{image.manifest.release}, built {image.manifest.built}, {image.size >> 20} MiB in {image.directory}"
        yield Finding("lab", "image", OK, value)
    elif shutil.which("apt-get") is None:
        yield Finding("lab", "image", FAIL, "none, and no apt to fetch one with", "use Debian or Ubuntu to build it")
    else:
        old = "an old one, to be built again" if cache.current() else "none yet: built when first used"
        yield Finding("lab", "image", INFO, f"{old} (about 100 MB of downloads to {cache.directory})")
