# SPDX-License-Identifier: Apache-2.0
"""Claims about calls on a VM and its vCPUs that a protected VM answers differently from a plain one."""

from __future__ import annotations

import os
from collections.abc import Callable
from ctypes import Structure, addressof, c_uint64
from functools import partial

from pyvmm import abi
from pyvmm.atlas.claim import group
from pyvmm.experiment import BEYOND, Experiment, raw
from pyvmm.kvm.fd import Fd
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.memory import mman
from pyvmm.memory.backing import Memfd
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from pyvmm.uapi import kvm_cap as cap
from pyvmm.uapi.ioctl import IOW
from pyvmm.uapi.kvm import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_CHECK_EXTENSION,
    KVM_HAS_DEVICE_ATTR,
    KVM_RUN,
    KVM_VM_TYPE_ARM_PROTECTED,
    KVMIO,
    DeviceType,
    kvm_device_attr,
)
from pyvmm.uapi.kvm_arm64 import KVM_ARM_VCPU_TIMER_CTRL, KVM_ARM_VCPU_TIMER_IRQ_VTIMER, core_reg
from pyvmm.uapi.kvm_arm64_vcpu import (
    KVM_ARM_GET_REG_WRITABLE_MASKS,
    KVM_ARM_SET_COUNTER_OFFSET,
    KVM_GET_VCPU_EVENTS,
    kvm_arm_counter_offset,
    kvm_vcpu_events,
    reg_mask_range,
)
from pyvmm.uapi.kvm_memory import KVM_REGISTER_COALESCED_MMIO, kvm_coalesced_mmio_zone
from pyvmm.uapi.kvm_state import KVM_GET_STATS_FD
from pyvmm.uapi.mman import PROT_NONE

claim = group("fatal")

FILTER = "arch/arm64/kvm/arm.c and asm/kvm_pkvm.h: what is not on the list is -EINVAL for a protected VM"


class kvm_arm_device_addr(Structure):
    """asm/kvm.h"""

    _fields_ = (("id", c_uint64), ("addr", c_uint64))


KVM_ARM_SET_DEVICE_ADDR = IOW("KVM_ARM_SET_DEVICE_ADDR", KVMIO, 0xAB, kvm_arm_device_addr)
ID_REGISTER_WORDS = 3 * 8 * 8


@claim(none="memfd", pkvm="memfd", origin=FILTER)
def these_calls_are_refused(x: Experiment) -> None:
    """A VM's hypercall filter, counter offset, register masks and old device addresses are refused: EINVAL."""
    vm = _vm(x)
    masks = (c_uint64 * ID_REGISTER_WORDS)()
    ways: dict[str, Callable[[], object]] = {
        "KVM_SET_DEVICE_ATTR, KVM_ARM_VM_SMCCC_FILTER": lambda: vm.forward_smccc(abi.HVC_FEATURES, 1),
        "KVM_HAS_DEVICE_ATTR, KVM_ARM_VM_SMCCC_CTRL": lambda: vm.call(KVM_HAS_DEVICE_ATTR, kvm_device_attr()),
        "KVM_ARM_SET_COUNTER_OFFSET": lambda: vm.call(KVM_ARM_SET_COUNTER_OFFSET, kvm_arm_counter_offset()),
        "KVM_ARM_GET_REG_WRITABLE_MASKS": lambda: vm.call(
            KVM_ARM_GET_REG_WRITABLE_MASKS, reg_mask_range(addr=addressof(masks))
        ),
        "KVM_ARM_SET_DEVICE_ADDR": lambda: vm.call(KVM_ARM_SET_DEVICE_ADDR, kvm_arm_device_addr()),
    }
    for name, way in ways.items():
        x.check(name, raw.answer(way), "EINVAL")


@claim(none="memfd", pkvm="memfd", origin=FILTER)
def these_capabilities_are_refused(x: Experiment) -> None:
    """Capabilities of arm64 that change what the VMM receives or sets cannot be enabled: EINVAL."""
    for name in ("ARM_NISV_TO_USER", "ARM_SYSTEM_SUSPEND", "ARM_SEA_TO_USER", "ARM_WRITABLE_IMP_ID_REGS"):
        number = getattr(cap, f"KVM_CAP_{name}")
        x.check(f"KVM_ENABLE_CAP of {name}", raw.answer(partial(_vm(x).enable_cap, number)), "EINVAL")


