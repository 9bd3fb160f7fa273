# SPDX-License-Identifier: Apache-2.0
"""A live guest and a notebook: what a claim is written with, and what a script or the REPL uses to ask the kernel.

    from pyvmm.experiment import Experiment
    from pyvmm.protection import Protection

    with Experiment(Protection.PKVM) as x:
        page = x.page()
        x.guest.write64(page, 42)
        x.check("the host is locked out", x.host64(page) is None)
        print(x.verdict, x.evidence)

The machine is built on entry and started by the first use of :attr:`Experiment.guest`, so that slots and limits can be
changed before. Owns the machine; everything is given back on exit, whatever state it is in.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self

from pyvmm._native import lib
from pyvmm.errors import GuestMemoryError, PyvmmError, hex_
from pyvmm.experiment.host import settings
from pyvmm.experiment.record import Event, Evidence, Picture, RunFailure, Value, Verdict
from pyvmm.guest.orders import GuestFault
from pyvmm.guest.puppet import Puppet
from pyvmm.kvm.faulttrace import FaultTrace, TracedFault
from pyvmm.kvm.system import System
from pyvmm.labenv import in_lab
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.hardware import require_architecture
from pyvmm.machine.layout import PRIVATE_BOOT, RAM_BASE
from pyvmm.machine.machine import Machine
from pyvmm.memory.address import HUGE_SIZE, MIB, PAGE_SIZE, Gpa, Hva, align_up
from pyvmm.memory.choices import ConversionPolicy
from pyvmm.memory.ledger import ASSUMED, PageState
from pyvmm.protection import Protection
from pyvmm.uapi.kvm_cap import KVM_CAP_GUEST_MEMFD
from pyvmm.vcpu.cold import Unclaimed

if TYPE_CHECKING:
    from pyvmm._native import pv_vcpu
    from pyvmm.devices.base import Device
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.observe.pagemap import PageMap

FREE = Gpa(RAM_BASE + PRIVATE_BOOT)
"""From here to RAM's last 2 MiB, where the device tree is, nothing is loaded, nor is the payload's stack there."""
BEYOND = Gpa(RAM_BASE + (1 << 30))
"""Far above RAM: where experiments put slots of their own."""
SPARE_HUGE_PAGES = 4
"""Huge pages kept free beside those of a guest's RAM, for slots of an experiment's own."""
PATIENCE = 20.0
"""Seconds to wait for what must come (a failure of KVM_RUN, an answer)."""


class Untold(PyvmmError):
    """The claim cannot be told here: the message says why."""


class Text(str):
    """Text that a prompt shows as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class Experiment:
    """One guest, what was seen of it, and whether that is as claimed.

    ``memory`` is MiB of RAM; ``faults`` records stage-2 faults from before the first run (None: if that is possible);
    ``unclaimed`` is Machine's, and may be set later; ``conversion`` is for the emulated protection alone; ``timed``
    keeps the native loop's histograms; ``prefault`` and ``devices`` are the machine's.
    """

    def __init__(
        self,
        protection: Protection = Protection.NONE,
        backing: str = "memfd",
        *,
        memory: int = 16,
        cpus: int = 1,
        conversion: ConversionPolicy | str | None = None,
        faults: bool | None = False,
        unclaimed: Unclaimed | None = None,
        timed: bool = False,
        prefault: bool = False,
        devices: Sequence[Device | VirtioDevice] = (),
    ) -> None:
        if conversion is None or protection is not Protection.EMULATED:
            copy = protection is Protection.EMULATED and backing == "private"
            conversion = ConversionPolicy.COPY if copy else ConversionPolicy.PRESERVE
        self.protection, self.backing = protection, backing
        self.config = MachineConfig(
            "payload:puppet",
            protection,
            memory=memory * MIB,
            cpus=cpus,
            backing=backing,
            conversion=ConversionPolicy(conversion),
            serial_out=None,
            timed=timed,
            prefault=prefault,
        )
        self.evidence: list[Evidence] = []
        self.pictures: list[Picture] = []
        self.ticks: dict[str, int] = {}
        self.stack = contextlib.ExitStack()
        """What else to give back at the end; run before the machine is closed."""
        self._outer = contextlib.ExitStack()
        self._want_faults, self.unclaimed = faults, unclaimed
        self._devices = tuple(devices)
        self._begun, self._next = 0, FREE
        self._events: list[tuple[int, str, int, int]] = []
        self._failures: queue.Queue[RunFailure] = queue.Queue()
        self._go = threading.Semaphore(0)
        self._started = self._leaving = False

    def __enter__(self) -> Self:
        self._begun = time.monotonic_ns()
        self._require()
        with contextlib.ExitStack() as undo:
            if self._want_faults is not False:
                # Faults on the payload's own pages and on devices are not what an experiment is about.
                self._trace = undo.enter_context(FaultTrace(range(FREE, 1 << 52)))
                if self._want_faults and not self._trace.available:
                    raise Untold(f"faults cannot be counted: {self._trace.why_not}")
            if self.backing == "hugetlb":
                need = self.config.memory // HUGE_SIZE
                undo.enter_context(self.setting(settings.HUGE_PAGES, str(need + SPARE_HUGE_PAGES)))
            if self.backing == "thp":
                undo.enter_context(self.setting(settings.SHMEM_ENABLED, "advise"))
            machine = Machine(self.config, unclaimed=self._access, intercept=self._intercept, devices=self._devices)
            self.machine = undo.enter_context(machine)
            undo.callback(self.end)
            self._outer = undo.pop_all()
        return self

    def _require(self) -> None:
        """Say in one way what a host may lack, whatever the experiment needs it for."""
        require_architecture()
        with System.open() as system:
            if self.backing in ("guest_memfd", "private") and not system.check(KVM_CAP_GUEST_MEMFD):
                self.cannot("this kernel has no guest_memfd (KVM_CAP_GUEST_MEMFD is 0)")
            if self.protection.by_hypervisor and not system.supports_protected():
                self.cannot("this host makes no protected VMs (KVM_CREATE_VM refuses bit 31: EINVAL)")

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the guest and give everything back. Idempotent."""
        with self._outer:
            self.stack.close()

    def end(self) -> None:
        """Destroy the VM but keep its memory mapped, to look at what the kernel gave back. Idempotent."""
        self._leaving = True
        self._go.release(self.config.cpus)
        self.machine.close_vm()

    # -- the guest and its memory

    @property
    def guest(self) -> Puppet:
        """The guest's first vCPU, started if it was not yet."""
        self.start()
        return self._puppet

    def start(self) -> None:
        """Let the guest go; nothing can be loaded into its memory from the host after this. Idempotent."""
        if not self._started:
            self._started = True
            self.machine.start()
            self._puppet = Puppet(self.machine.mailboxes, timeout=PATIENCE)
            self._puppet.ping()

    def others(self) -> list[Puppet]:
        """Start every other vCPU and return their handles."""
        return [self.guest.cpu_on(index) for index in range(1, self.config.cpus)]

    @property
    def memory(self) -> Any:
        """The guest's memory, pyvmm.memory.memory.Memory."""
        return self.machine.memory

    def page(self, pages: int = 1, *, align: int = PAGE_SIZE) -> Gpa:
        """Return the gpa of ``pages`` pages that nothing has touched and no earlier call has returned."""
        start = Gpa(align_up(self._next, align))
        if start + pages * PAGE_SIZE > RAM_BASE + self.config.memory - HUGE_SIZE:
            raise PyvmmError(f"this guest's memory has no {pages} fresh pages left", hint="give it more with memory=")
        self._next = Gpa(start + pages * PAGE_SIZE)
        return start

    def view(self, gpa: int) -> Hva:
        """Return the address at which the host's own code may look at ``gpa``; the same unless pyvmm enforces."""
        for slot in self.memory.slots:
            if slot.gpa <= gpa < slot.end:
                return Hva(slot.view + gpa - slot.gpa)
        raise PyvmmError(f"gpa {hex_(gpa)} is in no slot")

    def host64(self, gpa: int) -> int | None:
        """Load 64 bits as the host, guarded; None where that faults."""
        try:
            return int.from_bytes(self.memory.read(gpa, 8), "little")
        except GuestMemoryError:
            return None

    def host_stores(self, gpa: int, value: int) -> bool:
        """Store 64 bits as the host, guarded; False where that faults."""
        try:
            self.memory.write(gpa, value.to_bytes(8, "little"))
        except GuestMemoryError:
            return False
        return True

    # -- what is seen

    def check(self, what: str, saw: Value | None, wanted: Value = True) -> bool:
        """Note what was seen where the claim says what it must be; the claim holds if every check is as wanted."""
        entry = Evidence(what, "nothing" if saw is None else saw, wanted)
        self.evidence.append(entry)
        return bool(entry.ok)

    def tell(self, what: str, saw: Value | None) -> None:
        """Note what was seen, for the reader; the verdict does not hang on it."""
        self.evidence.append(Evidence(what, "nothing" if saw is None else saw))

    def time(self, what: str, ticks: int) -> None:
        """Note ticks of the guest's counter; they are kept apart from what must repeat."""
        self.ticks[what] = ticks

    def cannot(self, why: str) -> NoReturn:
        """End the experiment: the claim cannot be told here."""
        raise Untold(why)

    def map(self) -> Text:
        """Draw the page map as it is now."""
        from pyvmm.observe.mapterm import render

        return Text("\n".join(render(self.page_map())))

    def page_map(self) -> PageMap:
        """Return what is known of every page now: the ledger's word, and under pkvm what traced faults tell besides.

        The ledger must assume there that the guest has touched every page. A page above FREE with a fault was donated;
        one without is assumed to be the host's still, as long as a fault brings one page.
        """
        from pyvmm.observe.pagemap import PageMap

        page_map = PageMap.of(self.memory.ledger)
        if not (self.protection.by_hypervisor and self._started and self._traced):
            return page_map
        donated = {fault.gpa for fault in self._trace.faults()}
        if self._trace.lost:
            return page_map
        runs: list[tuple[int, int, int]] = []
        for gpa, pages, entry in page_map.runs:
            told = max(gpa, FREE)
            if entry != PageState.PRIVATE | ASSUMED or told >= gpa + pages * PAGE_SIZE:
                runs.append((gpa, pages, entry))
                continue
            runs += [(gpa, (told - gpa) // PAGE_SIZE, entry)] if told > gpa else []
            runs += [
                (page, 1, PageState.PRIVATE if page in donated else PageState.HOST | ASSUMED)
                for page in range(told, gpa + pages * PAGE_SIZE, PAGE_SIZE)
            ]
        return PageMap.from_runs(runs)

    def exits(self) -> Text:
        """Say how many exits of which kind there were, and how many conversions."""
        return Text(self.machine.counters.line())

    def picture(self, title: str) -> None:
        """Keep the page map as it is now."""
        self.pictures.append(Picture(title, [(gpa, pages, entry) for gpa, pages, entry in self.page_map().runs]))

    def event(self, kind: str, gpa: int, pages: int = 1) -> None:
        """Note for the timeline that something was done to memory now."""
        self._events.append((time.monotonic_ns(), kind, gpa, pages))

    def faults(self, gpa: int, pages: int = 1) -> list[TracedFault]:
        """Return the stage-2 faults the kernel has traced in a range until now; needs ``faults=True``.

        The kernel tells page addresses; nothing in RAM's last 2 MiB or below FREE is recorded.
        """
        end = gpa + pages * PAGE_SIZE
        return [fault for fault in self._trace.faults() if gpa <= fault.gpa < end]

    @property
    def _traced(self) -> bool:
        return self._want_faults is not False and self._trace.available

    @property
    def verdict(self) -> Verdict:
        """What the checks say."""
        checked = [entry.ok for entry in self.evidence if entry.ok is not None]
        if not checked:
            return Verdict.UNTOLD  # an experiment that checks nothing tells nothing
        return Verdict.HOLDS if all(checked) else Verdict.FAILS

    def events(self) -> tuple[tuple[Event, ...], list[int]]:
        """Return what happened to memory, in order, and when, in ns since the experiment began."""
        found = list(self._events)
        if self._traced:
            tree = range(RAM_BASE + self.config.memory - HUGE_SIZE, RAM_BASE + self.config.memory)
            found += [(fault.ns, "fault", fault.gpa, 1) for fault in self._trace.faults() if fault.gpa not in tree]
        found.sort()
        events = tuple(Event(order, kind, gpa, pages) for order, (_, kind, gpa, pages) in enumerate(found))
        return events, [ns - self._begun for ns, *_ in found]

    # -- KVM_RUN that fails

    def failure(self, timeout: float = PATIENCE) -> RunFailure:
        """Wait until a vCPU's KVM_RUN has failed, and return how; that vCPU waits for :meth:`retry`."""
        try:
            return self._failures.get(timeout=timeout)
        except queue.Empty:
            raise Untold(f"KVM_RUN was expected to fail and has not within {timeout:g} s") from None

    def failed(self, order: Any, timeout: float = PATIENCE) -> RunFailure | None:
        """Wait for an order's end: None when the guest carried it out, or how KVM_RUN failed."""
        deadline = time.monotonic() + timeout
        while not order.done():
            with contextlib.suppress(queue.Empty):
                return self._failures.get(timeout=0.005)
            if time.monotonic() > deadline:
                raise Untold(f"the guest neither answered nor failed within {timeout:g} s")
        return None

    def unasked_failures(self) -> list[RunFailure]:
        """Return the failures of KVM_RUN that the experiment has not asked for."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._failures.get_nowait())
        return found

    def went(self, order: Any, timeout: float = PATIENCE) -> str:
        """Wait for an order's end and name it: ``went on``, or the errno of KVM_RUN, and what the kernel told with it.

        A vCPU whose KVM_RUN failed waits for :meth:`retry`, or for the experiment's end.
        """
        failure = self.failed(order, timeout)
        if failure is None:
            try:
                order.result()
            except GuestFault as fault:
                return "external abort" if fault.trap and fault.trap.is_external else "trap"
            return "went on"
        return str(failure)

    def retry(self) -> None:
        """Let the vCPU whose KVM_RUN failed try again."""
        self._go.release()

    def _access(self, native: pv_vcpu) -> bool:
        return self.unclaimed is not None and self.unclaimed(native)

    def _intercept(self, stop: int, native: pv_vcpu) -> bool | None:
        if stop != lib.PV_STOP_FAILED:
            return None
        told = native.fault_gpa, native.fault_size, native.fault_flags
        self._failures.put(RunFailure(native.index, native.error, native.exit_reason, *told))
        self._go.acquire()
        return not self._leaving

    # -- settings of the host

    @contextlib.contextmanager
    def setting(self, path: str, value: str) -> Iterator[None]:
        """Change a setting of the whole host while the block runs: only in the lab, where the host is ours."""
        try:
            before = settings.read(path)
        except OSError as error:
            self.cannot(f"{path}: {error.strerror}")
        if before == value:
            yield
            return
        if not in_lab():
            self.cannot(f"{path} is {before}, the experiment needs {value}, and only the lab's settings are changed")
        try:
            settings.write(path, value)
        except OSError as error:
            self.cannot(f"{path} cannot be set to {value}: {error.strerror}")
        try:
            yield
        finally:
            settings.write(path, before)
