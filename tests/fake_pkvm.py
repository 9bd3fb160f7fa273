# SPDX-License-Identifier: Apache-2.0
"""A pKVM host without KVM, for pyvmm's own run loop, machine and session: it answers each call as the documents say.

There are two: ``7.3``, as measured, where the host's kernel keeps a protected vCPU's registers and answers PSCI; and
``7.4``, by Documentation/virt/kvm/arm/pkvm.rst of 7.4-rc1, where EL2 does. No 7.4 has been run: what is tested on it is
that pyvmm copes with the documented answers. Answers that the document leaves open are marked so.

The guest is a generator of :mod:`tests.fake_guests`. A page that a protected guest touches is locked and taken from
this process (PROT_NONE), and comes back as zeros when the VM is closed.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyvmm import abi
from pyvmm.kvm.fd import Kernel
from pyvmm.machine.layout import RAM_BASE
from pyvmm.uapi import kvm_arm64 as arm64
from pyvmm.uapi import kvm_cap as cap
from pyvmm.uapi import psci
from pyvmm.uapi.kvm import KVM_VM_TYPE_ARM_PROTECTED
from pyvmm.uapi.kvm_arm64 import core_reg
from pyvmm.uapi.kvm_run import ExitReason, SystemEvent, kvm_run
from pyvmm.uapi.kvm_state import MpState
from tests.fake_guests import (
    WORD,
    Cpu,
    ExternalAbort,
    Guest,
    Hvc,
    Load,
    Pair,
    Poisoned,
    Program,
    Spin,
    Step,
    Store,
    execute,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyvmm.kvm.causes import Value
    from pyvmm.kvm.fd import CData, Fd
    from pyvmm.uapi.ioctl import Ioctl

SERIES = ("7.3", "7.4")
PAGE = 4096
RUN_AREA = 2 * PAGE
BROKEN = 70
"""Exit status of a process whose fake host is broken."""
MOMENT = 0.002
"""Seconds between two looks of a waiting vCPU at whether it has been kicked."""
PC, X0 = core_reg("pc"), core_reg("x0")
XS = {core_reg(f"x{number}"): number for number in range(31)}
TRNG_VERSION = 0x8400_0050
SUCCESS, NOT_SUPPORTED, INVALID = 0, -1, -2
SMCCC_INVALID = -3

HOST = {cap.KVM_CAP_NR_MEMSLOTS: 32767, cap.KVM_CAP_ARM_VM_IPA_SIZE: 40, cap.KVM_CAP_MAX_VCPUS: 512}
"""Capabilities with a number; the others are 1."""
DEBUG = {cap.KVM_CAP_SET_GUEST_DEBUG, cap.KVM_CAP_GUEST_DEBUG_HW_BPS, cap.KVM_CAP_GUEST_DEBUG_HW_WPS}
DENIED = {
    "7.3": DEBUG | {cap.KVM_CAP_IMMEDIATE_EXIT, cap.KVM_CAP_ONE_REG, cap.KVM_CAP_MP_STATE, cap.KVM_CAP_VCPU_EVENTS}
    | {cap.KVM_CAP_IOEVENTFD, cap.KVM_CAP_READONLY_MEM},
    "7.4": DEBUG | {cap.KVM_CAP_READONLY_MEM},
}  # fmt: skip
"""What a protected VM's descriptor answers 0 for."""
FEATURES = {
    arm64.KVM_ARM_VCPU_POWER_OFF,
    arm64.KVM_ARM_VCPU_PSCI_0_2,
    arm64.KVM_ARM_VCPU_PTRAUTH_ADDRESS,
    arm64.KVM_ARM_VCPU_PTRAUTH_GENERIC,
}
"""Of a protected vCPU."""

_libc = ctypes.CDLL(None, use_errno=True)


def _protect(address: int, size: int, how: int) -> None:
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), how):
        raise OSError(ctypes.get_errno(), "mprotect")


