# SPDX-License-Identifier: Apache-2.0
"""Claims about access to a private page by memory management: advice, migration, merging, swap, unmapping."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

from pyvmm.atlas.claim import group
from pyvmm.atlas.claims.ownership_pages import (
    FINDS,
    GUESTS,
    HOSTS,
    PRIVATE,
    WORDS,
    Access,
    harmless,
    pages,
    what_it_finds,
)
from pyvmm.experiment import BEYOND, Experiment, raw
from pyvmm.experiment.host import inspect, processes
from pyvmm.experiment.host.syscalls import NR_MLOCK, Answer, anonymous, call, madvise, mremap, page_frame
from pyvmm.experiment.host.zram import Zram
from pyvmm.labenv import in_lab
from pyvmm.memory import mman
from pyvmm.memory.address import Gpa
from pyvmm.memory.memlock import LockedMemory
from pyvmm.pages import HOST_PAGE, HUGE_SIZE
from pyvmm.uapi.mman import (
    MADV_COLD,
    MADV_COLLAPSE,
    MADV_DONTNEED,
    MADV_DONTNEED_LOCKED,
    MADV_FREE,
    MADV_MERGEABLE,
    MADV_PAGEOUT,
    MADV_POPULATE_READ,
    MADV_POPULATE_WRITE,
    MADV_SOFT_OFFLINE,
    MADV_WILLNEED,
    PROT_NONE,
)

claim = group("ownership")
anywhere = partial(claim, none="private", emulated="memfd guest_memfd", pkvm="memfd")
touched = partial(claim, none="memfd guest_memfd", pkvm="memfd")
"""Where pages of the guest are held by a pin, by a mapping alone, or by a file of KVM's."""

PIN = 'thread: "In our current implementation it uses a longterm GUP pin on the corresponding page"'
NOTIFIER = 'thread: "the host can\'t unmap anything from the guest stage-2"; mmu.c, kvm_unmap_gfn_range()'
LINEAR = "arch/arm64/mm/fault.c and pkvm's mem_protect.c: a fault of the kernel in its own mapping takes the page back"
COMPACT = Path("/proc/sys/vm/compact_memory")
KSM = Path("/sys/kernel/mm/ksm")
SCANS = 3
"""Rounds after which ksmd has compared every page: it leaves those alone whose checksum has changed since the last."""
PATIENCE = 5.0


@anywhere(origin="madvise(2), MADV_COLD and MADV_WILLNEED")
def hints_take_nothing(x: Experiment) -> None:
    """MADV_COLD and MADV_WILLNEED on a private page do the guest no harm."""
    harmless(x, "MADV_COLD and MADV_WILLNEED on {}", _advised(x, MADV_COLD, MADV_WILLNEED))


@anywhere(origin=f"{PIN}; madvise(2), MADV_DONTNEED and MADV_DONTNEED_LOCKED")
def dontneed_takes_nothing(x: Experiment) -> None:
    """After MADV_DONTNEED a private page is not in the host's page tables, and the guest has come to no harm."""
    advise = _advised(x, MADV_DONTNEED, MADV_DONTNEED_LOCKED)
    there: list[bool] = []

    def drop(gpa: Gpa) -> Answer:
        before, answer = raw.present(x.memory.hva(gpa)), advise(gpa)
        there[:] = before, raw.present(x.memory.hva(gpa))
        return answer

    harmless(x, "MADV_DONTNEED on {}", drop)
    before, after = there  # of the private page, which comes last
    x.tell(f"the host's page tables have {PRIVATE} before", before)
    x.check(f"the host's page tables have {PRIVATE} after", after, False)


@anywhere(origin="madvise(2), MADV_FREE: private anonymous pages only")
def free_is_refused(x: Experiment) -> None:
    """MADV_FREE on a private page is refused with EINVAL and does the guest no harm."""
    page = _held(x)
    x.check(f"MADV_FREE on {PRIVATE}", madvise(x.memory.hva(page), HOST_PAGE, MADV_FREE).name, "EINVAL")
    _still_there(x, page)


