# SPDX-License-Identifier: Apache-2.0
"""Claims about huge pages: when one fault maps 2 MiB, and what splits such a mapping again."""

from __future__ import annotations

from functools import partial

from pyvmm.atlas.claim import group
from pyvmm.errors import KvmError
from pyvmm.experiment import BEYOND, Experiment, raw
from pyvmm.experiment.host import settings
from pyvmm.experiment.host.syscalls import madvise
from pyvmm.guest.orders import Access
from pyvmm.memory import mman
from pyvmm.memory.address import Gpa
from pyvmm.memory.backing import Memfd
from pyvmm.memory.memlock import LockedMemory
from pyvmm.pages import HOST_PAGE, HUGE_SIZE
from pyvmm.uapi.kvm import KVM_MEM_LOG_DIRTY_PAGES
from pyvmm.uapi.kvm_cap import KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE, KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES
from pyvmm.uapi.mman import MADV_COLLAPSE, MADV_NOHUGEPAGE, PROT_READ

claim = group("huge")

HUGE = 'thread: "And that\'s especially true as we introduce support for huge pages"'
ADJUST = "arch/arm64/kvm/mmu.c, transparent_hugepage_adjust()"
SPAN = "arch/arm64/kvm/mmu.c, fault_supports_stage2_huge_mapping()"
ONE_PAGE = "arch/arm64/kvm/pkvm.c, pkvm_pgtable_stage2_map(): pages only for a protected VM"
LOGGED = "arch/arm64/kvm/mmu.c, user_mem_abort(): force_pte where the slot is logged"
NOTIFIER = "arch/arm64/kvm/mmu.c, kvm_unmap_gfn_range(), by MMU notifiers"
TRUNCATE = "mm/truncate.c, truncate_inode_partial_folio(): the hole is zeroed through the kernel's mapping"
PAGES = HUGE_SIZE // HOST_PAGE
SOME = PAGES // 8
"""Pages that are touched of a huge page where that tells as much as touching all."""
VALUE = 42


def _block(x: Experiment) -> Gpa:
    """Return 2 MiB of unused guest memory, aligned in guest and host."""
    return x.page(PAGES, align=HUGE_SIZE)


