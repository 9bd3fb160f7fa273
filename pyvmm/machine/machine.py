# SPDX-License-Identifier: Apache-2.0
"""Run a guest: start, pause, resume, stop and wait for it.

The machine builds on :class:`~pyvmm.machine.hardware.Hardware` and adds a thread for each vCPU. The threads end before
anything below is torn down.
"""

from __future__ import annotations

import contextlib

from pyvmm._native import lib
from pyvmm.devices.roles import Printing
from pyvmm.errors import hex_, within_limits
from pyvmm.log import get_logger
from pyvmm.machine.hardware import Hardware
from pyvmm.machine.threads import Threads
from pyvmm.machine.vm import native_vcpu
from pyvmm.memory.address import MIB
from pyvmm.pages import GUEST_PAGE, HOST_PAGE
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

    ``unclaimed`` completes accesses to addresses without slot or device (see :data:`pyvmm.vcpu.cold.Unclaimed`).
    Without it the guest gets an external abort. ``intercept`` gets every stop of a vCPU first (see
    :data:`pyvmm.vcpu.cold.Intercept`). ``kernel`` replaces this host's KVM: see :mod:`pyvmm.machine.plan`. ``start`` is
    where the guest begins: by default the kernel of ``config``, or a :class:`pyvmm.machine.snapshot.Snapshot`. The
    machine closes it at its own end.

    ``devices`` are placed after those of ``config``. Each gets a window, an interrupt line if it wants one, and a node
    in the device tree. The machine owns and closes them once it is entered. No other machine may use them.
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
        self._ready = False
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
        """Start, wait for the end or deadline, and return the outcome. ``spent`` seconds of the deadline are over."""
        self.start()
        deadline = self.config.deadline
        return self._wait(None if deadline is None else max(deadline - spent, 0.0), deadline)

    def make_ready(self) -> None:
        """Take all that a start needs of the host but threads: the right to lock memory, populated memory. Idempotent.

        :meth:`start` does it. Afterwards the machine opens nothing. Raises HostError if a protected guest could not
        lock its memory, or if the host cannot populate it.
        """
        if self._ready:
            return
        if self.config.protection is Protection.PKVM:
            from pyvmm.memory.memlock import require_memlock

            require_memlock(sum(slot.size for slot in self.memory.slots))
        if self.config.protection is Protection.PKVM or self.config.prefault:
            from pyvmm.memory.cgroup import warn_of_cgroup

            warn_of_cgroup(sum(slot.size for slot in self.memory.slots))
        if self.config.prefault:
            self.prefault()
        self._ready = True

    def start(self) -> None:
        """Seal memory and start every vCPU.

        Raises what :meth:`make_ready` does, HostError if a vCPU's thread cannot start, and KvmError if the hypervisor
        cannot take a vCPU.
        """
        self.make_ready()
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
        if self.config.protection.by_hypervisor:
            self._introduce()
        if HOST_PAGE != GUEST_PAGE:
            from pyvmm.machine.livelock import Watchdog  # of the few hosts with such pages

            self._stack.enter_context(Watchdog(self.vcpus, self._natives, self._give_up))
        self._end.begin()
        with within_limits(self.descriptors):
            self._threads.start()

    def _give_up(self, outcome: Outcome) -> None:
        """End the run though its vCPUs do not come back. Nobody may be waiting for it but for an order."""
        self._end.finish(outcome)
        self._abandon_orders()

    def _introduce(self) -> None:
        """Have EL2 know every vCPU before the guest's first instruction.

        A vCPU that has never called KVM_RUN is unknown to EL2. Where EL2 itself answers PSCI, a CPU_ON of it fails for
        good. The first call makes it known, also one that returns before the guest runs.
        """
        for vcpu, native in zip(self.vcpus[1:], self._natives[1:], strict=True):
            if errno := lib.pv_settle(native):
                raise vcpu.error("KVM_RUN", errno, vcpu=vcpu.index)

    def prefault(self) -> None:
        """Populate all memory, before the start. Raises HostError if the host cannot populate so much."""
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
        outcome = self._end.finish(outcome)  # lost output takes precedence
        self._end.say(outcome)
        return outcome

    def _overdue(self, deadline: float | None) -> Outcome:
        """Stop every vCPU, and report its pc at the deadline, if the kernel tells it."""
        self._abort_output()
        # Devices keep running: a stuck device must not delay this report.
        self._threads.pause_alone()
        where = ", ".join(f"vCPU {vcpu.index} at {vcpu.place}" for vcpu in self.vcpus)
        return Outcome(Ending.DEADLINE, f"the guest was still running at its deadline of {deadline:g} s: {where}")

    def stop(self, reason: str = "stopped") -> None:
        """End the run, from any thread. Output that the console's reader does not take at once is lost."""
        self._abort_output()
        self._end.finish(Outcome(Ending.INTERRUPTED, reason))

    def _abort_output(self) -> None:
        for device in self.role(Printing):
            device.abort()

    def pause(self) -> None:
        """Pause every vCPU and then every device, and return when all are paused. Not from a vCPU's own thread.

        Pauses nest: the machine runs again after as many resumes. If a device cannot be paused, nothing is, and its
        exception is raised.
        """
        self._threads.pause()

    def resume(self) -> None:
        """Resume every device and vCPU."""
        self._threads.resume()

    @property
    def paused(self) -> bool:
        """Whether the machine is paused."""
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
        """Keep every vCPU but the caller's own out of the guest, for example to move slots."""
        return self._threads.quiet()

    @property
    def counters(self) -> Counters:
        """The native loop's counters."""
        from pyvmm.vcpu.counters import Counters  # only after the start

        return Counters.read(self.native, self._natives, self.elapsed_ns, self.started_ns, kicks=self.kicks)

    @property
    def kicks(self) -> int:
        """The number of virtqueue kicks that the kernel took, without an exit, and that devices have seen."""
        return sum(transport.kicks_without_exit for transport in self.virtio)

    @property
    def natives(self) -> tuple[pv_vcpu, ...]:
        """Each vCPU's ``struct pv_vcpu``: its counters, and its ring of recorded shares and faults."""
        return tuple(self._natives)

    @property
    def threads(self) -> tuple[VcpuThread, ...]:
        """Each vCPU's thread, to pause and resume one by one. Empty once the machine is closed."""
        return tuple(self._threads)

    @property
    def started_ns(self) -> int:
        """CLOCK_MONOTONIC time (ns) of the first vCPU's start; 0 before."""
        return self._end.started_ns

    @property
    def ended_ns(self) -> int:
        """CLOCK_MONOTONIC time (ns) of the run's end; 0 before."""
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
        # A kick writes to the vCPU's run area, which is unmapped with the vCPU.
        self._threads.clear()
        self._abandon_orders()
