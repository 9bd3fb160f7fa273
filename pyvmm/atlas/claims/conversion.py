# SPDX-License-Identifier: Apache-2.0
"""Claims about the effect of conversions on contents, for a page that becomes shared and private again.

Under pkvm the hypervisor converts in place. Under the emulated protection the VMM converts, by one of four policies. A
claim with a policy is about that policy. Under pkvm the policy is ignored.
"""

from __future__ import annotations

import ctypes
import threading
import time

from pyvmm import abi
from pyvmm._native import ffi, lib
from pyvmm.atlas.claim import group
from pyvmm.experiment import Experiment
from pyvmm.experiment.host.syscalls import NR_MINCORE, call, page_frame
from pyvmm.memory.address import Gpa, Hva
from pyvmm.pages import HOST_PAGE, HUGE_SIZE

claim = group("conversion")

IN_PLACE = "arch/arm64/kvm/hyp/nvhe/mem_protect.c, __pkvm_guest_share_host() and __pkvm_guest_unshare_host()"
SCENARIO = 'thread: "is there a use case where that happens post-boot _and_ the contents of the page are preserved?"'
CLEARS = 'thread: "defining the semantics to state that the trusted hypervisor will clear that page on conversion"'
HANDED = 'thread: "The guest doesn\'t have to know that it was handed back a different page"'
ITSELF = 'thread: "of all problems, zeroing the page before sharing is probably one of the simplest to solve"'
RARE = 'thread: "converting private=>shared and preserving the contents should be a very, very rare scenario"'
PUNCH = 'thread: "The hole doesn\'t get punched in guest IPA space, it gets punched in the private backing store"'
HUGE = 'thread: "And that\'s especially true as we introduce support for huge pages"'
PLAIN = "memfd thp guest_memfd"
ALL = "memfd thp guest_memfd private"
INVALID_PARAMETER = -3
PATIENCE = 2.0
PAGES = HUGE_SIZE // HOST_PAGE


@claim(emulated=PLAIN, pkvm="memfd thp", conversion="preserve", origin=f"{RARE}; {IN_PLACE}")
def a_conversion_is_in_place(x: Experiment) -> None:
    """A page that changes hands stays the same physical page with the same contents, in both directions."""
    page = x.page()
    x.guest.write64(page, 0x11)
    private = _frame(x, page)
    x.picture("private")
    x.guest.share(page)
    x.check("the host reads what the guest wrote", x.host64(page), 0x11)
    x.check("shared, it is the same page frame", _frame(x, page) == private)
    x.picture("shared")
    x.host_stores(page, 0x22)
    x.guest.unshare(page)
    x.check("the guest reads what the host wrote", x.guest.read64(page), 0x22)
    x.check("private again, it is the same page frame", _frame(x, page) == private)
    x.picture("private again")


@claim(emulated=PLAIN, pkvm="memfd thp", conversion="zero", origin=CLEARS)
def a_conversion_clears_the_page(x: Experiment) -> None:
    """The page is cleared on conversion, in both directions: neither side finds what the other left in it."""
    page = x.page()
    x.guest.fill(page, HOST_PAGE, 0x11)
    x.guest.share(page)
    x.check("shared, the page reads as zeros", not any(x.memory.read(page, HOST_PAGE)))
    x.memory.fill(page, HOST_PAGE, 0x22)
    x.guest.unshare(page)
    x.check("private again, it reads as zeros", x.guest.sum(page, HOST_PAGE) == 0)


@claim(emulated=PLAIN, pkvm="memfd thp", conversion="punch", origin=f"{HANDED}; {PUNCH}")
def the_page_handed_back_is_another_and_cleared(x: Experiment) -> None:
    """A conversion drops the page from its file, so that the other side is handed a new one, which reads as zeros."""
    page = x.page()
    x.guest.write64(page, 0x11)
    x.tell("the page is in its file once the guest has written to it", _in_file(x, x.memory.hva(page)))
    x.guest.share(page)
    x.check("shared, it is still in its file", _in_file(x, x.memory.hva(page)), False)
    x.check("the host reads", x.host64(page), 0)
    x.host_stores(page, 0x22)
    x.guest.unshare(page)
    x.check("private again, it is still in its file", _in_file(x, x.memory.hva(page)), False)
    x.check("the guest reads", x.guest.read64(page), 0)


