# SPDX-License-Identifier: Apache-2.0
"""A virtual CPU: its registers, its state, and its run area. Made by Vm.create_vcpu.

KVM_RUN is not here: the native loop issues it, on :meth:`Vcpu.fileno` and :attr:`Vcpu.run_address`. Access registers
while the vCPU is outside of KVM_RUN; otherwise the kernel makes the calling thread wait.
"""

from __future__ import annotations

import errno as _errno
import os
from ctypes import addressof, c_uint8, c_uint64

from pyvmm.errors import HostError, KvmError, PyvmmError, hex_
from pyvmm.kvm import libc
from pyvmm.kvm.stats import MeasuredFd
from pyvmm.uapi import kvm_arm64
from pyvmm.uapi.kvm import (
    KVM_GET_ONE_REG,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_REG_SIZE,
    KVM_SET_ONE_REG,
    kvm_one_reg,
)
from pyvmm.uapi.kvm_arm64 import core_reg
from pyvmm.uapi.layout import with_tail
from pyvmm.uapi.mman import MAP_SHARED, PROT_READ, PROT_WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.kvm.vm import Vm
    from pyvmm.uapi import kvm_arm64_vcpu
    from pyvmm.uapi.kvm_run import kvm_run
    from pyvmm.uapi.kvm_state import MpState

_X86 = os.uname().machine == "x86_64"

if TYPE_CHECKING or _X86:
    from pyvmm.uapi import kvm_x86


ID_AA64MMFR0_EL1 = kvm_arm64.ARM64_SYS_REG(3, 0, 0, 7, 0)
"""The register that has the sizes of pages."""


