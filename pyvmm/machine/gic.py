# SPDX-License-Identifier: Apache-2.0
"""The interrupt controller in the kernel: a GICv3 with an ITS, or a GICv2 where the host has no GICv3.

Every machine has it, also one whose guest takes no interrupts. Without it, KVM assumes that user space delivers
interrupts. It then updates timers and counters at every exit and entry, and reads the host's GIC each time.

Owns the descriptors of the devices; the devices themselves stay in their VM. All of it is there and initialised before
the first run: KVM never initialises a protected VM's later.
"""

from __future__ import annotations

import contextlib
from ctypes import c_uint32, c_uint64

from pyvmm.errors import HostError
from pyvmm.machine.describing import GicNode
from pyvmm.machine.layout import (
    GIC_CPU,
    GIC_DISTRIBUTOR,
    GIC_ITS,
    GIC_REDISTRIBUTORS,
    MAX_VCPUS,
    MAX_VCPUS_GICV2,
    SPIS,
)
from pyvmm.uapi.kvm import DeviceType
from pyvmm.uapi.kvm_arm64 import (
    KVM_ARM_IRQ_TYPE_SHIFT,
    KVM_ARM_IRQ_TYPE_SPI,
    KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
    KVM_VGIC_ITS_ADDR_TYPE,
    KVM_VGIC_V2_ADDR_TYPE_CPU,
    KVM_VGIC_V2_ADDR_TYPE_DIST,
    KVM_VGIC_V2_CPU_SIZE,
    KVM_VGIC_V2_DIST_SIZE,
    KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST,
    KVM_VGIC_V3_REDIST_SIZE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from pyvmm.kvm.device import KvmDevice
    from pyvmm.kvm.vm import Vm
    from pyvmm.machine.layout import Window

    State = dict[str, Any]

# Interrupt numbers below the first SPI, private to a vCPU.
_PRIVATE: Final = 32
_SPI_LINE: Final = KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT

if GIC_REDISTRIBUTORS.size < MAX_VCPUS * KVM_VGIC_V3_REDIST_SIZE:
    raise AssertionError("the layout has no room for the redistributors of layout.MAX_VCPUS vCPUs")


class Gic:
    """The controller of one VM, initialised.

    ``version`` is 3 or 2. ``node`` is its part of the device tree, ``windows`` the guest addresses that it answers,
    ``device`` the controller itself, ``its`` its ITS where it has one.
    """

    def __init__(self, vm: Vm, version: int, cpus: int) -> None:
        """Make it; the VM's ``cpus`` vCPUs have all been made, and none has run."""
        self.version = version
        self.its: KvmDevice | None = None
        self._vm, self._cpus = vm, cpus
        self._files = contextlib.ExitStack()
        with contextlib.ExitStack() as half_built:
            half_built.callback(self.close)
            if version == 3:
                self._make_v3(vm, cpus)
            else:
                self._make_v2(vm)
            half_built.pop_all()

    def _make_v3(self, vm: Vm, cpus: int) -> None:
        places = ((KVM_VGIC_V3_ADDR_TYPE_DIST, GIC_DISTRIBUTOR), (KVM_VGIC_V3_ADDR_TYPE_REDIST, GIC_REDISTRIBUTORS))
        self._make(vm, DeviceType.KVM_DEV_TYPE_ARM_VGIC_V3, places)
        if vm.has_device(DeviceType.KVM_DEV_TYPE_ARM_VGIC_ITS):
            self.its = its = self._files.enter_context(vm.create_device(DeviceType.KVM_DEV_TYPE_ARM_VGIC_ITS))
            its.set_attr(KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_ITS_ADDR_TYPE, c_uint64(GIC_ITS.start))
            its.set_attr(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT)
            self.windows += (GIC_ITS,)
        self.node = GicNode(
            distributor=(GIC_DISTRIBUTOR.start, GIC_DISTRIBUTOR.size),
            redistributors=(GIC_REDISTRIBUTORS.start, cpus * KVM_VGIC_V3_REDIST_SIZE),
            its=None if self.its is None else (GIC_ITS.start, GIC_ITS.size),
        )

    def _make_v2(self, vm: Vm) -> None:
        places = ((KVM_VGIC_V2_ADDR_TYPE_DIST, GIC_DISTRIBUTOR), (KVM_VGIC_V2_ADDR_TYPE_CPU, GIC_CPU))
        self._make(vm, DeviceType.KVM_DEV_TYPE_ARM_VGIC_V2, places)
        self.node = GicNode(
            distributor=(GIC_DISTRIBUTOR.start, KVM_VGIC_V2_DIST_SIZE),
            cpu_interfaces=(GIC_CPU.start, KVM_VGIC_V2_CPU_SIZE),
        )

    def _make(self, vm: Vm, type: DeviceType, places: tuple[tuple[int, Window], ...]) -> None:
        self.device = gic = self._files.enter_context(vm.create_device(type))
        gic.set_attr(KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, c_uint32(_PRIVATE + SPIS))
        for kind, window in places:
            gic.set_attr(KVM_DEV_ARM_VGIC_GRP_ADDR, kind, c_uint64(window.start))
        gic.set_attr(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT)
        self.windows = tuple(window for _, window in places)

    def save(self) -> State:
        """Return its state, while its VM stands still; call it before memory is saved (the kernel writes to that)."""
        from pyvmm.machine import state

        if self.version == 3:
            return state.save_gic(self.device, self.its, self._cpus)
        return state.save_gicv2(self.device, self._cpus)

    def load(self, saved: State) -> None:
        """Make it the one that was saved; vCPUs have their registers by now, and guest memory its contents.

        HostError where the snapshot is of another kind of controller, or where the kernel refuses a register's value.
        """
        from pyvmm.machine import state

        version = saved.get("version", 3)
        if version != self.version:
            raise HostError(
                f"the snapshot is of a machine with a GICv{version}, and this host makes a GICv{self.version}",
                hint=f"restore it on a host with a GICv{version}",
            )
        if self.version == 3:
            state.load_gic(self.device, self.its, saved)
        else:
            state.load_gicv2(self.device, saved, lambda number: self._vm.irq_line(_SPI_LINE | number, level=True))

    def close(self) -> None:
        """Close the descriptors; idempotent."""
        self._files.close()


def find_gic(vm: Vm) -> int | None:
    """Return the version of the interrupt controller that this host's KVM makes: 3, else 2, else None."""
    for version, type in ((3, DeviceType.KVM_DEV_TYPE_ARM_VGIC_V3), (2, DeviceType.KVM_DEV_TYPE_ARM_VGIC_V2)):
        if vm.has_device(type):
            return version
    return None


def host_gic() -> int | None:
    """Return what :func:`find_gic` says of a new VM on this host; HostError where no VM can be made here."""
    from pyvmm.kvm.system import System

    with System.open() as system, system.create_vm() as vm:
        return find_gic(vm)


def choose_gic(vm: Vm, cpus: int) -> int | None:
    """Return what :func:`find_gic` says. HostError where that controller cannot have ``cpus`` vCPUs.

    Ask before the vCPUs are made: beyond a GICv2's limit KVM_CREATE_VCPU only says EINVAL.
    """
    version = find_gic(vm)
    if version == 2 and cpus > MAX_VCPUS_GICV2:
        raise HostError(
            f"this host has a GICv2, which cannot have {cpus} vCPUs: its limit is {MAX_VCPUS_GICV2}",
            hint=f"-c {MAX_VCPUS_GICV2}",
        )
    return version
