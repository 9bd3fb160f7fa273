# SPDX-License-Identifier: Apache-2.0
"""Measure MMIO exits in the native loop, by kind, against a C loop around KVM_RUN: python -m tests.bench.exit_cost

Every kind, the bare loop, a device in Python and the loop's pure-Python twin take turns on one vCPU, and the ratio is
the median of the turns' own, so that what else the machine does falls on both. Exit status 1 when a bar is missed.
``--lab`` does it in the lab, where time counts instructions, in a protected VM. ``--part NAME`` measures one kind only.

A store that the kernel answers with an eventfd (KVM_IOEVENTFD) is held against the bare loop's store to a register.
The parts of a trace are measured against the loop as a run has it, which keeps histograms, without one. The registers
of virtio-mmio are measured against a load or a store of the loop's register kind, by another guest that takes turns.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import platform
import statistics
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pyvmm._native import ffi, lib
from pyvmm.devices.virtio.mmio import VirtioMmio
from pyvmm.devices.virtio.registers import CONFIG, SIZE, Register
from pyvmm.devices.virtio.rng import VirtioRng
from pyvmm.observe.recorder import Recorder
from pyvmm.uapi.kvm import KVM_VM_TYPE_ARM_PROTECTED
from tests import twin, twin_state
from tests.real_guest import DEVICES, ENDED, Code, RealGuest, uart

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / ".bench"
REGISTERS, FIFO, DOORBELL, COLD, UNTAKEN, VIRTIO = 0x0000, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000
KERNELS = 1
"""The queue whose kicks the kernel takes. Kicks of queue 0 come to the loop."""
IN_C = ("registers: store", "registers: load", "FIFO", "doorbell")
TRACES = ("trace", "trace: Python device", "trace and its reader")
ID, FEATURES, READY, CONFIGURATION = "virtio: id", "virtio: features", "virtio: queue ready", "virtio: configuration"
SELECTOR, KICK = "virtio: selector", "virtio: kick"
IOEVENTFD = "ioeventfd"
OF_VIRTIO = {
    **dict.fromkeys((ID, FEATURES, READY, CONFIGURATION), "registers: load"),
    **dict.fromkeys((SELECTOR, KICK), "registers: store"),
}
"""The part that each part is compared with."""
ALIKE = {**dict.fromkeys(TRACES, 1.05), **dict.fromkeys(OF_VIRTIO, 1.05), IOEVENTFD: 0.7}
NATIVE_BARS = {**dict.fromkeys(IN_C, 1.10), "Python device": 3.0, **ALIKE}
INSTRUCTION_BARS = {**dict.fromkeys(IN_C, 1.05), "Python device": 3.0, **ALIKE, **dict.fromkeys(TRACES, 1.03)}
READ_MORE = 20
"""How many times as many exits to make for a part whose reader comes only sometimes."""


def bare_library(machine: str) -> Path:
    """Return the bare loop for ``machine``, built when there is a compiler and it is missing or old."""
    source, path = ROOT / "pyvmm" / "bench" / "peers" / "bare_loop.c", BUILT / f"bare_loop.{machine}.so"
    if path.exists() and path.stat().st_mtime >= source.stat().st_mtime:
        return path
    cc = "gcc" if machine == platform.machine() else f"{machine}-linux-gnu-gcc"
    BUILT.mkdir(exist_ok=True)
    subprocess.run([cc, "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-o", path, source], check=True)
    return path


class Bench:
    """One VM whose vCPU makes ``exits`` MMIO exits of a kind, and then ends. The measured loop enters it."""

    def __init__(self, code: Callable[[], Code], exits: int, type_: int) -> None:
        self.exits = exits
        self.guest = RealGuest(Code().repeat(exits, code()).end(), type=type_)
        self.vcpu = self.guest.vcpus[0]
        self.uart, self._buffers = uart(tx=1 << 15)
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        # A bell that is a system call at each ring, and one that is a system call only until its reader takes it.
        slots = ffi.new("struct pv_doorbell_slot[]", [(0, 1, self.fd, 0, 0), (0, 1, self.fd, 0, 1)])
        bell, untaken = (ffi.new("struct pv_doorbell *", {"count": 1, "slots": slots + n}) for n in range(2))
        self.device = VirtioMmio(VirtioRng(), self.guest.vm, private=False)
        self.device.native.bell.slots[0].rung = 1  # a kick that the device has yet to take
        self._keep: list[object] = [slots, bell, untaken]
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK)
        self.guest.kvm.ioeventfd(self.eventfd, DEVICES + VIRTIO + Register.QUEUE_NOTIFY, 4, datamatch=KERNELS)
        self.guest.bus(
            (REGISTERS, 0x1000, lib.PV_KIND_REGISTERS, ffi.new("uint8_t[]", 0x1000)),
            (FIFO, 0x1000, lib.PV_KIND_PL011, self.uart),
            (DOORBELL, 0x1000, lib.PV_KIND_DOORBELL, bell),
            (COLD, 0x1000, lib.PV_KIND_COLD, None),
            (UNTAKEN, 0x1000, lib.PV_KIND_DOORBELL, untaken),
            (VIRTIO, SIZE, lib.PV_KIND_VIRTIO, self.device.native),
        )
        library = ctypes.CDLL(str(bare_library(platform.machine())))
        self._bare = library.bare_loop
        self._bare.restype = ctypes.c_uint64
        self._bare.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64)]
        self._area = int(ffi.cast("uintptr_t", self.vcpu.run))

    def _begin(self) -> None:
        self.guest.start(0)
        self.uart.tx.tail = self.uart.tx.head

    def bare(self) -> float:
        """Nanoseconds an exit of the C loop."""
        self._begin()
        exits = ctypes.c_uint64()
        took = int(self._bare(self.vcpu.fd, self._area, ctypes.byref(exits)))
        return took / self._checked(exits.value)

    def native(self) -> float:
        """Nanoseconds an exit of pv_run, with a device in Python behind the cold range."""
        self._begin()
        run, reply, vcpu, cold = lib.pv_run, lib.pv_mmio_reply, self.vcpu, PythonDevice()
        stats = vcpu.stats
        before = sum(stats[n].count for n in range(lib.PV_EXIT_MMIO_UNCLAIMED))
        start = time.perf_counter_ns()
        while (stop := run(vcpu)) == lib.PV_STOP_MMIO:
            if vcpu.is_write:
                cold.write(vcpu.offset, vcpu.size, vcpu.value)
            else:
                reply(vcpu, cold.read(vcpu.offset, vcpu.size))
        took = time.perf_counter_ns() - start
        if stop != ENDED:
            raise RuntimeError(f"pv_run stopped with {stop}")
        return took / self._checked(sum(stats[n].count for n in range(lib.PV_EXIT_MMIO_UNCLAIMED)) - before)

    def kernel(self) -> float:
        """Nanoseconds a store that the kernel answers with an eventfd. The vCPU returns at the end of its program."""
        self._begin()
        start = time.perf_counter_ns()
        stop = lib.pv_run(self.vcpu)
        took = time.perf_counter_ns() - start
        if stop != ENDED:
            raise RuntimeError(f"pv_run stopped with {stop}")
        return took / self._checked(os.eventfd_read(self.eventfd))

    def timed(self) -> float:
        """Nanoseconds an exit of pv_run with the histograms that a run keeps."""
        self.vcpu.timed = 1
        return self.native()

    def recorded(self) -> float:
        """The same, with every exit recorded in the ring."""
        ring = self.vcpu.ring
        size = 1 << self.exits.bit_length()
        if ring.size < size:
            records = ffi.new("struct pv_record[]", size)
            self._keep.append(records)
            ring.size, ring.records = size, records
        ring.exits, ring.tail = 1, ring.head
        took = self.timed()
        ring.exits = 0
        return self._whole(took)

    def traced(self) -> float:
        """The same, with a thread that reads the ring, as run --trace has."""
        recorder = Recorder()
        recorder.watch(types.SimpleNamespace(), [self.vcpu])  # type: ignore[arg-type]
        took = self.timed()
        recorder.stop()
        self._keep.append(recorder)  # the ring is still its own
        self.vcpu.ring.exits = 0
        return self._whole(took)

    def _whole(self, took: float) -> float:
        if self.vcpu.ring.dropped:
            raise RuntimeError(f"{self.vcpu.ring.dropped} records found no room")
        return took

    def twin(self) -> float:
        """Nanoseconds an exit of the pure-Python twin."""
        self._begin()
        vm = twin.Vm(lib.PV_NONE)
        vm.ranges = [twin.Range(DEVICES + REGISTERS, 0x1000, lib.PV_KIND_REGISTERS, bytearray(0x1000))]
        vcpu = twin.Vcpu(vm, 0, self.guest.area(0), cast("twin_state.Kernel", TwinKernel(self.guest)))
        start = time.perf_counter_ns()
        stop = vcpu.run()
        took = time.perf_counter_ns() - start
        if stop != ENDED:
            raise RuntimeError(f"the twin stopped with {stop}")
        return took / self._checked(sum(vcpu.counts[: lib.PV_EXIT_MMIO_UNCLAIMED]))

    def _checked(self, exits: int) -> int:
        if exits != self.exits:
            raise RuntimeError(f"{exits} exits, not {self.exits}")
        return exits

    def close(self) -> None:
        self.guest.close()
        self.device.close()
        os.close(self.fd)
        os.close(self.eventfd)


class PythonDevice:
    """The smallest possible device in Python: it looks at the offset, and keeps the value."""

    def __init__(self) -> None:
        self.value = 0

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        self.value = value


class TwinKernel:
    """KVM_RUN and nothing else. The twin needs no more here."""

    def __init__(self, guest: RealGuest) -> None:
        self._guest = guest

    def enter(self) -> int:
        return self._guest.enter(0)

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(name)


PARTS: dict[str, tuple[Callable[[], Code], Callable[[Bench], float]]] = {
    "registers: store": (lambda: Code().store(REGISTERS, 7), Bench.native),
    "registers: load": (lambda: Code().load(REGISTERS), Bench.native),
    "FIFO": (lambda: Code().store(FIFO, 65, 1), Bench.native),
    "doorbell": (lambda: Code().store(UNTAKEN, 1), Bench.native),
    "doorbell, written": (lambda: Code().store(DOORBELL, 1), Bench.native),
    "Python device": (lambda: Code().store(COLD, 7), Bench.native),
    "trace": (lambda: Code().store(REGISTERS, 7), Bench.recorded),
    "trace: Python device": (lambda: Code().store(COLD, 7), Bench.recorded),
    "trace and its reader": (lambda: Code().store(REGISTERS, 7), Bench.traced),
    ID: (lambda: Code().load(VIRTIO + Register.DEVICE_ID), Bench.native),
    FEATURES: (lambda: Code().load(VIRTIO + Register.DEVICE_FEATURES), Bench.native),
    READY: (lambda: Code().load(VIRTIO + Register.QUEUE_READY), Bench.native),
    CONFIGURATION: (lambda: Code().load(VIRTIO + CONFIG), Bench.native),
    SELECTOR: (lambda: Code().store(VIRTIO + Register.QUEUE_SEL, 0), Bench.native),
    KICK: (lambda: Code().store(VIRTIO + Register.QUEUE_NOTIFY, 0), Bench.native),
    IOEVENTFD: (lambda: Code().store(VIRTIO + Register.QUEUE_NOTIFY, KERNELS), Bench.kernel),
    "twin: registers": (lambda: Code().store(REGISTERS, 7), Bench.twin),
}


def measure(part: str, rounds: int, exits: int, type_: int) -> tuple[float, float, float]:
    """Return three medians: ns an exit of the part to compare with, ns an exit of the part, and the ratio in a turn."""
    code, measured = PARTS[part]
    pairs = []
    with contextlib.ExitStack() as guests:

        def make(code: Callable[[], Code]) -> Bench:
            bench = Bench(code, exits * READ_MORE if measured is Bench.traced else exits, type_)
            guests.callback(bench.close)
            return bench

        bench = make(code)
        mine: Callable[[], float] = partial(measured, bench)
        against: Callable[[], float] = bench.timed if part in TRACES else bench.bare
        if part in OF_VIRTIO:
            against = make(PARTS[OF_VIRTIO[part]][0]).native
        elif part == IOEVENTFD:
            against = make(PARTS["registers: store"][0]).bare
        for turn in range(rounds + 1):
            first, second = (against, mine) if turn % 2 else (mine, against)
            values = first(), second()
            pairs.append(values if turn % 2 else values[::-1])
    pairs = pairs[1:]  # the first turn warms up
    ratios = [b / a for a, b in pairs]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), statistics.median(ratios)


def in_lab(arguments: list[str]) -> int:
    """Run this module in the lab, on one CPU if time counts instructions."""
    bare_library("aarch64")
    inside = ["python3", "-m", "tests.bench.exit_cost", "--inside", *arguments]
    command = [sys.executable, "-m", "pyvmm", "lab", "exec", "--icount", "--", *inside]
    return subprocess.run(command, check=False).returncode


def main(arguments: list[str]) -> int:
    """Measure, print a table, judge."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.exit_cost", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--lab", action="store_true", help="in the lab: instructions, in a protected VM")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help="on arm64: a plain VM instead of a protected one")
    parser.add_argument("--part", choices=PARTS, action="append", help="measure this kind only")
    parser.add_argument("--rounds", type=int, help="turns of each (41; 5 in the lab)")
    parser.add_argument("--exits", type=int, help="exits a turn (2000; 500 in the lab)")
    options = parser.parse_args(arguments)
    if options.lab:
        return in_lab([argument for argument in arguments if argument != "--lab"])
    counted = options.inside
    bars = INSTRUCTION_BARS if counted else NATIVE_BARS
    protected = platform.machine() == "aarch64" and not options.plain
    unit = "instructions" if counted else "ns"
    print(f"{'an MMIO exit':<22}{'held against':>19}{unit:>14}{'ratio':>8}{'bar':>7}")
    missed = False
    for part in options.part or PARTS:
        bare, own, ratio = measure(
            part,
            options.rounds or (5 if counted else 41),
            options.exits or (500 if counted else 2000),
            KVM_VM_TYPE_ARM_PROTECTED if protected else 0,
        )
        bar = bars.get(part)
        verdict = "" if bar is None else f"{bar:>7.2f}" + ("" if ratio <= bar else "  MISSED")
        missed = missed or (bar is not None and ratio > bar)
        print(f"{part:<22}{bare:>19.0f}{own:>14.0f}{ratio:>8.3f}{verdict}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