class FailedError(Exception):
    """The call fails with this errno."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode[number])
        self.number = number


@dataclass
class FakeVm:
    """A VM. ``pages`` are those that a protected guest has touched: by gpa, whether it shares them."""

    series: str
    protected: bool
    guest: Guest
    slots: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    vcpus: dict[int, FakeVcpu] = field(default_factory=dict)
    pages: dict[int, bool] = field(default_factory=dict)
    started: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def kept(self) -> bool:
        """Whether EL2 keeps its vCPUs' registers, and answers PSCI."""
        return self.protected and self.series == "7.4"

    def place(self, gpa: int) -> int | None:
        """Return the host's address of a gpa, if there is memory."""
        for start, size, hva in self.slots.values():
            if start <= gpa < start + size:
                return hva + gpa - start
        return None

    def donate(self, gpa: int) -> None:
        """Take the page from this process, if the guest has not touched it yet."""
        page = gpa & -PAGE
        if self.protected and page not in self.pages and (hva := self.place(page)) is not None:
            if _libc.mlock(ctypes.c_void_p(hva), ctypes.c_size_t(PAGE)):
                raise FailedError(ctypes.get_errno())
            self.pages[page] = False
            _protect(hva, PAGE, 0)

    def access(self, gpa: int, size: int, value: int | None = None) -> int:
        """Load from guest memory as the guest, or store ``value``."""
        with self.changed:
            self.donate(gpa)
            hva = self.place(gpa)
            assert hva is not None
            private = self.pages.get(gpa & -PAGE) is False
            if private:
                _protect(hva & -PAGE, PAGE, 3)
            memory = (ctypes.c_uint8 * size).from_address(hva)
            if value is not None:
                memory[:] = list((value & (1 << 8 * size) - 1).to_bytes(size, "little"))
            loaded = int.from_bytes(bytes(memory), "little")
            if private:
                _protect(hva & -PAGE, PAGE, 0)
            return loaded

    def convert(self, gpa: int, shared: bool) -> int:
        """Share a page with this process, or take it back."""
        with self.changed:
            if gpa % PAGE or self.place(gpa) is None:
                return SMCCC_INVALID
            self.donate(gpa)
            if self.pages[gpa] is shared:
                return SMCCC_INVALID
            self.pages[gpa] = shared
            _protect(self.place(gpa) or 0, PAGE, 3 if shared else 0)
            return SUCCESS

    def begin(self) -> None:
        """Make the VM at EL2, before the first run."""
        if not self.started and self.kept:
            able = [vcpu for vcpu in self.vcpus.values() if vcpu.state is MpState.KVM_MP_STATE_RUNNABLE]
            if len(able) != 1:
                raise FailedError(errno.EINVAL)  # which errno, the document does not say
        self.started = True

    def close(self) -> None:
        """Give every page back: private ones as zeros."""
        with self.changed:
            for page, shared in self.pages.items():
                hva = self.place(page)
                assert hva is not None
                _protect(hva, PAGE, 3)
                if not shared:
                    ctypes.memset(hva, 0, PAGE)
                _libc.munlock(ctypes.c_void_p(hva), ctypes.c_size_t(PAGE))
            self.pages.clear()


