# SPDX-License-Identifier: Apache-2.0
"""What only an arm64 KVM has: its features, its hypercall filter, its interrupt controller, its guest_memfd rules."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from ctypes import c_uint32, c_uint64, memmove

import pytest

from pyvmm.errors import KvmError
from pyvmm.kvm.system import System
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.uapi import kvm_arm64 as arm64
from pyvmm.uapi.kvm import GUEST_MEMFD_FLAG_MMAP, KVM_RUN, KVM_VM_TYPE_ARM_PROTECTED, DeviceType
from pyvmm.uapi.kvm_arm64 import core_reg
from pyvmm.uapi.kvm_cap import KVM_CAP_GUEST_MEMFD_FLAGS
from pyvmm.uapi.kvm_run import ExitReason
from pyvmm.uapi.kvm_state import MpState
from tests.kvm_guest import PAGE, pages

pytestmark = pytest.mark.pkvm

RAM = 0x8000_0000
UART = 0x0900_0000
STORE = b"".join(word.to_bytes(4, "little") for word in (0xD2A12000, 0xB9000000, 0x14000000))
"""movz x0, #0x900, lsl 16; str w0, [x0]; b ."""


@pytest.fixture
def vm() -> Iterator[Vm]:
    with System.open() as system, system.create_vm() as vm:
        yield vm


@pytest.fixture
def protected() -> Iterator[Vm]:
    with System.open() as system, system.create_vm(KVM_VM_TYPE_ARM_PROTECTED) as vm:
        yield vm


def interrupt_controller(vm: Vm) -> None:
    gic = vm.create_device(DeviceType.KVM_DEV_TYPE_ARM_VGIC_V3)
    gic.set_attr(arm64.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, c_uint32(128))
    gic.set_attr(arm64.KVM_DEV_ARM_VGIC_GRP_ADDR, arm64.KVM_VGIC_V3_ADDR_TYPE_DIST, c_uint64(0x0800_0000))
    gic.set_attr(arm64.KVM_DEV_ARM_VGIC_GRP_ADDR, arm64.KVM_VGIC_V3_ADDR_TYPE_REDIST, c_uint64(0x080A_0000))
    with pytest.raises(
        KvmError, match=r"ARM_VGIC_V3=\d+, group=0, attr=0x2, value=0x800_0000\): EEXIST: it is already set"
    ):
        gic.set_attr(arm64.KVM_DEV_ARM_VGIC_GRP_ADDR, arm64.KVM_VGIC_V3_ADDR_TYPE_DIST, c_uint64(0x0800_0000))
    gic.set_attr(arm64.KVM_DEV_ARM_VGIC_GRP_CTRL, arm64.KVM_DEV_ARM_VGIC_CTRL_INIT)
    irqs = c_uint32()
    gic.get_attr(arm64.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, irqs)
    assert irqs.value == 128


def test_kvm_refuses_new_vcpus_once_the_interrupt_controller_is_initialised(vm: Vm) -> None:
    vm.create_vcpu(0)
    interrupt_controller(vm)
    vm.irq_line(arm64.KVM_ARM_IRQ_TYPE_SPI << arm64.KVM_ARM_IRQ_TYPE_SHIFT | 40, True)
    with pytest.raises(KvmError, match="EBUSY: the interrupt controller is already initialised"):
        vm.create_vcpu(1)


def test_forwarded_hypercalls_cannot_overlap_reserved_ones_or_be_set_late(vm: Vm) -> None:
    vm.forward_smccc(0x8600_0000, 1)
    vm.forward_smccc(0xC600_0002, 3)
    with pytest.raises(KvmError, match=r"base=0x8000_0000, count=1.*EEXIST: it is already set, or overlaps"):
        vm.forward_smccc(0x8000_0000, 1)


def stored(vm: Vm, hva: int) -> Vcpu:
    """Run a guest up to its store to the UART's address."""
    memmove(hva, STORE, len(STORE))
    vm.set_memory(0, RAM, 4 * PAGE, hva)
    vcpu = vm.create_vcpu(0)
    vcpu.init()
    vcpu.set_reg(core_reg("pc"), RAM)
    vcpu.call(KVM_RUN)
    assert vcpu.run.exit_reason == ExitReason.KVM_EXIT_MMIO
    assert vcpu.run.mmio.phys_addr == UART
    return vcpu


