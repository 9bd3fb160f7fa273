# SPDX-License-Identifier: Apache-2.0
"""A vCPU's run area, registers and states on a real KVM."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator

import pytest

from pyvmm.errors import HostError, KvmError, PyvmmError
from pyvmm.kvm import libc
from pyvmm.kvm.system import System
from pyvmm.kvm.vm import Vm
from pyvmm.uapi.kvm import KVM_RUN
from pyvmm.uapi.kvm_run import ExitReason
from pyvmm.uapi.kvm_state import MpState
from tests.kvm_guest import RealMode

pytestmark = pytest.mark.kvm
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="drives an x86 real-mode guest")


@pytest.fixture
def vm() -> Iterator[Vm]:
    with System.open() as system, system.create_vm() as vm:
        yield vm


def test_the_run_area_lives_as_long_as_the_vcpu(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    assert vcpu.run_address % 4096 == 0
    vcpu.run.immediate_exit = 1
    assert vcpu.run.immediate_exit == 1
    vcpu.close()
    with pytest.raises(PyvmmError, match=r"the run area of vcpu0=.* is unmapped: the vCPU is closed"):
        _ = vcpu.run
    with pytest.raises(KvmError, match="EBADF: it is closed"):
        _ = vcpu.mp_state


def test_a_vcpu_whose_run_area_cannot_be_mapped_leaves_nothing(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(libc, "mmap", lambda *_: (0, errno.ENOMEM))
    with pytest.raises(KvmError, match=r"mmap\(vcpu0=\d+, size=0x[\d_a-f]+\): ENOMEM"):
        vm.create_vcpu(0)
    assert os.listdir("/proc/self/fd") == before


@x86
def test_a_guest_runs_and_its_exits_are_read_by_name(vm: Vm) -> None:
    guest = RealMode(vm, b"\xc6\x06\x00\x50\x2a\xe6\x42\xf4")  # mov byte [0x5000], 42; out 0x42, al; hlt
    assert guest.run() == ExitReason.KVM_EXIT_MMIO
    mmio = guest.vcpu.run.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write, mmio.data[0]) == (0x5000, 1, 1, 42)
    assert guest.run() == ExitReason.KVM_EXIT_IO
    assert (guest.vcpu.run.io.port, guest.vcpu.run.io.size) == (0x42, 1)
    assert guest.run() == ExitReason.KVM_EXIT_HLT
    assert guest.vcpu.pc == guest.vcpu.get_regs().rip == 0x1008
    assert guest.vcpu.stats()["exits"] != 0


@x86
def test_the_vmm_answers_a_load_through_the_run_area(vm: Vm) -> None:
    guest = RealMode(vm, b"\xa1\x00\x50\xf4")  # mov ax, [0x5000]; hlt
    assert guest.run() == ExitReason.KVM_EXIT_MMIO
    guest.vcpu.run.mmio.data[:2] = [0x34, 0x12]
    assert guest.run() == ExitReason.KVM_EXIT_HLT
    assert guest.vcpu.get_regs().rax & 0xFFFF == 0x1234


@x86
def test_single_step_stops_after_every_instruction(vm: Vm) -> None:
    guest = RealMode(vm, b"\x90\x90\xf4")
    guest.vcpu.single_step(True)
    for pc in (0x1001, 0x1002):
        assert guest.run() == ExitReason.KVM_EXIT_DEBUG
        assert guest.vcpu.run.debug_x86.pc == pc
    guest.vcpu.single_step(False)
    assert guest.run() == ExitReason.KVM_EXIT_HLT


@x86
def test_the_general_registers_read_back_as_written(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    regs = vcpu.get_regs()
    regs.r15 = 0x1234_5678_9ABC_DEF0
    vcpu.set_regs(regs)
    assert vcpu.get_regs().r15 == 0x1234_5678_9ABC_DEF0


@x86
def test_pyvmm_refuses_an_external_abort_on_x86_where_the_flag_means_something_else(vm: Vm) -> None:
    with pytest.raises(HostError, match="x86 vCPU"):
        vm.create_vcpu(0).inject_abort()


def test_the_mp_state_of_a_vcpu_can_be_changed(vm: Vm) -> None:
    if platform.machine() == "aarch64":
        other = MpState.KVM_MP_STATE_STOPPED
        vcpu = vm.create_vcpu(0)
        vcpu.init()
    else:
        other = MpState.KVM_MP_STATE_HALTED
        vm.create_irqchip()
        vcpu = vm.create_vcpu(0)
    assert vcpu.mp_state == MpState.KVM_MP_STATE_RUNNABLE
    vcpu.mp_state = other
    assert vcpu.mp_state == other


def test_an_unknown_mp_state_is_refused_by_name(vm: Vm) -> None:
    with pytest.raises(KvmError, match=r"KVM_SET_MP_STATE.*mp_state=KVM_MP_STATE_LOAD.*EINVAL"):
        vm.create_vcpu(0).mp_state = MpState.KVM_MP_STATE_LOAD


def test_a_register_that_does_not_exist_is_an_error_with_its_id(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    with pytest.raises(KvmError, match=r"KVM_GET_ONE_REG.*id=0x7030_0000_0000_0001"):
        vcpu.get_reg(0x7030_0000_0000_0001)


def test_a_value_too_big_for_its_register_is_refused(vm: Vm) -> None:
    with pytest.raises(OverflowError):
        vm.create_vcpu(0).set_reg(0x7030_0000_0000_0001, 1 << 64)


def test_a_run_with_immediate_exit_returns_at_once(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    if platform.machine() == "aarch64":
        vcpu.init()
    vcpu.run.immediate_exit = 1
    assert vcpu.attempt(KVM_RUN) == (-1, errno.EINTR)