class FakeVcpu:
    """A vCPU. ``ran`` says whether it has called KVM_RUN, which makes it known at EL2."""

    def __init__(self, vm: FakeVm, index: int, fd: int) -> None:
        self.vm, self.index = vm, index
        self._map = mmap.mmap(fd, RUN_AREA)
        self.area = kvm_run.from_buffer(self._map)
        self.ran = False
        self.features: set[int] | None = None
        """Those it was initialised with, which stay."""
        self.state = MpState.KVM_MP_STATE_RUNNABLE
        self.cpu = Cpu(index, 0)
        self.others: dict[int, int] = {}
        self.aborts: int | None = None
        """The gpa of an access that is to be an abort in the guest."""
        self.serror = False
        self._program: Program | None = None
        self._loading: Load | None = None

    # -- what the VMM asks

    def initialise(self, features: set[int]) -> None:
        lasting = features - {arm64.KVM_ARM_VCPU_POWER_OFF}
        if self.features is not None and self.features != lasting and not (self.vm.kept and self.ran):
            raise FailedError(errno.EINVAL)
        if self.vm.kept:
            if self.ran:
                raise FailedError(errno.EPERM)
            if arm64.KVM_ARM_VCPU_PSCI_0_2 not in features or features - FEATURES:
                raise FailedError(errno.EINVAL)
        self.features = lasting
        off = arm64.KVM_ARM_VCPU_POWER_OFF in features
        self.state = MpState.KVM_MP_STATE_STOPPED if off else MpState.KVM_MP_STATE_RUNNABLE
        self.cpu, self.others, self._program, self._loading = Cpu(self.index, 0), {}, None, None

    def register(self, id: int, value: int | None = None) -> int:
        """Read a register, or set it."""
        if self.vm.kept and self.ran:
            raise FailedError(errno.EPERM)
        if value is not None:
            if id == PC:
                self.cpu.pc = value
            elif id in XS:
                self.cpu.x[XS[id]] = value
            else:
                self.others[id] = value
        return self.cpu.pc if id == PC else self.cpu.x[XS[id]] if id in XS else self.others.get(id, 0)

    def set_state(self, state: MpState) -> None:
        if state is MpState.KVM_MP_STATE_RUNNABLE and self.state is MpState.KVM_MP_STATE_UNINITIALIZED:
            raise FailedError(errno.EPERM)
        with self.vm.changed:
            self.state = state
            self.vm.changed.notify_all()

    def take_events(self, events: Any) -> None:
        if events.exception.ext_dabt_pending:
            if self.vm.kept:
                raise FailedError(errno.EPERM)
            self.aborts = self.area.mmio.phys_addr
        self.serror |= bool(events.exception.serror_pending)

    # -- KVM_RUN

    def run(self) -> int:
        """Run until the next exit; returns an errno."""
        try:
            return self._run()
        except FailedError as failed:
            return failed.number

    def _run(self) -> int:
        vm, area = self.vm, self.area
        vm.begin()
        if not self.ran and vm.kept:
            primary = self.state is MpState.KVM_MP_STATE_RUNNABLE
            begins = self.cpu.pc, self.cpu.x[0]
            self.cpu = Cpu(self.index, 0)
            if primary:
                self.cpu.pc, self.cpu.x[0] = begins
        self.ran = True
        self.cpu.cpus = len(vm.vcpus)
        answer: int | None = None
        if (loading := self._loading) is not None and self.aborts is None:
            answer = int.from_bytes(bytes(area.mmio.data[: loading.size]), "little")
        if area.immediate_exit:
            return errno.EINTR
        self._loading = None
        while self._wait_until_on():
            if self._program is None:
                self._program, answer = (execute if self.cpu.pc == RAM_BASE else vm.guest)(self.cpu), None
            done = self._do(self._next(answer))
            if isinstance(done, ExitReason):
                area.exit_reason = done
                return 0
            if done is None:
                break
            answer = done
        return errno.EINTR

    def _wait_until_on(self) -> bool:
        """Wait until it is switched on. False if it has been kicked."""
        while self.state is not MpState.KVM_MP_STATE_RUNNABLE:
            if self.area.immediate_exit:
                return False
            time.sleep(MOMENT)
        return True

    def _next(self, answer: int | None) -> Step:
        assert self._program is not None
        if (gpa := self.aborts) is not None:
            self.aborts = None
            return self._program.throw(ExternalAbort(gpa))
        return next(self._program) if answer is None else self._program.send(answer)

    def _do(self, step: Step) -> int | ExitReason | None:
        """Do what the guest does. Returns its answer, or the exit that it makes; None if a kick has ended a wait."""
        vm = self.vm
        match step:
            case Load(gpa, size) | Store(gpa, _, size) if vm.place(gpa) is not None:
                return vm.access(gpa, size, step.value if isinstance(step, Store) else None)
            case Load() | Store():
                return self._mmio(step)
            case Pair(gpa):
                if not vm.protected:
                    raise FailedError(errno.ENOSYS)
                self.aborts = gpa
                return 0
            case Poisoned():
                self._program = self._again(step)
                raise FailedError(errno.EFAULT)
            case Spin():
                while not self.area.immediate_exit:
                    time.sleep(MOMENT)
                self._program = self._again(Spin())
                return None
            case Hvc():
                return self._call(step)

    def _again(self, step: Step) -> Program:
        yield step

    def _mmio(self, step: Load | Store) -> ExitReason:
        mmio = self.area.mmio
        mmio.phys_addr, mmio.len, mmio.is_write = step.gpa, step.size, isinstance(step, Store)
        value = step.value if isinstance(step, Store) else 0
        mmio.data[:] = list((value & WORD).to_bytes(8, "little"))
        self._loading = step if isinstance(step, Load) else Load(0, 0)
        return ExitReason.KVM_EXIT_MMIO

    def _call(self, call: Hvc) -> int | ExitReason | None:
        vm = self.vm
        self.cpu.x[:4] = call
        match call.function:
            case abi.HVC_FEATURES if vm.protected:
                return 0x1D
            case abi.HVC_SHARE | abi.HVC_UNSHARE if vm.protected:
                return vm.convert(call.x1, call.function == abi.HVC_SHARE) & WORD
            case psci.PSCI_0_2_FN_PSCI_VERSION:
                return psci.PSCI_VERSION(1, 1 if vm.kept else 3)
            case psci.PSCI_0_2_FN64_CPU_ON:
                return self._cpu_on(call) & WORD
            case psci.PSCI_0_2_FN64_AFFINITY_INFO:
                return int(vm.vcpus[call.x1].state is not MpState.KVM_MP_STATE_RUNNABLE)
            case psci.PSCI_0_2_FN_CPU_OFF:
                unknown, stopped = MpState.KVM_MP_STATE_UNINITIALIZED, MpState.KVM_MP_STATE_STOPPED
                self.state = unknown if vm.kept else stopped
                self._program = None
                return 0
            case psci.PSCI_0_2_FN_SYSTEM_OFF:
                return self._end(SystemEvent.KVM_SYSTEM_EVENT_SHUTDOWN)
            case psci.PSCI_0_2_FN_SYSTEM_RESET:
                return self._end(SystemEvent.KVM_SYSTEM_EVENT_RESET)
            case psci.PSCI_1_1_FN64_SYSTEM_RESET2:
                return self._end(SystemEvent.KVM_SYSTEM_EVENT_RESET, flags=1)
            case _ if call.function == TRNG_VERSION and not vm.kept:
                return 1 << 16
            case _:
                return NOT_SUPPORTED & WORD

    def _cpu_on(self, call: Hvc) -> int:
        vm = self.vm
        target = vm.vcpus.get(call.x1)
        if target is None or (vm.kept and not target.ran):
            return psci.PSCI_RET_INVALID_PARAMS
        if target.state is MpState.KVM_MP_STATE_RUNNABLE:
            return psci.PSCI_RET_ALREADY_ON
        target.cpu = Cpu(target.index, 0, call.x2)
        target.cpu.x[0] = call.x3
        target.state = MpState.KVM_MP_STATE_RUNNABLE
        return psci.PSCI_RET_SUCCESS

    def _end(self, event: SystemEvent, flags: int = 0) -> ExitReason:
        self.area.system_event.type = event
        self.area.system_event.ndata = 1
        self.area.system_event.flags = flags
        return ExitReason.KVM_EXIT_SYSTEM_EVENT