def test_the_vmm_can_answer_an_access_with_an_abort(vm: Vm) -> None:
    with pages(4) as hva, stored(vm, hva) as vcpu:
        vcpu.inject_abort()
        vcpu.run.immediate_exit = 1
        assert vcpu.attempt(KVM_RUN) == (-1, errno.EINTR)
        assert vcpu.get_reg(core_reg("elr_el1")) == RAM + 4  # the store, as the guest's handler sees it
        assert vcpu.pc & 0x7FF == 0x200  # the vector of a synchronous exception from the current level


def test_a_plain_vm_can_remove_its_slots_after_it_ran(vm: Vm) -> None:
    with pages(4) as hva, stored(vm, hva):
        with pytest.raises(KvmError, match="EBUSY: too late"):
            vm.forward_smccc(0x8600_0000, 1)
        vm.delete_memory(0)


def test_a_guest_memfd_without_mmap_serves_no_slot(vm: Vm) -> None:
    if not vm.system.check(KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_MMAP:
        pytest.skip("this kernel has no guest_memfd that can be mapped")
    refused = pytest.raises(KvmError, match=r"memfd_flags=0x0.*arm64 accepts only a guest_memfd")
    with vm.create_guest_memfd(4 * PAGE, 0) as file, pages(4) as hva, refused as caught:
        vm.set_memory(0, RAM, 4 * PAGE, hva, guest_memfd=file)
    assert "GUEST_MEMFD_FLAG_MMAP" in str(caught.value.hint)


def test_a_protected_vm_keeps_its_slots_once_it_ran(protected: Vm) -> None:
    with pages(4) as hva:
        with stored(protected, hva), pytest.raises(KvmError, match=r"slot=0, size=0x0.*EPERM: a protected VM"):
            protected.delete_memory(0)
        protected.close()  # its pages are still mapped


def test_kvm_refuses_to_forward_hypercalls_of_a_protected_vm(protected: Vm) -> None:
    with pytest.raises(KvmError, match="EINVAL: a protected VM has no SMCCC filter") as caught:
        protected.forward_smccc(0x8600_0000, 1)
    assert "emulated" in str(caught.value.hint)


def test_a_protected_vm_takes_the_same_interrupt_controller(protected: Vm) -> None:
    protected.create_vcpu(0)
    interrupt_controller(protected)


def test_arm64_registers_read_back_as_written(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    with pytest.raises(KvmError, match="ENOEXEC: the vCPU is not initialised"):
        vcpu.get_reg(core_reg("pc"))
    vcpu.init()
    for name, value in {"pc": 0x8000_0000, "x0": 2**64 - 1, "sp_el1": 16, "v3": 2**127 + 5, "fpcr": 0}.items():
        vcpu.set_reg(core_reg(name), value)
        assert vcpu.get_reg(core_reg(name)) == value
    assert vcpu.pc == 0x8000_0000
    assert core_reg("pc") in vcpu.reg_list()


def test_a_feature_that_no_cpu_has_is_refused_with_a_clear_error(vm: Vm) -> None:
    with pytest.raises(KvmError, match=r"features=2\+77.*ENOENT: this kernel does not know this feature"):
        vm.create_vcpu(0).init(features=[77])


def test_a_second_vcpu_can_start_powered_off(vm: Vm) -> None:
    first, second = vm.create_vcpu(0), vm.create_vcpu(1)
    first.init()
    second.init(power_off=True)
    assert (first.mp_state, second.mp_state) == (MpState.KVM_MP_STATE_RUNNABLE, MpState.KVM_MP_STATE_STOPPED)


def test_a_pkvm_host_gives_every_vm_all_its_address_bits_whatever_was_requested() -> None:
    with System.open() as system:
        assert system.supports_protected()
        end = 1 << system.max_ipa_bits
        for bits in (0, 36):
            with system.create_vm(bits) as vm, pages(1) as hva:
                vm.set_memory(0, end - PAGE, PAGE, hva)
                with pytest.raises(KvmError, match="EFAULT: the range ends beyond the VM's address bits"):
                    vm.set_memory(1, end, PAGE, hva)