def _touch(x: Experiment, gpa: int, pages: int = PAGES, *, stride: int = 8, access: Access = Access.WRITE) -> int:
    """Have the guest access every 8th page of a range. Returns the number of faults."""
    before = len(x.faults(gpa, pages))
    x.guest.touch(gpa, pages // stride, stride=stride, access=access)
    # Distinct ones: a page that the host moves meanwhile (compaction) may fault twice.
    return len({fault.gpa for fault in x.faults(gpa, pages)[before:]})


def _late(x: Experiment, gpa: int, size: int, *, flags: int = 0) -> int:
    """Make a slot over new memory of the guest's kind, with huge pages. Returns its number."""
    backing = raw.make(x, HUGE_SIZE * 2)
    return raw.slot(x, gpa, size, backing.hva, flags=flags, file=backing.guest_memfd)


@claim(
    none="thp hugetlb memfd guest_memfd private",
    emulated="thp",
    pkvm="thp memfd",
    faults=True,
    origin=f"{HUGE}; {ADJUST}; {ONE_PAGE}",
)
def a_huge_page_costs_one_fault(x: Experiment) -> None:
    """When the guest touches all 512 pages of an aligned 2 MiB, one of them faults."""
    block = _block(x)
    x.start()
    x.check("pages that fault", _touch(x, block, stride=1), 1)


@claim(
    none="thp hugetlb",
    emulated="thp",
    pkvm="thp",
    faults=True,
    origin="arch/arm64/kvm/mmu.c, user_mem_abort(): mapped writable where the host's page is",
)
def a_load_maps_the_block_for_stores(x: Experiment) -> None:
    """A load maps the whole 2 MiB for loads and stores: later accesses do not fault."""
    block = _block(x)
    x.start()
    x.check("faults of a load", _touch(x, block, 1, stride=1, access=Access.READ), 1)
    x.check("faults of stores to 64 pages of it", _touch(x, block), 0)


@claim(none="thp hugetlb memfd guest_memfd", pkvm="thp", origin=f"{HUGE}; mm/shmem.c, shmem_get_folio_gfp()")
def a_touch_takes_two_mib_of_the_host(x: Experiment) -> None:
    """A guest that touches one byte takes 2 MiB of the host's memory."""
    file = x.memory.add(BEYOND, raw.make(x, 2 * HUGE_SIZE)).backing
    x.start()
    locked, before = LockedMemory.read().locked, raw.kib(file.fd)
    x.guest.write8(BEYOND, 1)
    x.check("KiB that the file has grown by", raw.kib(file.fd) - before, HUGE_SIZE >> 10)
    x.tell("KiB locked for the guest (VmLck)", (LockedMemory.read().locked - locked) >> 10)


@claim(none="thp hugetlb", pkvm="thp", faults=True, origin=SPAN)
def misaligned_memory_is_mapped_by_pages(x: Experiment) -> None:
    """Huge pages behind a slot whose guest and host addresses differ modulo 2 MiB are mapped page by page."""
    _late(x, BEYOND + HOST_PAGE, 2 * HUGE_SIZE)
    x.start()
    x.check("faults of 64 pages of 2 MiB", _touch(x, BEYOND + HUGE_SIZE), SOME)


@claim(none="thp hugetlb", pkvm="thp", faults=True, origin=SPAN)
def a_block_ends_with_its_slot(x: Experiment) -> None:
    """The part of a huge page that a slot ends in is mapped page by page, the whole one before it at once."""
    _late(x, BEYOND, HUGE_SIZE + HUGE_SIZE // 2)
    x.start()
    x.check("faults of 64 pages of the slot's first 2 MiB", _touch(x, BEYOND), 1)
    x.check("of 32 pages of the 1 MiB after it", _touch(x, BEYOND + HUGE_SIZE, PAGES // 2), SOME // 2)


@claim(none="memfd", pkvm="memfd", faults=True, origin="arch/arm64/kvm/mmu.c: contiguous mappings for hugetlb only")
def a_folio_of_64_kib_costs_one_fault(x: Experiment) -> None:
    """With memory in folios of 64 KiB (mTHP), each fault maps a whole folio."""
    x.stack.enter_context(x.setting(settings.SHMEM_64K, "advise"))
    backing = x.stack.enter_context(Memfd(HUGE_SIZE, thp=True))
    raw.slot(x, BEYOND, HUGE_SIZE, backing.hva)
    x.guest.write8(BEYOND, 1)
    if raw.kib(backing.fd) != 64:
        x.cannot(f"a touch took {raw.kib(backing.fd)} KiB of the file: this kernel gave it no folio of 64 KiB")
    x.check("faults of the 16 pages, the first with them", 1 + _touch(x, BEYOND, 16, stride=1), 1)


# -- what takes it apart


@claim(
    none="thp hugetlb guest_memfd",
    emulated="thp",
    pkvm="thp",
    origin=f"{TRUNCATE}, which takes donated pages back by force",
)
def a_small_hole_is_zeros_and_nothing_else(x: Experiment) -> None:
    """A hole of one page in a huge page is zeros to the guest, and leaves the pages beside it as they are."""
    block = _block(x)
    for number in (4, 5, 6):
        x.guest.write64(block + number * HOST_PAGE, number)
    file, offset = raw.place(x, block)
    x.check("the punch", raw.punch(file.fd, offset + 5 * HOST_PAGE, HOST_PAGE), "ok")
    x.event("punch", block + 5 * HOST_PAGE)
    for number, wanted in ((4, 4), (6, 6), (5, 0)):
        order = x.guest.start_read64(block + number * HOST_PAGE)
        if not x.check(f"page {number}: the guest's load", x.went(order), "went on"):
            break
        x.check(f"page {number}: the guest reads", order.result(), wanted)


@claim(
    none="thp hugetlb", emulated="thp", pkvm="thp", faults=True, origin=f"{NOTIFIER}; mm/shmem.c: the folio is split"
)
def a_small_hole_costs_the_guest_its_block(x: Experiment) -> None:
    """After a hole of one page in a huge page, the other pages fault again, one by one."""
    block = _block(x)
    x.start()
    _touch(x, block)
    madvise(x.memory.hva(block), HUGE_SIZE, MADV_NOHUGEPAGE)  # or khugepaged may mend it meanwhile
    file, offset = raw.place(x, block)
    before = raw.kib(file.fd)
    raw.punch(file.fd, offset + 5 * HOST_PAGE, HOST_PAGE)
    x.event("punch", block + 5 * HOST_PAGE)
    x.tell("KiB that the file is smaller", before - raw.kib(file.fd))
    x.check("faults of 64 other pages", _touch(x, block), SOME)


@claim(
    none="thp",
    emulated="thp",
    pkvm="thp",
    faults=True,
    origin=f"{NOTIFIER}; {ADJUST}: no larger than the host's own mapping",
)
def mprotect_of_one_page_costs_the_guest_its_block(x: Experiment) -> None:
    """When the host makes one page of its mapping read-only, the guest's other pages fault again, one by one."""
    block = _block(x)
    x.start()
    _touch(x, block)
    mman.protect(x.memory.hva(block) + 5 * HOST_PAGE, HOST_PAGE, PROT_READ)
    x.check("faults of 64 other pages", _touch(x, block), SOME)
    mman.protect(x.memory.hva(block) + 5 * HOST_PAGE, HOST_PAGE, mman.PROT_RW)
    x.tell("faults of those when it is writable again", _touch(x, block))


@claim(
    none="memfd",
    emulated="memfd",
    pkvm="memfd",
    faults=True,
    origin="madvise(2), MADV_COLLAPSE; mm/khugepaged.c, collapse_file()",
)
def small_pages_collapse_under_the_guest(x: Experiment) -> None:
    """MADV_COLLAPSE merges a guest's small pages into a huge page: contents stay, and one fault maps it all."""
    block = _block(x)
    x.start()
    x.check("faults of 64 pages before", _touch(x, block), SOME)
    x.guest.write64(block, VALUE)
    x.check("MADV_COLLAPSE", madvise(x.memory.hva(block), HUGE_SIZE, MADV_COLLAPSE).name, "ok")
    x.check("the guest's load", x.went(x.guest.start_read64(block)), "went on")
    x.check("the guest reads", x.guest.read64(block), VALUE)
    x.check("faults of 64 pages after that load", _touch(x, block), 0)


# -- dirty logging


@claim(none="thp hugetlb", pkvm="thp", faults=True, origin=LOGGED)
def a_logged_slot_is_mapped_by_pages(x: Experiment) -> None:
    """Huge pages behind a slot with KVM_MEM_LOG_DIRTY_PAGES are mapped page by page."""
    if x.check("the slot", raw.answer(partial(_late, x, BEYOND, HUGE_SIZE, flags=KVM_MEM_LOG_DIRTY_PAGES)), "ok"):
        x.start()
        x.check("faults of 64 pages", _touch(x, BEYOND), SOME)


@claim(none="thp hugetlb memfd", pkvm="memfd", origin="Documentation/virt/kvm/api.rst, KVM_GET_DIRTY_LOG")
def the_dirty_log_names_exactly_what_was_written(x: Experiment) -> None:
    """KVM_GET_DIRTY_LOG names every page the guest has stored to since the last call, and no page it only loaded."""
    backing, vm = raw.make(x, HUGE_SIZE), x.machine.vm
    try:
        slot = raw.slot(x, BEYOND, HUGE_SIZE, backing.hva, flags=KVM_MEM_LOG_DIRTY_PAGES)
    except KvmError as error:
        x.check("the slot", raw.name(error.errno), "ok")
        return

    def log() -> str:
        bits = int.from_bytes(vm.dirty_log(slot, PAGES), "little")
        return " ".join(str(page) for page in range(PAGES) if bits >> page & 1) or "none"

    x.start()
    x.check("pages named before the first store", log(), "none")
    for page in (0, 5, 63, 64, 511):
        x.guest.write8(BEYOND + page * HOST_PAGE, 1)
    x.guest.touch(BEYOND + 100 * HOST_PAGE, 8, access=Access.READ)
    x.check("named after stores and loads", log(), "0 5 63 64 511")
    x.check("named again at once", log(), "none")
    x.guest.read8(BEYOND)
    x.guest.write8(BEYOND + 5 * HOST_PAGE, 2)
    x.check("named after one more store", log(), "5")


@claim(
    none="thp hugetlb",
    pkvm="thp",
    faults=True,
    origin=f"{LOGGED}; kvm_mmu_split_memory_region(): no split in advance unless told",
)
def logging_takes_a_block_apart(x: Experiment) -> None:
    """Turning on logging splits the guest's 2 MiB mapping: every page faults at its next store."""
    backing, vm = raw.make(x, HUGE_SIZE), x.machine.vm
    number = raw.slot(x, BEYOND, HUGE_SIZE, backing.hva)
    x.start()
    x.tell("faults of 64 pages before", _touch(x, BEYOND))
    again = partial(vm.set_memory, number, BEYOND, HUGE_SIZE, backing.hva)
    if not x.check("switching it on", raw.answer(partial(again, flags=KVM_MEM_LOG_DIRTY_PAGES)), "ok"):
        return
    x.check("faults of 64 stores then", _touch(x, BEYOND), SOME)
    x.check("switching it off", raw.answer(again), "ok")
    x.tell("faults of 64 stores after that", _touch(x, BEYOND))


@claim(none="thp", faults=True, origin="arch/arm64/include/asm/kvm_pkvm.h, kvm_pkvm_ext_allowed(): not on pKVM hosts")
def block_sizes_are_told(x: Experiment) -> None:
    """KVM reports the sizes it maps (KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES), and allows splitting in advance."""
    system, vm = x.machine.system, x.machine.vm
    sizes = system.check(KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES)
    x.tell("sizes told", " ".join(f"{1 << bit:#x}" for bit in range(64) if sizes >> bit & 1) or "none")
    block = _block(x)
    x.start()
    x.tell("faults of 64 pages of 2 MiB", _touch(x, block))
    x.check("2 MiB are told", bool(sizes & HUGE_SIZE))
    said = raw.answer(lambda: vm.enable_cap(KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE, HUGE_SIZE))
    x.check("enabling KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE", said, "ok")
