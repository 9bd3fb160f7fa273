# SPDX-License-Identifier: Apache-2.0
"""/dev/kvm itself, on any architecture."""

from __future__ import annotations

import os
import platform

import pytest

from pyvmm.errors import KvmError
from pyvmm.kvm.system import System
from pyvmm.uapi.kvm import KVM_VM_TYPE_ARM_PROTECTED
from pyvmm.uapi.kvm_cap import KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_NR_MEMSLOTS, KVM_CAP_USER_MEMORY

pytestmark = pytest.mark.kvm


def test_capabilities_are_numbers_and_unknown_ones_are_zero() -> None:
    with System.open() as system:
        assert system.check(KVM_CAP_USER_MEMORY) == 1
        assert system.check(KVM_CAP_IMMEDIATE_EXIT) == 1
        assert system.check(KVM_CAP_NR_MEMSLOTS) >= 32
        assert system.check(65000) == 0


def test_the_run_area_is_whole_pages() -> None:
    with System.open() as system:
        assert system.vcpu_mmap_size >= 4096
        assert system.vcpu_mmap_size % 4096 == 0


def test_an_unknown_machine_type_is_refused_with_its_number() -> None:
    with System.open() as system, pytest.raises(KvmError, match=r"KVM_CREATE_VM\(kvm=\d+, type=0x7fff_0000\): EINVAL"):
        system.create_vm(0x7FFF_0000)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="an arm64 host may run pKVM")
def test_an_x86_host_refuses_protected_vms_and_says_why() -> None:
    with System.open() as system:
        assert system.supports_protected() is False
        assert system.max_ipa_bits == 0
        with pytest.raises(KvmError, match="it does not run pKVM") as caught:
            system.create_vm(KVM_VM_TYPE_ARM_PROTECTED)
    assert "--protection emulated" in str(caught.value.hint)


def test_closing_the_system_closes_everything_made_from_it() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with open("/proc/self/maps") as maps:
        mapped = maps.read().count("anon_inode:kvm-vcpu")
    system = System.open()
    vms = [system.create_vm() for _ in range(3)]
    vcpus = [vm.create_vcpu(index) for vm in vms for index in range(2)]
    vms[1].stats()
    vcpus[0].close()
    system.close()
    assert all(thing.closed for thing in [*vms, *vcpus])
    assert set(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/maps") as maps:
        assert maps.read().count("anon_inode:kvm-vcpu") == mapped


def test_descriptors_are_not_inherited() -> None:
    with System.open() as system, system.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        assert not any(os.get_inheritable(fd.fileno()) for fd in (system, vm, vcpu))


def test_a_forked_process_is_refused_with_the_reason() -> None:
    with System.open() as system, system.create_vm() as vm:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                vm.create_vcpu(0)
            except KvmError as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as said:
            text = said.read()
        os.waitpid(child, 0)
    assert "EIO" in text
    assert "threads, not forks" in text
