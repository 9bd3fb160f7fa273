# SPDX-License-Identifier: Apache-2.0
"""Make the VM of a configuration, with the address bits that it needs, and register it with the native loop."""

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
"""FEATURES, and MEMINFO with SHARE and UNSHARE: the calls that the emulated protection answers instead of EL2."""
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
    """Make the VM. Returns it with the number of bits in its guest's physical addresses.

    Raises HostError if the host cannot make such a VM, or not with ``config.memory`` bytes.
    """
    kind = KVM_VM_TYPE_ARM_PROTECTED if config.protection is Protection.PKVM else 0
    bits = DEFAULT_IPA_BITS
    try:
        try:
            return system.create_vm(kind), bits
        except KvmError as error:
            # A CPU with fewer bits: the kernel makes a VM with exactly that number, if asked for it.
            bits = system.max_ipa_bits
            if error.errno != errno.EINVAL or not 0 < bits < DEFAULT_IPA_BITS:
                raise
        end = layout.RAM_BASE + config.memory
        if end > 1 << bits:
            most = ((1 << bits) - layout.RAM_BASE) // MIB
            raise HostError(
                f"{config.memory // MIB} MiB of memory end at gpa {hex_(end)}, but guests on this host have "
                f"{bits} address bits",
                hint=f"use at most -m {most}M" if most > 0 else None,
            )
        return system.create_vm(kind | bits), bits
    except KvmError as error:
        if kind and error.errno == errno.EINVAL:
            raise HostError(error.message, hint=error.hint) from error
        raise


def protect(vm: Vm, config: MachineConfig) -> pv_vm:
    """Set the protection of the VM and in the native loop. Returns the ``struct pv_vm *``, still without memory."""
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
    """Register a vCPU with the native loop. Returns its ``struct pv_vcpu *``, and its records, to keep as long."""
    records = ffi.new("struct pv_record[]", RING_RECORDS)
    native = ffi.new("struct pv_vcpu *")
    native.fd, native.index, native.vm = vcpu.fileno(), vcpu.index, native_vm
    native.run = ffi.cast("void *", vcpu.run_address)
    native.timed = timed
    native.ring.size, native.ring.records = RING_RECORDS, records
    return native, records
