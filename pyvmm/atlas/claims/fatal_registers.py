# SPDX-License-Identifier: Apache-2.0
"""Claims about who keeps a vCPU's registers and answers its PSCI calls: the host's kernel, or EL2.

Up to Linux 7.3 the host's kernel does, for every VM. By the document of 7.4 EL2 does for a protected VM, and never lets
the host at them once the vCPU has run. A claim says what holds in either case. It asks the kernel which case it is, by
KVM_GET_ONE_REG of a vCPU that has run. No kernel with the second case has been run yet.
"""

from __future__ import annotations

import time
from ctypes import c_int64
from functools import partial
from typing import TYPE_CHECKING

from pyvmm.atlas.claim import group
from pyvmm.experiment import PATIENCE, Experiment, raw
from pyvmm.experiment.host.bare import BASE, POWER_OFF, Bare, Program, call, move, tell
from pyvmm.uapi import kvm_cap as cap
from pyvmm.uapi.kvm import KVM_VM_TYPE_ARM_PROTECTED
from pyvmm.uapi.kvm_arm64 import KVM_ARM_VCPU_PMU_V3, KVM_ARM_VCPU_SVE, core_reg
from pyvmm.uapi.kvm_arm64_vcpu import KVM_SET_VCPU_EVENTS, kvm_vcpu_events
from pyvmm.uapi.kvm_run import SystemEvent
from pyvmm.uapi.kvm_state import MpState
from pyvmm.uapi.psci import (
    PSCI_0_2_FN64_AFFINITY_INFO,
    PSCI_0_2_FN64_CPU_ON,
    PSCI_0_2_FN_PSCI_VERSION,
    PSCI_0_2_FN_SYSTEM_RESET,
    PSCI_1_1_FN64_SYSTEM_RESET2,
    PSCI_1_1_RESET_TYPE_VENDOR_START,
    PSCI_RET_INVALID_PARAMS,
    PSCI_RET_NOT_SUPPORTED,
    PSCI_RET_SUCCESS,
    PSCI_VERSION,
)

if TYPE_CHECKING:
    from pyvmm.kvm.vcpu import Vcpu

claim = group("fatal")
either = partial(claim, none="memfd", pkvm="memfd", origin="Documentation/virt/kvm/arm/pkvm.rst of Linux 7.4-rc1")

TRNG_VERSION = 0x8400_0050
TRNG_1_0 = 1 << 16
"""include/linux/arm-smccc.h"""
SECRET = 0x5EC2_E75E_C2E7
TOLD = 0x1234_5678
PC, X0, X1, X2, X5 = (core_reg(name) for name in ("pc", "x0", "x1", "x2", "x5"))


@either()
def registers_are_open_or_kept(x: Experiment) -> None:
    """After a vCPU's first run the VMM can read and set its registers, or EL2 keeps them and both calls are EPERM."""
    vcpu = _ran(x).vcpu
    kept = _are_kept(x, vcpu)
    x.check("KVM_SET_ONE_REG of x1", raw.answer(partial(vcpu.set_reg, X1, TOLD)), _due(kept))
    if not kept:
        x.check("x1 is then", vcpu.get_reg(X1), TOLD)


@either()
def a_guest_begins_with_its_pc_and_x0(x: Experiment) -> None:
    """A guest begins with the pc and x0 that the VMM set, and with its other registers only where those stay open."""
    kept = _are_kept(x)
    bare = _bare(x, tell(0) + tell(5) + POWER_OFF)
    bare.vcpu.set_reg(X0, TOLD)
    bare.vcpu.set_reg(X5, SECRET)
    x.check("the guest's x0", _reported(bare), TOLD)
    x.check("its x5", _reported(bare), 0 if kept else SECRET)


@either()
def a_vcpu_that_has_run_starts_over_if_its_registers_are_open(x: Experiment) -> None:
    """KVM_ARM_VCPU_INIT of a vCPU that has run starts it over, or is EPERM where EL2 keeps its registers."""
    vcpu = _ran(x).vcpu
    x.check("KVM_ARM_VCPU_INIT", raw.answer(vcpu.init), _due(_are_kept(x, vcpu)))


@either()
def a_vcpu_that_el2_keeps_needs_psci_and_has_no_sve_and_no_pmu(x: Experiment) -> None:
    """KVM_ARM_VCPU_INIT without PSCI_0_2, with SVE or with a PMU is EINVAL where EL2 keeps the registers."""
    kept = _are_kept(x)
    without = raw.answer(partial(_uninitialised(x).init, psci=False))
    x.check("without PSCI_0_2", without, "EINVAL" if kept else "ok")
    for name, feature in (("SVE", KVM_ARM_VCPU_SVE), ("a PMU", KVM_ARM_VCPU_PMU_V3)):
        said = raw.answer(partial(_uninitialised(x).init, features=[feature]))
        if kept:
            x.check(f"with {name}", said, "EINVAL")
        else:
            x.tell(f"with {name}", said)


