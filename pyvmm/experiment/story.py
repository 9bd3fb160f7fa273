# SPDX-License-Identifier: Apache-2.0
"""Run and check the life of a protected guest, step by step, for ``pyvmm demo``.

Owns the machine that it makes. Every fact comes from the kernel, the guest or the VMM at that moment. A wrong fact is
marked, and the story continues.
"""

from __future__ import annotations

import contextlib
import platform
from typing import TYPE_CHECKING, NamedTuple

from pyvmm import abi
from pyvmm.devices.echo import ANSWER_OFFSET
from pyvmm.errors import GuestMemoryError, hex_
from pyvmm.guest.puppet import Puppet
from pyvmm.machine import layout
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine
from pyvmm.memory.address import MIB, Gpa
from pyvmm.memory.choices import DEFAULT_MEMORY
from pyvmm.memory.memlock import LockedMemory
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyvmm.memory.relay import ShareEvent

PAGES = 16
# Away from loaded data: the payload is at RAM's start, the device tree at its end.
TOUCHED = Gpa(layout.RAM_BASE + DEFAULT_MEMORY // 2)
SECRET = Gpa(TOUCHED + PAGES * HOST_PAGE)
SHARED = Gpa(SECRET + HOST_PAGE)
KEPT = Gpa(SHARED + HOST_PAGE)
WARM = Gpa(KEPT + HOST_PAGE)

GREETING = b"from the host, before the run..."
PRIVATE = b"a guest's secret"
REQUEST = b"hello from a protected guest...."
FAREWELL = b"shared to the end..............."


class Step(NamedTuple):
    """One step: its title, and its facts, each with whether it is as expected."""

    title: str
    facts: list[tuple[bool, str]]

    @property
    def ok(self) -> bool:
        """Whether all facts are as expected."""
        return all(good for good, _ in self.facts)


class Story:
    """The story. :meth:`tell` runs it once, and passes each finished step to ``say``.

    Under the emulated protection pyvmm keeps the host out itself: no page is locked, and none is scrubbed at the end.
    """

    def __init__(self, say: Callable[[Step], None], protection: Protection = Protection.PKVM) -> None:
        self._say = say
        self._protection = protection
        self._facts: list[tuple[bool, str]] = []
        self._events: list[ShareEvent] = []
        self.ok = True

    def tell(self) -> str:
        """Run the guest through its life. Returns the line of exit statistics."""
        before = locked_kib()
        config = MachineConfig("payload:puppet", self._protection, DEFAULT_MEMORY, serial_out=None)
        with Machine(config) as machine:
            self._machine = machine
            machine.relay.subscribe(self._events.append)
            self._create(before)
            guest = self._start()
            self._donate(guest)
            self._lock_out(guest)
            self._share(guest)
            self._answer(guest)
            self._take_back(guest)
            self._end(guest)
            line = machine.counters.line()
            self._tear_down(before)
        return line

    # -- the steps

    def _create(self, before: int) -> None:
        memory = self._machine.memory
        pkvm = self._protection.by_hypervisor
        with self._step("A protected VM is made" if pkvm else "A VM is made whose protection pyvmm emulates"):
            how = "KVM_CREATE_VM with bit 31" if pkvm else "a plain KVM_CREATE_VM"
            self._fact(True, f"{how} on Linux {platform.release()}; {DEFAULT_MEMORY // MIB} MiB of memfd, 1 vCPU")
            memory.write(SECRET, GREETING)
            seen = memory.read(SECRET, len(GREETING))
            self._fact(
                seen == GREETING, f"the host still writes and reads guest memory: {text(seen)} at {hex_(SECRET)}"
            )
            self._fact(locked_kib() == before, f"locked by this process (VmLck): {locked_kib()} kB")

    def _start(self) -> Puppet:
        with self._step("The guest starts"):
            self._machine.start()
            guest = Puppet(self._machine.mailboxes, timeout=60.0)
            pong = guest.ping()
            self._fact(pong.el == 1, f"a vCPU answers from EL{pong.el}; it takes orders through a mailbox")
            # After the first order its code and stack are donated. Further growth comes from ordered accesses.
            guest.touch(WARM, 1)
            if self._protection.by_hypervisor:
                locked = locked_kib()
                self._fact(locked > 0, f"its code, stack and device tree are its own now: VmLck {locked} kB")
        return guest

    def _donate(self, guest: Puppet) -> None:
        if not self._protection.by_hypervisor:
            with self._step("Pages are private before the guest touches them"):
                closed = self._closed()
                self._fact(closed == PAGES, f"of {PAGES} fresh pages {closed} fault on an access by this process")
                guest.touch(TOUCHED, PAGES)
            return
        with self._step("Pages are donated as the guest touches them"):
            before = locked_kib()
            guest.touch(TOUCHED, PAGES)
            grown, due = locked_kib() - before, PAGES * HOST_PAGE // 1024
            self._fact(
                grown == due, f"{PAGES} fresh pages touched: VmLck {before} -> {before + grown} kB, {due} expected"
            )

    def _lock_out(self, guest: Puppet) -> None:
        with self._step("The host is locked out"):
            seen = get(guest, SECRET, len(GREETING))
            self._fact(seen == GREETING, f"the guest reads what the host left: {text(seen)}")
            put(guest, SECRET, PRIVATE)
            self._fact(*self._refused(SECRET))
            closed = self._closed()
            self._fact(
                closed == PAGES, f"of the {PAGES} pages touched above {closed} fault too; the guest has noticed nothing"
            )
            seen = get(guest, SECRET, len(PRIVATE))
            self._fact(seen == PRIVATE, f"the guest still reads {text(seen)}")

    def _share(self, guest: Puppet) -> None:
        with self._step("The guest shares a page, and the VMM is told"):
            put(guest, SHARED, REQUEST)
            done = guest.share(SHARED)
            self._fact(done.status == 0, f"MEM_SHARE of {hex_(SHARED)} returned {done.status} to the guest")
            self._fact(*self._heard(SHARED, shared=True))
            seen = self._machine.memory.read(SHARED, len(REQUEST))
            self._fact(seen == REQUEST, f"the host reads what the guest wrote there: {text(seen)}")
            guest.share(KEPT)
            put(guest, KEPT, FAREWELL)

    def _answer(self, guest: Puppet) -> None:
        with self._step("A device answers through that page"):
            echo = layout.ECHO.start
            guest.write64(echo + abi.ECHO_PAGE, SECRET)
            status = guest.read64(echo + abi.ECHO_STATUS)
            self._fact(
                status == abi.ECHO_NOT_SHARED, f"offered the private page, the echo device refuses it: status {status}"
            )
            guest.write64(echo + abi.ECHO_PAGE, SHARED)
            guest.write64(echo + abi.ECHO_REQUEST, len(REQUEST))
            status, count = guest.read64(echo + abi.ECHO_STATUS), guest.read64(echo + abi.ECHO_COUNT)
            self._fact(
                (status, count) == (abi.ECHO_OK, 1),
                f"given the shared one, it answers: status {status}, answers {count}",
            )
            seen = get(guest, SHARED + ANSWER_OFFSET, len(REQUEST))
            self._fact(seen == REQUEST.upper(), f"the guest reads {text(seen)}")

    def _take_back(self, guest: Puppet) -> None:
        with self._step("The guest takes the page back"):
            done = guest.unshare(SHARED)
            self._fact(done.status == 0, f"MEM_UNSHARE of {hex_(SHARED)} returned {done.status}")
            self._fact(*self._heard(SHARED, shared=False))
            page = guest.read64(layout.ECHO.start + abi.ECHO_PAGE)
            self._fact(page == 0, f"the device has let go of it: its page is {hex_(page)}")
            self._fact(*self._refused(SHARED))
            seen = get(guest, SHARED, len(REQUEST))
            self._fact(seen == REQUEST, f"the guest has kept its contents: {text(seen)}")

    def _end(self, guest: Puppet) -> None:
        with self._step("The guest powers off"):
            guest.off()
            outcome = self._machine.wait(60.0)
            self._fact(outcome.ending is Ending.POWEROFF, f"{outcome.reason}; exit status {outcome.status}")
            if self._protection.by_hypervisor:
                self._fact(locked_kib() > 0, f"its pages stay locked while the VM lives: VmLck {locked_kib()} kB")

    def _tear_down(self, before: int) -> None:
        memory = self._machine.memory
        pkvm = self._protection.by_hypervisor
        with self._step("Everything is torn down and scrubbed" if pkvm else "Everything is torn down"):
            self._machine.close_vm()
            after = locked_kib()
            self._fact(after == before, f"VM destroyed: VmLck {after} kB, as before the run")
            if pkvm:
                pages = [SECRET, SHARED, *(TOUCHED + n * HOST_PAGE for n in range(PAGES))]
                zero = sum(not any(memory.read(page, HOST_PAGE)) for page in pages)
                said = f"{zero} of {len(pages)} private pages come back as zeros, the secret's among them"
                self._fact(zero == len(pages), said)
            seen = memory.read(KEPT, len(FAREWELL))
            self._fact(seen == FAREWELL, f"a page still shared keeps its contents: {text(seen)}")

    # -- finding facts

    @contextlib.contextmanager
    def _step(self, title: str) -> Iterator[None]:
        self._facts = []
        yield
        step = Step(title, self._facts)
        self.ok = self.ok and step.ok
        self._say(step)

    def _fact(self, good: bool, what: str) -> None:
        self._facts.append((good, what))

    def _closed(self) -> int:
        """Count the pages at TOUCHED that this process cannot read."""
        pages = [TOUCHED + n * HOST_PAGE for n in range(PAGES)]
        return sum(not self._machine.memory.probe(page) for page in pages)

    def _refused(self, gpa: int) -> tuple[bool, str]:
        """Try to read a private page as the host. The read must fail, without a crash."""
        try:
            seen = self._machine.memory.read(gpa, 8)
        except GuestMemoryError as error:
            return True, f"a host load at {hex_(gpa)} faults (SIGSEGV, caught): the page is {error.state}"
        return False, f"a host load at {hex_(gpa)} went through: {seen.hex()}"

    def _heard(self, gpa: int, *, shared: bool) -> tuple[bool, str]:
        """Look for the conversion among the relay's announcements."""
        what = "share" if shared else "unshare"
        for event in self._events:
            if event.shared == shared and event.gpa <= gpa < event.gpa + event.npages * HOST_PAGE:
                return (
                    True,
                    f"the relay announced the {what} before the guest went on (source: {event.source.name.lower()})",
                )
        return False, f"the relay has announced no {what} of {hex_(gpa)}"


def locked_kib() -> int:
    """Return this process's VmLck, in KiB."""
    return LockedMemory.read().locked // 1024


def put(guest: Puppet, gpa: int, data: bytes) -> None:
    """Have the guest store ``data``, in whole words."""
    for at in range(0, len(data), 8):
        guest.write64(gpa + at, int.from_bytes(data[at : at + 8], "little"))


def get(guest: Puppet, gpa: int, size: int) -> bytes:
    """Have the guest load ``size`` bytes, in whole words."""
    return b"".join(word.to_bytes(8, "little") for word in guest.words(gpa, size // 8))


def text(data: bytes) -> str:
    """Quote bytes for a message, without the padding dots at the end."""
    return '"' + data.decode("latin-1").encode("unicode_escape").decode().rstrip(".") + '"'
