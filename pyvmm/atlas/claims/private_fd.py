# SPDX-License-Identifier: Apache-2.0
"""Claims about guest_memfd, compared with memfd: access to its pages, its slots, and holes in it."""

from __future__ import annotations

import fcntl
import mmap
import os
from functools import partial

from pyvmm.atlas.claim import group
from pyvmm.experiment import BEYOND, Experiment, raw
from pyvmm.experiment.host.access import fork_load
from pyvmm.experiment.host.syscalls import madvise
from pyvmm.guest.orders import Access
from pyvmm.memory import mman
from pyvmm.memory.address import Gpa
from pyvmm.memory.backing import Memfd
from pyvmm.pages import HOST_PAGE
from pyvmm.uapi.falloc import (
    FALLOC_FL_COLLAPSE_RANGE,
    FALLOC_FL_INSERT_RANGE,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_ZERO_RANGE,
)
from pyvmm.uapi.kvm import GUEST_MEMFD_FLAG_INIT_SHARED
from pyvmm.uapi.memfd import F_GET_SEALS
from pyvmm.uapi.mman import MADV_DONTNEED, MADV_POPULATE_WRITE, MADV_REMOVE

claim = group("private-fd")

PUNCHED = 'thread: "The hole ... gets punched in the private backing store, which is host PA space"'
FATAL = (
    'thread: "when a whole gets punched in the fd KVM will go and unmap the page in the private SPTEs, which will '
    'cause a fatal error for any subsequent access from the guest"'
)
NO_WAY_BACK = 'thread: "Once it has donated a page to a guest, it can\'t have it back until ... torn down"'
CREATE = "virt/kvm/guest_memfd.c, kvm_gmem_create()"
FALLOCATE = "virt/kvm/guest_memfd.c, kvm_gmem_fallocate()"
TOUCH = "virt/kvm/guest_memfd.c, kvm_gmem_fault_user_mapping()"
SIZE = 1 << 16
VALUE = 42
FILES = "memfd guest_memfd private"


# -- who may touch


@claim(none=FILES, pkvm="memfd", origin=f"{TOUCH}: GUEST_MEMFD_FLAG_INIT_SHARED")
def host_and_guest_see_one_page(x: Experiment) -> None:
    """What the guest stores the host reads through its mapping of the file, and the other way round."""
    page = x.page()
    x.guest.write64(page, VALUE)
    x.check("the host reads", x.host64(page), VALUE)
    x.check("the host can store", x.host_stores(page, 5))
    x.check("the guest reads after that", x.guest.read64(page), 5)


@claim(none="private guest_memfd", pkvm="memfd", origin=f"{TOUCH}: VM_FAULT_SIGBUS without INIT_SHARED")
def a_host_load_is_sigbus(x: Experiment) -> None:
    """The host has the file mapped, a load through that mapping is SIGBUS, and the guest goes on with its contents."""
    page = x.page()
    x.guest.write64(page, VALUE)
    ended, _ = fork_load(x.memory.hva(page))
    x.check("a load ends a process by", ended, "SIGBUS")
    x.check("a guarded load faults", x.host64(page) is None)
    x.check("a guarded store faults", not x.host_stores(page, 5))
    x.check("the guest reads", x.guest.read64(page), VALUE)


@claim(none="private guest_memfd", pkvm="memfd", origin="madvise(2), MADV_POPULATE_WRITE: as a store")
def a_page_of_the_guest_cannot_be_populated(x: Experiment) -> None:
    """MADV_POPULATE_WRITE on a page the guest has touched is refused with EFAULT, and the guest keeps the contents."""
    page = x.page()
    x.guest.write64(page, VALUE)
    x.check("MADV_POPULATE_WRITE", madvise(x.memory.hva(page), HOST_PAGE, MADV_POPULATE_WRITE).name, "EFAULT")
    x.check("the guest reads", x.guest.read64(page), VALUE)


