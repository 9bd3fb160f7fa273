# SPDX-License-Identifier: Apache-2.0
"""A guest that runs: let go, paused, ended, and waited for.

What it runs on is :class:`~pyvmm.machine.hardware.Hardware`. A thread for each vCPU comes on top of that, and is gone
before anything below it is taken away.
"""

from __future__ import annotations

import contextlib

from pyvmm.devices.roles import Printing
from pyvmm.errors import hex_, within_limits
from pyvmm.log import get_logger
from pyvmm.machine.hardware import Hardware
from pyvmm.machine.threads import Threads
from pyvmm.machine.vm import native_vcpu
from pyvmm.memory.address import MIB
from pyvmm.protection import Protection
from pyvmm.vcpu.cold import ColdExits, Intercept, Unclaimed
from pyvmm.vcpu.outcome import Ending, Outcome
from pyvmm.vcpu.thread import VcpuThread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from pyvmm._native import CData, pv_vcpu
    from pyvmm.devices.base import Device
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.kvm.fd import Kernel
    from pyvmm.machine.clock import GuestClock
    from pyvmm.machine.config import MachineConfig
    from pyvmm.machine.start import Start
    from pyvmm.vcpu.counters import Counters

log = get_logger("machine")


class Machine(Hardware):
    """A guest with its memory, vCPUs and devices; a context manager.

    ``unclaimed`` completes accesses to addresses without slot or device (see :data:`pyvmm.vcpu.cold.Unclaimed`);
    without it the guest gets an external abort. ``intercept`` hears of every stop of a vCPU first (see
    :data:`pyvmm.vcpu.cold.Intercept`). ``kernel`` answers its calls instead of this host's KVM: see
    :mod:`pyvmm.machine.plan`. ``start`` is where the guest begins: the kernel of ``config``, unless it is a
    :class:`pyvmm.machine.snapshot.Snapshot`. It stays open until this is closed, and is closed with it.

    ``devices`` are placed beside those of ``config`` and behind them: a window each, an interrupt line if it wants one,
    and a node in the device tree. Once this is entered they are its to close, and no other machine takes them.
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
        super().__init__(config, kernel=kernel, start=start, devices=devices)
        self._unclaimed = unclaimed
        self._intercept = intercept
        self._threads = Threads(lambda: [placed.device for placed in self.bus.placed], lambda: self.clock)
        self._clock: GuestClock | None = None
        self._natives: list[pv_vcpu] = []
        self._keep: list[CData] = []

    def __enter__(self) -> Machine:
        with within_limits(self.descriptors), contextlib.ExitStack() as half_built:
            half_built.callback(self.close)
            self._build()
            self._make_threads()
            half_built.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_threads(self) -> None:
        self.memory.quiesce = self.quiet
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

    def run(self, *, spent: float = 0.0) -> Outcome:
        """Start, wait for the end or the deadline, and say how it ended; ``spent`` seconds of the deadline are over."""
        self.start()
        deadline = self.config.deadline
        return self._wait(None if deadline is None else max(deadline - spent, 0.0), deadline)

    def start(self) -> None:
        """Seal memory and let every vCPU go.

        Raises HostError where a protected guest could not lock its memory, or where there is no thread for each vCPU.
        """
        if self.config.protection is Protection.PKVM:
            from pyvmm.memory.memlock import require_memlock

            require_memlock(sum(slot.size for slot in self.memory.slots))
        if self.config.protection is Protection.PKVM or self.config.prefault:
            from pyvmm.memory.cgroup import warn_of_cgroup

            warn_of_cgroup(sum(slot.size for slot in self.memory.slots))
        if self.config.prefault:
            self.prefault()
        self.memory.seal()
        with within_limits(self.descriptors):
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
        with within_limits(self.descriptors):
            self._threads.start()

    def prefault(self) -> None:
        """Populate all memory, before the start; HostError where there is not so much, or no way."""
        for slot in self.memory.slots:
            self.memory.populate(slot.gpa, slot.size)

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for the run's end; after ``timeout`` seconds end it as past its deadline."""
        return self._wait(timeout, timeout)

    def _wait(self, timeout: float | None, deadline: float | None) -> Outcome:
        outcome = self._end.wait(timeout) or self._end.finish(self._overdue(deadline))
        self._threads.stop()
        for device in self.role(Printing):
            device.drain()
        self._abandon_orders()
        outcome = self._end.finish(outcome)  # output that was lost by now is another reason
        self._end.say(outcome)
        return outcome

    def _overdue(self, deadline: float | None) -> Outcome:
        """Stop every vCPU, and say where each was when its time was over."""
        self._abort_output()
        # Devices may go on: one that is stuck must not keep the deadline from being told.
        self._threads.pause_alone()
        where = ", ".join(f"vCPU {vcpu.index} at pc {hex_(vcpu.pc)}" for vcpu in self.vcpus)
        return Outcome(Ending.DEADLINE, f"the guest was still running at its deadline of {deadline:g} s: {where}")

    def stop(self, reason: str = "stopped") -> None:
        """End the run from outside, from any thread; what the console's reader does not take at once is lost."""
        self._abort_output()
        self._end.finish(Outcome(Ending.INTERRUPTED, reason))

    def _abort_output(self) -> None:
        for device in self.role(Printing):
            device.abort()

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

    @property
    def clock(self) -> GuestClock:
        """The guest's time, which stands with :meth:`pause` where it can."""
        if self._clock is None:
            from pyvmm.machine.clock import GuestClock  # of a run that is stopped

            kept = "the hypervisor keeps a protected guest's counters" if self.config.protection.by_hypervisor else None
            self._clock = GuestClock(self.vcpus[0], kept)
        return self._clock

    def quiet(self) -> AbstractContextManager[None]:
        """Keep every vCPU but the caller's own out of the guest: what moving slots under them needs."""
        return self._threads.quiet()

    @property
    def counters(self) -> Counters:
        """What the native loop has counted until now."""
        from pyvmm.vcpu.counters import Counters  # of a run that has begun

        return Counters.read(self.native, self._natives, self.elapsed_ns, self.started_ns, kicks=self.kicks)

    @property
    def kicks(self) -> int:
        """Kicks of virtqueues that the kernel took, so that there was no exit, and that their devices have seen."""
        return sum(transport.kicks_without_exit for transport in self.virtio)

    @property
    def natives(self) -> tuple[pv_vcpu, ...]:
        """Each vCPU's ``struct pv_vcpu``: what it counts, and the ring it records shares and faults in."""
        return tuple(self._natives)

    @property
    def threads(self) -> tuple[VcpuThread, ...]:
        """Each vCPU's thread, to pause and let go one by one; none once the machine is closed."""
        return tuple(self._threads)

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

    def _abandon_orders(self) -> None:
        outcome = self._end.outcome
        self.mailboxes.abandon(outcome.reason if outcome else "the machine stopped")

    def _leave(self) -> None:
        if self._end.outcome is None:
            self.stop("the machine was closed")
        self._threads.stop()
        # A kick writes to the vCPU's run area, which goes with the vCPU.
        self._threads.clear()
        self._abandon_orders()
