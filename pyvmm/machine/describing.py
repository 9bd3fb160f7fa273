# SPDX-License-Identifier: Apache-2.0
"""The device tree that describes a machine to its guest.

Owns nothing. The machine calls :func:`machine_tree` with the nodes of its devices (:func:`describe`), then
:meth:`pyvmm.machine.fdt.Tree.to_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from pyvmm.devices.base import Trigger
from pyvmm.errors import UsageError, hex_
from pyvmm.machine.fdt import Node, Tree, Value, cells64
from pyvmm.typed import NamedTuple, Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Final

# Linux include/dt-bindings/interrupt-controller/{irq,arm-gic}.h; see also pyvmm.devices.base.Trigger.
_LEVEL_LOW: Final = 8
_SPI, _PPI = 0, 1
#: The generic timer's interrupts: secure, non-secure (the physical one), virtual, hypervisor; PPI n is number 16 + n.
_TIMER_PPIS: Final = (13, 14, 11, 10)

#: The interrupt of the performance counters, as Arm's Base System Architecture has it.
PMU_PPI: Final = 7


class GicNode(NamedTuple):
    """An interrupt controller: (gpa, bytes) of each part. A GICv3 has redistributors, a GICv2 has CPU interfaces."""

    distributor: tuple[int, int]
    redistributors: tuple[int, int] | None = None
    its: tuple[int, int] | None = None
    cpu_interfaces: tuple[int, int] | None = None


class DeviceNode(NamedTuple):
    """A device's own properties, and its place in the machine. ``base`` is a gpa, ``size`` is in bytes.

    ``clocks`` names the device's clock inputs, all wired to one fixed clock. ``spi`` is the number of its shared
    interrupt, from 0, and ``trigger`` the type.
    """

    name: str
    compatible: Sequence[str]
    base: int
    size: int
    properties: Mapping[str, Value] = MappingProxyType({})
    clocks: Sequence[str] = ()
    spi: int | None = None
    trigger: Trigger = Trigger.LEVEL


class Describable(Protocol):
    """The part of a device's interface that its node needs."""

    name: ClassVar[str]
    compatible: ClassVar[str | tuple[str, ...]]
    node: ClassVar[str | None]
    clocks: ClassVar[tuple[str, ...]]
    size: int

    def properties(self) -> dict[str, Any]:
        """Return its properties besides ``compatible`` and ``reg``."""
        ...


def describe(device: Describable, base: int, spi: int | None = None, trigger: Trigger = Trigger.LEVEL) -> DeviceNode:
    """Return the node of a device at gpa ``base``. ``spi`` is its interrupt's SPI, if it has one."""
    name, compatible = device.node or device.name, device.compatible
    if isinstance(compatible, str):
        compatible = (compatible,)
    return DeviceNode(name, compatible, base, device.size, device.properties(), device.clocks, spi, trigger)


#: The UART's reference clock in Hz, as in QEMU's virt machine. Drivers derive any baud rate from it.
CLOCK_HZ: Final = 24_000_000


_SEEDS: Final = ("kaslr-seed", "rng-seed")


def without_entropy(tree: Tree) -> Tree:
    """Remove the random seeds from a tree of :func:`machine_tree`, which would allow guessing a guest's keys."""
    for node in tree.root.children:
        if node.name == "chosen":
            for seed in _SEEDS:
                node.properties.pop(seed, None)
    return tree


