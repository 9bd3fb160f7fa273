# SPDX-License-Identifier: Apache-2.0
"""The interrupt controller in the kernel: a GICv3 and its ITS at the addresses that the layout keeps for them.

Every machine has it, one whose guest takes no interrupts too: without it, KVM sees at every exit and every entry to
timers and counters on behalf of a user space that delivers interrupts itself, and asks the host's own GIC each time.

Owns the descriptors of both devices; the devices themselves stay in their VM. All of it is there and initialised before
the first run: a protected VM's is never initialised later.
"""

from __future__ import annotations

import contextlib
from ctypes import c_uint32, c_uint64

from pyvmm.machine.describing import GicNode
from pyvmm.machine.layout import GIC_DISTRIBUTOR, GIC_ITS, GIC_REDISTRIBUTORS, MAX_VCPUS, SPIS
from pyvmm.uapi.kvm import DeviceType
from pyvmm.uapi.kvm_arm64 import (
    KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
    KVM_VGIC_ITS_ADDR_TYPE,
    KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST,
    KVM_VGIC_V3_REDIST_SIZE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.kvm.vm import Vm

# Interrupt numbers before the first SPI: a vCPU's own.
_PRIVATE = 32

if GIC_REDISTRIBUTORS.size < MAX_VCPUS * KVM_VGIC_V3_REDIST_SIZE:
    raise AssertionError("the layout has no room for the redistributors of as many vCPUs as a machine may have")


class Gic:
    """The controller of one VM, initialised; ``node`` is its part of the device tree, ``device`` the GICv3
    itself, ``its`` its ITS where there is one.
    """

    def __init__(self, vm: Vm, cpus: int) -> None:
        self._files = contextlib.ExitStack()
        with contextlib.ExitStack() as half_built:
            half_built.callback(self.close)
            gic = self._files.enter_context(vm.create_device(DeviceType.KVM_DEV_TYPE_ARM_VGIC_V3))
            self.device = gic
            gic.set_attr(KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, c_uint32(_PRIVATE + SPIS))
            for kind, window in (
                (KVM_VGIC_V3_ADDR_TYPE_DIST, GIC_DISTRIBUTOR),
                (KVM_VGIC_V3_ADDR_TYPE_REDIST, GIC_REDISTRIBUTORS),
            ):
                gic.set_attr(KVM_DEV_ARM_VGIC_GRP_ADDR, kind, c_uint64(window.start))
            gic.set_attr(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT)
            self.has_its = vm.has_device(DeviceType.KVM_DEV_TYPE_ARM_VGIC_ITS)
            self.its = None
            if self.has_its:
                self.its = its = self._files.enter_context(vm.create_device(DeviceType.KVM_DEV_TYPE_ARM_VGIC_ITS))
                its.set_attr(KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_ITS_ADDR_TYPE, c_uint64(GIC_ITS.start))
                its.set_attr(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT)
            half_built.pop_all()
        self.node = GicNode(
            distributor=(GIC_DISTRIBUTOR.start, GIC_DISTRIBUTOR.size),
            redistributors=(GIC_REDISTRIBUTORS.start, cpus * KVM_VGIC_V3_REDIST_SIZE),
            its=(GIC_ITS.start, GIC_ITS.size) if self.has_its else None,
        )

    def close(self) -> None:
        """Close the descriptors; idempotent."""
        self._files.close()


def create_gic(vm: Vm, cpus: int) -> Gic | None:
    """Give a VM whose ``cpus`` vCPUs are all made and have not run a GICv3; None where the host's own makes none."""
    if not vm.has_device(DeviceType.KVM_DEV_TYPE_ARM_VGIC_V3):
        return None
    return Gic(vm, cpus)