@claim(none="memfd", pkvm="memfd", origin="virt/kvm/kvm_main.c: generic capabilities pass by the architecture's list")
def generic_capabilities_can_be_enabled(x: Experiment) -> None:
    """KVM's generic capabilities can be enabled, those for dirty logging too, whether a slot can be logged or not."""
    x.check("KVM_ENABLE_CAP of HALT_POLL", raw.answer(lambda: _vm(x).enable_cap(cap.KVM_CAP_HALT_POLL)), "ok")
    manual = cap.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
    x.check("of MANUAL_DIRTY_LOG_PROTECT2", raw.answer(lambda: _vm(x).enable_cap(manual, 1)), "ok")
    ring = cap.KVM_CAP_DIRTY_LOG_RING_ACQ_REL
    x.check("of DIRTY_LOG_RING_ACQ_REL", raw.answer(lambda: _vm(x).enable_cap(ring, HOST_PAGE)), "ok")


@claim(none="memfd", pkvm="memfd", origin="virt/kvm/kvm_main.c, kvm_vm_ioctl(): not filtered by the architecture")
def these_calls_work(x: Experiment) -> None:
    """Slots, guest_memfd, the GICv3 and its ITS, eventfds for doorbells, and statistics are available for any VM."""
    vm = _vm(x)
    backing, bell = x.stack.enter_context(Memfd(HOST_PAGE)), os.eventfd(0, os.EFD_CLOEXEC)
    x.stack.callback(os.close, bell)
    flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
    ways: dict[str, Callable[[], object]] = {
        "KVM_ARM_PREFERRED_TARGET": vm.preferred_target,
        "KVM_SET_USER_MEMORY_REGION": lambda: vm.set_memory(0, BEYOND, HOST_PAGE, backing.hva),
        "KVM_CREATE_GUEST_MEMFD": lambda: vm.create_guest_memfd(HOST_PAGE, flags),
        "KVM_SET_USER_MEMORY_REGION2, over one": lambda: _gmem_slot(vm, flags, backing.hva),
        "KVM_IOEVENTFD": lambda: vm.ioeventfd(bell, BEYOND + HOST_PAGE, 4),
        "KVM_REGISTER_COALESCED_MMIO": lambda: vm.call(
            KVM_REGISTER_COALESCED_MMIO, kvm_coalesced_mmio_zone(addr=BEYOND, size=HOST_PAGE)
        ),
        "KVM_CREATE_VCPU": lambda: vm.create_vcpu(0),
        "KVM_CREATE_DEVICE of a GICv3": lambda: vm.create_device(DeviceType.KVM_DEV_TYPE_ARM_VGIC_V3),
        "KVM_CREATE_DEVICE of an ITS": lambda: vm.create_device(DeviceType.KVM_DEV_TYPE_ARM_VGIC_ITS),
        "KVM_GET_STATS_FD": lambda: _stats(vm),
    }
    for name, way in ways.items():
        x.check(name, raw.answer(way), "ok")


@claim(none="memfd", pkvm="memfd", origin="arch/arm64/kvm/arm.c, kvm_arch_vcpu_ioctl(): not filtered")
def these_calls_on_a_vcpu_work(x: Experiment) -> None:
    """Registers, run state, events, debugging, timer interrupts and statistics of a vCPU are available to the VMM."""
    for name, way in _of_a_vcpu(x.machine.vcpus[0]).items():
        x.check(name, raw.answer(way), "ok")


