"""The interrupt controller in the kernel: a GICv3 at the addresses that the layout keeps for one.

Every machine has it, one whose guest takes no interrupts too: without it, KVM sees at every exit and every entry to
timers and counters on behalf of a user space that delivers interrupts itself, and asks the host's own GIC each time.
"""

from __future__ import annotations

from ctypes import c_uint64

from pyvmm.kvm.device import Device
from pyvmm.kvm.vm import Vm
from pyvmm.machine.layout import GIC_DISTRIBUTOR, GIC_REDISTRIBUTORS
from pyvmm.uapi.kvm import DeviceType
from pyvmm.uapi.kvm_arm64 import (
    KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST,
)


def create_gic(vm: Vm) -> Device | None:
    """Give a VM whose vCPUs are all made and have not run a GICv3; None where the host's own makes none."""
    if not vm.has_device(DeviceType.KVM_DEV_TYPE_ARM_VGIC_V3):
        return None
    gic = vm.create_device(DeviceType.KVM_DEV_TYPE_ARM_VGIC_V3)
    for kind, window in (
        (KVM_VGIC_V3_ADDR_TYPE_DIST, GIC_DISTRIBUTOR),
        (KVM_VGIC_V3_ADDR_TYPE_REDIST, GIC_REDISTRIBUTORS),
    ):
        gic.set_attr(KVM_DEV_ARM_VGIC_GRP_ADDR, kind, c_uint64(window.start))
    gic.set_attr(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT)
    return gic
