# SPDX-License-Identifier: Apache-2.0
"""The VM's kind and its address bits."""

from __future__ import annotations

import errno

import pytest

from pyvmm.errors import HostError, KvmError
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.vm import create_vm
from pyvmm.protection import Protection

PROTECTED = 1 << 31


class System:
    """Makes VMs of at most ``bits`` address bits; protected ones only if ``pkvm``."""

    def __init__(self, bits: int, *, pkvm: bool = True) -> None:
        self.max_ipa_bits = bits
        self.pkvm = pkvm

    def create_vm(self, kind: int) -> int:
        bits = kind & 0xFF or 40
        if bits > self.max_ipa_bits or (kind & PROTECTED and not self.pkvm):
            raise KvmError("KVM_CREATE_VM", "", errno.EINVAL, hint="a hint")
        return kind


def make(system: System, protection: Protection = Protection.NONE, gib: int = 1) -> tuple[object, int]:
    return create_vm(system, MachineConfig("k", protection, memory=gib << 30))  # type: ignore[arg-type]


@pytest.mark.parametrize("protection", Protection)
def test_a_host_with_40_bits_or_more_gets_no_request_for_a_number(protection: Protection) -> None:
    kind = PROTECTED if protection is Protection.PKVM else 0
    assert make(System(48), protection) == (kind, 40)
    assert make(System(40), protection) == (kind, 40)


def test_a_host_with_fewer_bits_gets_a_request_for_its_number() -> None:
    assert make(System(36)) == (36, 36)
    assert make(System(36), Protection.PKVM) == (PROTECTED | 36, 36)


def test_memory_beyond_a_hosts_addresses_is_refused_with_the_maximum() -> None:
    assert make(System(36), gib=62) == (36, 36)
    with pytest.raises(HostError, match=r"64512 MiB of memory end at gpa 0x10_4000_0000, .* 36 address bits") as caught:
        make(System(36), gib=63)
    assert caught.value.hint == "use at most -m 63488M"


@pytest.mark.parametrize("bits", [36, 48])
def test_a_host_without_protected_vms_refuses_a_protected_guest(bits: int) -> None:
    with pytest.raises(HostError) as caught:
        make(System(bits, pkvm=False), Protection.PKVM)
    assert (caught.value.exit_status, caught.value.hint) == (5, "a hint")