@anywhere(origin="madvise(2), MADV_POPULATE_READ and MADV_POPULATE_WRITE: fault pages in as a load or a store does")
def populating_opens_nothing(x: Experiment) -> None:
    """MADV_POPULATE_READ and _WRITE on a private page let the host in no further, and do the guest no harm."""
    page = _held(x)
    x.tell(f"MADV_POPULATE_READ on {PRIVATE}", madvise(x.view(page), HOST_PAGE, MADV_POPULATE_READ).name)
    x.tell(f"MADV_POPULATE_WRITE on {PRIVATE}", madvise(x.view(page), HOST_PAGE, MADV_POPULATE_WRITE).name)
    x.check("a load of the host's then faults", x.host64(page) is None)
    _still_there(x, page)


@touched(origin=f"{PIN}; mm/vmscan.c, is_page_cache_freeable()")
def it_is_not_swapped_out(x: Experiment) -> None:
    """With swap to page out to, MADV_PAGEOUT sends no page that the guest has touched there, and does it no harm."""
    range_, others = _filled(x, 16), x.page(16)
    for page in range(16):
        x.host_stores(others + page * HOST_PAGE, HOSTS)
    try:
        x.stack.enter_context(Zram(16 << 20)).swap()
    except OSError as error:
        x.cannot(f"nothing to swap to: {error.strerror}")
    _settle(x)
    x.tell("pages swapped out, of 16 the guest never touched", _swapped(x, others, 16))
    x.check("pages swapped out, of 16 it has", _swapped(x, range_, 16), 0)
    _still_there(x, range_)


