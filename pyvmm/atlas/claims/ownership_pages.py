# SPDX-License-Identifier: Apache-2.0
"""The pages that ownership claims try an access on, and the wording of its result.

This module has no claims. An access is tried on a page that the guest has not touched, on a shared page, and last on a
private page. The private page is last because a vCPU does not run again after its page was taken by force.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass

from pyvmm.experiment import Experiment
from pyvmm.experiment.host.access import PATTERN
from pyvmm.experiment.host.syscalls import Answer
from pyvmm.experiment.raw import place
from pyvmm.guest.orders import GuestFault
from pyvmm.memory.address import Gpa
from pyvmm.pages import HOST_PAGE

GUESTS = 0x6775_6573_7400_0001
"""What the guest stores in pages of its own."""
HOSTS = 0x686F_7374_0000_0002
"""What the host has put into a page before the guest's first touch."""
WRITTEN = int.from_bytes(PATTERN[:8], "little")
"""What accesses that write leave."""
FRESH, SHARED, PRIVATE = "a page the guest never touched", "a shared page", "a private page"
ZEROS = "ok, sees zeros"
FINDS = "the guest then finds in {}"
WORDS = {GUESTS: "the guest's data", HOSTS: "the host's data", WRITTEN: "what the access wrote", 0: "zeros"}

Access = Callable[[Gpa], Answer]


@dataclass(frozen=True)
class Pages:
    """One page of each kind, in the guest's address space. A protection without sharing has no shared one."""

    fresh: Gpa
    private: Gpa
    shared: Gpa | None


def pages(x: Experiment) -> Pages:
    """Make them, and start the guest."""
    fresh, private, shared = x.page(), x.page(), x.page()
    x.host_stores(fresh, HOSTS)
    x.guest.write64(private, GUESTS)
    if not x.protection.isolates:
        return Pages(fresh, private, None)
    x.guest.write64(shared, GUESTS)
    x.guest.share(shared)
    return Pages(fresh, private, shared)


def kept_out(x: Experiment, text: str, access: Access, *, zeros: bool = False) -> None:
    """Check that an access to a private page fails, or shows ``zeros``, and does not harm the guest.

    ``text`` names the access, with ``{}`` for the page. The other pages are tried for comparison. If an access that
    should show zeros dies without data, the result is inconclusive.
    """
    each = pages(x)
    _tell(x, text, access, each.fresh, FRESH)
    if each.shared is not None:
        _tell(x, text, access, each.shared, SHARED)
    answer = access(each.private)
    if zeros and answer.died:
        x.cannot(f"{text.format(PRIVATE)}: {answer.died}")
    due = ZEROS if zeros else "an error" if answer.ok else outcome(answer)
    x.check(text.format(PRIVATE), outcome(answer), due)
    x.check(FINDS.format(PRIVATE), what_it_finds(x, each.private), WORDS[GUESTS])


def harmless(x: Experiment, text: str, access: Access) -> None:
    """Check that an operation on a page changes nothing for the guest, whatever its result; as in :func:`kept_out`."""
    each = pages(x)
    _tell(x, text, access, each.fresh, FRESH)
    for gpa, kind in ((each.shared, SHARED), (each.private, PRIVATE)):
        if gpa is not None:
            x.tell(text.format(kind), outcome(access(gpa)))
            x.check(FINDS.format(kind), what_it_finds(x, gpa), WORDS[GUESTS])


def _tell(x: Experiment, text: str, access: Access, gpa: Gpa, kind: str) -> None:
    x.tell(text.format(kind), outcome(access(gpa)))
    x.tell(FINDS.format(kind), what_it_finds(x, gpa))


def outcome(answer: Answer) -> str:
    """Return the result of an access, and the bytes that it saw."""
    if not answer.ok:
        return answer.name
    if answer.data:
        return f"ok, sees {WORDS.get(answer.word, 'other bytes')}"
    return "ok" if answer.result in (0, HOST_PAGE) else f"ok, {answer.result} bytes"


def what_it_finds(x: Experiment, gpa: int) -> str:
    """Have the guest load a word. Returns what it finds, or how its access fails."""
    order = x.guest.start_read64(gpa)
    failure = x.failed(order)
    if failure is not None:
        return f"nothing: KVM_RUN fails with {failure}"
    try:
        return WORDS.get(order.result(), "other bytes")
    except GuestFault as fault:
        return f"nothing: {'an external abort' if fault.trap and fault.trap.is_external else 'a trap'}"


def by_address(x: Experiment, access: Callable[[int], Answer], where: Callable[[int], int] | None = None) -> Access:
    """Convert an access to an address of this process into one to a guest page.

    ``where`` returns the address, by default x.view: that of the host's own code. The access is first tried on a page
    of this process. If it fails there too, the result for the guest's page is inconclusive.
    """
    with mmap.mmap(-1, HOST_PAGE) as own:
        own[:8] = GUESTS.to_bytes(8, "little")
        word = ctypes.c_uint64.from_buffer(own)
        try:
            answer = access(ctypes.addressof(word))
        except OSError as error:
            x.cannot(f"the access fails on any page here: {error}")
        finally:
            del word
    if not answer.ok or (answer.data and answer.word != GUESTS):
        x.cannot(f"the access fails on any page here: {outcome(answer)}")
    at = where or x.view
    return lambda gpa: access(at(gpa))


def by_file(x: Experiment, access: Callable[[int, int], Answer]) -> Access:
    """Convert an access to a file's offset into one to the page there."""

    def reach(gpa: Gpa) -> Answer:
        backing, offset = place(x, gpa)
        return access(backing.fd, offset)

    return reach
