# SPDX-License-Identifier: Apache-2.0
"""A guest that only does MMIO, on a real /dev/kvm of either architecture. Its code is assembled here.

On x86 it is real-mode code in the first 64 KiB, devices at 0xd_0000; on arm64 code is at 0x8000_0000 and devices
are at 0x0930_0000, as in pyvmm's layout.
"""

from __future__ import annotations

import mmap
import platform
from ctypes import addressof, c_char
from typing import TYPE_CHECKING, Any, Self

from pyvmm._native import ffi, lib
from pyvmm.kvm import libc
from pyvmm.kvm.system import System
from pyvmm.uapi.kvm import KVM_RUN
from pyvmm.uapi.kvm_arm64 import core_reg

if TYPE_CHECKING:
    from types import TracebackType

X86 = platform.machine() == "x86_64"
RAM = 0 if X86 else 0x8000_0000
DEVICES = 0xD_0000 if X86 else 0x0930_0000
PAGE = 4096
SIZES = (1, 2, 4) if X86 else (1, 2, 4, 8)
PSCI_SYSTEM_OFF = 0x8400_0008


class Code:
    """A program under construction; offsets are from DEVICES. A store can write the last loaded value."""

    def __init__(self) -> None:
        self.bytes = b"\xb8\x00\xd0\x8e\xd8" if X86 else b""  # mov ax, 0xd000; mov ds, ax

    def _word(self, word: int) -> None:
        self.bytes += word.to_bytes(4, "little")

    def _set(self, register: int, value: int) -> None:
        for part in range(4):
            base = 0xF280_0000 if part else 0xD280_0000  # movk, movz
            self._word(base | part << 21 | (value >> 16 * part & 0xFFFF) << 5 | register)

    def store(self, offset: int, value: int | None = None, size: int = 4) -> Self:
        """Store a value, or the last loaded value."""
        if X86:
            if value is not None:
                self.bytes += b"\x66\xb8" + (value & 0xFFFF_FFFF).to_bytes(4, "little")
            self.bytes += {1: b"\xa2", 2: b"\xa3", 4: b"\x66\xa3"}[size] + offset.to_bytes(2, "little")
        else:
            if value is not None:
                self._set(0, value)
            self._set(1, DEVICES + offset)
            self._word({1: 0x3900_0020, 2: 0x7900_0020, 4: 0xB900_0020, 8: 0xF900_0020}[size])
        return self

    def load(self, offset: int, size: int = 4) -> Self:
        """Load a value, for a store without a value."""
        if X86:
            self.bytes += {1: b"\xa0", 2: b"\xa1", 4: b"\x66\xa1"}[size] + offset.to_bytes(2, "little")
        else:
            self._set(1, DEVICES + offset)
            self._word({1: 0x3940_0020, 2: 0x7940_0020, 4: 0xB940_0020, 8: 0xF940_0020}[size])
        return self

    def repeat(self, count: int, body: Code) -> Self:
        """Repeat the body ``count`` times."""
        inner = body.bytes[5:] if X86 else body.bytes
        if X86:
            self.bytes += b"\x66\xb9" + count.to_bytes(4, "little") + inner + b"\x66\x49"  # mov ecx; dec ecx
            self.bytes += b"\x75" + (-(len(inner) + 4) & 0xFF).to_bytes(1, "little")  # jnz
        else:
            self._set(2, count)
            self.bytes += inner
            self._word(0xF100_0442)  # subs x2, x2, #1
            self._word(0xB500_0002 | (-(len(inner) // 4 + 1) & 0x7FFFF) << 5)  # cbnz x2
        return self

    def forever(self) -> Self:
        """Loop without an exit."""
        self.bytes += b"\xeb\xfe" if X86 else (0x1400_0000).to_bytes(4, "little")
        return self

    def end(self) -> bytes:
        """Stop: hlt (PV_STOP_OTHER) or PSCI SYSTEM_OFF (PV_STOP_SYSTEM)."""
        if X86:
            self.bytes += b"\xf4"
        else:
            self._set(0, PSCI_SYSTEM_OFF)
            self._word(0xD400_0002)  # hvc #0
        return self.bytes


ENDED = lib.PV_STOP_OTHER if X86 else lib.PV_STOP_SYSTEM


class RealGuest:
    """A VM with one vCPU for each program, ready for pv_run; ``ranges`` are as of tests.fake_kvm.Rig.bus."""

    def __init__(self, *programs: bytes, type: int = 0) -> None:
        self.system = System.open()
        self.kvm = self.system.create_vm(type)
        self.memory = mmap.mmap(-1, 16 * PAGE)
        self.hva = addressof(c_char.from_buffer(self.memory))
        self.kvm.set_memory(0, RAM, 16 * PAGE, self.hva)
        self.vm = ffi.new("struct pv_vm *", {"fd": self.kvm.fileno()})
        self.keep: list[Any] = []
        self.vcpus: list[Any] = []
        self.kvm_vcpus = [self.kvm.create_vcpu(index) for index in range(len(programs))]
        for index, program in enumerate(programs):
            self.vcpus.append(self._vcpu(index, program))
        if lib.pv_install_signals():
            raise OSError("pv_install_signals")

    def _vcpu(self, index: int, program: bytes) -> Any:
        vcpu, offset = self.kvm_vcpus[index], PAGE * (1 + index)
        self.memory[offset : offset + len(program)] = program
        self.start(index)
        return ffi.new(
            "struct pv_vcpu *",
            {"fd": vcpu.fileno(), "index": index, "vm": self.vm, "run": ffi.cast("void *", vcpu.run_address)},
        )

    def start(self, index: int) -> None:
        """Put a vCPU at the start of its program."""
        vcpu, pc = self.kvm_vcpus[index], RAM + PAGE * (1 + index)
        if X86:
            sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
            sregs.cs.base = sregs.cs.selector = 0
            vcpu.set_sregs(sregs)
            regs.rip, regs.rflags = pc, 2
            vcpu.set_regs(regs)
        else:
            vcpu.init()
            vcpu.set_reg(core_reg("pc"), pc)

    def bus(self, *ranges: tuple[int, int, int, Any]) -> Any:
        """Publish ranges of (offset from DEVICES, size, kind, state), and return them."""
        array = ffi.new("struct pv_range[]", len(ranges))
        for entry, (offset, size, kind, state) in zip(array, sorted(ranges, key=lambda r: r[0]), strict=True):
            entry.base, entry.size, entry.kind = DEVICES + offset, size, kind
            entry.state = ffi.NULL if state is None else ffi.cast("void *", state)
        bus = ffi.new("struct pv_bus *", {"count": len(ranges), "ranges": array})
        self.keep += [array, bus, ranges]
        self.vm.bus = bus
        return array

    def enter(self, index: int) -> int:
        """Call KVM_RUN from Python, for the twin; return 0 or an errno."""
        result, errno = libc.ioctl(self.vcpus[index].fd, KVM_RUN.number, 0)
        return errno if result < 0 else 0

    def area(self, index: int) -> memoryview:
        """Return a vCPU's struct kvm_run, writable."""
        return memoryview(ffi.buffer(ffi.cast("uint8_t *", self.vcpus[index].run), PAGE))

    def close(self) -> None:
        for vcpu in self.kvm_vcpus:
            vcpu.close()
        self.kvm.close()
        self.system.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def uart(tx: int = 64, rx: int = 16) -> tuple[Any, list[Any]]:
    """Make a struct pv_pl011 without eventfds and interrupt; return it with the objects that must stay alive."""
    made = ffi.new("struct pv_pl011 *")
    made.vm_fd = made.tx.wake_fd = made.rx.wake_fd = -1
    buffers = [ffi.new("uint8_t[]", tx), ffi.new("uint8_t[]", rx)]
    made.tx.size, made.tx.data, made.rx.size, made.rx.data = tx, buffers[0], rx, buffers[1]
    return made, buffers
