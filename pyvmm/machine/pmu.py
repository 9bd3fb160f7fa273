# SPDX-License-Identifier: Apache-2.0
"""The performance counters of a plain guest's CPUs: KVM's PMUv3, where this host has one. Owns nothing."""

from __future__ import annotations

from ctypes import c_uint32

from pyvmm.errors import HostError
from pyvmm.machine.describing import PMU_PPI
from pyvmm.uapi.kvm_arm64 import KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_INIT, KVM_ARM_VCPU_PMU_V3_IRQ
from pyvmm.uapi.kvm_cap import KVM_CAP_ARM_PMU_V3

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.kvm.system import System
    from pyvmm.kvm.vcpu import Vcpu


def require_pmu(system: System) -> None:
    """Raise HostError if this host's KVM has no PMU for guests."""
    if not system.check(KVM_CAP_ARM_PMU_V3):
        raise HostError(
            "this host's KVM has no PMU for guests (KVM_CAP_ARM_PMU_V3)",
            hint="drop --pmu; the host's CPU or firmware has no PMU, or its kernel is a pKVM host",
        )


def start_pmu(vcpus: Iterable[Vcpu]) -> None:
    """Give each vCPU, made with KVM_ARM_VCPU_PMU_V3, its interrupt. Call it when the interrupt controller is ready."""
    for vcpu in vcpus:
        vcpu.set_attr(KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_IRQ, c_uint32(16 + PMU_PPI))
        vcpu.set_attr(KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_INIT)
