# SPDX-License-Identifier: Apache-2.0
"""Build and wire a machine that has not run: VM, memory, vCPUs, interrupt controller and devices.

Construction goes in this order, teardown in the reverse order, from any half-built state:

    /dev/kvm -> VM -> slots -> vCPUs -> interrupt controller, lines -> devices on the bus -> start state

The VM's last descriptor is closed before its memory is unmapped. Only then has the kernel returned every page.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from pyvmm.devices.base import Device
from pyvmm.devices.bus import Bus
from pyvmm.devices.echo import Echo
from pyvmm.devices.exit_targets import ExitTargets
from pyvmm.devices.mailbox import Mailboxes
from pyvmm.devices.pl011 import Pl011
from pyvmm.devices.pl031 import Pl031
from pyvmm.devices.share_bell import ShareBell
from pyvmm.errors import HostError, UsageError
from pyvmm.kvm.fd import KERNEL, Kernel
from pyvmm.kvm.system import System
from pyvmm.machine import boot, layout
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.ending import RunEnd
from pyvmm.machine.gic import Gic, choose_gic
from pyvmm.machine.irq import Interrupts
from pyvmm.machine.ram import add_ram
from pyvmm.machine.start import KernelImage
from pyvmm.machine.vm import create_vm, protect
from pyvmm.memory.memory import Memory
from pyvmm.memory.relay import ShareRelay
from pyvmm.uapi.kvm_arm64 import KVM_ARM_VCPU_PMU_V3

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, TypeVar

    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.devices.virtio.mmio import VirtioMmio
    from pyvmm.machine.start import Start

    R = TypeVar("R")

OTHER_DESCRIPTORS: Final = 32
DEVICE_DESCRIPTORS: Final = 12
"""Without its queues, of which each has one."""


class Hardware:
    """The hardware of a :class:`pyvmm.machine.machine.Machine`, which documents the arguments."""

    def __init__(
        self,
        config: MachineConfig,
        *,
        kernel: Kernel | None,
        start: Start | None,
        devices: Sequence[Device | VirtioDevice],
    ) -> None:
        config.check()
        self.config = config
        self._kernel = kernel
        self._start = KernelImage() if start is None else start
        self._memory_stack = contextlib.ExitStack()
        self._memory_stack.callback(self._start.close)
        self._stack = contextlib.ExitStack()
        self._devices = tuple(devices)
        self._brought: list[Device | VirtioDevice] = []
        self._end = RunEnd()

    def _build(self) -> None:
        config = self.config
        self._stack.callback(self._drop_brought)
        self._take_brought()
        if self._kernel is None:
            require_architecture()
        self.tree = None if config.dtb is None else boot.read_tree(config.dtb)
        self.pool = config.pool_size(self.tree, virtio=not all(isinstance(each, Device) for each in self._brought))
        self._start.prepare(config)
        if self.descriptors > os.sysconf("SC_OPEN_MAX"):
            _raise_limit_of_descriptors()
        push = self._stack.enter_context
        self.system = push(System.open(kernel=self._kernel or KERNEL))
        vm, bits = create_vm(self.system, config)
        self.vm = push(vm)
        self.native = protect(self.vm, config)
        self.memory = self._memory_stack.enter_context(Memory(self.vm, config.protection, self.native, ipa_bits=bits))
        self._memory_stack.callback(self._start.close)  # it may serve memory, so it closes before memory does
        self.loadable = add_ram(self.memory, self.vm, config)
        self.relay = ShareRelay(self.native, self.memory.ledger)
        self.memory.on_evidence = self.relay.evidence
        gic = choose_gic(self.vm, config.cpus)
        if config.pmu:
            from pyvmm.machine.pmu import require_pmu  # few guests have one

            require_pmu(self.system)
        self.vcpus = [push(self.vm.create_vcpu(index)) for index in range(config.cpus)]
        for vcpu in self.vcpus:
            vcpu.init(power_off=vcpu.index > 0, features=(KVM_ARM_VCPU_PMU_V3,) if config.pmu else ())
        self.gic = None if gic is None else Gic(self.vm, gic, config.cpus)
        if self.gic is not None:
            self._stack.callback(self.gic.close)
        if config.pmu:
            from pyvmm.machine.pmu import start_pmu

            start_pmu(self.vcpus)
        self.interrupts = Interrupts(self.vm, present=self.gic is not None)
        self._stack.callback(self.interrupts.close)
        self._place_devices()
        self.entry = self._start.enter(self)

    def _place_devices(self) -> None:
        config = self.config
        self.bus = Bus(self.native)
        self._stack.callback(self.bus.close)
        line = self.interrupts.level(layout.PL011_SPI)
        uart = Pl011(config.serial_out, config.serial_in, self._end.unheard, line)
        self.uart = self.bus.add(uart, layout.PL011.start, line)
        self.bus.add(Pl031(), layout.PL031.start)
        self.bus.add(ShareBell(), layout.SHARE_DOORBELL.start)
        self.echo = self.bus.add(Echo(self.memory, self.relay), layout.ECHO.start)
        self.mailboxes = self.bus.add(Mailboxes(config.cpus), layout.MAILBOX.start)
        self.exit_targets = self.bus.add(ExitTargets(), layout.BENCH.start)
        self.virtio: tuple[VirtioMmio, ...] = self._place_others() if config.devices or self._brought else ()
        self.bus.publish()

    def _place_others(self) -> tuple[VirtioMmio, ...]:
        from pyvmm.devices.kind import Context
        from pyvmm.machine.devices import place  # only needed for guests with such devices
        from pyvmm.machine.kicks import Kicks

        config = self.config
        context = Context(
            self.native,
            config.protection,
            self.memory,
            range(layout.RAM_BASE, layout.RAM_BASE + config.memory),
            self._end.unheard,
            pool=self.pool,
            planned=self._kernel is not None and self._kernel.pretends,
        )
        return place(config.devices, self._brought, context, self.bus, self.interrupts, Kicks(self.vm))

    def _take_brought(self) -> None:
        """Take ownership of a script's devices. Refuse one that another machine already owns, and leave it alone."""
        others = []
        for device in self._devices:
            if device.taken:
                others.append(device.name)
                continue
            device.taken = True
            self._brought.append(device)
        if others:
            raise UsageError(
                f"device {others[0]} already belongs to another machine, which closes it",
                hint="make a new device for each machine",
            )

    def _drop_brought(self) -> None:
        with contextlib.ExitStack() as rest:  # closes each, even if another's close raises
            while self._brought:
                rest.callback(self._brought.pop().close)

    # -- queries

    @property
    def descriptors(self) -> int:
        """About how many descriptors a process of this machine has open: a little more than it will, with its run's."""
        specs = self.config.devices
        queues = sum(getattr(spec, "queues", 0) or 0 for spec in specs)
        return OTHER_DESCRIPTORS + self.config.cpus + DEVICE_DESCRIPTORS * (len(specs) + len(self._devices)) + queues

    def role(self, kind: type[R]) -> tuple[R, ...]:
        """Return the devices of the role ``kind`` (see :mod:`pyvmm.devices.roles`), by address."""
        devices = (placed.device.behind for placed in self.bus.placed)
        return tuple(device for device in devices if isinstance(device, kind))

    @property
    def lazy(self) -> bool:
        """Whether guest memory is loaded page by page from a snapshot, on first access."""
        return self._start.lazy

    def failed(self, error: BaseException) -> None:
        """End the run because of ``error``, from any thread."""
        self._end.failed(error)

    # -- teardown

    def close_vm(self) -> None:
        """Destroy the VM but keep its memory mapped, to inspect the pages that the kernel returned.

        If a device cannot be closed, memory stays mapped forever. Its pending I/O may still write there, and must not
        hit another mapping.
        """
        try:
            self._stack.close()
        except BaseException:  # of several exceptions only the last is visible, and it may come from anywhere
            self._memory_stack.pop_all()
            raise

    def close(self) -> None:
        """Release everything: threads, devices, descriptors, mappings. Safe at any time, and repeatedly.

        Memory may stay mapped: see :meth:`close_vm`.
        """
        with self._memory_stack:
            self.close_vm()


def require_architecture() -> None:
    """Raise HostError where KVM runs guests of another architecture."""
    if (here := os.uname().machine) != "aarch64":
        raise HostError(
            f"this host is {here}, but pyvmm's guests are arm64: KVM runs guests of its own architecture only",
            hint="use the lab, an emulated arm64 host: pyvmm --lab VERB ..., or for a program pyvmm lab exec -- "
            "python3 FILE; from Python, subprocess.run(['pyvmm', 'lab', 'exec', '--', 'python3', FILE])",
        )


def _raise_limit_of_descriptors() -> None:
    """Take all descriptors that this process may give itself."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
