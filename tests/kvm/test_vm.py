# SPDX-License-Identifier: Apache-2.0
"""A VM's slots, doorbells, interrupts and statistics on a real KVM."""

from __future__ import annotations

import os
import platform
import select
from collections.abc import Iterator

import pytest

from pyvmm.errors import KvmError
from pyvmm.kvm.system import System
from pyvmm.kvm.vm import Vm
from pyvmm.uapi.kvm import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    DeviceType,
)
from pyvmm.uapi.kvm_cap import KVM_CAP_GUEST_MEMFD_FLAGS, KVM_CAP_NR_MEMSLOTS
from pyvmm.uapi.kvm_run import ExitReason
from tests.kvm_guest import PAGE, RealMode, pages

pytestmark = pytest.mark.kvm
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="drives an x86 real-mode guest")

GPA = 0x10_0000


@pytest.fixture
def vm() -> Iterator[Vm]:
    with System.open() as system, system.create_vm() as vm:
        yield vm


def needs_guest_memfd(vm: Vm) -> None:
    if not vm.system.check(KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_MMAP:
        pytest.skip("this kernel has no guest_memfd that can be mapped")


def test_overlapping_slots_are_refused_with_the_call_and_its_values(vm: Vm) -> None:
    with pages(4) as hva:
        vm.set_memory(0, GPA, 4 * PAGE, hva)
        with pytest.raises(KvmError, match=r"slot=1, gpa=0x10_3000, size=0x1000, .*: EEXIST: .* overlaps another slot"):
            vm.set_memory(1, GPA + 3 * PAGE, PAGE, hva)
        vm.set_memory(1, GPA + 4 * PAGE, PAGE, hva)


@pytest.mark.parametrize("what", ["gpa", "size", "hva"])
def test_unaligned_slots_are_refused_with_a_clear_error(vm: Vm, what: str) -> None:
    with pages(4) as hva:
        wanted = {"gpa": GPA, "size": PAGE, "hva": hva}
        wanted[what] += 8
        with pytest.raises(KvmError, match="EINVAL: gpa, size, hva and offset must be multiples of 4096"):
            vm.set_memory(0, wanted["gpa"], wanted["size"], wanted["hva"])


def test_deleting_a_slot_makes_room_and_deleting_a_missing_one_is_an_error(vm: Vm) -> None:
    with pages(4) as hva:
        vm.set_memory(3, GPA, 4 * PAGE, hva)
        vm.delete_memory(3)
        vm.set_memory(4, GPA, PAGE, hva)
        with pytest.raises(KvmError, match=r"slot=3, size=0x0\): EINVAL: there is no such slot to delete"):
            vm.delete_memory(3)


def test_the_error_for_a_slot_number_that_is_too_large_names_the_capability(vm: Vm) -> None:
    with pages(1) as hva, pytest.raises(KvmError, match="no such slot number") as caught:
        vm.set_memory(vm.check(KVM_CAP_NR_MEMSLOTS) + 1, GPA, PAGE, hva)
    assert "KVM_CAP_NR_MEMSLOTS" in str(caught.value.hint)


def test_a_slot_cannot_grow_in_place(vm: Vm) -> None:
    with pages(4) as hva:
        vm.set_memory(0, GPA, PAGE, hva)
        with pytest.raises(KvmError, match="cannot change like this"):
            vm.set_memory(0, GPA, 2 * PAGE, hva)


def test_a_second_vcpu_of_the_same_number_is_refused(vm: Vm) -> None:
    vm.create_vcpu(1)
    with pytest.raises(KvmError, match="EEXIST: the VM already has a vCPU of this number"):
        vm.create_vcpu(1)


def test_statistics_can_be_read_by_name(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    assert vm.stats()["remote_tlb_flush"] == 0
    assert vcpu.stats()["exits"] == 0
    histogram = vcpu.stats()["halt_poll_success_hist"]
    assert isinstance(histogram, tuple)
    assert len(histogram) > 1


def test_has_device_tells_a_device_the_host_lacks_and_creating_it_is_refused(vm: Vm) -> None:
    assert vm.has_device(DeviceType.KVM_DEV_TYPE_ARM_PV_TIME) is False
    with pytest.raises(KvmError, match=r"type=KVM_DEV_TYPE_ARM_PV_TIME.*ENODEV: this kernel makes no device"):
        vm.create_device(DeviceType.KVM_DEV_TYPE_ARM_PV_TIME)


def test_a_slot_may_lie_over_part_of_a_guest_memfd_which_no_other_slot_uses(vm: Vm) -> None:
    needs_guest_memfd(vm)
    shared = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
    with vm.create_guest_memfd(4 * PAGE, shared) as file, pages(4) as hva:
        vm.set_memory(0, GPA, 2 * PAGE, hva + PAGE, guest_memfd=file, offset=PAGE)
        with pytest.raises(KvmError, match=r"EINVAL: guest_memfd slots .* no other slot uses"):
            vm.set_memory(1, GPA + 4 * PAGE, PAGE, hva, guest_memfd=file, offset=2 * PAGE)
        vm.set_memory(1, GPA + 4 * PAGE, PAGE, hva, guest_memfd=file, offset=0)


def test_a_guest_memfd_of_odd_size_or_unknown_flags_is_refused_with_a_clear_error(vm: Vm) -> None:
    needs_guest_memfd(vm)
    with pytest.raises(KvmError, match="size must be a multiple of 4096"):
        vm.create_guest_memfd(PAGE + 1, GUEST_MEMFD_FLAG_MMAP)
    with pytest.raises(KvmError, match="does not know these flags"):
        vm.create_guest_memfd(PAGE, GUEST_MEMFD_FLAG_MMAP | 1 << 40)


def test_a_guest_memfd_slot_beyond_the_file_or_with_a_dirty_log_is_refused(vm: Vm) -> None:
    needs_guest_memfd(vm)
    with (
        vm.create_guest_memfd(2 * PAGE, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED) as file,
        pages(2) as hva,
    ):
        for wanted in ({"offset": PAGE}, {"flags": KVM_MEM_LOG_DIRTY_PAGES}):
            with pytest.raises(
                KvmError, match=r"KVM_SET_USER_MEMORY_REGION2.*EINVAL: guest_memfd slots can only"
            ) as caught:
                vm.set_memory(0, GPA, 2 * PAGE, hva, guest_memfd=file, **wanted)
            assert f"guest_memfd={file.fileno()}" in caught.value.values
    with pytest.raises(KvmError, match="guest_memfd is closed"), pages(2) as hva:
        vm.set_memory(0, GPA, 2 * PAGE, hva, flags=KVM_MEM_GUEST_MEMFD, guest_memfd=file)


@x86
def test_stores_signal_an_eventfd_without_an_exit(vm: Vm) -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        vm.ioeventfd(bell, 0x4000, 2, datamatch=0x1234)
        with pytest.raises(KvmError, match=r"gpa=0x4000, size=0x2, datamatch=0x1234, flags=0x1\): EEXIST"):
            vm.ioeventfd(bell, 0x4000, 2, datamatch=0x1234)
        guest = RealMode(vm, b"\xc7\x06\x00\x40\x34\x12\xc7\x06\x00\x40\x35\x12\xf4")
        assert guest.run() == ExitReason.KVM_EXIT_MMIO  # the store that does not match
        assert bytes(guest.vcpu.run.mmio.data[:2]) == b"\x35\x12"
        assert os.eventfd_read(bell) == 1
        vm.ioeventfd(bell, 0x4000, 2, datamatch=0x1234, deassign=True)
        with pytest.raises(KvmError, match="ENOENT: no such eventfd is registered there"):
            vm.ioeventfd(bell, 0x4000, 2, datamatch=0x1234, deassign=True)
    finally:
        os.close(bell)


@x86
def test_interrupts_need_a_controller(vm: Vm) -> None:
    with pytest.raises(KvmError, match="ENXIO: the VM has no interrupt controller"):
        vm.irq_line(4, True)
    with pytest.raises(KvmError, match=r"address=0xfee0_0000, data=65\): EINVAL: the VM has no interrupt controller"):
        vm.signal_msi(0xFEE0_0000, 65)
    vm.create_irqchip()
    vm.irq_line(4, True)
    vm.irq_line(4, False)


@x86
def test_an_eventfd_can_drive_only_one_interrupt(vm: Vm) -> None:
    vm.create_irqchip()
    vm.create_vcpu(0)
    line = os.eventfd(0)
    try:
        vm.irqfd(line, 4)
        with pytest.raises(KvmError, match="EBUSY: the eventfd already drives"):
            vm.irqfd(line, 5)
        os.eventfd_write(line, 1)
        ready, _, _ = select.select([line], [], [], 1)
        assert not ready, "the kernel did not take the interrupt"
        vm.irqfd(line, 4, deassign=True)
        os.eventfd_write(line, 1)
        assert select.select([line], [], [], 0)[0]
    finally:
        os.close(line)


@x86
def test_a_message_is_delivered_or_blocked(vm: Vm) -> None:
    vm.create_irqchip()
    vm.create_vcpu(0)
    assert vm.signal_msi(0xFEE0_0000, 0x41) is False  # the guest's APIC is off, which blocks the message


@x86
def test_the_dirty_log_lists_written_pages_and_starts_over(vm: Vm) -> None:
    guest = RealMode(vm, b"\xc6\x06\x00\x30\x07\xf4", flags=KVM_MEM_LOG_DIRTY_PAGES)  # mov byte [0x3000], 7; hlt
    assert guest.run() == ExitReason.KVM_EXIT_HLT
    first = vm.dirty_log(0, guest.pages)
    assert len(first) == 8
    assert first[0] & 1 << 3
    assert not vm.dirty_log(0, guest.pages)[0] & 1 << 3
    with pytest.raises(KvmError, match=r"slot=9\): ENOENT: the slot is missing or has no KVM_MEM_LOG_DIRTY_PAGES"):
        vm.dirty_log(9, 1)


def test_the_error_for_an_unknown_capability_names_it(vm: Vm) -> None:
    with pytest.raises(KvmError, match=r"KVM_ENABLE_CAP\(vm=\d+, cap=65000, args=0x1 0x2\): EINVAL"):
        vm.enable_cap(65000, 1, 2)


@x86
def test_calls_of_arm64_are_refused_on_x86_with_the_reason(vm: Vm) -> None:
    for call in (vm.preferred_target, lambda: vm.forward_smccc(0x8600_0000, 1)):
        with pytest.raises(KvmError, match="ENOTTY: this kernel does not know the call") as caught:
            call()
        assert "of another architecture" in str(caught.value.hint)
