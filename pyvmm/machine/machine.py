# SPDX-License-Identifier: Apache-2.0
"""The one place that wires: from a configuration to a running guest and back to nothing.

Order of construction, and the reverse of it for teardown, which works from any half-built state:

    /dev/kvm -> VM -> slots -> vCPUs -> interrupt controller, lines -> devices on the bus -> what it starts with
    -> threads

The VM's last descriptor is closed before its memory is unmapped: only then has the kernel given every page back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pyvmm.devices.base import Device
from pyvmm.devices.bus import Bus
from pyvmm.devices.echo import Echo
from pyvmm.devices.exit_targets import ExitTargets
from pyvmm.devices.mailbox import Mailboxes
from pyvmm.devices.pl011 import Pl011
from pyvmm.devices.roles import Printing
from pyvmm.devices.share_bell import ShareBell
from pyvmm.errors import HostError, PyvmmError, hex_
from pyvmm.kvm.fd import KERNEL, Kernel
from pyvmm.kvm.system import System
from pyvmm.log import get_logger
from pyvmm.machine import boot, layout
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.ending import RunEnd
from pyvmm.machine.gic import create_gic
from pyvmm.machine.irq import Interrupts
from pyvmm.machine.ram import add_ram
from pyvmm.machine.start import Built, KernelImage, Start
from pyvmm.machine.threads import Threads
from pyvmm.machine.vm import create_vm, native_vcpu, protect
from pyvmm.memory.address import MIB
from pyvmm.memory.memory import Memory
from pyvmm.memory.relay import ShareRelay
from pyvmm.protection import Protection
from pyvmm.vcpu.cold import ColdExits, Intercept, Unclaimed
from pyvmm.vcpu.outcome import Ending, Outcome
from pyvmm.vcpu.thread import VcpuThread

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.devices.virtio.mmio import VirtioMmio
    from pyvmm.vcpu.counters import Counters

log = get_logger("machine")

R = TypeVar("R")


class Machine(Built):
    """A guest with its memory, vCPUs and devices; a context manager.

    ``unclaimed`` completes accesses to addresses without slot or device (see :data:`pyvmm.vcpu.cold.Unclaimed`);
    without it the guest gets an external abort. ``intercept`` hears of every stop of a vCPU first (see
    :data:`pyvmm.vcpu.cold.Intercept`). ``kernel`` answers its calls instead of this host's KVM: see
    :mod:`pyvmm.machine.plan`. ``start`` is where the guest begins: the kernel of ``config``, unless it is a
    :class:`pyvmm.machine.snapshot.Snapshot`. It stays open until this is closed, and is closed with it.

    ``devices`` are placed beside those of ``config`` and behind them: a window each, an interrupt line if it wants one,
    and a node in the device tree. Once this is entered they are its to close.
    """

    def __init__(
        self,
        config: MachineConfig,
        *,
        unclaimed: Unclaimed | None = None,
        intercept: Intercept | None = None,
        kernel: Kernel | None = None,
        start: Start | None = None,
        devices: Sequence[Device | VirtioDevice] = (),
    ) -> None:
        config.check()
        self.config = config
        self._unclaimed = unclaimed
        self._intercept = intercept
        self._kernel = kernel
        self._start = KernelImage() if start is None else start
        self._memory_stack = contextlib.ExitStack()
        self._memory_stack.callback(self._start.close)
        self._stack = contextlib.ExitStack()
        self._end = RunEnd()
        self._brought = list(devices)
        self._threads = Threads(lambda: [placed.device for placed in self.bus.placed])
        self._natives: list[Any] = []
        self._keep: list[Any] = []

    def __enter__(self) -> Machine:
        with contextlib.ExitStack() as half_built:
            half_built.callback(self.close)
            self._build()
            half_built.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- building

    def _build(self) -> None:
        config = self.config
        if self._kernel is None and (here := os.uname().machine) != "aarch64":
            raise HostError(
                f"this host is {here}, pyvmm's guests are arm64: KVM runs only its own architecture",
                hint="run the same command in the lab, a nested arm64 host: pyvmm --lab …",
            )
        self.tree = None if config.dtb is None else boot.read_tree(config.dtb)
        self._stack.callback(self._drop_brought)
        self.pool = config.pool_size(self.tree, virtio=not all(isinstance(each, Device) for each in self._brought))
        self._start.prepare(config)
        push = self._stack.enter_context
        self.system = push(System.open(kernel=self._kernel or KERNEL))
        vm, bits = create_vm(self.system, config)
        self.vm = push(vm)
        self.native = protect(self.vm, config)
        self.memory = self._memory_stack.enter_context(Memory(self.vm, config.protection, self.native, ipa_bits=bits))
        self._memory_stack.callback(self._start.close)  # it may serve memory: it ends before that does
        self.loadable = add_ram(self.memory, self.vm, config)
        self.relay = ShareRelay(self.native, self.memory.ledger)
        self.memory.on_evidence = self.relay.evidence
        self.memory.quiesce = self.quiet
        self.vcpus = [push(self.vm.create_vcpu(index)) for index in range(config.cpus)]
        for vcpu in self.vcpus:
            vcpu.init(power_off=vcpu.index > 0)
        self.gic = create_gic(self.vm, config.cpus)
        if self.gic is not None:
            self._stack.callback(self.gic.close)
        self.interrupts = Interrupts(self.vm, present=self.gic is not None)
        self._stack.callback(self.interrupts.close)
        self._place_devices()
        self.entry = self._start.enter(self)
        self._make_threads()

    def _place_devices(self) -> None:
        config = self.config
        self.bus = Bus(self.native)
        self._stack.callback(self.bus.close)
        line = self.interrupts.level(layout.PL011_SPI)
        uart = Pl011(config.serial_out, config.serial_in, self._end.unheard, line)
        self.uart = self.bus.add(uart, layout.PL011.start, line)
        self.bus.add(ShareBell(), layout.SHARE_DOORBELL.start)
        self.echo = self.bus.add(Echo(self.memory, self.relay), layout.ECHO.start)
        self.mailboxes = self.bus.add(Mailboxes(config.cpus), layout.MAILBOX.start)
        self.exit_targets = self.bus.add(ExitTargets(), layout.BENCH.start)
        self.virtio = self._place_others() if config.devices or self._brought else ()
        self.bus.publish()

    def _place_others(self) -> tuple[VirtioMmio, ...]:
        from pyvmm.devices.kind import Context
        from pyvmm.machine.devices import place  # of guests that have such devices

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
        return place(config.devices, self._brought, context, self.bus, self.interrupts)

    def _drop_brought(self) -> None:
        while self._brought:
            self._brought.pop().close()

    def _make_threads(self) -> None:
        for vcpu in self.vcpus:
            native, records = native_vcpu(vcpu, self.native, timed=self.config.timed)
            self._natives.append(native)
            self._keep.append(records)
            cold = ColdExits(
                native=native,
                vcpu=vcpu,
                memory=self.memory,
                relay=self.relay,
                bus=self.bus,
                uart=self.uart,
                mailboxes=self.mailboxes,
                finish=self._end.finish,
                wanted=self._wanted(vcpu.index),
                unclaimed=self._unclaimed,
                intercept=self._intercept,
            )
            self._threads.add(VcpuThread(native, cold.handle, self.failed, self._wake))
        self._stack.callback(self._leave)

    def _wake(self) -> None:
        self.mailboxes.wake()
        self.uart.wake()

    def _wanted(self, index: int) -> Callable[[], bool]:
        return lambda: self._threads[index].wanted

    # -- running

    def run(self) -> Outcome:
        """Start, wait for the end or the deadline, and say how it ended."""
        self.start()
        return self.wait(self.config.deadline)

    def start(self) -> None:
        """Seal memory and let every vCPU go. Raises HostError where a protected guest could not lock its memory."""
        if self.config.protection is Protection.PKVM:
            from pyvmm.memory.memlock import require_memlock

            require_memlock(sum(slot.size for slot in self.memory.slots))
        if self.config.prefault:
            self.prefault()
        self.memory.seal()
        self.uart.start()
        log.info(
            "starting",
            protection=self.config.protection.value,
            cpus=self.config.cpus,
            memory_mib=self.config.memory // MIB,
            backing=self.config.backing,
            kernel=self._start.kind,
            pc=hex_(self.entry.pc),
        )
        self._end.begin()
        self._threads.start()

    def prefault(self) -> None:
        """Populate all memory, before the start; HostError where there is not so much, or no way."""
        for slot in self.memory.slots:
            self.memory.populate(slot.gpa, slot.size)

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for the run's end; after ``timeout`` seconds end it as past its deadline."""
        outcome = self._end.wait(timeout) or self._end.finish(self._overdue(timeout))
        self._threads.stop()
        for device in self.role(Printing):
            device.drain()
        self._abandon_orders()
        outcome = self._end.finish(outcome)  # output that was lost by now is another reason
        self._end.say(outcome)
        return outcome

    def _overdue(self, timeout: float | None) -> Outcome:
        """Stop every vCPU, and say where each was when its time was over."""
        self._abort_output()
        # Devices may go on: one that is stuck must not keep the deadline from being told.
        self._threads.pause_alone()
        where = ", ".join(f"vCPU {vcpu.index} at pc {hex_(vcpu.pc)}" for vcpu in self.vcpus)
        return Outcome(Ending.DEADLINE, f"the guest was still running at its deadline of {timeout:g} s: {where}")

    def stop(self, reason: str = "stopped") -> None:
        """End the run from outside, from any thread; what the console's reader does not take at once is lost."""
        self._abort_output()
        self._end.finish(Outcome(Ending.INTERRUPTED, reason))

    def _abort_output(self) -> None:
        for device in self.role(Printing):
            device.abort()

    def role(self, kind: type[R]) -> tuple[R, ...]:
        """Return the devices that can do what ``kind`` says, one of :mod:`pyvmm.devices.roles`, by address."""
        devices = (placed.device.behind for placed in self.bus.placed)
        return tuple(device for device in devices if isinstance(device, kind))

    def pause(self) -> None:
        """Stop every vCPU and then every device, and return when all stand still. Not from a vCPU's own thread.

        Pauses nest: all goes on when each has been resumed. Where a device does not come to rest nothing is paused, and
        what it raises says so.
        """
        self._threads.pause()

    def resume(self) -> None:
        """Let every device and vCPU go on."""
        self._threads.resume()

    @property
    def paused(self) -> bool:
        """Whether :meth:`pause` holds it."""
        return self._threads.paused

    def quiet(self) -> AbstractContextManager[None]:
        """Keep every vCPU but the caller's own out of the guest: what moving slots under them needs."""
        return self._threads.quiet()

    @property
    def counters(self) -> Counters:
        """What the native loop has counted until now."""
        from pyvmm.vcpu.counters import Counters  # of a run that has begun

        return Counters.read(self.native, self._natives, self.elapsed_ns, self.started_ns)

    @property
    def natives(self) -> tuple[Any, ...]:
        """Each vCPU's ``struct pv_vcpu``: what it counts, and the ring it records shares and faults in."""
        return tuple(self._natives)

    @property
    def threads(self) -> tuple[VcpuThread, ...]:
        """Each vCPU's thread, to pause and let go one by one; none once the machine is closed."""
        return tuple(self._threads)

    @property
    def lazy(self) -> bool:
        """Whether pages of guest memory come only when they are touched, from a snapshot."""
        return self._start.lazy

    @property
    def started_ns(self) -> int:
        """When the first vCPU was let go, of CLOCK_MONOTONIC; 0 before."""
        return self._end.started_ns

    @property
    def ended_ns(self) -> int:
        """When the run ended; 0 before."""
        return self._end.ended_ns

    @property
    def elapsed_ns(self) -> int:
        """Nanoseconds since the first run, or of the whole run once it has ended; from 0."""
        return self._end.elapsed_ns

    def failed(self, error: BaseException) -> None:
        """End the run because of ``error``, from any thread."""
        self._end.failed(error)

    def _abandon_orders(self) -> None:
        outcome = self._end.outcome
        self.mailboxes.abandon(outcome.reason if outcome else "the machine stopped")

    # -- teardown

    def _leave(self) -> None:
        if self._end.outcome is None:
            self.stop("the machine was closed")
        self._threads.stop()
        # A kick writes to the vCPU's run area, which goes with the vCPU.
        self._threads.clear()
        self._abandon_orders()

    def close_vm(self) -> None:
        """Destroy the VM but keep its memory mapped, to look at what the kernel gave back."""
        self._stack.close()

    def close(self) -> None:
        """Give everything back: threads, devices, descriptors, mappings. Safe at any time, more than once.

        Memory stays mapped where a device cannot be closed: what it waits for may still write there, and must not
        find anybody else's.
        """
        with self._memory_stack:
            try:
                self.close_vm()
            except PyvmmError:
                self._memory_stack.pop_all()
                raise