@either()
def a_guest_is_debugged_if_its_registers_are_open(x: Experiment) -> None:
    """KVM_SET_GUEST_DEBUG works, or is EPERM and not told as a capability of the VM where EL2 keeps the registers."""
    bare = _ran(x)
    kept = _are_kept(x, bare.vcpu)
    x.check("KVM_SET_GUEST_DEBUG of a vCPU that has run", raw.answer(partial(bare.vcpu.single_step, False)), _due(kept))
    fresh = _bare(x).vcpu
    x.check("of one that has not", raw.answer(partial(fresh.single_step, False)), _due(kept))
    told = bare.vm.check(cap.KVM_CAP_SET_GUEST_DEBUG) > 0
    if kept:
        x.check("KVM_CAP_SET_GUEST_DEBUG, asked of the VM", told, False)
    else:
        x.tell("KVM_CAP_SET_GUEST_DEBUG, asked of the VM", told)


@either()
def an_abort_is_injected_if_registers_are_open(x: Experiment) -> None:
    """The VMM can make an SError pending, and an external abort, or that is EPERM where EL2 keeps the registers."""
    vcpu = _ran(x).vcpu
    kept = _are_kept(x, vcpu)
    for name, due in (("serror_pending", "ok"), ("ext_dabt_pending", _due(kept))):
        events = kvm_vcpu_events()
        setattr(events.exception, name, 1)
        x.check(f"KVM_SET_VCPU_EVENTS with {name}", raw.answer(partial(vcpu.call, KVM_SET_VCPU_EVENTS, events)), due)


@either()
def one_vcpu_begins_where_el2_keeps_registers(x: Experiment) -> None:
    """A VM of two vCPUs that could both run runs, or is refused its first run where EL2 keeps the registers."""
    kept = _are_kept(x)
    bare = _bare(x, POWER_OFF, cpus=2)
    bare.vcpus[1].init()
    said = bare.run()
    x.tell("KVM_RUN of the first", said)
    x.check("it is refused", said != "off", kept)


@either()
def psci_is_answered_by_who_keeps_the_registers(x: Experiment) -> None:
    """Where EL2 keeps the registers, PSCI is version 1.1 without a TRNG; else the kernel answers, and has a TRNG."""
    kept = _are_kept(x)
    bare = _bare(x, call(PSCI_0_2_FN_PSCI_VERSION) + tell(0) + call(TRNG_VERSION) + tell(0) + POWER_OFF)
    version = _reported(bare)
    if kept:
        x.check("PSCI_VERSION", version, PSCI_VERSION(1, 1))
    else:
        x.tell("PSCI_VERSION", version)
    x.check("TRNG_VERSION", _reported(bare), PSCI_RET_NOT_SUPPORTED if kept else TRNG_1_0)


@either()
def a_vcpu_that_never_ran_is_switched_on_by_the_kernel_alone(x: Experiment) -> None:
    """CPU_ON of a vCPU that has never called KVM_RUN succeeds, or is INVALID_PARAMETERS where EL2 answers it."""
    kept = _are_kept(x)
    bare = _bare(x, call(PSCI_0_2_FN64_CPU_ON, 1, BASE) + tell(0) + POWER_OFF, cpus=2)
    x.check("CPU_ON", _reported(bare), PSCI_RET_INVALID_PARAMS if kept else PSCI_RET_SUCCESS)


@either()
def a_power_off_and_resets_reach_the_vmm(x: Experiment) -> None:
    """SYSTEM_OFF, SYSTEM_RESET and SYSTEM_RESET2 are system events, and the last one's arguments are open or EPERM."""
    for name, program, event in (
        ("SYSTEM_OFF", POWER_OFF, SystemEvent.KVM_SYSTEM_EVENT_SHUTDOWN),
        ("SYSTEM_RESET", call(PSCI_0_2_FN_SYSTEM_RESET), SystemEvent.KVM_SYSTEM_EVENT_RESET),
    ):
        bare = _bare(x, program)
        x.check(f"{name} leaves KVM_RUN with a system event", bare.run(), "off")
        x.check("of type", bare.vcpu.run.system_event.type, event.value)
    kind, cookie = PSCI_1_1_RESET_TYPE_VENDOR_START | 1, 0x77
    bare = _bare(x, call(PSCI_1_1_FN64_SYSTEM_RESET2, kind, cookie))
    x.check("SYSTEM_RESET2 leaves KVM_RUN with a system event", bare.run(), "off")
    x.check("of type", bare.vcpu.run.system_event.type, SystemEvent.KVM_SYSTEM_EVENT_RESET.value)
    kept = _are_kept(x, bare.vcpu)
    for name, register, value in (("its type", X1, kind), ("its cookie", X2, cookie)):
        x.check(f"KVM_GET_ONE_REG of {name}", raw.answer(partial(bare.vcpu.get_reg, register)), _due(kept))
        if not kept:
            x.check(f"{name} is then", bare.vcpu.get_reg(register), value)