@claim(none=FILES, origin="virt/kvm/guest_memfd.c, kvm_gmem_fops: neither read_iter nor write_iter")
def the_file_cannot_be_read_or_written(x: Experiment) -> None:
    """The file can be neither read nor written: read(2) and write(2) are EINVAL, pread(2) and pwrite(2) ESPIPE."""
    page = x.page()
    x.guest.write64(page, VALUE)
    file, offset = raw.place(x, page)
    x.check("read", raw.answer(lambda: os.read(file.fd, 8)), "EINVAL")
    x.check("write", raw.answer(lambda: os.write(file.fd, bytes(8))), "EINVAL")
    x.check("pread", raw.answer(lambda: os.pread(file.fd, 8, offset)), "ESPIPE")
    x.check("pwrite", raw.answer(lambda: os.pwrite(file.fd, bytes(8), offset)), "ESPIPE")
    x.check("the guest reads", x.guest.read64(page), VALUE)


@claim(none=FILES, pkvm="memfd", origin="virt/kvm/guest_memfd.c, kvm_gmem_mmap(): VM_SHARED or -EINVAL")
def a_private_mapping_is_refused(x: Experiment) -> None:
    """The file cannot be mapped MAP_PRIVATE, which would hand out copies: mmap(2) refuses with EINVAL."""
    file = raw.make(x, SIZE)
    x.check("MAP_PRIVATE", raw.answer(lambda: mmap.mmap(file.fd, SIZE, flags=mmap.MAP_PRIVATE).close()), "EINVAL")
    x.check("MAP_SHARED", raw.answer(lambda: mmap.mmap(file.fd, SIZE, flags=mmap.MAP_SHARED).close()), "ok")


# -- making one


@claim(
    none="memfd",
    emulated="memfd",
    pkvm="memfd",
    origin="arch/arm64/kvm/mmu.c, kvm_arch_prepare_memory_region(): only slots of mappable files",
)
def without_mmap_there_is_no_slot(x: Experiment) -> None:
    """A guest_memfd without GUEST_MEMFD_FLAG_MMAP can be made, but not be mapped (ENODEV), nor get a slot (EINVAL)."""
    spare, vm = x.stack.enter_context(Memfd(SIZE)), x.machine.vm
    for name, flags in (("no flag", 0), ("INIT_SHARED alone", GUEST_MEMFD_FLAG_INIT_SHARED)):
        file = vm.create_guest_memfd(SIZE, flags)
        x.check(f"mmap of a file with {name}", raw.answer(partial(mmap.mmap, file.fileno(), SIZE)), "ENODEV")
        refused = raw.answer(partial(raw.slot, x, BEYOND, SIZE, spare.hva, file=file))
        x.check(f"a slot on a file with {name}", refused, "EINVAL")


@claim(none="memfd", pkvm="memfd", origin=f"{CREATE}: -EINVAL")
def impossible_files_are_refused(x: Experiment) -> None:
    """A guest_memfd of no bytes, of parts of pages, of a negative size or with unknown flags is refused with EINVAL."""
    vm = x.machine.vm
    for size in (0, 1, HOST_PAGE - 1, HOST_PAGE + 1, 1 << 63):
        x.check(f"size {size:#x}", raw.answer(partial(vm.create_guest_memfd, size, 3)), "EINVAL")
    for bit in (2, 3, 31, 63):
        x.check(f"flag bit {bit}", raw.answer(partial(vm.create_guest_memfd, SIZE, 1 << bit)), "EINVAL")


@claim(none="memfd guest_memfd private", pkvm="memfd", origin=f"{CREATE}: i_size and nothing else")
def a_huge_sparse_file_costs_nothing(x: Experiment) -> None:
    """A file of 1 TiB, and a slot over 256 GiB of it, cost no memory until a page is touched."""
    before = raw.free_kib()
    file = raw.make(x, 1 << 40)
    raw.slot(x, BEYOND, 1 << 38, file.hva, file=file.guest_memfd)
    x.check("size of the file, in TiB", os.fstat(file.fd).st_size >> 40, 1)
    x.check("KiB that fstat tells", raw.kib(file.fd), 0)
    last = BEYOND + (1 << 38) - HOST_PAGE
    x.guest.write64(last, VALUE)
    x.check("the guest reads its store to the slot's last page", x.guest.read64(last), VALUE)
    x.check("less than 16 MiB are gone", before - raw.free_kib() < 16 << 10)


