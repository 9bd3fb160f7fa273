# SPDX-License-Identifier: Apache-2.0
"""The native loop built against a fake kernel, for tests that drive it without /dev/kvm."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import os
import platform
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from native import build

HERE = Path(__file__).resolve().parent
NAME = "pyvmm_fake"
_libc = ctypes.CDLL(None, use_errno=True)

MOVING = 0x40
"""PV_PAGE_MOVING of native/loop/loop.h."""

EXIT_MMIO, EXIT_HYPERCALL, EXIT_DEBUG, EXIT_HLT, EXIT_SYSTEM, EXIT_MEMORY_FAULT = 6, 3, 4, 5, 24, 39


def built(path: Path) -> Path:
    """Build the loop with ``fake_*`` beside ``pv_*`` at ``path``. Skips the test if there is no compiler."""
    if build.compiler(platform.machine()) is None:
        pytest.skip("no C compiler")
    build.build(
        platform.machine(),
        path,
        module=NAME,
        cdef=(HERE / "fake_kvm.h").read_text(),
        more=[HERE / "fake_kvm.c"],
        flags=[f"-I{HERE}", "-Dioctl=fake_ioctl", "-Dmprotect=fake_mprotect"],
    )
    return path


def load_native(path: Path) -> Any:
    """Import what :func:`built` has built."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def native() -> Any:
    """Build and import the loop on the fake kernel. Skips the test if there is no compiler."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-fake-") as folder:
        module = load_native(built(Path(folder) / f"{NAME}.abi3.so"))
    assert module.lib.pv_install_signals() == 0
    return module


class Rig:
    """A VM of one or more vCPUs in the fake kernel, with ``pages`` pages of memory at RAM and the given ranges.

    Memory behind every pointer lives as long as the rig. ``views`` is the host's view of guest memory.
    """

    RAM = 0x8000_0000

    def __init__(self, *, protection: str = "NONE", pages: int = 4, vcpus: int = 1) -> None:
        module = native()
        self.ffi, self.lib = module.ffi, module.lib
        self.keep: list[Any] = []
        self.pages = pages
        self.vm = self.new("struct pv_vm *")
        self.vm.protection = getattr(self.lib, f"PV_{protection}")
        self.memfd = os.memfd_create("rig")
        os.ftruncate(self.memfd, pages * 4096)
        self.memory = mmap.mmap(self.memfd, pages * 4096)
        self.view = int(self.ffi.cast("uintptr_t", self.ffi.from_buffer(self.memory)))
        self.ledger = self.new("uint8_t[]", pages)
        regions = self.new("struct pv_region[]", 1)
        regions[0] = {
            "gpa": self.RAM,
            "size": pages * 4096,
            "view": self.ffi.cast("uint8_t *", self.view),
            "ledger": self.ledger,
            "fd": self.memfd,
        }
        self.vm.map = self.new("struct pv_map *", {"count": 1, "regions": regions})
        self.vm.pages[0] = pages
        self.vcpus = [self._vcpu(index) for index in range(vcpus)]
        self.ranges: Any = None

    def new(self, cdecl: str, init: Any = None) -> Any:
        """Allocate a C object, and keep it alive."""
        made = self.ffi.new(cdecl) if init is None else self.ffi.new(cdecl, init)
        self.keep.append(made)
        return made

    def _vcpu(self, index: int) -> Any:
        run = self.new("uint8_t[]", 4096)
        fake = self.new("struct fake_vcpu *", {"run": run})
        self.lib.fake_attach(index, fake)
        vcpu = self.new("struct pv_vcpu *", {"fd": index, "index": index, "vm": self.vm, "run": run})
        vcpu.ring.size, vcpu.ring.records = 64, self.new("struct pv_record[]", 64)
        return SimpleNamespace(native=vcpu, fake=fake, run=run, area=memoryview(self.ffi.buffer(run)))

    def state(self, page: int, state: str, *, assumed: bool = False) -> None:
        """Set a page's ledger entry, and the view of a private page of the emulated protection."""
        value = getattr(self.lib, f"PV_PAGE_{state}") | (0x80 if assumed else 0)
        self.lib.pv_ledger_set(self.vm, self.RAM + page * 4096, value)

    def move(self, page: int) -> None:
        """Make a page look as if another vCPU were unsharing it (emulated)."""
        self.state(page, "PRIVATE")
        self.ledger[page] |= MOVING

    def close_view(self, page: int, pages: int = 1) -> None:
        """Make pages unreadable for the host."""
        if _libc.mprotect(ctypes.c_void_p(self.view + page * 4096), pages * 4096, 0):
            raise OSError(ctypes.get_errno(), "mprotect")

    def open_view(self, page: int, pages: int = 1) -> None:
        """Make them readable and writable again."""
        if _libc.mprotect(ctypes.c_void_p(self.view + page * 4096), pages * 4096, 3):
            raise OSError(ctypes.get_errno(), "mprotect")

    def bus(self, *ranges: tuple[int, int, str, Any]) -> None:
        """Publish ranges of (base, size, kind, state), in any order."""
        self.ranges = self.new("struct pv_range[]", len(ranges))
        for index, (base, size, kind, state) in enumerate(sorted(ranges, key=lambda r: r[0])):
            self.ranges[index] = {
                "base": base,
                "size": size,
                "kind": getattr(self.lib, f"PV_KIND_{kind}"),
                "index": index,
                "state": self.ffi.cast("void *", 0 if state is None else state),
            }
        self.vm.bus = self.new("struct pv_bus *", {"count": len(ranges), "ranges": self.ranges})

    def script(self, *exits: dict[str, Any], vcpu: int = 0) -> Any:
        """Have a vCPU make these exits, then a halt. Returns the exits, so that a test can check the answers."""
        fake = self.vcpus[vcpu].fake
        array = self.new("struct fake_exit[]", list(exits))
        fake.exits, fake.count, fake.next = array, len(exits), 0
        return array

    def run(self, vcpu: int = 0) -> str:
        """Run until the loop stops; returns its reason, without PV_STOP_."""
        return self.stop_name(self.lib.pv_run(self.vcpus[vcpu].native))

    def stop_name(self, stop: int) -> str:
        return self._names("PV_STOP_")[stop]

    def exit_name(self, number: int) -> str:
        return self._names("PV_EXIT_")[number]

    def _names(self, prefix: str) -> dict[int, str]:
        return {getattr(self.lib, n): n.removeprefix(prefix) for n in dir(self.lib) if n.startswith(prefix)}

    def pl011(self, tx: int = 16, rx: int = 16) -> Any:
        uart = self.new("struct pv_pl011 *")
        uart.vm_fd = uart.tx.wake_fd = uart.rx.wake_fd = -1
        uart.tx.size, uart.tx.data = tx, self.new("uint8_t[]", tx)
        uart.rx.size, uart.rx.data = rx, self.new("uint8_t[]", rx)
        return uart

    def line(self, irq: int) -> Any:
        """Make a line of the fake kernel: how often it was raised and lowered, and its level. All start at zero."""
        line = self.lib.fake_line(irq)
        line[0] = {"raised": 0, "lowered": 0, "level": 0}
        return line

    def records(self, vcpu: int = 0) -> list[Any]:
        """Take what the ring holds."""
        to = self.new("struct pv_record[]", 64)
        native_ring = self.ffi.addressof(self.vcpus[vcpu].native, "ring")
        return [to[i] for i in range(self.lib.pv_ring_read(native_ring, to, 64))]

    def close(self) -> None:
        """Give the memory back."""
        self.open_view(0, self.pages)
        self.keep.clear()
        os.close(self.memfd)