@either(cpus=2)
def a_vcpu_that_its_guest_switched_off_stays_off_at_el2(x: Experiment) -> None:
    """The VMM can stop and resume a vCPU by its state, and one that the guest switched off unless EL2 answers PSCI."""
    [other] = x.others()
    other.cpu_off()
    until = time.monotonic() + PATIENCE
    while x.guest.hvc(PSCI_0_2_FN64_AFFINITY_INFO, 1).status != 1:
        if time.monotonic() > until:
            x.cannot("AFFINITY_INFO never tells that the second vCPU is off")
    kept = _are_kept(x)
    x.machine.pause()
    try:
        first, second = x.machine.vcpus
        for state in (MpState.KVM_MP_STATE_STOPPED, MpState.KVM_MP_STATE_RUNNABLE):
            said = raw.answer(partial(_set_state, first, state))
            x.check(f"KVM_SET_MP_STATE of the vCPU that runs, {state.name.removeprefix('KVM_MP_STATE_')}", said, "ok")
        due = MpState.KVM_MP_STATE_UNINITIALIZED if kept else MpState.KVM_MP_STATE_STOPPED
        x.check("KVM_GET_MP_STATE of the one that is off", second.mp_state.name, due.name)
        said = raw.answer(partial(_set_state, second, MpState.KVM_MP_STATE_RUNNABLE))
        x.check("KVM_SET_MP_STATE of it, RUNNABLE", said, _due(kept))
        if not kept:
            second.mp_state = MpState.KVM_MP_STATE_STOPPED  # it has nothing to go on with
    finally:
        x.machine.resume()
    x.guest.ping()


@either()
def a_store_to_no_memory_shows_the_stored_register(x: Experiment) -> None:
    """A store to no memory tells the VMM the stored register, and other registers only where they are open."""
    bare = _bare(x, move(5, SECRET) + move(6, TOLD) + tell(6) + POWER_OFF)
    x.check("the store tells", _reported(bare), TOLD)
    kept = _are_kept(x, bare.vcpu)
    x.check("KVM_GET_ONE_REG of another", raw.answer(partial(bare.vcpu.get_reg, X5)), _due(kept))
    if not kept:
        x.check("it is", bare.vcpu.get_reg(X5), SECRET)


@claim(pkvm="memfd", origin="Documentation/virt/kvm/arm/pkvm.rst of Linux 7.4-rc1")
def a_vm_tells_its_capabilities_where_el2_keeps_registers(x: Experiment) -> None:
    """A protected VM's descriptor tells what works on it where EL2 keeps its registers, and denies it where not."""
    kept = _are_kept(x)
    vm = _bare(x).vm
    for name in ("IMMEDIATE_EXIT", "IOEVENTFD"):
        x.check(f"KVM_CAP_{name}, asked of the VM", vm.check(getattr(cap, f"KVM_CAP_{name}")) > 0, kept)
        x.tell(f"KVM_CAP_{name}, asked of /dev/kvm", x.machine.system.check(getattr(cap, f"KVM_CAP_{name}")) > 0)


def _are_kept(x: Experiment, vcpu: Vcpu | None = None) -> bool:
    """Ask the kernel whether EL2 keeps the registers of a vCPU that has run: this one, or that of a VM made for it."""
    said = raw.answer(lambda: (vcpu or _ran(x).vcpu).pc)
    x.tell("KVM_GET_ONE_REG of the pc of a vCPU that has run", said)
    if said not in ("ok", "EPERM"):
        x.cannot(f"KVM_GET_ONE_REG of a vCPU that has run answers {said}, not ok or EPERM")
    return said == "EPERM"


def _due(kept: bool) -> str:
    """Return the answer to a call that is refused where EL2 keeps the registers."""
    return "EPERM" if kept else "ok"


def _bare(x: Experiment, program: Program = POWER_OFF, *, cpus: int = 1) -> Bare:
    """Make a small VM of the experiment's kind."""
    return x.stack.enter_context(Bare(x.protection, program=program, cpus=cpus))


def _uninitialised(x: Experiment) -> Vcpu:
    """Make a vCPU of a VM of the experiment's kind, whose features are still to be chosen."""
    kind = KVM_VM_TYPE_ARM_PROTECTED if x.protection.by_hypervisor else 0
    return x.stack.enter_context(x.machine.system.create_vm(kind)).create_vcpu(0)


def _ran(x: Experiment) -> Bare:
    """Make one whose guest has run and powered off."""
    bare = _bare(x)
    if (said := bare.run()) != "off":
        x.cannot(f"a guest that powers off at once ends with {said}")
    return bare


def _reported(bare: Bare) -> int | str:
    """Run to the guest's next report and return the value, signed; or what KVM_RUN answered instead."""
    said = bare.run()
    if said != "exit 6":
        return said
    return c_int64(int.from_bytes(bytes(bare.vcpu.run.mmio.data), "little")).value


def _set_state(vcpu: Vcpu, state: MpState) -> None:
    vcpu.mp_state = state
