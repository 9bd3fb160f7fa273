# SPDX-License-Identifier: Apache-2.0
"""Plan a machine and its ioctls, by building it against a simulated kernel.

The same code makes the machine and the plan, so they cannot differ. ``/dev/kvm`` is not opened and no guest runs, so it
works on any workstation. Everything outside of KVM is real: files are read, and guest memory is allocated to load them.
"""

from __future__ import annotations

from pyvmm.errors import hex_
from pyvmm.kvm.causes import Value, argument_text
from pyvmm.kvm.stand_in import Call, Recording, StandIn
from pyvmm.machine import layout
from pyvmm.machine.machine import Machine
from pyvmm.memory.address import MIB
from pyvmm.uapi import kvm_arm64
from pyvmm.uapi.kvm import DeviceType
from pyvmm.uapi.kvm_arm64 import core_reg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Final

    from pyvmm.devices.base import Device
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.machine.config import MachineConfig

_REGISTERS: Final = {core_reg(name): name for name in ("pc", "x0")}
_GROUPS: Final = {
    value: name.removeprefix("KVM_DEV_ARM_VGIC_GRP_")
    for name, value in vars(kvm_arm64).items()
    if name.startswith("KVM_DEV_ARM_VGIC_GRP_")
}
_EVENTFDS: Final = ("KVM_IRQFD", "KVM_IOEVENTFD")


class Plan:
    """The plan of one machine. A context manager, within which ``machine`` can be inspected.

    ``gic`` is the version of the host's interrupt controller, 3 or 2 (see :func:`~pyvmm.machine.gic.host_gic`).
    """

    def __init__(self, config: MachineConfig, *, devices: Sequence[Device | VirtioDevice] = (), gic: int = 3) -> None:
        missing = () if gic == 3 else (DeviceType.KVM_DEV_TYPE_ARM_VGIC_V3,)
        self._kernel = Recording(StandIn(*missing))
        # A plan does not use the console.
        self.machine = Machine(config._replace(serial_out=None, serial_in=None), kernel=self._kernel, devices=devices)

    def __enter__(self) -> Plan:
        self.machine.__enter__()
        self.calls = tuple(self._kernel.calls)
        return self

    def __exit__(self, *error: object) -> None:
        self.machine.__exit__(*error)

    def lines(self) -> Iterator[str]:
        """Yield the plan as text: the address map, memory slots, devices, vCPUs, and the ioctls in order."""
        yield from self._addresses()
        yield from self._slots()
        yield from self._devices()
        yield from self._vcpus()
        yield "ioctls, in order:"
        for line in calls(self.machine, self.calls):
            yield f"  {line}"
        yield "  then KVM_RUN of each vCPU, in its own thread"

    def _addresses(self) -> Iterator[str]:
        yield "guest addresses, half-open:"
        used = [(placed.base, placed.end) for placed in self.machine.bus.placed]
        in_kernel = (layout.GIC_DISTRIBUTOR, layout.GIC_CPU, layout.GIC_ITS, layout.GIC_REDISTRIBUTORS)
        there = self.machine.gic.windows if self.machine.gic is not None else ()
        for window in layout.MAP:
            if window in in_kernel:
                where = "in the kernel" if window in there else "not there"
            else:
                where = "" if any(base < window.end and window.start < end for base, end in used) else "free"
            yield _row(window.start, window.end, window.name, where)
        config, entry = self.machine.config, self.machine.entry
        yield _row(layout.RAM_BASE, layout.RAM_BASE + config.memory, "RAM", f"{config.memory // MIB} MiB")
        if pool := self.machine.pool if config.dtb is None else 0:
            yield f"{'':28}    DMA pool, {pool // MIB} MiB of it, at an address that the guest chooses"
        for part in entry.plan:
            size = len(entry.device_tree) if part.gpa == entry.fdt else part.size
            yield _row(part.gpa, part.gpa + size, f"  {part.what}", f"{size} bytes")

    def _slots(self) -> Iterator[str]:
        yield "memory slots:"
        for slot in self.machine.memory.slots:
            for piece in slot.pieces:
                yield _row(piece.gpa, piece.end, piece.backing.kind, f"from byte {piece.offset:#x} of it")

    def _devices(self) -> Iterator[str]:
        yield "devices:"
        for placed in self.machine.bus.placed:
            spi = "" if placed.line is None else f"SPI {placed.line.spi}"
            details = ", ".join(filter(None, (spi, placed.device.about())))
            yield _row(placed.base, placed.end, placed.device.name, details)

    def _vcpus(self) -> Iterator[str]:
        yield "vCPUs:"
        entry = self.machine.entry
        for vcpu in self.machine.vcpus:
            begins = f"pc {hex_(entry.pc)}, x0 {hex_(entry.fdt)}" if vcpu.index == 0 else "off, until PSCI CPU_ON"
            yield f"  {vcpu.index}: {begins}"


def _row(start: int, end: int, name: str, details: str) -> str:
    return f"  {hex_(start):>12}  {hex_(end):>12}  {name}{', ' if details else ''}{details}"


def calls(machine: Machine, made: tuple[Call, ...]) -> Iterator[str]:
    """Yield the ioctls of ``machine`` as text, without descriptor numbers, with hvas as offsets in backings."""
    for call in made:
        values = ", ".join(filter(None, (_value(machine, call, name, value) for name, value in call.values.items())))
        failed = " fails" if call.result < 0 else ""
        yield f"{call.name}({call.on}{', ' if values else ''}{values}){failed}"


def _value(machine: Machine, call: Call, name: str, value: Value) -> str:
    if name == "hva" and isinstance(value, int):
        for slot in machine.memory.slots:
            backing = slot.backing
            if backing.hva <= value < backing.hva + backing.size:
                return f"hva={backing.kind}+{value - backing.hva:#x}"
    if name == "id" and isinstance(value, int) and value in _REGISTERS:
        return f"id={_REGISTERS[value]}"
    if name == "group" and isinstance(value, int) and call.on.startswith("ARM_VGIC"):
        return f"group={_GROUPS.get(value, value)}"
    if name in ("fd", "resample") and call.name in _EVENTFDS and value is not None:
        return f"{name}=eventfd"
    if name == "guest_memfd":
        return "guest_memfd=that one"
    return argument_text(name, value)
