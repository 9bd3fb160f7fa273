# SPDX-License-Identifier: Apache-2.0
"""The native loop's twin in pure Python. It decides as native/loop/cdef.h and firmware/lib/abi.h specify.

It is the oracle of the differential tests and the baseline of the benchmark. It runs on any ``Kernel``.
"""

from __future__ import annotations

import errno
import struct
from enum import IntEnum
from typing import TypeGuard

from pyvmm import abi
from pyvmm._native import lib
from pyvmm.uapi.errno import EHWPOISON
from tests.twin_state import Counter, Doorbell, Kernel, Mailbox, Pl011, Range, Region, Virtio, Vm

__all__ = ["Counter", "Doorbell", "Mailbox", "Pl011", "Range", "Region", "Vcpu", "Virtio", "Vm", "bucket_of"]

PAGE = 4096
NOT_SUPPORTED, INVALID_PARAMETER = -1, -3
EXIT_HYPERCALL, EXIT_DEBUG, EXIT_MMIO, EXIT_SYSTEM_EVENT, EXIT_MEMORY_FAULT = 3, 4, 6, 24, 39
MOVING = 0x40  # PV_PAGE_MOVING of native/loop/loop.h
MASK64 = (1 << 64) - 1

Pending = IntEnum("Pending", "NONE MMIO TOLD CONVERTED", start=0)


