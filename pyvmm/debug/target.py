# SPDX-License-Identifier: Apache-2.0
"""A machine as a debugger's target: stop and resume its vCPUs, access registers, and memory by virtual address.

Owns no descriptor and no thread. Only the debugger's thread calls it, except for :meth:`GuestTarget.intercept`, which
runs in the vCPUs' threads. From :meth:`halt` to :meth:`resume` the debugger holds one pause of each vCPU's thread.
While it holds all of them, it also holds the guest's time (see :mod:`pyvmm.machine.clock`). Other pauses, such as the
control socket's, nest with it. Devices keep running while vCPUs are stopped.

Linux 7.3 allows a debugger the same in every protection, including registers of a protected guest: EL2 takes them from
the host at every entry. Memory differs: the debugger can access only pages that the host can. A later kernel keeps a
protected guest's registers at EL2, and lets nobody debug it. A :class:`GuestTarget` asks the kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pyvmm._native import lib
from pyvmm.debug.breakpoints import REASON, Breakpoints, Kind
from pyvmm.debug.errors import EFAULT, EINVAL, Refused
from pyvmm.debug.exception import enter_el1
from pyvmm.debug.interrupts import HeldInterrupts
from pyvmm.debug.protocol import SIGSEGV, SIGTRAP, Go, Stop
from pyvmm.debug.registers import REGISTERS, SYSTEM
from pyvmm.debug.stage1 import REGIME, Regime, Translation, Untranslated, translate
from pyvmm.errors import GuestMemoryError, HostError, KvmError, PyvmmError, hex_
from pyvmm.log import get_logger
from pyvmm.pages import HOST_PAGE
from pyvmm.uapi.kvm import KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP
from pyvmm.uapi.kvm_arm64 import KVM_GUESTDBG_USE_HW, core_reg
from pyvmm.uapi.kvm_cap import KVM_CAP_GUEST_DEBUG_HW_BPS, KVM_CAP_GUEST_DEBUG_HW_WPS, KVM_CAP_SET_GUEST_DEBUG
from pyvmm.uapi.kvm_run import ExitReason
from pyvmm.uapi.kvm_state import MpState

if TYPE_CHECKING:
    from pyvmm._native import pv_vcpu
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.machine.machine import Machine
    from pyvmm.vcpu.thread import VcpuThread

log = get_logger("gdb")

_ELSEWHERE: Final = "debug it under --protection emulated or none"
_EC_SHIFT: Final = 26
_EC_WATCHPOINT: Final = 0x34
_EC_BRK: Final = 0x3C
_EL1H: Final = 0b0101
_MODE: Final = 0b1111
_CPSR: Final = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class _Exit:
    """Why a vCPU stopped: a KVM_EXIT_DEBUG with the CPU's details, or (SIGSEGV) a failed KVM_RUN."""

    index: int
    signal: int
    syndrome: int = 0
    address: int = 0


def _require_debugging(machine: Machine) -> None:
    """Ask the kernel whether it lets somebody debug ``machine``. Only the call itself tells: 7.3 denies what works."""
    guest = f"a guest under {machine.config.protection.value}"
    hint = _ELSEWHERE if machine.config.protection.by_hypervisor else None
    if not machine.vm.offers(KVM_CAP_SET_GUEST_DEBUG):
        raise HostError(f"--gdb: this kernel cannot debug {guest} (KVM_CAP_SET_GUEST_DEBUG is 0)", hint=hint)
    try:
        machine.vcpus[0].set_guest_debug(0)
    except KvmError as error:
        raise HostError(f"--gdb: this kernel does not let {guest} be debugged: {error.message}", hint=hint) from None


