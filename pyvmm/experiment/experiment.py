# SPDX-License-Identifier: Apache-2.0
"""A live guest with recorded evidence, for claims, scripts and the REPL.

    from pyvmm.experiment import Experiment
    from pyvmm.protection import Protection

    with Experiment(Protection.PKVM) as x:
        page = x.page()
        x.guest.write64(page, 42)
        x.check("the host is locked out", x.host64(page) is None)
        print(x.verdict, x.evidence)

The machine is built on entry and started by the first use of :attr:`Experiment.guest`, so that slots and limits can be
changed before. Owns the machine. On exit everything is released, in any state.
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
from pyvmm.machine.boot import FDT_ROOM
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.hardware import require_architecture
from pyvmm.machine.layout import PRIVATE_BOOT, RAM_BASE
from pyvmm.machine.machine import Machine
from pyvmm.memory.address import MIB, Gpa, Hva, align_up
from pyvmm.memory.choices import ConversionPolicy
from pyvmm.memory.ledger import ASSUMED, PageState
from pyvmm.pages import HOST_PAGE, HUGE_SIZE
from pyvmm.protection import Protection
from pyvmm.uapi.kvm_cap import KVM_CAP_GUEST_MEMFD
from pyvmm.vcpu.cold import Unclaimed

if TYPE_CHECKING:
    from pyvmm._native import pv_vcpu
    from pyvmm.devices.base import Device
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.observe.pagemap import PageMap

FREE = Gpa(RAM_BASE + PRIVATE_BOOT)
"""Start of free RAM. It ends at RAM's last 2 MiB, which hold the device tree. The payload's stack is below."""
BEYOND = Gpa(RAM_BASE + (1 << 30))
"""The address, far above RAM, of an experiment's own slots."""
MEMORY = min(8 * HUGE_SIZE // MIB, 512)
"""MiB of RAM unless said otherwise: some huge pages of the host, and less than what lies below BEYOND."""
SPARE_HUGE_PAGES = 4
"""Huge pages to keep free for an experiment's own slots, besides those of guest RAM."""
PATIENCE = 20.0
"""Seconds to wait for an expected event (a failure of KVM_RUN, an answer)."""


class Untold(PyvmmError):
    """The claim cannot be tested here. The message has the reason."""


class Text(str):
    """Text that a Python prompt shows without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class Experiment:
    """One guest, the evidence about it, and the verdict.

    ``backing`` is one of BACKINGS, ``memory`` is MiB of RAM, ``cpus`` is the number of vCPUs. ``faults`` records
    stage-2 faults from before the first run (None: if possible). ``unclaimed`` is Machine's, and may be set later.
    ``conversion`` is only for the emulated protection. ``timed`` keeps the native loop's histograms. ``prefault``
    and ``devices`` are the machine's.
    """

    def __init__(
        self,
        protection: Protection = Protection.NONE,
        backing: str = "memfd",
        *,
        memory: int = MEMORY,
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
        """More resources to release at the end, before the machine is closed."""
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
                # Exclude faults on the payload's own pages and on devices.
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
        """Report a missing host feature in the same words for every experiment."""
        require_architecture()
        with System.open() as system:
            if self.backing in ("guest_memfd", "private") and not system.check(KVM_CAP_GUEST_MEMFD):
                self.cannot("this kernel has no guest_memfd (KVM_CAP_GUEST_MEMFD is 0)")
            if self.protection.by_hypervisor and not system.supports_protected():
                self.cannot("this host makes no protected VMs (KVM_CREATE_VM refuses bit 31: EINVAL)")

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the guest and release everything. Idempotent."""
        with self._outer:
            self.stack.close()

    def end(self) -> None:
        """Destroy the VM but keep its memory mapped, to inspect the returned pages. Idempotent."""
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
        """Start the guest. Afterwards the host cannot load into its memory. Idempotent."""
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

    def page(self, pages: int = 1, *, align: int = HOST_PAGE) -> Gpa:
        """Return the gpa of ``pages`` unused pages that no earlier call has returned, a multiple of ``align`` bytes.

        Raises PyvmmError if the guest's memory has no such pages left.
        """
        start = Gpa(align_up(self._next, align))
        if start + pages * HOST_PAGE > RAM_BASE + self.config.memory - FDT_ROOM:
            raise PyvmmError(f"this guest's memory has no {pages} fresh pages left", hint="give it more with memory=")
        self._next = Gpa(start + pages * HOST_PAGE)
        return start

    def view(self, gpa: int) -> Hva:
        """Return the host code's address of ``gpa``. It differs from KVM's only under the emulated protection.

        Raises PyvmmError if ``gpa`` is in no slot.
        """
        for slot in self.memory.slots:
            if slot.gpa <= gpa < slot.end:
                return Hva(slot.view + gpa - slot.gpa)
        raise PyvmmError(f"gpa {hex_(gpa)} is in no slot")

    def host64(self, gpa: int) -> int | None:
        """Load 64 bits as the host, guarded. None if that faults."""
        try:
            return int.from_bytes(self.memory.read(gpa, 8), "little")
        except GuestMemoryError:
            return None

    def host_stores(self, gpa: int, value: int) -> bool:
        """Store 64 bits as the host, guarded. False if that faults."""
        try:
            self.memory.write(gpa, value.to_bytes(8, "little"))
        except GuestMemoryError:
            return False
        return True

    # -- evidence

    def check(self, what: str, saw: Value | None, wanted: Value = True) -> bool:
        """Record an observation and return whether ``saw`` is ``wanted``. The claim holds if every check is so."""
        entry = Evidence(what, "nothing" if saw is None else saw, wanted)
        self.evidence.append(entry)
        return bool(entry.ok)

    def tell(self, what: str, saw: Value | None) -> None:
        """Record what was seen, ``saw``, for the reader, without effect on the verdict."""
        self.evidence.append(Evidence(what, "nothing" if saw is None else saw))

    def time(self, what: str, ticks: int) -> None:
        """Record ``ticks`` of the guest's counter, separately from reproducible observations."""
        self.ticks[what] = ticks

    def cannot(self, why: str) -> NoReturn:
        """End the experiment: the claim cannot be tested here. Raises Untold, always."""
        raise Untold(why)

    def map(self) -> Text:
        """Draw the current page map."""
        from pyvmm.observe.mapterm import render

        return Text("\n".join(render(self.page_map())))

    def page_map(self) -> PageMap:
        """Return the state of every page: from the ledger, and under pkvm also from traced faults.

        Under pkvm the ledger assumes that the guest has used every page. A page above FREE with a fault was donated.
        One without a fault is assumed to still belong to the host, as long as each fault maps one page.
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
            if entry != PageState.PRIVATE | ASSUMED or told >= gpa + pages * HOST_PAGE:
                runs.append((gpa, pages, entry))
                continue
            runs += [(gpa, (told - gpa) // HOST_PAGE, entry)] if told > gpa else []
            runs += [
                (page, 1, PageState.PRIVATE if page in donated else PageState.HOST | ASSUMED)
                for page in range(told, gpa + pages * HOST_PAGE, HOST_PAGE)
            ]
        return PageMap.from_runs(runs)

    def exits(self) -> Text:
        """Return a text with the exits by kind and the conversions."""
        return Text(self.machine.counters.line())

    def picture(self, title: str) -> None:
        """Record the current page map under ``title``."""
        self.pictures.append(Picture(title, [(gpa, pages, entry) for gpa, pages, entry in self.page_map().runs]))

    def event(self, kind: str, gpa: int, pages: int = 1) -> None:
        """Record an event for the timeline. ``kind`` is fault, share, unshare, punch, convert or slot."""
        self._events.append((time.monotonic_ns(), kind, gpa, pages))

    def faults(self, gpa: int, pages: int = 1) -> list[TracedFault]:
        """Return the stage-2 faults that the kernel has traced in a range; needs ``faults=True``.

        The addresses are those of pages. RAM's last 2 MiB and addresses below FREE are not recorded.
        """
        end = gpa + pages * HOST_PAGE
        return [fault for fault in self._trace.faults() if gpa <= fault.gpa < end]

    @property
    def _traced(self) -> bool:
        return self._want_faults is not False and self._trace.available

    @property
    def verdict(self) -> Verdict:
        """The verdict of all checks."""
        checked = [entry.ok for entry in self.evidence if entry.ok is not None]
        if not checked:
            return Verdict.UNTOLD  # an experiment without checks has no verdict
        return Verdict.HOLDS if all(checked) else Verdict.FAILS

    def events(self) -> tuple[tuple[Event, ...], list[int]]:
        """Return the events of memory, in order, and their times in ns since the experiment began."""
        found = list(self._events)
        if self._traced:
            tree = range(RAM_BASE + self.config.memory - FDT_ROOM, RAM_BASE + self.config.memory)
            found += [(fault.ns, "fault", fault.gpa, 1) for fault in self._trace.faults() if fault.gpa not in tree]
        found.sort()
        events = tuple(Event(order, kind, gpa, pages) for order, (_, kind, gpa, pages) in enumerate(found))
        return events, [ns - self._begun for ns, *_ in found]

    # -- KVM_RUN that fails

    def failure(self, timeout: float = PATIENCE) -> RunFailure:
        """Wait until a vCPU's KVM_RUN has failed, and return the failure. That vCPU waits for :meth:`retry`.

        Raises Untold after ``timeout`` seconds without a failure.
        """
        try:
            return self._failures.get(timeout=timeout)
        except queue.Empty:
            raise Untold(f"KVM_RUN was expected to fail and has not within {timeout:g} s") from None

    def failed(self, order: Any, timeout: float = PATIENCE) -> RunFailure | None:
        """Wait for an order's end. Returns None on success, or the failure of KVM_RUN.

        Raises Untold after ``timeout`` seconds with neither.
        """
        deadline = time.monotonic() + timeout
        while not order.done():
            with contextlib.suppress(queue.Empty):
                return self._failures.get(timeout=0.005)
            if time.monotonic() > deadline:
                raise Untold(f"the guest neither answered nor failed within {timeout:g} s")
        return None

    def unasked_failures(self) -> list[RunFailure]:
        """Return the failures of KVM_RUN that the experiment has not collected."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._failures.get_nowait())
        return found

    def went(self, order: Any, timeout: float = PATIENCE) -> str:
        """Wait for an order's end and name it: ``went on``, or the errno of KVM_RUN with the kernel's details.

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
        """Let the vCPU with the failed KVM_RUN try again."""
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
        """Change a host-wide setting during the block. Only in the lab, which owns its host."""
        try:
            before = settings.read(path)
        except OSError as error:
            self.cannot(f"{path}: {error.strerror}")
        if before == value:
            yield
            return
        if not in_lab():
            self.cannot(f"{path} is {before}, but must be {value}, and settings are only changed in the lab")
        try:
            settings.write(path, value)
        except OSError as error:
            self.cannot(f"{path} cannot be set to {value}: {error.strerror}")
        try:
            yield
        finally:
            settings.write(path, before)