def machine_tree(
    *,
    ram: Sequence[tuple[int, int]],
    mpidrs: Sequence[int],
    devices: Sequence[DeviceNode],
    bootargs: str = "",
    stdout: DeviceNode | None = None,
    initrd: tuple[int, int] | None = None,
    gic: GicNode | None = None,
    pmu: bool = False,
    entropy: bytes = b"",
) -> Tree:
    """Describe the machine to its guest.

    ``ram`` is (gpa, bytes) of each bank; ``mpidrs`` the affinity value of each vCPU, the booting one first; ``initrd``
    its gpa and bytes; ``stdout`` one of ``devices``. Without ``gic``, devices and the generic timer have no interrupts.
    ``pmu``: the CPUs have performance counters, whose interrupt needs ``gic``.
    ``entropy`` is for the guest: the first 8 bytes choose its kernel's address, the others seed its random numbers. It
    may be empty.
    """
    tree = Tree()
    root = tree.root
    # Devicetree Specification v0.4, chapter 3: the nodes every tree has.
    root.properties |= {"#address-cells": 2, "#size-cells": 2, "model": "pyvmm", "compatible": "linux,dummy-virt"}

    chosen = root.add("chosen", {"bootargs": bootargs})
    if stdout is not None:
        chosen.properties["stdout-path"] = f"/{_unit(stdout)}"
    if initrd is not None:
        start, size = initrd
        chosen.properties |= {"linux,initrd-start": cells64(start), "linux,initrd-end": cells64(start + size)}

    if entropy:
        # dt-schema's chosen.yaml. Linux removes both from the tree that it shows to user space.
        chosen.properties |= dict(zip(_SEEDS, (entropy[:8], entropy[8:]), strict=True))

    for gpa, size in ram:
        root.add(f"memory@{gpa:x}", {"device_type": "memory", "reg": cells64(gpa, size)})

    # Linux Documentation/devicetree/bindings/arm/cpus.yaml and psci.yaml. PSCI is KVM's own (KVM_ARM_VCPU_PSCI_0_2).
    cpus = root.add("cpus", {"#address-cells": 1, "#size-cells": 0})
    cpu: dict[str, Value] = {"device_type": "cpu", "compatible": "arm,armv8", "enable-method": "psci"}
    for mpidr in mpidrs:
        cpus.add(f"cpu@{mpidr:x}", cpu | {"reg": mpidr})
    root.add("psci", {"compatible": ("arm,psci-1.0", "arm,psci-0.2"), "method": "hvc"})

    # bindings/timer/arm,arch_timer.yaml; always-on: a vCPU's timer never loses its state to idle.
    timer = root.add("timer", {"compatible": "arm,armv8-timer", "always-on": True})
    if gic is not None:
        root.properties["interrupt-parent"] = tree.phandle(_add_gic(root, gic))
        # bindings/interrupt-controller/arm,gic.yaml: bits 15 to 8 are the CPUs that a GICv2 wires it to.
        flags = _LEVEL_LOW | (((1 << len(mpidrs)) - 1) << 8 if gic.redistributors is None else 0)
        timer.properties["interrupts"] = [cell for ppi in _TIMER_PPIS for cell in (_PPI, ppi, flags)]
        if pmu:
            # bindings/arm/pmu.yaml
            high = flags & ~_LEVEL_LOW | Trigger.LEVEL
            root.add("pmu", {"compatible": "arm,armv8-pmuv3", "interrupts": (_PPI, PMU_PPI, high)})

    clock: Node | None = None
    if any(device.clocks for device in devices):
        clock = root.add("clock", {"compatible": "fixed-clock", "#clock-cells": 0})
        clock.properties |= {"clock-frequency": CLOCK_HZ, "clock-output-names": "clk24mhz"}
    for device in devices:
        node = root.add(_unit(device), {"compatible": device.compatible, "reg": cells64(device.base, device.size)})
        if device.clocks and clock is not None:
            node.properties["clocks"] = [tree.phandle(clock)] * len(device.clocks)
            node.properties["clock-names"] = device.clocks
        if device.spi is not None and gic is not None:
            node.properties["interrupts"] = (_SPI, device.spi, device.trigger)
        for name, value in device.properties.items():
            if name in node.properties:
                raise UsageError(f"device {device.name} at gpa {hex_(device.base)} may not set {name!r} itself")
            node.properties[name] = value
    return tree


def _add_gic(root: Node, gic: GicNode) -> Node:
    # bindings/interrupt-controller/arm,gic-v3.yaml and arm,gic.yaml
    cpus = gic.redistributors or gic.cpu_interfaces
    assert cpus is not None
    model = "arm,gic-400" if gic.redistributors is None else "arm,gic-v3"
    node = root.add(f"interrupt-controller@{gic.distributor[0]:x}", {"compatible": model})
    node.properties |= {"interrupt-controller": True, "#interrupt-cells": 3}
    node.properties["reg"] = cells64(*gic.distributor, *cpus)
    node.properties |= {"#address-cells": 2, "#size-cells": 2, "ranges": True}
    if gic.its is not None:
        its = node.add(f"msi-controller@{gic.its[0]:x}", {"compatible": "arm,gic-v3-its", "reg": cells64(*gic.its)})
        its.properties |= {"msi-controller": True, "#msi-cells": 1}
    return node


def _unit(device: DeviceNode) -> str:
    return f"{device.name}@{device.base:x}"