@claim(none="memfd", pkvm="memfd", origin=f"{FILTER}, and so does KVM_CHECK_EXTENSION")
def what_works_is_told(x: Experiment) -> None:
    """KVM_CHECK_EXTENSION on the VM reports everything that works on the VM and its vCPUs."""
    vm, vcpu = x.machine.vm, x.machine.vcpus[0]
    bell = os.eventfd(0, os.EFD_CLOEXEC)
    x.stack.callback(os.close, bell)
    calls = _of_a_vcpu(vcpu)
    ways: dict[str, Callable[[], object]] = {
        "ONE_REG": calls["KVM_GET_ONE_REG"],
        "MP_STATE": calls["KVM_GET_MP_STATE"],
        "VCPU_EVENTS": calls["KVM_GET_VCPU_EVENTS"],
        "SET_GUEST_DEBUG": calls["KVM_SET_GUEST_DEBUG"],
        "VCPU_ATTRIBUTES": calls["KVM_HAS_DEVICE_ATTR of a vCPU"],
        "IOEVENTFD": lambda: vm.ioeventfd(bell, BEYOND, 4),
        "BINARY_STATS_FD": lambda: _stats(vm),
        "IMMEDIATE_EXIT": lambda: _immediate_exit(vcpu),
    }
    for name, way in ways.items():
        x.check(f"KVM_CAP_{name}, asked of the VM", _says(vm, name), raw.answer(way) == "ok")
        x.tell(f"KVM_CAP_{name}, asked of /dev/kvm", _says(x.machine.system, name))


@claim(none="memfd", pkvm="memfd", origin="arch/arm64/kvm/mmu.c, kvm_unmap_gfn_range(): nothing for a protected VM")
def sync_mmu_is_told_as_it_is(x: Experiment) -> None:
    """KVM_CAP_SYNC_MMU, checked on the VM, says whether the guest loses a page that the host makes PROT_NONE."""
    page = x.page()
    x.guest.write64(page, 1)
    mman.protect(x.memory.hva(page), HOST_PAGE, PROT_NONE)
    lost = x.went(x.guest.start_read64(page)) == "EFAULT"
    x.check("the guest loses the page", lost, _says(x.machine.vm, "SYNC_MMU"))


def _vm(x: Experiment) -> Vm:
    """Make another, empty VM of the experiment's kind."""
    kind = KVM_VM_TYPE_ARM_PROTECTED if x.protection is Protection.PKVM else 0
    return x.stack.enter_context(x.machine.system.create_vm(kind))


def _of_a_vcpu(vcpu: Vcpu) -> dict[str, Callable[[], object]]:
    pc = core_reg("pc")
    timer = KVM_ARM_VCPU_TIMER_CTRL, KVM_ARM_VCPU_TIMER_IRQ_VTIMER
    return {
        "KVM_GET_ONE_REG": lambda: vcpu.get_reg(pc),
        "KVM_SET_ONE_REG": lambda: vcpu.set_reg(pc, vcpu.get_reg(pc)),
        "KVM_GET_REG_LIST": vcpu.reg_list,
        "KVM_GET_MP_STATE": lambda: vcpu.mp_state,
        "KVM_GET_VCPU_EVENTS": lambda: vcpu.call(KVM_GET_VCPU_EVENTS, kvm_vcpu_events()),
        "KVM_SET_GUEST_DEBUG": lambda: vcpu.single_step(False),
        "KVM_HAS_DEVICE_ATTR of a vCPU": lambda: vcpu.call(
            KVM_HAS_DEVICE_ATTR, kvm_device_attr(group=timer[0], attr=timer[1])
        ),
        "KVM_GET_STATS_FD": lambda: _stats(vcpu),
    }


def _says(fd: Fd, name: str) -> bool:
    return fd.attempt(KVM_CHECK_EXTENSION, getattr(cap, f"KVM_CAP_{name}"))[0] > 0


def _stats(fd: Fd) -> None:
    os.close(fd.call(KVM_GET_STATS_FD))


def _gmem_slot(vm: Vm, flags: int, hva: int) -> None:
    vm.set_memory(1, BEYOND + 0x10_0000, HOST_PAGE, hva, guest_memfd=vm.create_guest_memfd(HOST_PAGE, flags))


def _immediate_exit(vcpu: Vcpu) -> None:
    vcpu.run.immediate_exit = 1
    name = raw.name(vcpu.attempt(KVM_RUN)[1])
    vcpu.run.immediate_exit = 0
    if name != "EINTR":
        raise OSError(0, name)