class Vcpu(MeasuredFd):
    """A vCPU. It owns the mapping of its run area, and unmaps it on close."""

    kind = "vcpu"

    def __init__(self, fd: int, vm: Vm, index: int) -> None:
        super().__init__(fd, vm)
        self.vm = vm
        self.index = index
        self.label = f"vcpu{index}={fd}"
        self._run_size = 0
        try:
            size = vm.system.vcpu_mmap_size
            self._address, errno = libc.mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
            if errno:
                raise self.error("mmap", errno, size=size)
            self._run_size = size
        except BaseException:
            self.close()
            raise

    def _release(self) -> None:
        size, self._run_size = self._run_size, 0
        if size and (errno := libc.munmap(self._address, size)):
            raise self.error("munmap", errno, address=self._address, size=size)

    @property
    def run_address(self) -> int:
        """The address of ``struct kvm_run``. Do not use it after close."""
        if not self._run_size:
            raise PyvmmError(f"the run area of {self.label} is unmapped: the vCPU is closed")
        return self._address

    @property
    def run(self) -> kvm_run:
        """A view of ``struct kvm_run``. Do not keep it after close."""
        from pyvmm.uapi.kvm_run import kvm_run  # few runs need these structures: the native loop has its own

        return kvm_run.from_address(self.run_address)

    # ---- arm64 ----

    def init(self, *, psci: bool = True, power_off: bool = False, features: Iterable[int] = ()) -> None:
        """Set an arm64 vCPU's target and features (KVM_ARM_VCPU_* numbers). A second call resets it, where allowed.

        ``psci``: it can call PSCI 0.2 and later. ``power_off``: it waits for another vCPU's CPU_ON.
        """
        target = self.vm.preferred_target()
        wanted = set(features)
        wanted |= {kvm_arm64.KVM_ARM_VCPU_PSCI_0_2} if psci else set()
        wanted |= {kvm_arm64.KVM_ARM_VCPU_POWER_OFF} if power_off else set()
        for feature in wanted:
            target.features[feature // 32] |= 1 << feature % 32
        said = "+".join(map(str, sorted(wanted))) or "none"
        self.call(kvm_arm64.KVM_ARM_VCPU_INIT, target, target=target.target, features=said)

    def inject_abort(self) -> None:
        """Fail the vCPU's current access in the guest, with a synchronous external abort.

        Raises KvmError with EPERM where EL2 takes none for a protected guest.
        """
        if _X86:  # there the request has the same number, but another structure
            raise HostError(f"{self.label} is an x86 vCPU: it has no external abort to inject")
        from pyvmm.uapi.kvm_arm64_vcpu import KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, kvm_vcpu_events

        events = kvm_vcpu_events()
        self.call(KVM_GET_VCPU_EVENTS, events)
        events.exception.ext_dabt_pending = 1
        self.call(KVM_SET_VCPU_EVENTS, events, ext_dabt_pending=1)

    # ---- either architecture ----

    def get_reg(self, id: int) -> int:
        """Return the register with a ONE_REG id, such as ``kvm_arm64.core_reg("pc")``; its size is in the id."""
        room = (c_uint8 * KVM_REG_SIZE(id))()
        self.call(KVM_GET_ONE_REG, kvm_one_reg(id=id, addr=addressof(room)), id=id)
        return int.from_bytes(bytes(room), "little")

    def set_reg(self, id: int, value: int) -> None:
        """Set the register with a ONE_REG id. Raises OverflowError if ``value`` is negative or too large."""
        room = (c_uint8 * KVM_REG_SIZE(id)).from_buffer_copy(value.to_bytes(KVM_REG_SIZE(id), "little"))
        self.call(KVM_SET_ONE_REG, kvm_one_reg(id=id, addr=addressof(room)), id=id, value=value)

    def reg_list(self) -> list[int]:
        """Return the id of every register that the kernel saves and restores here."""
        from pyvmm.uapi.kvm_state import KVM_GET_REG_LIST, kvm_reg_list

        probe = kvm_reg_list()
        _, errno = self.attempt(KVM_GET_REG_LIST, probe)
        if errno not in (0, _errno.E2BIG):
            raise self.error(KVM_GET_REG_LIST.name, errno)
        argument = with_tail(kvm_reg_list, "reg", [0] * probe.n, c_uint64)
        argument.n = probe.n
        self.call(KVM_GET_REG_LIST, argument, n=probe.n)
        return list(argument.reg)

    @property
    def pc(self) -> int:
        """The address of the next instruction."""
        return self.get_regs().rip if _X86 else self.get_reg(core_reg("pc"))

    @property
    def place(self) -> str:
        """Where it is, in words, for a message: ``pc 0x8000_0000``, or that the kernel does not tell.

        A kernel that keeps a protected vCPU's registers at EL2 tells none once the vCPU has run.
        """
        try:
            return f"pc {hex_(self.pc)}"
        except KvmError:
            return "a pc that the kernel does not tell"

    @property
    def mp_state(self) -> MpState:
        """The vCPU's state: running, or waiting for an event."""
        from pyvmm.uapi.kvm_state import KVM_GET_MP_STATE, MpState, kvm_mp_state

        state = kvm_mp_state()
        self.call(KVM_GET_MP_STATE, state)
        return MpState(state.mp_state)

    @mp_state.setter
    def mp_state(self, state: MpState) -> None:
        from pyvmm.uapi.kvm_state import KVM_SET_MP_STATE, kvm_mp_state

        self.call(KVM_SET_MP_STATE, kvm_mp_state(mp_state=state), mp_state=state)

    def set_guest_debug(
        self,
        control: int,
        registers: kvm_arm64_vcpu.kvm_guest_debug_arch | kvm_x86.kvm_guest_debug_arch | None = None,
    ) -> None:
        """Debug the guest: ``control`` is KVM_GUESTDBG_*, ``registers`` this architecture's breakpoints. 0 ends it."""
        if _X86:
            x86 = kvm_x86.kvm_guest_debug(control=control)
            if isinstance(registers, kvm_x86.kvm_guest_debug_arch):
                x86.arch = registers
            self.call(kvm_x86.KVM_SET_GUEST_DEBUG, x86, control=control)
        else:
            from pyvmm.uapi import kvm_arm64_vcpu

            arm64 = kvm_arm64_vcpu.kvm_guest_debug(control=control)
            if isinstance(registers, kvm_arm64_vcpu.kvm_guest_debug_arch):
                arm64.arch = registers
            self.call(kvm_arm64_vcpu.KVM_SET_GUEST_DEBUG, arm64, control=control)

    def single_step(self, on: bool) -> None:
        """Turn KVM_EXIT_DEBUG after every instruction on or off. Protected VMs may refuse it."""
        self.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP if on else 0)

    # ---- x86 ----

    def get_regs(self) -> kvm_x86.kvm_regs:
        """Return an x86 vCPU's general registers."""
        regs = kvm_x86.kvm_regs()
        self.call(kvm_x86.KVM_GET_REGS, regs)
        return regs

    def set_regs(self, regs: kvm_x86.kvm_regs) -> None:
        """Set an x86 vCPU's general registers."""
        self.call(kvm_x86.KVM_SET_REGS, regs, rip=hex(regs.rip))

    def get_sregs(self) -> kvm_x86.kvm_sregs:
        """Return an x86 vCPU's segments and control registers."""
        sregs = kvm_x86.kvm_sregs()
        self.call(kvm_x86.KVM_GET_SREGS, sregs)
        return sregs

    def set_sregs(self, sregs: kvm_x86.kvm_sregs) -> None:
        """Set an x86 vCPU's segments and control registers."""
        self.call(kvm_x86.KVM_SET_SREGS, sregs)