class FakePkvm(Kernel):
    """The host: /dev/kvm of a Linux of ``series``. Machines run ``guest``, whatever their kernel is.

    What begins at RAM's first byte, as bare programs do, is executed instead.
    """

    def __init__(self, series: str, guest: Guest) -> None:
        assert series in SERIES
        self.series, self.guest = series, guest
        self.vms: dict[int, FakeVm] = {}
        self.vcpus: dict[int, FakeVcpu] = {}

    def run(self, fd: int) -> int:
        """Make KVM_RUN's call, for the native loop. Returns an errno. C would not hear of an exception: it is fatal."""
        try:
            return self.vcpus[fd].run()
        except BaseException:
            traceback.print_exc()
            os._exit(BROKEN)

    def closed(self, fd: int) -> None:
        """Hear that a VM's last descriptor is closed."""
        if (vm := self.vms.pop(fd, None)) is not None:
            vm.close()

    def open(self, path: str) -> int:
        """Return a memfd as the descriptor."""
        del path
        return _file()

    def ioctl(self, fd: Fd, request: Ioctl, argument: int | CData, values: Mapping[str, Value]) -> tuple[int, int]:
        """Answer a call."""
        del values
        try:
            return self._answer(fd.kind, fd.fileno(), request.name, argument), 0
        except FailedError as failed:
            return -1, failed.number

    def _answer(self, kind: str, fd: int, name: str, argument: Any) -> int:
        if kind == "vcpu" and name != "KVM_GET_STATS_FD":
            return self._of_vcpu(self.vcpus[fd], name, argument)
        match name:
            case "KVM_GET_API_VERSION":
                return 12
            case "KVM_GET_VCPU_MMAP_SIZE":
                return RUN_AREA
            case "KVM_CHECK_EXTENSION":
                denied = DENIED[self.series] if kind == "vm" and self.vms[fd].protected else ()
                return 0 if argument in denied else HOST.get(argument, 1)
            case "KVM_CREATE_VM":
                made = _file()
                self.vms[made] = FakeVm(self.series, bool(argument & KVM_VM_TYPE_ARM_PROTECTED), self.guest)
                return made
            case "KVM_CREATE_VCPU":
                made = _file()
                vm = self.vms[fd]
                vm.vcpus[argument] = self.vcpus[made] = FakeVcpu(vm, argument, made)
                return made
            case "KVM_CREATE_DEVICE":
                argument.fd = _file()
            case "KVM_SET_USER_MEMORY_REGION":
                self._slot(self.vms[fd], argument)
            case "KVM_GET_STATS_FD":
                return _file()
        return 0

    def _slot(self, vm: FakeVm, region: Any) -> None:
        if not region.memory_size:
            if vm.protected and vm.started:
                raise FailedError(errno.EPERM)
            del vm.slots[region.slot]
            return
        vm.slots[region.slot] = region.guest_phys_addr, region.memory_size, region.userspace_addr

    def _of_vcpu(self, vcpu: FakeVcpu, name: str, argument: Any) -> int:
        match name:
            case "KVM_RUN":
                if error := vcpu.run():
                    raise FailedError(error)
            case "KVM_ARM_VCPU_INIT":
                words = argument.features
                vcpu.initialise({bit for bit in range(64) if words[bit // 32] >> bit % 32 & 1})
            case "KVM_GET_ONE_REG":
                size = 1 << (argument.id >> 52 & 15)
                (ctypes.c_uint8 * size).from_address(argument.addr)[:] = list(
                    (vcpu.register(argument.id) & (1 << 8 * size) - 1).to_bytes(size, "little")
                )
            case "KVM_SET_ONE_REG":
                size = 1 << (argument.id >> 52 & 15)
                told = bytes((ctypes.c_uint8 * size).from_address(argument.addr))
                vcpu.register(argument.id, int.from_bytes(told, "little"))
            case "KVM_SET_GUEST_DEBUG":
                if vcpu.vm.kept:
                    raise FailedError(errno.EPERM)
            case "KVM_GET_MP_STATE":
                argument.mp_state = vcpu.state
            case "KVM_SET_MP_STATE":
                vcpu.set_state(MpState(argument.mp_state))
            case "KVM_SET_VCPU_EVENTS":
                vcpu.take_events(argument)
        return 0


def _file() -> int:
    number = os.memfd_create("kvm")
    os.ftruncate(number, RUN_AREA)
    return number