@touched(origin=f"{PIN}; mm/khugepaged.c, collapse_file(): pages with other references are left alone")
def it_is_not_collapsed(x: Experiment) -> None:
    """MADV_COLLAPSE makes no huge page of 2 MiB in which the guest has touched a page, and does it no harm."""
    range_ = x.page(HUGE_SIZE // HOST_PAGE, align=HUGE_SIZE)
    x.memory.populate(range_, HUGE_SIZE)
    x.guest.write64(range_, GUESTS)
    answer = madvise(x.memory.hva(range_), HUGE_SIZE, MADV_COLLAPSE)
    x.check("MADV_COLLAPSE", answer.name, "an error" if answer.ok else answer.name)
    _still_there(x, range_)


@claim(
    none="memfd guest_memfd private",
    emulated="memfd",
    pkvm="memfd",
    origin=f"{PIN}; mm/memory-failure.c, soft_offline_page(): the contents move to another page",
)
def it_does_not_migrate(x: Experiment) -> None:
    """MADV_SOFT_OFFLINE, which moves contents to another frame, fails on a page of the guest's and does it no harm."""
    if not in_lab():
        x.cannot("a page that does move is lost to the host until it boots again: in the lab only")
    page = _held(x)
    answer = madvise(x.memory.hva(page), HOST_PAGE, MADV_SOFT_OFFLINE)
    x.check("MADV_SOFT_OFFLINE", answer.name, "an error" if answer.ok else answer.name)
    _still_there(x, page)


@claim(none="guest_memfd", pkvm="memfd", origin=f"{PIN}; Documentation/admin-guide/sysctl/vm.rst, compact_memory")
def compaction_leaves_it_in_place(x: Experiment) -> None:
    """Compaction of the host's memory leaves the guest's pages in their frames, and does the guest no harm."""
    range_ = _filled(x, 64)
    before = _frames(x, range_, 64)
    _settle(x)
    moved = sum(a != b for a, b in zip(before, _frames(x, range_, 64), strict=True))
    x.check("pages in another frame, of 64", moved, 0)
    _still_there(x, range_)


@claim(none="memfd", pkvm="memfd", origin=f"{LINEAR}; mm/ksm.c, calc_checksum()")
def ksm_does_no_harm(x: Experiment) -> None:
    """KSM, let loose on private anonymous memory behind a slot, does the guest no harm."""
    gpa, hva = _anonymous(x, 4)
    x.guest.write64(gpa, GUESTS)
    x.guest.write64(gpa + HOST_PAGE, GUESTS)
    answer = madvise(hva, 4 * HOST_PAGE, MADV_MERGEABLE)
    if not answer.ok:
        x.cannot(f"MADV_MERGEABLE: {answer.name}")
    for name, value in (("sleep_millisecs", "1"), ("pages_to_scan", "1000"), ("run", "1")):
        x.stack.enter_context(x.setting(str(KSM / name), value))
    if not _wait_for_scans(SCANS):
        x.cannot(f"ksmd has not been round {SCANS} times within {PATIENCE:g} s")
    x.tell("equal pages of the guest's are merged", inspect.ksm_merging() > 0)
    _still_there(x, gpa)


@claim(none="memfd", pkvm="memfd", origin=f"{LINEAR}; mm/memory.c, copy_present_page(): copied since pinned")
def a_fork_does_no_harm_to_anonymous_memory(x: Experiment) -> None:
    """A fork(2) with private anonymous memory behind a slot does the guest no harm."""
    gpa, _ = _anonymous(x, 1)
    x.guest.write64(gpa, GUESTS)
    processes.in_child(lambda fd: os.close(fd))
    _still_there(x, gpa)


@anywhere(origin="Documentation/filesystems/proc.rst: smaps, pagemap; mincore(2); admin-guide/mm/pagemap.rst")
def reading_page_tables_does_no_harm(x: Experiment) -> None:
    """Reading smaps, pagemap, kpageflags, kpagecount and mincore(2) of a private page does the guest no harm."""
    page = _held(x)
    for name, answer in inspect.everything(x.memory.hva(page)).items():
        x.tell(name, answer)
    x.check("a load of the host's then faults", x.host64(page) is None)
    _still_there(x, page)


@anywhere(origin="mlock(2); mm/gup.c, populate_vma_page_range()")
def mlock_does_no_harm(x: Experiment) -> None:
    """An mlock(2) of a private page does the guest no harm."""
    page = _held(x)
    before = LockedMemory.read().locked
    x.tell(f"mlock(2) of {PRIVATE}", call(NR_MLOCK, x.memory.hva(page), HOST_PAGE).name)
    x.tell("bytes that adds to VmLck", LockedMemory.read().locked - before)
    _still_there(x, page)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{PIN}; fsync(2), posix_fadvise(2), fallocate(2)")
def upkeep_of_the_file_does_no_harm(x: Experiment) -> None:
    """An fsync(2), POSIX_FADV_DONTNEED and fallocate(2) of the file that a private page is in do the guest no harm."""
    page = _held(x)
    backing, offset = raw.place(x, page)
    dontneed = os.POSIX_FADV_DONTNEED
    x.tell("fsync(2)", raw.answer(lambda: os.fsync(backing.fd)))
    x.tell("POSIX_FADV_DONTNEED", raw.answer(lambda: os.posix_fadvise(backing.fd, offset, HOST_PAGE, dontneed)))
    x.tell("fallocate(2)", raw.answer(lambda: os.posix_fallocate(backing.fd, offset, HOST_PAGE)))
    _still_there(x, page)


@touched(origin=NOTIFIER)
def munmap_takes_nothing(x: Experiment) -> None:
    """A page the guest has touched stays its own, contents and all, when the host unmaps the memory behind the slot."""
    gpa, hva = _mapped(x)
    x.guest.write64(gpa, GUESTS)
    mman.unmap(hva, 2 * HOST_PAGE)
    _still_there(x, gpa, fresh=gpa + HOST_PAGE)


@touched(origin=NOTIFIER)
def mprotect_takes_nothing(x: Experiment) -> None:
    """A page the guest has touched stays its own when the host makes the memory behind the slot PROT_NONE."""
    gpa, hva = _mapped(x)
    x.guest.write64(gpa, GUESTS)
    mman.protect(hva, 2 * HOST_PAGE, PROT_NONE)
    _still_there(x, gpa, fresh=gpa + HOST_PAGE)


@touched(origin=NOTIFIER)
def mremap_takes_nothing(x: Experiment) -> None:
    """A page the guest has touched stays its own when the host moves the mapping behind the slot elsewhere."""
    gpa, hva = _mapped(x)
    x.guest.write64(gpa, GUESTS)
    elsewhere = anonymous(2 * HOST_PAGE)
    x.stack.callback(mman.unmap, elsewhere, 2 * HOST_PAGE)
    x.tell("mremap(2)", mremap(hva, 2 * HOST_PAGE, elsewhere).name)
    _still_there(x, gpa, fresh=gpa + HOST_PAGE)


@touched(origin=NOTIFIER)
def another_mapping_takes_nothing(x: Experiment) -> None:
    """A page the guest has touched stays its own when the host maps other memory in the place behind the slot."""
    gpa, hva = _mapped(x)
    x.guest.write64(gpa, GUESTS)
    other = raw.make(x, 2 * HOST_PAGE)
    for page in range(2):
        other.load(page * HOST_PAGE, HOSTS.to_bytes(8, "little"))
    mman.map_over(hva, 2 * HOST_PAGE, other.fd, 0, mman.PROT_RW)
    _still_there(x, gpa, fresh=gpa + HOST_PAGE)


def _held(x: Experiment) -> Gpa:
    """Return a private page that holds the guest's data."""
    return pages(x).private


def _filled(x: Experiment, count: int) -> Gpa:
    range_ = x.page(count)
    for page in range(count):
        x.guest.write64(range_ + page * HOST_PAGE, GUESTS)
    return range_


def _still_there(x: Experiment, gpa: int, fresh: int | None = None) -> None:
    """Check that the guest finds its data at ``gpa``. Record what it finds in a fresh page, if it still runs."""
    kind = PRIVATE if x.protection.isolates or x.backing == "private" else "a page it has touched"
    words = what_it_finds(x, gpa)
    x.check(FINDS.format(kind), words, WORDS[GUESTS])
    if fresh is not None and words in WORDS.values():
        x.tell("in a page it had not touched the guest finds", what_it_finds(x, fresh))


def _advised(x: Experiment, *advice: int) -> Access:
    def advise(gpa: Gpa) -> Answer:
        answers = [madvise(x.memory.hva(gpa), HOST_PAGE, each) for each in advice]
        return next((answer for answer in answers if not answer.ok), answers[0])

    return advise


def _frames(x: Experiment, gpa: int, count: int) -> list[int]:
    madvise(x.memory.hva(gpa), count * HOST_PAGE, MADV_POPULATE_READ)
    frames = [page_frame(x.memory.hva(gpa + page * HOST_PAGE)) for page in range(count)]
    if None in frames:
        x.cannot("/proc/self/pagemap does not show frames to this user")
    return [frame for frame in frames if frame is not None]


def _settle(x: Experiment) -> None:
    """Compact the host's memory. This also drains per-CPU page batches, whose pages cannot be found otherwise."""
    if not in_lab():
        x.cannot(f"{COMPACT} moves pages of the whole host: in the lab only")
    try:
        COMPACT.write_text("1")
    except OSError as error:
        x.cannot(f"{COMPACT}: {error.strerror}")


def _swapped(x: Experiment, gpa: int, count: int) -> int:
    """Page out a range, and return how many pages more of its mapping are in swap."""
    hva = x.memory.hva(gpa)
    before = inspect.swapped(hva)
    madvise(hva, count * HOST_PAGE, MADV_PAGEOUT)
    return (inspect.swapped(hva) - before) // HOST_PAGE


def _wait_for_scans(rounds: int) -> bool:
    until, deadline = inspect.ksm_scans() + rounds, time.monotonic() + PATIENCE
    while inspect.ksm_scans() < until:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _anonymous(x: Experiment, count: int) -> tuple[Gpa, int]:
    """Put private anonymous memory behind a slot; returns where the guest and where the host has it."""
    hva = anonymous(count * HOST_PAGE)
    x.stack.callback(mman.unmap, hva, count * HOST_PAGE)
    raw.slot(x, BEYOND, count * HOST_PAGE, hva)
    return BEYOND, hva


def _mapped(x: Experiment) -> tuple[Gpa, int]:
    """Put two pages of a file behind a slot, mapped where the mapping may go; return where guest and host have it."""
    room = anonymous(4 * HOST_PAGE)
    hva, backing = room + HOST_PAGE, raw.make(x, 2 * HOST_PAGE)
    x.stack.callback(mman.unmap, room, 4 * HOST_PAGE)
    mman.map_over(hva, 2 * HOST_PAGE, backing.fd, 0, mman.PROT_RW)
    raw.slot(x, BEYOND, 2 * HOST_PAGE, hva, file=backing.guest_memfd)
    return BEYOND, hva
