# SPDX-License-Identifier: Apache-2.0
"""Import before the guest starts what other runs import when they first need it: a confined run opens no files.

The module owns the list of these modules. A test compares it with the imports inside of functions.
"""

from __future__ import annotations

from importlib import import_module

from pyvmm import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

ALWAYS: Final = (
    "concurrent.futures._base",
    "concurrent.futures",
    "inspect",
    "json",
    "pyvmm.devices.trap",
    "pyvmm.devices.virtio.limit",
    "pyvmm.kvm.causes",
    "pyvmm.kvm.faulttrace",
    "pyvmm.machine.clock",
    "pyvmm.machine.livelock",
    "pyvmm.memory.conversion",
    "pyvmm.memory.memlock",
    "pyvmm.observe.rates",
    "pyvmm.session.summary",
    "pyvmm.terminal",
    "pyvmm.uapi.kvm_arm64_vcpu",
    "pyvmm.uapi.kvm_irq",
    "pyvmm.uapi.kvm_memory",
    "pyvmm.uapi.kvm_run",
    "pyvmm.uapi.kvm_state",
    "pyvmm.vcpu.counters",
    "pyvmm.vcpu.failure",
    "resource",
    "socket",
    "traceback",
    "unicodedata",
)
"""What any run may need. concurrent.futures imports its Future only when that is asked for."""

ONLY_BEFORE: Final = frozenset(
    {
        "difflib",
        "elftools.common.utils",
        "elftools.elf.elffile",
        "hashlib",
        "ipaddress",
        "lzma",
        "getpass",
        "pyvmm.confine.reporter",
        "pyvmm.debug.server",
        "pyvmm.devices.kind",
        "pyvmm.devices.virtio.balloon",
        "pyvmm.devices.virtio.blk",
        "pyvmm.devices.virtio.console",
        "pyvmm.devices.virtio.disk",
        "pyvmm.devices.virtio.net",
        "pyvmm.devices.virtio.netbackend",
        "pyvmm.devices.virtio.passt",
        "pyvmm.devices.virtio.rng",
        "pyvmm.devices.virtio.tap",
        "pyvmm.devices.virtio.vsock",
        "pyvmm.devices.virtio.vsock_packet",
        "pyvmm.devices.virtio.vsock_host",
        "pyvmm.devices.vmgenid",
        "pyvmm.kvm.guest_memfd",
        "pyvmm.log",
        "pyvmm.machine.cmdline",
        "pyvmm.machine.devices",
        "pyvmm.machine.elf",
        "pyvmm.machine.granule",
        "pyvmm.machine.kicks",
        "pyvmm.machine.packed",
        "pyvmm.machine.pmu",
        "pyvmm.machine.snapshot",
        "pyvmm.machine.state",
        "pyvmm.machine.swiotlb",
        "pyvmm.memory.cgroup",
        "pyvmm.payloads",
        "pyvmm.schema",
        "pyvmm.session.keys",
        "pyvmm.session.lives",
        "pyvmm.uapi.kvm_cap",
        "shlex",
        "zlib",
        "zstandard",
    }
)
"""What is imported in functions that a run calls only before its guest starts."""

NEVER: Final = frozenset(
    {
        "pyvmm.machine.saving",
        "pyvmm.observe.hyptrace",
        "pyvmm.observe.mapsvg",
        "pyvmm.observe.recorder",
        "pyvmm.observe.timesvg",
        "pyvmm.observe.tracefile",
        "pyvmm.options.written",
    }
)
"""What belongs to requests and options that a confined run refuses: snapshots, traces, pictures."""


def import_all(modules: Iterable[str] = ALWAYS) -> None:
    """Import what a run may need later, and read what it reads once."""
    for name in modules:
        import_module(name)
    # It imports this name when it is asked for it.
    _ = import_module("concurrent.futures").Future
    log.prepare()