@claim(emulated=ALL, pkvm="memfd thp", conversion="copy", origin=f"{HANDED}; {RARE}")
def the_page_handed_back_is_another_with_its_contents(x: Experiment) -> None:
    """A conversion copies the page to another file: the contents go along, and nothing is left where it was."""
    page = x.page()
    x.guest.write64(page, 0x11)
    private = x.memory.hva(page)
    x.guest.share(page)
    shared = x.memory.hva(page)
    x.check("shared, it is in another file", private != shared)
    x.check("the private file still holds a page there", _in_file(x, private), False)
    x.check("the host reads what the guest wrote", x.host64(page), 0x11)
    x.host_stores(page, 0x22)
    x.guest.unshare(page)
    x.check("private again, it is in the file it was in", x.memory.hva(page) == private)
    x.check("the shared file still holds a page there", _in_file(x, shared), False)
    x.check("the guest reads what the host wrote", x.guest.read64(page), 0x22)


@claim(emulated=ALL, pkvm="memfd thp", origin=SCENARIO)
def shared_to_private_after_boot_keeps_contents(x: Experiment) -> None:
    """A running guest takes a page back from the host with all that the host put there, such as a block of a disk."""
    page = x.page()
    x.guest.share(page)
    block = bytes(range(256)) * (HOST_PAGE // 256)
    x.memory.write(page, block)
    x.guest.unshare(page)
    words = sum(int.from_bytes(block[at : at + 8], "little") for at in range(0, HOST_PAGE, 8))
    x.check("the guest's sum of the block is the host's", x.guest.sum(page, HOST_PAGE) == words % (1 << 64))
    x.check("the host reaches it after", x.host64(page) is not None, False)


@claim(emulated=ALL, pkvm="memfd thp", origin=ITSELF)
def a_guest_can_clear_what_it_shares(x: Experiment) -> None:
    """A guest that clears a page before sharing it shows the host nothing else, though the host looks all the time."""
    page = x.page()
    x.guest.fill(page, HOST_PAGE, 0x5EC2E7)  # until its first touch the page is the host's to see
    looks = _Looks()
    host = threading.Thread(target=_look, args=(x, page, looks))
    host.start()
    x.stack.callback(host.join)
    x.stack.callback(looks.end.set)
    met = 0
    for _ in range(5):
        x.guest.fill(page, HOST_PAGE, 0x5EC2E7)
        x.guest.fill(page, HOST_PAGE, 0)
        x.guest.share(page)
        met += looks.two_more()
        x.guest.unshare(page)
    looks.end.set()
    host.join()
    x.check("shares, of 5, during which the host saw into the page", met, 5)
    x.check("the host saw anything but zeros", bool(looks.seen - {0}), False)


@claim(emulated=PLAIN, pkvm="memfd", conversion="zero", origin=IN_PLACE)
def a_refused_conversion_clears_nothing(x: Experiment) -> None:
    """A share of a shared page and an unshare of a private one, both refused, leave the contents alone."""
    _refused(x)


@claim(emulated=PLAIN, pkvm="memfd", conversion="punch", origin=IN_PLACE)
def a_refused_conversion_drops_nothing(x: Experiment) -> None:
    """Where a conversion drops the page, one that is refused drops nothing."""
    _refused(x)


def _refused(x: Experiment) -> None:
    page = x.page()
    x.guest.share(page)
    x.host_stores(page, 0x11)
    x.check("x0 of a second MEM_SHARE", x.guest.hvc(abi.HVC_SHARE, page).status, INVALID_PARAMETER)
    x.check("the host reads", x.host64(page), 0x11)
    x.guest.unshare(page)
    x.guest.write64(page, 0x22)
    x.check("x0 of a second MEM_UNSHARE", x.guest.hvc(abi.HVC_UNSHARE, page).status, INVALID_PARAMETER)
    x.check("the guest reads", x.guest.read64(page), 0x22)


@claim(emulated="thp", pkvm="thp", conversion="preserve", origin=HUGE)
def half_a_huge_page_is_shared(x: Experiment) -> None:
    """Half of a transparent huge page can be shared in place: the other half stays private, and the page stays huge."""
    _half(x, kept=True)


@claim(emulated="thp", pkvm="thp", conversion="punch", origin=f"{HUGE}; {PUNCH}; mm/shmem.c: a hole in a large folio")
def half_a_huge_page_is_replaced(x: Experiment) -> None:
    """Half of a transparent huge page can be dropped and replaced: it reads as zeros, the other half is kept."""
    _half(x, kept=False)


def _half(x: Experiment, *, kept: bool) -> None:
    huge = x.page(PAGES, align=HUGE_SIZE)
    half = HUGE_SIZE // 2
    x.guest.fill(huge, HUGE_SIZE, 1)
    if not _is_huge(x, huge):
        x.cannot("the host had no huge page left for the guest's memory")
    done = x.guest.share(huge, PAGES // 2, how=abi.SHARE_HVC)
    x.time(f"{PAGES // 2} shares", done.ticks)
    x.check("pages shared", done.pages, PAGES // 2)
    word = (1).to_bytes(8, "little") if kept else bytes(8)
    x.check("the host reads what is due in the shared half", x.memory.read(huge, half) == word * (half // 8))
    x.check("the host reaches the other half's first page", x.memory.probe(huge + half), False)
    x.check("the guest's sum of the other half", x.guest.sum(huge + half, half), half // 8)
    x.guest.unshare(huge, PAGES // 2, how=abi.SHARE_HVC)
    x.check("the guest's sum of the first half, private again", x.guest.sum(huge, half), half // 8 if kept else 0)
    if kept:
        x.check(f"its {PAGES} page frames are still one huge page", _is_huge(x, huge))
    else:
        x.tell(f"its {PAGES} page frames are still one huge page", _is_huge(x, huge))


def _frame(x: Experiment, gpa: Gpa) -> int:
    """Return the number of the page frame behind a guest page; the load that maps it for us may fault, guarded."""
    address = x.memory.hva(gpa)
    lib.pv_copy(ffi.new("uint8_t[1]"), ffi.cast("void *", address), 1)
    frame = page_frame(address)
    if frame is None:
        x.cannot("/proc/self/pagemap tells no page frames: it takes CAP_SYS_ADMIN")
    return frame


def _is_huge(x: Experiment, gpa: Gpa) -> bool:
    frames = [_frame(x, Gpa(gpa + page * HOST_PAGE)) for page in range(PAGES)]
    return frames[0] % PAGES == 0 and frames == list(range(frames[0], frames[0] + PAGES))


def _in_file(x: Experiment, address: Hva) -> bool:
    """Whether the file mapped at an address holds a page there (mincore(2), which touches nothing)."""
    room = ctypes.create_string_buffer(1)
    answer = call(NR_MINCORE, address, HOST_PAGE, ctypes.byref(room))
    if not answer.ok:
        x.cannot(f"mincore: {answer.name}")
    return bool(room.raw[0] & 1)


class _Looks:
    """What a thread of the host's that looks all the time has seen of a page, and how often it saw into it."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.count = 0
        self.end = threading.Event()

    def two_more(self) -> bool:
        """Wait for two more looks into the page, of which the first may be an older one; False if none come."""
        until, deadline = self.count + 2, time.monotonic() + PATIENCE
        while self.count < until:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0001)
        return True


def _look(x: Experiment, page: Gpa, looks: _Looks) -> None:
    while not looks.end.is_set():
        word = x.host64(page)
        if word is not None:
            looks.seen.add(word)
            looks.count += 1