def store(gpa: int, data: int, size: int = 8) -> dict[str, Any]:
    """An MMIO store."""
    return {"exit_reason": EXIT_MMIO, "gpa": gpa, "data": data, "len": size, "is_write": 1}


def load(gpa: int, size: int = 8) -> dict[str, Any]:
    """An MMIO load."""
    return {"exit_reason": EXIT_MMIO, "gpa": gpa, "len": size}


def hypercall(nr: int, *x: int, told: int = 0) -> dict[str, Any]:
    """Make a hypercall with x1, x2, x3. ``told`` is args[0]: set by Android kernels, junk from others."""
    return {"exit_reason": EXIT_HYPERCALL, "nr": nr, "x": [nr, *x, *[0] * (3 - len(x))], "gpa": told}


def failure(error: int, *, gpa: int | None = None, size: int = 4096) -> dict[str, Any]:
    """Make a failing KVM_RUN; with ``gpa`` it reports the address."""
    if gpa is None:
        return {"error": error}
    return {"error": error, "exit_reason": EXIT_MEMORY_FAULT, "gpa": gpa, "data": size}


def printed(rig: Rig, uart: Any, most: int = 16) -> bytes:
    """Take the guest's output."""
    out = rig.new("uint8_t[]", 16)
    n = rig.lib.pv_fifo_read(rig.ffi.addressof(uart, "tx"), out, most)
    return bytes(out)[:n]
