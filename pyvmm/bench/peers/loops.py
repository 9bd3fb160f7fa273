# SPDX-License-Identifier: Apache-2.0
"""Compare MMIO exits in pyvmm's loop, in a minimal C loop, and in the loop's pure-Python twin, on one vCPU.

The bare loop is C that only repeats KVM_RUN. The twin is the tests' oracle, and only exists in a checkout. Each turn
enters the vCPU at its program's start.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import pyvmm
from pyvmm._native import ffi, lib
from pyvmm.bench.model import Point, Series
from pyvmm.bench.peers import TURNS, pair
from pyvmm.errors import HostError, PyvmmError
from pyvmm.kvm.system import System
from pyvmm.lab.trees import find_tree
from pyvmm.machine.layout import BENCH, RAM_BASE
from pyvmm.pages import HOST_PAGE
from pyvmm.uapi.kvm_arm64 import core_reg
from pyvmm.uapi.psci import PSCI_0_2_FN_SYSTEM_OFF

if TYPE_CHECKING:
    pass

LIBRARY: Final = "bare_loop.so"
TWIN: Final = "tests.bench.twin_peer"
EXITS: Final = 2000
FEW: Final = 200
"""Exits in a turn of the twin's."""

# x0 is stored at x1, x2 times; then x0 is the number of a call.
PROGRAM: Final = struct.pack("<4I", 0xB900_0020, 0xF100_0442, 0x54FF_FFC1, 0xD400_0002)
"""1: str w0, [x1]; subs x2, x2, #1; b.ne 1b; hvc #0"""


class LoopVm:
    """A plain VM with one vCPU that stores to a register file ``exits`` times and then powers off."""

    def __init__(self, exits: int) -> None:
        self.exits = exits
        if lib.pv_install_signals():
            raise HostError("the native loop cannot have its signal")
        self._memory = mmap.mmap(-1, HOST_PAGE)
        self._memory[: len(PROGRAM)] = PROGRAM
        self._system = System.open()
        self.kvm = self._system.create_vm()
        self.kvm.set_memory(0, RAM_BASE, HOST_PAGE, ctypes.addressof(ctypes.c_char.from_buffer(self._memory)))
        self.vcpu = self.kvm.create_vcpu(0)
        self._registers = ffi.new("uint8_t[]", HOST_PAGE)
        self._ranges = ffi.new("struct pv_range[1]")
        self._ranges[0].base, self._ranges[0].size, self._ranges[0].kind = BENCH.start, HOST_PAGE, lib.PV_KIND_REGISTERS
        self._ranges[0].state = ffi.cast("void *", self._registers)
        self._bus = ffi.new("struct pv_bus *", {"count": 1, "ranges": self._ranges})
        self._vm = ffi.new("struct pv_vm *", {"fd": self.kvm.fileno(), "bus": self._bus})
        run = ffi.cast("void *", self.vcpu.run_address)
        self.native = ffi.new("struct pv_vcpu *", {"fd": self.vcpu.fileno(), "index": 0, "vm": self._vm, "run": run})

    def restart(self) -> None:
        """Put the vCPU at its program's start."""
        self.vcpu.init()
        values = {"pc": RAM_BASE, "x0": PSCI_0_2_FN_SYSTEM_OFF, "x1": BENCH.start, "x2": self.exits}
        for name, value in values.items():
            self.vcpu.set_reg(core_reg(name), value)

    def per_exit(self, ns: int, exits: int) -> float:
        """Return ns per exit. Raises PyvmmError for an unexpected number of exits."""
        if exits != self.exits:
            raise PyvmmError(f"{exits} exits instead of the expected {self.exits}: the measurement is invalid")
        return ns / exits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.vcpu.close()
        self.kvm.close()
        self._system.close()


def own(vm: LoopVm) -> float:
    """Return the ns an exit that pyvmm's loop takes."""
    vm.restart()
    stats = vm.native.stats
    before = sum(stats[n].count for n in range(lib.PV_EXIT_MMIO_UNCLAIMED))
    start = time.monotonic_ns()
    stop = lib.pv_run(vm.native)
    took = time.monotonic_ns() - start
    if stop != lib.PV_STOP_SYSTEM:
        raise PyvmmError(f"the loop stopped with {stop} before the guest was off")
    return vm.per_exit(took, sum(stats[n].count for n in range(lib.PV_EXIT_MMIO_UNCLAIMED)) - before)


def bare_loop() -> Callable[[LoopVm], float]:
    """Return a function that measures the bare loop. Raises HostError if it is not built."""
    tree = find_tree("loop")
    if tree is None:
        raise HostError("the bare loop is not here", hint="pyvmm --lab bench --peers builds it")
    function = ctypes.CDLL(str(tree / LIBRARY)).bare_loop
    function.restype = ctypes.c_uint64
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64)]

    def bare(vm: LoopVm) -> float:
        vm.restart()
        exits = ctypes.c_uint64()
        took = function(vm.vcpu.fileno(), vm.vcpu.run_address, ctypes.byref(exits))
        return vm.per_exit(took, exits.value)

    return bare


def twin() -> Callable[[LoopVm], float]:
    """Return a function that measures the twin. Raises HostError outside of a checkout."""
    root = Path(pyvmm.__file__).resolve().parents[1]
    if not (root / "tests" / "twin.py").is_file():
        raise HostError("the loop's Python twin is part of the tests", hint="use a checkout of pyvmm")
    run = importlib.import_module(TWIN).run

    def measured(vm: LoopVm) -> float:
        vm.restart()
        start = time.monotonic_ns()
        exits = run(vm.vcpu, BENCH.start)
        return vm.per_exit(time.monotonic_ns() - start, exits)

    return measured


def _by_turns(name: str, find: Callable[[], Callable[[LoopVm], float]], exits: int) -> list[Series]:
    other = find()
    theirs: list[list[float]] = []
    ours: list[list[float]] = []
    with LoopVm(exits) as vm:
        for turn in range(TURNS):
            sides = [(theirs, other), (ours, own)]
            for values, measured in sides if turn % 2 else reversed(sides):
                values.append([measured(vm)])
    what: Point = {"what": "store to a register file"}
    return pair(name, what, "exit", ours, theirs, clocks=("host", "host"), per="exit", exits=exits)


def bare_series() -> list[Series]:
    """Measure the bare loop and pyvmm's by turns."""
    return _by_turns("bare loop", bare_loop, EXITS)


def twin_series() -> list[Series]:
    """Measure the twin and pyvmm's loop by turns."""
    return _by_turns("twin", twin, FEW)


PEERS: Final[Mapping[str, Callable[[], list[Series]]]] = {"bare loop": bare_series, "twin": twin_series}