class GuestTarget:
    """A machine, built and not started. A vCPU's thread calls ``wake`` when the vCPU has stopped.

    Raises HostError, with the reason, if the kernel lets nobody debug this guest.
    """

    def __init__(self, machine: Machine, wake: Callable[[], None]) -> None:
        _require_debugging(machine)
        self.machine = machine
        self._wake = wake
        self._lock = threading.Lock()
        self._exits: list[_Exit] = []
        self._halted: set[int] = set()
        self._stepping: set[int] = set()
        self._debugging: set[int] = set()
        self._failed: set[int] = set()
        self.watched = False
        """Whether a debugger is attached."""
        # Asked for here, before another thread can make a pause: the machine makes its clock when it is first asked.
        self.clock = machine.clock
        """The guest's time."""
        self._holds_time = False
        self._interrupts = HeldInterrupts(machine.gic)
        self._tell_refusal = log.warning if machine.config.protection.isolates else log.info
        self.last_refusal: str | None = None
        """The text of the last failed request for memory or a breakpoint."""
        offers = machine.vm.offers
        self.points = Breakpoints(offers(KVM_CAP_GUEST_DEBUG_HW_BPS), offers(KVM_CAP_GUEST_DEBUG_HW_WPS))
        self.physical = False
        """Whether the debugger's addresses are guest physical ones."""

    # -- the vCPUs' threads

    def intercept(self, stop: int, native: pv_vcpu) -> bool | None:
        """Stop a vCPU at a debug exit (see :data:`pyvmm.vcpu.cold.Intercept`), until the debugger lets it go on."""
        index = native.index
        if stop == lib.PV_STOP_FAILED and self.watched and index not in self._failed:
            # Let the debugger inspect it. When resumed it fails again, unless the cause was fixed.
            self._failed.add(index)
            return self._hold(_Exit(index, SIGSEGV))
        if stop != lib.PV_STOP_DEBUG:
            return None
        vcpu = self.machine.vcpus[index]
        told = vcpu.run.debug_arm64
        if told.hsr >> _EC_SHIFT == _EC_BRK:
            # KVM intercepts every BRK of a debugged guest. None of them is ours.
            enter_el1(vcpu, told.hsr)
            return True
        return self._hold(_Exit(index, SIGTRAP, told.hsr, told.far))

    def _hold(self, exit: _Exit) -> bool:
        with self._lock:
            self._exits.append(exit)
        self._threads[exit.index].pause()
        self._wake()
        return True

    # -- stopping and resuming

    def halt(self) -> None:
        """Stop every running vCPU, and return when all are out of the guest."""
        threads = self._threads
        going = [index for index in range(len(threads)) if index not in self._halted]
        for index in going:
            threads[index].pause()
        for index in going:
            threads[index].wait_paused()
            self._settle(index)
        self._halted.update(going)
        if not self._holds_time:
            self._holds_time = True
            self.clock.stop()

    @property
    def has_stopped(self) -> bool:
        """Whether a vCPU has an unreported debug exit."""
        with self._lock:
            return bool(self._exits)

    def take_stop(self) -> Stop | None:
        """Halt the guest and return why it stopped, or None if no vCPU has a debug exit."""
        self.halt()
        self._interrupts.give_back()
        with self._lock:
            exits, self._exits = self._exits, []
        for each in exits:
            self._threads[each.index].resume()  # release its own pause; that of halt() remains
        # Unreported exits occur again, unless their breakpoint is removed.
        exits.sort(key=lambda each: each.index not in self._stepping)
        self._stepping.clear()
        return self._reason(exits[0]) if exits else None

    def resume(self, actions: Mapping[int, Go]) -> None:
        """Let vCPUs go on."""
        chosen = {thread - 1: go for thread, go in actions.items()}
        for index, go in chosen.items():
            self._debug(index, step=go is Go.STEP)
        self._stepping = {index for index, go in chosen.items() if go is Go.STEP}
        for index in self._stepping:
            self._interrupts.hold(self.machine.vcpus[index])
        if chosen:
            self._let_time_go()
        for index in chosen:
            self._halted.discard(index)
            self._threads[index].resume()

    def detach(self) -> None:
        """Drop every breakpoint and resume all vCPUs, even if KVM reports errors."""
        self.take_stop()
        self.watched = False
        self.points.clear()
        self.physical = False
        halted, self._halted = self._halted, set()
        for index in sorted(halted):
            try:
                self._debug(index, step=False)
            except Refused as refused:
                log.warning("still_debugged", vcpu=index, why=refused.why)
        self._let_time_go()
        for index in sorted(halted):
            self._threads[index].resume()

    def kill(self) -> None:
        """End the run."""
        self.machine.stop("killed by the debugger")

    # -- threads

    def threads(self) -> Sequence[int]:
        """Return a number for each vCPU, from 1."""
        return range(1, len(self.machine.vcpus) + 1)

    def describe(self, thread: int) -> str:
        """Return the vCPU's name, and whether it is off."""
        vcpu = self._vcpu(thread)
        off = vcpu.mp_state is MpState.KVM_MP_STATE_STOPPED
        return f"vCPU {vcpu.index}{' (off)' if off else ''}"

    # -- registers

    def read_register(self, thread: int, number: int) -> bytes:
        """Return a register."""
        register, vcpu = REGISTERS[number], self._vcpu(thread)
        value: int = _checked(lambda: vcpu.get_reg(_register_id(vcpu, register.name)))
        return (value & (1 << 8 * register.size) - 1).to_bytes(register.size, "little")

    def write_register(self, thread: int, number: int, value: bytes) -> None:
        """Set a register. KVM refuses an invalid cpsr."""
        register, vcpu = REGISTERS[number], self._vcpu(thread)
        new = int.from_bytes(value, "little")
        if register.name == "cpsr":
            new |= vcpu.get_reg(core_reg("pstate")) & ~_CPSR
        _checked(lambda: vcpu.set_reg(_register_id(vcpu, register.name), new))

    # -- memory

    def read_memory(self, thread: int, address: int, size: int) -> bytes:
        """Return the readable bytes, in one piece from ``address``."""
        data = bytearray()
        while len(data) < size:
            try:
                gpa, room = self._place(thread, address + len(data))
                data += self.machine.memory.read(gpa, min(size - len(data), room))
            except (Refused, PyvmmError) as error:
                if not data:
                    raise self._noted(error) from None
                break
        return bytes(data)

    def write_memory(self, thread: int, address: int, data: bytes) -> None:
        """Write all bytes, or up to the page that fails."""
        while data:
            try:
                gpa, room = self._place(thread, address)
                self.machine.memory.write(gpa, data[:room])
            except (Refused, PyvmmError) as error:
                raise self._noted(error) from None
            data = data[room:]
            address += room

    def translate(self, thread: int, address: int) -> Translation:
        """Translate an address by the guest's own tables. Raises Refused without a translation."""
        vcpu, memory = self._vcpu(thread), self.machine.memory
        regime = Regime(*(vcpu.get_reg(SYSTEM[name]) for name in REGIME))

        def read64(gpa: int) -> int:
            try:
                return int.from_bytes(memory.read(gpa, 8), "little")
            except PyvmmError:
                raise Refused(
                    EFAULT,
                    f"{hex_(address)} cannot be translated: the guest's table at gpa {hex_(gpa)} "
                    f"is {memory.describe(gpa)}; `monitor phys on` takes addresses as guest "
                    "physical",
                ) from None

        try:
            return translate(address, regime, read64)
        except Untranslated as why:
            raise Refused(EFAULT, str(why)) from None

    # -- breakpoints

    def insert(self, kind: Kind, address: int, length: int) -> None:
        """Set one. The CPU gets it when the guest resumes."""
        try:
            self.points.insert(kind, address, length)
        except Refused as refused:
            log.warning("breakpoint_refused", why=refused.why)
            self.last_refusal = refused.why
            raise

    def remove(self, kind: Kind, address: int, length: int) -> None:
        """Take one away."""
        self.points.remove(kind, address, length)

    # -- inside

    def _let_time_go(self) -> None:
        if self._holds_time:
            self._holds_time = False
            self.clock.go()

    @property
    def _threads(self) -> Sequence[VcpuThread]:
        return self.machine.threads

    def _vcpu(self, thread: int) -> Vcpu:
        return self.machine.vcpus[thread - 1]

    def _settle(self, index: int) -> None:
        """Have KVM finish an access to a device, so that registers are at an instruction boundary."""
        native = self.machine.natives[index]
        if native.exit_reason == ExitReason.KVM_EXIT_MMIO and (errno := lib.pv_settle(native)):
            log.warning("access_not_finished", vcpu=index, errno=errno)

    def _debug(self, index: int, *, step: bool) -> None:
        wanted = KVM_GUESTDBG_SINGLESTEP if step else 0
        wanted |= KVM_GUESTDBG_USE_HW if self.points else 0
        if not wanted and index not in self._debugging:
            return
        control = wanted | KVM_GUESTDBG_ENABLE if wanted else 0
        vcpu = self.machine.vcpus[index]
        _checked(lambda: vcpu.set_guest_debug(control, self.points.registers()))
        (self._debugging.add if wanted else self._debugging.discard)(index)

    def _reason(self, told: _Exit) -> Stop:
        thread = told.index + 1
        if told.signal != SIGTRAP:
            return Stop(thread, told.signal)
        if told.syndrome >> _EC_SHIFT == _EC_WATCHPOINT:
            if hit := self.points.watching(told.address):
                return Stop(thread, reason=f"{REASON[hit[0]]}:{hit[1]:x}")
        elif (kind := self.points.at(self._vcpu(thread).pc)) is not None:
            return Stop(thread, reason=f"{REASON[kind]}:")
        return Stop(thread)

    def _place(self, thread: int, address: int) -> tuple[int, int]:
        """Return an address's gpa, and the number of bytes up to the end of its page."""
        if address >> 64:
            raise Refused(EFAULT, "beyond the last address")
        gpa = address if self.physical else self.translate(thread, address).gpa
        return gpa, HOST_PAGE - gpa % HOST_PAGE

    def _noted(self, error: Refused | PyvmmError) -> Refused:
        """Return the debugger's error. The text goes to the log, because the protocol has no room for it."""
        if isinstance(error, GuestMemoryError):
            error = Refused(
                EFAULT,
                f"the page at gpa {hex_(error.gpa)} is {error.state}; a debugger needs the host's access",
            )
        elif isinstance(error, PyvmmError):
            error = Refused(EFAULT, error.message)
        self.last_refusal = error.why
        # A debugger reads wherever a register points, so log it only once.
        tell, self._tell_refusal = self._tell_refusal, log.info
        tell("refused_the_debugger", why=error.why, more="monitor info")
        return error


def _checked(do: Callable[[], Any]) -> Any:
    try:
        return do()
    except PyvmmError as error:
        raise Refused(EINVAL, error.message) from None


def _register_id(vcpu: Vcpu, name: str) -> int:
    if name in SYSTEM:
        return SYSTEM[name]
    if name == "sp" and vcpu.get_reg(core_reg("pstate")) & _MODE == _EL1H:
        return core_reg("sp_el1")
    return core_reg("pstate" if name == "cpsr" else name)