class Vcpu:
    """One vCPU; ``run`` is its struct kvm_run, as writable bytes."""

    def __init__(self, vm: Vm, index: int, run: memoryview, kernel: Kernel) -> None:
        self.vm, self.index, self.raw, self.kernel = vm, index, run, kernel
        self.kick = False
        self.pending = Pending.NONE
        self.counts = [0] * lib.PV_EXITS
        self.exit = self.exit_reason = self.gpa = self.offset = self.value = self.size = self.retries = 0
        self.is_write = False
        self.range: Range | None = None
        self.share_gpa = self.share_op = self.share_source = self.share_status = 0
        self.event, self.event_data = 0, [0] * 0
        self.error = self.failure = self.fault_gpa = self.fault_size = 0

    def run(self) -> int:
        while True:
            if self.kick:
                return lib.PV_STOP_KICK
            stop = self.enter() if self.pending == Pending.NONE else self.resume()
            if stop:
                return stop

    def enter(self) -> int:
        error = self.kernel.enter()
        (self.exit_reason,) = struct.unpack_from("<I", self.raw, 8)
        if error == errno.EINTR:
            self.exit, stop = lib.PV_EXIT_INTR, lib.PV_STOP_NONE
            self.raw[1] = 0
        elif error:
            stop = self.failed(error)
        else:
            stop = self.dispatch()
        self.counts[self.exit] += 1
        return stop

    def resume(self) -> int:
        pending, self.pending = self.pending, Pending.NONE
        if pending == Pending.MMIO:
            return self.mmio(again=True)
        return self.change() if pending == Pending.TOLD else self.apply(converted=True)

    def dispatch(self) -> int:
        self.retries = 0
        match self.exit_reason:
            case 6:
                return self.mmio(again=False)
            case 3:
                self.exit = lib.PV_EXIT_HYPERCALL
                return self.hypercall()
            case 24:
                self.exit = lib.PV_EXIT_SYSTEM
                self.event, count = struct.unpack_from("<II", self.raw, 32)
                self.event_data = list(struct.unpack_from(f"<{min(count, 4)}Q", self.raw, 40))
                return lib.PV_STOP_SYSTEM
            case 4:
                self.exit = lib.PV_EXIT_DEBUG
                return lib.PV_STOP_DEBUG
        self.exit = lib.PV_EXIT_OTHER
        return lib.PV_STOP_OTHER

    # ---- failures

    def failed(self, error: int) -> int:
        told = self.exit_reason == EXIT_MEMORY_FAULT
        self.exit, self.error = lib.PV_EXIT_FAILED, error
        _, self.fault_gpa, self.fault_size = struct.unpack_from("<3Q", self.raw, 32) if told else (0, 0, 0)
        if told:
            struct.pack_into("<I", self.raw, 8, 0)
        known = {
            errno.EAGAIN: lib.PV_FAIL_EAGAIN,
            errno.ENOMEM: lib.PV_FAIL_ENOMEM,
            errno.EFAULT: lib.PV_FAIL_MEMORY if told else lib.PV_FAIL_EFAULT,
            EHWPOISON: lib.PV_FAIL_EHWPOISON,
        }
        self.failure = known.get(error, lib.PV_FAIL_OTHER)
        action = self.vm.policy.get(self.failure, lib.PV_ACT_STOP)
        if action == lib.PV_ACT_STOP or self.retries >= self.vm.retry_limit:
            return lib.PV_STOP_FAILED
        if action == lib.PV_ACT_PUNCH and not (told and self.punch(self.fault_gpa)):
            return lib.PV_STOP_FAILED
        self.retries += 1
        return lib.PV_STOP_NONE

    def punch(self, gpa: int) -> bool:
        region = self.vm.region(gpa)
        if region is None or self.vm.protection == lib.PV_PKVM:
            return False
        index = (gpa - region.gpa) // PAGE
        if claimable(region.ledger[index]):
            region.ledger[index] = lib.PV_PAGE_HOLE
        return self.kernel.drop(gpa & -PAGE, lib.PV_CONVERT_PUNCH)

    # ---- MMIO

    def mmio(self, *, again: bool) -> int:
        self.gpa, data, self.size, is_write = struct.unpack_from("<Q8sIB", self.raw, 32)
        self.is_write = bool(is_write)
        self.value = int.from_bytes(data[: self.size], "little") if self.is_write else 0
        self.range = next(
            (r for r in self.vm.ranges if r.base <= self.gpa and self.gpa + self.size <= r.base + r.size), None
        )
        self.offset = self.gpa - (self.range.base if self.range else 0)
        if self.range is None:
            self.exit = lib.PV_EXIT_MMIO_UNCLAIMED
            return lib.PV_STOP_UNCLAIMED
        self.exit = self.range.kind
        if not again:
            self.range.writes += self.is_write
            self.range.reads += not self.is_write
        stop = self.carry_out(self.range)
        if not self.is_write:
            self.reply(self.value)
        return stop

    def reply(self, value: int) -> None:
        if not self.is_write:
            self.raw[40 : 40 + self.size] = (value & MASK64).to_bytes(8, "little")[: self.size]

    def carry_out(self, where: Range) -> int:
        state, value = where.state, self.value
        match where.kind:
            case lib.PV_KIND_REGISTERS:
                span = slice(self.offset, self.offset + self.size)
                if self.is_write:
                    state[span] = value.to_bytes(self.size, "little")
                else:
                    self.value = int.from_bytes(state[span], "little")
            case lib.PV_KIND_COUNTER:
                if self.is_write:
                    state.value = (state.value + value) & MASK64
                else:
                    self.value = state.value
            case lib.PV_KIND_DOORBELL if self.is_write:
                self.ring(state)
            case lib.PV_KIND_PL011 if self.offset % 4 == 0 and self.size <= 4:
                done = True
                if self.is_write:
                    done = state.store(self.offset, value)
                else:
                    self.value = state.load(self.offset)
                state.update(self.kernel)
                if not done:
                    self.pending = Pending.MMIO
                    return lib.PV_STOP_FIFO
            case lib.PV_KIND_MAILBOX if self.offset // PAGE == self.index and self.size == 8 and self.offset % 8 == 0:
                return self.mailbox(state[self.index], self.offset % PAGE)
            case lib.PV_KIND_SHARE:
                if self.is_write:
                    return self.bell(value)
                self.value = self.share_status & MASK64
            case lib.PV_KIND_VIRTIO:
                return self.virtio(state)
            case lib.PV_KIND_COLD:
                return lib.PV_STOP_MMIO
        return lib.PV_STOP_NONE

    def ring(self, bell: Doorbell) -> None:
        fds = (fd for offset, match, fd in bell.slots if offset == self.offset and match in (None, self.value))
        fd = next(fds, None)
        if fd is None:
            bell.missed += 1
        else:
            self.kernel.signal(fd)

    def virtio(self, transport: Virtio) -> int:
        if 0x50 <= self.offset < 0x58:
            self.exit = lib.PV_EXIT_MMIO_DOORBELL
            if self.is_write:
                self.ring(transport.bell)
        elif self.offset >= 0x100 and not self.is_write:
            at = self.offset - 0x100
            self.value = int.from_bytes(transport.config[at : at + self.size], "little")
        elif self.offset < 0x100 and (self.size != 4 or self.offset % 4):
            pass
        elif not self.is_write:
            self.value = transport.load(self.offset)
        elif not transport.store(self.offset, self.value):
            self.exit = lib.PV_EXIT_MMIO_COLD
            return lib.PV_STOP_MMIO
        return lib.PV_STOP_NONE

    def mailbox(self, box: Mailbox, offset: int) -> int:
        if not self.is_write:
            if offset == 0x000:
                if box.state != lib.PV_MAILBOX_ORDER:
                    self.pending = Pending.MMIO
                    return lib.PV_STOP_MAILBOX
                box.state = lib.PV_MAILBOX_BUSY
            if offset < 0x040:
                self.value = box.order[offset // 8]
        elif 0x040 <= offset < 0x078:
            box.result[1 + (offset - 0x040) // 8] = self.value
        elif offset == 0x078 and box.state == lib.PV_MAILBOX_BUSY:
            box.result[0], box.state = self.value, lib.PV_MAILBOX_DONE
        elif 0x080 <= offset < 0x0C0:
            box.trap[(offset - 0x080) // 8] = self.value
        elif offset == 0x0C0:
            box.trapped = 1
            return lib.PV_STOP_MAILBOX
        elif 0x0C8 <= offset < 0x0E8:
            box.note[(offset - 0x0C8) // 8] = self.value
        return lib.PV_STOP_NONE

    # ---- pages

    def entry(self, gpa: int) -> int | None:
        region = self.vm.region(gpa) if gpa % PAGE == 0 else None
        return None if region is None else region.ledger[(gpa - region.gpa) // PAGE]

    def enter_page(self, gpa: int, entry: int) -> None:
        region = self.vm.region(gpa)
        assert region is not None
        region.ledger[(gpa - region.gpa) // PAGE] = entry

    def move(self, gpa: int, share: bool) -> bool:
        entry = self.entry(gpa)
        if not claimable(entry) or (entry & 7 == lib.PV_PAGE_SHARED) == share:
            return False
        unshared = {
            lib.PV_NONE: lib.PV_PAGE_HOST,
            lib.PV_PKVM: lib.PV_PAGE_PRIVATE | lib.PV_PAGE_ASSUMED,
            lib.PV_EMULATED: lib.PV_PAGE_PRIVATE | MOVING,
        }
        self.enter_page(gpa, lib.PV_PAGE_SHARED if share else unshared[self.vm.protection])
        return True

    def count(self, status: int) -> None:
        self.share_status = status
        self.vm.refused += status != 0
        self.vm.shares += status == 0 and bool(self.share_op)
        self.vm.unshares += status == 0 and not self.share_op

    def bell(self, value: int) -> int:
        vm, op = self.vm, value % PAGE
        self.share_gpa, self.share_op, self.share_source = value - op, int(op == 1), lib.PV_SOURCE_DOORBELL
        entry = self.entry(self.share_gpa)
        if self.size != 8 or self.offset or op not in (1, 2) or not claimable(entry):
            status = INVALID_PARAMETER
        elif vm.protection == lib.PV_EMULATED:
            status = 0 if entry & 7 == lib.PV_PAGE_SHARED else NOT_SUPPORTED
        elif vm.protection == lib.PV_PKVM and op == 1 and not self.kernel.probe(self.share_gpa):
            status = NOT_SUPPORTED
        else:
            status = 0
        if status:
            self.count(status)
            return lib.PV_STOP_NONE
        self.share_status = 0
        return lib.PV_STOP_NONE if vm.protection == lib.PV_EMULATED else self.announce(op == 1)

    def announce(self, share: bool) -> int:
        if not self.move(self.share_gpa, share):
            return lib.PV_STOP_NONE
        self.count(0)
        return lib.PV_STOP_SHARE if self.vm.subscribers else lib.PV_STOP_NONE

    def share_exit(self, gpa: int, share: bool) -> int:
        self.share_gpa, self.share_op, self.share_source = gpa, int(share), lib.PV_SOURCE_EXIT
        if claimable(self.entry(gpa)):
            return self.announce(share)
        self.count(INVALID_PARAMETER)
        return lib.PV_STOP_NONE

    def hypercall(self) -> int:
        number, told = struct.unpack_from("<QQ", self.raw, 32)
        if self.vm.protection == lib.PV_PKVM and number in (abi.HVC_SHARE, abi.HVC_UNSHARE):
            return self.share_exit(told, number == abi.HVC_SHARE)
        if self.vm.protection != lib.PV_EMULATED:
            return lib.PV_STOP_HYPERCALL
        match number:
            case abi.HVC_SHARE | abi.HVC_UNSHARE:
                return self.share_call(number == abi.HVC_SHARE)
            case abi.HVC_MEMINFO:
                zero = not any(self.kernel.get_x(n) for n in (1, 2, 3))
                self.kernel.set_x(0, PAGE if zero else INVALID_PARAMETER & MASK64)
            case abi.HVC_FEATURES:
                for n, value in enumerate((0x1D, 0, 0, 0)):
                    self.kernel.set_x(n, value)
            case _:
                return lib.PV_STOP_HYPERCALL
        return lib.PV_STOP_NONE

    def sharable(self) -> bool:
        entry = self.entry(self.share_gpa)
        return claimable(entry) and entry not in (lib.PV_PAGE_SHARED, lib.PV_PAGE_POISONED)

    def share_call(self, share: bool) -> int:
        self.share_gpa, x2, x3 = (self.kernel.get_x(n) for n in (1, 2, 3))
        self.share_op, self.share_source = int(share), lib.PV_SOURCE_HYPERCALL
        if x2 or x3 or not (self.sharable() if share else self.move(self.share_gpa, share=False)):
            return self.finish(INVALID_PARAMETER)
        if not share and self.vm.subscribers:
            self.share_status, self.pending = 0, Pending.TOLD
            return lib.PV_STOP_SHARE
        return self.change()

    def change(self) -> int:
        if self.vm.conversion != lib.PV_CONVERT_COLD:
            return self.apply(converted=False)
        self.pending = Pending.CONVERTED
        return lib.PV_STOP_CONVERT

    def apply(self, *, converted: bool) -> int:
        share = bool(self.share_op)
        status = INVALID_PARAMETER
        if self.sharable() or not share:
            status = self.share_status if converted else self.convert(share)
        if not share:
            self.enter_page(self.share_gpa, lib.PV_PAGE_SHARED if status else lib.PV_PAGE_PRIVATE)
        elif status == 0:
            self.move(self.share_gpa, share)
        return self.finish(status)

    def convert(self, share: bool) -> int:
        if not self.kernel.protect(self.share_gpa, share):
            return NOT_SUPPORTED
        if not self.kernel.drop(self.share_gpa, self.vm.conversion):
            self.kernel.protect(self.share_gpa, not share)
            return NOT_SUPPORTED
        return 0

    def finish(self, status: int) -> int:
        self.count(status)
        self.kernel.set_x(0, status & MASK64)
        told = status == 0 and self.share_op and self.vm.subscribers
        return lib.PV_STOP_SHARE if told else lib.PV_STOP_NONE


def claimable(entry: int | None) -> TypeGuard[int]:
    """Return whether a guest may share or unshare a page with this ledger entry."""
    return entry is not None and entry & 7 != lib.PV_PAGE_ABSENT and not entry & MOVING


def bucket_of(ns: int) -> int:
    """Return the histogram bucket: each power of two has 8."""
    if ns < 8:
        return ns
    power = ns.bit_length() - 1
    return min((power - 2) * 8 + (ns >> (power - 3)) % 8, 319)