@claim(none=FILES, pkvm="memfd", origin="virt/kvm/guest_memfd.c, kvm_gmem_setattr(): -EINVAL; fcntl(2), F_SEAL_SHRINK")
def the_size_is_final(x: Experiment) -> None:
    """The size of the file behind a live slot cannot be changed."""
    file = raw.make(x, SIZE)
    raw.slot(x, BEYOND, SIZE, file.hva, file=file.guest_memfd)
    x.guest.write64(BEYOND, VALUE)
    for what, size in (("to nothing", 0), ("to half", SIZE // 2), ("to twice", SIZE * 2)):
        refused = raw.answer(partial(os.ftruncate, file.fd, size))
        x.tell(f"ftruncate {what}", refused)
        x.check(f"ftruncate {what} is refused", refused != "ok")
    x.tell("F_GET_SEALS, for pyvmm seals what it can", raw.answer(lambda: fcntl.fcntl(file.fd, F_GET_SEALS)))
    x.check("the guest reads", x.guest.read64(BEYOND), VALUE)


# -- what is there


@claim(none=FILES, pkvm="memfd", origin="fstat(2), st_blocks; virt/kvm/guest_memfd.c, kvm_gmem_get_folio()")
def fstat_counts_the_pages(x: Experiment) -> None:
    """The st_blocks of the file count its present pages: touched or allocated, and not punched again."""
    size, kib = 64 * HOST_PAGE, HOST_PAGE >> 10
    file = x.memory.add(BEYOND, raw.make(x, size)).backing
    x.start()
    x.check("KiB before a touch", raw.kib(file.fd), 0)
    x.guest.touch(BEYOND, 8, access=Access.WRITE)
    x.check("KiB when the guest has touched 8 pages", raw.kib(file.fd), 8 * kib)
    x.check("fallocate of 16 more", raw.allocate(file.fd, size // 2, size // 4), "ok")
    x.check("KiB with those", raw.kib(file.fd), 24 * kib)
    x.check("punching all", raw.punch(file.fd, 0, size), "ok")
    x.event("punch", BEYOND, size // HOST_PAGE)
    x.check("KiB after the punch", raw.kib(file.fd), 0)


@claim(none=FILES, emulated="memfd guest_memfd", pkvm="memfd", origin=f"{PUNCHED}; {NO_WAY_BACK}")
def a_punch_frees_memory(x: Experiment) -> None:
    """The memory of punched pages is the host's again at once, while the guest lives."""
    size = 2048 * HOST_PAGE
    file = x.memory.add(BEYOND, raw.make(x, size)).backing
    x.guest.touch(BEYOND, size // HOST_PAGE, access=Access.WRITE)
    before = raw.free_kib()
    x.check(f"punching {size >> 20} MiB", raw.punch(file.fd, 0, size), "ok")
    x.event("punch", BEYOND, size // HOST_PAGE)
    x.tell("KiB of the file that fstat tells", raw.kib(file.fd))
    x.check(f"free memory has grown by {size * 3 >> 22} MiB or more", raw.free_kib() - before >= size * 3 >> 12)


@claim(none=FILES, pkvm="memfd", origin=f"{FALLOCATE}: FALLOC_FL_KEEP_SIZE alone allocates what is missing")
def allocating_keeps_what_is_there(x: Experiment) -> None:
    """Allocating pages that are there (fallocate(2)) leaves their contents alone, and the guest in KVM_RUN."""
    page = x.page(2)
    x.guest.write64(page, VALUE)
    file, offset = raw.place(x, page)
    before = raw.exits(x)
    x.check("fallocate of it and the next", raw.allocate(file.fd, offset, 2 * HOST_PAGE), "ok")
    x.check("the guest reads its store", x.guest.read64(page), VALUE)
    x.check("and zeros in the new page", x.guest.read64(page + HOST_PAGE), 0)
    x.check("exits for that", raw.exits(x) - before, 0)


@claim(none=FILES, origin=f"{FALLOCATE}: -EOPNOTSUPP for every other mode")
def only_allocating_and_punching_is_known(x: Experiment) -> None:
    """The file supports fallocate(2) only with FALLOC_FL_KEEP_SIZE, with and without a punch; else EOPNOTSUPP."""
    file = raw.make(x, SIZE)
    for name, mode in (
        ("0, which may grow the file", 0),
        ("ZERO_RANGE", FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE),
        ("COLLAPSE_RANGE", FALLOC_FL_COLLAPSE_RANGE),
        ("INSERT_RANGE", FALLOC_FL_INSERT_RANGE),
    ):
        said = raw.answer(partial(mman.fallocate, file.fd, mode, 0, HOST_PAGE))
        x.check(f"mode {name}", said, "EOPNOTSUPP")
    x.check("beyond the end", raw.allocate(file.fd, SIZE, HOST_PAGE), "EINVAL")


# -- holes


@claim(none=FILES, emulated=FILES, pkvm="memfd", origin=PUNCHED)
def a_punched_page_is_zeros_without_an_exit(x: Experiment) -> None:
    """The guest's next load of a punched page finds zeros, and no vCPU has left KVM_RUN for it."""
    page = x.page(3)
    for number in range(3):
        x.guest.write64(page + number * HOST_PAGE, VALUE)
    before = raw.exits(x)
    x.picture("before the punch")
    x.memory.punch(page + HOST_PAGE, HOST_PAGE, unsafe=True)
    x.event("punch", page + HOST_PAGE)
    x.picture("after it")
    load = x.guest.timed_read(page + HOST_PAGE)
    x.check("the guest reads", load.value, 0)
    x.time("load of a punched page", load.ticks)
    x.check("exits for that", raw.exits(x) - before, 0)
    x.check("the page before it", x.guest.read64(page), VALUE)
    x.check("the page behind it", x.guest.read64(page + 2 * HOST_PAGE), VALUE)


@claim(none=FILES, emulated=FILES, pkvm="memfd", origin=FATAL)
def a_punch_is_fatal_to_the_guest(x: Experiment) -> None:
    """Once a hole is punched in the file, the guest's next access to that page is a fatal error."""
    page = x.page()
    x.guest.write64(page, VALUE)
    x.memory.punch(page, HOST_PAGE, unsafe=True)
    x.event("punch", page)
    went = x.went(x.guest.start_read64(page))
    x.tell("the guest's load", went)
    x.check("it fails", went != "went on")


@claim(
    none=FILES,
    emulated="memfd guest_memfd",
    pkvm="memfd",
    faults=True,
    origin='thread: "the host can\'t unmap anything from the guest stage-2, it can only tear it down"',
)
def a_punch_unmaps_the_page_from_the_guest(x: Experiment) -> None:
    """A punch takes the page out of the guest's stage 2: its next access faults, once."""
    page = x.page()
    x.guest.write64(page, VALUE)
    before = len(x.faults(page))
    x.memory.punch(page, HOST_PAGE, unsafe=True)
    x.event("punch", page)
    x.guest.read64(page)
    x.check("faults of the next load", len(x.faults(page)) - before, 1)
    x.guest.read64(page)
    x.check("faults of one more", len(x.faults(page)) - before, 1)


@claim(none="memfd guest_memfd", pkvm="memfd", origin=f"{PUNCHED}; arch/arm64/kvm/mmu.c, kvm_unmap_gfn_range()")
def after_a_punch_both_see_the_same_page(x: Experiment) -> None:
    """After a punch host and guest still look at one page: the guest finds what the host stores there."""
    page = x.page()
    x.guest.write64(page, VALUE)
    x.tell("before the punch the host reads", x.host64(page))
    x.picture("before the punch")
    x.memory.punch(page, HOST_PAGE, unsafe=True)
    x.event("punch", page)
    x.picture("after it")
    x.check("the host reads after it", x.host64(page), 0)
    x.check("the host can store", x.host_stores(page, 5))
    x.check("the guest reads", x.guest.read64(page), 5)


@claim(none=FILES, emulated="memfd", pkvm="memfd", cpus=2, origin=f"{PUNCHED}; mmu_invalidate_retry()")
def a_punch_under_a_running_vcpu_is_harmless(x: Experiment) -> None:
    """A page can be punched again and again while a vCPU stores to it without a pause: no trap, no exit, no stop."""
    page = x.page()
    [other] = x.others()
    x.guest.write64(page, VALUE)
    before = raw.exits(x)
    punches, whole = 0, True
    while punches < 20:
        order = other.start_hammer(page, 64, 200_000, Access.WRITE)
        while not order.done():
            x.memory.punch(page, HOST_PAGE, unsafe=True)
            punches += 1
        whole &= order.result() == 200_000
    x.event("punch", page)
    x.check("all stores are done, with 20 punches or more among them", whole)
    x.check("exits", raw.exits(x) - before, 0)
    x.memory.punch(page, HOST_PAGE, unsafe=True)
    x.tell("the guest finds zeros after a last punch", x.guest.read64(page) == 0)


@claim(none=FILES, pkvm="memfd", origin=f"{FALLOCATE}: PAGE_ALIGNED or -EINVAL; mm/shmem.c zeroes parts of pages")
def part_of_a_page_cannot_be_punched(x: Experiment) -> None:
    """A hole that is not of whole pages is refused with EINVAL, and the page stays as it is."""
    page = x.page()
    x.guest.write64(page, VALUE)
    x.guest.write64(page + 2048, VALUE)
    file, offset = raw.place(x, page)
    x.check("a hole in the first half of a page", raw.punch(file.fd, offset, 2048), "EINVAL")
    went = x.went(x.guest.start_read64(page))
    x.check("the guest's load", went, "went on")
    if went == "went on":
        x.check("the guest reads in that half", x.guest.read64(page), VALUE)
        x.check("and in the other", x.guest.read64(page + 2048), VALUE)


@claim(none=FILES, emulated="memfd", pkvm="memfd", origin=f"{PUNCHED}; {FALLOCATE}")
def a_hole_spans_two_slots_on_two_files(x: Experiment) -> None:
    """A hole across the border of two slots on two files is zeros on both sides of it and nowhere else."""
    for number in range(2):
        x.memory.add(Gpa(BEYOND + number * SIZE), raw.make(x, SIZE))
    border = BEYOND + SIZE
    places = [border + number * HOST_PAGE for number in range(-2, 2)]
    for place in places:
        x.guest.write64(place, VALUE)
    x.memory.punch(border - HOST_PAGE, 2 * HOST_PAGE, unsafe=True)
    x.event("punch", border - HOST_PAGE, 2)
    words = " ".join(str(x.guest.read64(place)) for place in places)
    x.check("words of the pages around the border", words, f"{VALUE} 0 0 {VALUE}")


@claim(none="memfd guest_memfd", emulated="memfd", pkvm="memfd", origin="madvise(2), MADV_REMOVE: a punch by address")
def madv_remove_punches_too(x: Experiment) -> None:
    """MADV_REMOVE on the host's mapping is a punch: the guest finds zeros."""
    page = x.page()
    x.guest.write64(page, VALUE)
    x.check("MADV_REMOVE", madvise(x.memory.hva(page), HOST_PAGE, MADV_REMOVE).name, "ok")
    x.event("punch", page)
    x.check("the guest reads", x.guest.read64(page), 0)


@claim(none=FILES, emulated="memfd", pkvm="memfd", origin="madvise(2), MADV_DONTNEED: shared mappings lose no contents")
def madv_dontneed_takes_nothing(x: Experiment) -> None:
    """MADV_DONTNEED on the host's mapping does not drop the page: the guest keeps its contents."""
    page = x.page()
    x.guest.write64(page, VALUE)
    x.check("MADV_DONTNEED", madvise(x.memory.hva(page), HOST_PAGE, MADV_DONTNEED).name, "ok")
    x.check("the guest reads", x.guest.read64(page), VALUE)
    x.guest.write64(page, 5)
    x.check("and its next store", x.guest.read64(page), 5)
