# SPDX-License-Identifier: Apache-2.0
"""Makes the VM that a configuration asks for, with the address bits that it needs, and tells the native loop of it."""

from __future__ import annotations

import errno

from pyvmm import abi
from pyvmm._native import ffi, lib
from pyvmm.errors import HostError, KvmError, hex_
from pyvmm.machine import layout
from pyvmm.memory.address import MIB
from pyvmm.memory.choices import ConversionPolicy
from pyvmm.memory.memory import DEFAULT_IPA_BITS
from pyvmm.protection import Protection
from pyvmm.uapi.kvm import KVM_VM_TYPE_ARM_PROTECTED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from pyvmm._native import Array, pv_record, pv_vcpu, pv_vm
    from pyvmm.kvm.system import System
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.kvm.vm import Vm
    from pyvmm.machine.config import MachineConfig

FORWARDED: Final = ((abi.HVC_FEATURES, 1), (abi.HVC_MEMINFO, 3))
"""FEATURES, and MEMINFO with SHARE and UNSHARE: what the emulated protection answers in EL2's place."""
RETRIES: Final = 64
RING_RECORDS: Final = 1 << 12
NATIVE_PROTECTIONS: Final = {
    Protection.NONE: lib.PV_NONE,
    Protection.PKVM: lib.PV_PKVM,
    Protection.EMULATED: lib.PV_EMULATED,
}
NATIVE_POLICIES: Final = {
    ConversionPolicy.PRESERVE: lib.PV_CONVERT_PRESERVE,
    ConversionPolicy.ZERO: lib.PV_CONVERT_ZERO,
    ConversionPolicy.PUNCH: lib.PV_CONVERT_PUNCH,
    ConversionPolicy.COPY: lib.PV_CONVERT_COLD,
}


def create_vm(system: System, config: MachineConfig) -> tuple[Vm, int]:
    """Make the VM; returns it with the number of bits in its guest's physical addresses.

    Raises HostError where the host makes none of this kind, or none with so much memory.
    """
    kind = KVM_VM_TYPE_ARM_PROTECTED if config.protection is Protection.PKVM else 0
    bits = DEFAULT_IPA_BITS
    try:
        try:
            return system.create_vm(kind), bits
        except KvmError as error:
            # A CPU with fewer bits: the kernel makes VMs of what it has, if asked for just that.
            bits = system.max_ipa_bits
            if error.errno != errno.EINVAL or not 0 < bits < DEFAULT_IPA_BITS:
                raise
        end = layout.RAM_BASE + config.memory
        if end > 1 << bits:
            most = ((1 << bits) - layout.RAM_BASE) // MIB
            raise HostError(
                f"{config.memory // MIB} MiB of memory end at gpa {hex_(end)}, and guests of this host have "
                f"{bits} address bits",
                hint=f"-m {most}M is the most" if most > 0 else None,
            )
        return system.create_vm(kind | bits), bits
    except KvmError as error:
        if kind and error.errno == errno.EINVAL:
            raise HostError(error.message, hint=error.hint) from error
        raise


def protect(vm: Vm, config: MachineConfig) -> pv_vm:
    """Tell the VM, and the native loop, of its protection; returns the ``struct pv_vm *``, without memory yet."""
    native = ffi.new("struct pv_vm *")
    native.fd = vm.fileno()
    native.protection = NATIVE_PROTECTIONS[config.protection]
    native.conversion = NATIVE_POLICIES[config.conversion]
    native.retry_limit = RETRIES
    native.policy[lib.PV_FAIL_EAGAIN] = lib.PV_ACT_RETRY
    if config.protection is Protection.EMULATED:
        for function, count in FORWARDED:
            vm.forward_smccc(function, count)
    return native


def native_vcpu(vcpu: Vcpu, native_vm: pv_vm, *, timed: bool) -> tuple[pv_vcpu, Array[pv_record]]:
    """Tell the native loop of a vCPU; returns its ``struct pv_vcpu *``, and the records to be kept as long as that."""
    records = ffi.new("struct pv_record[]", RING_RECORDS)
    native = ffi.new("struct pv_vcpu *")
    native.fd, native.index, native.vm = vcpu.fileno(), vcpu.index, native_vm
    native.run = ffi.cast("void *", vcpu.run_address)
    native.timed = timed
    native.ring.size, native.ring.records = RING_RECORDS, records
    return native, records
