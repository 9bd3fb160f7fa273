# SPDX-License-Identifier: Apache-2.0
"""Claims about how pages get into a guest: stage 2 starts empty and is filled by faults."""

from __future__ import annotations

import ctypes
import os
import resource
import tempfile

from pyvmm.atlas.claim import group
from pyvmm.experiment import BEYOND, Experiment, raw
from pyvmm.experiment.host import settings
from pyvmm.experiment.host.syscalls import drop_capabilities
from pyvmm.guest.orders import Access
from pyvmm.memory import mman
from pyvmm.memory.backing import FileBacking, Memfd, SharedGuestMemfd
from pyvmm.memory.memlock import LockedMemory
from pyvmm.pages import HOST_PAGE, HUGE_SIZE
from pyvmm.uapi.capability import CAP_IPC_LOCK
from pyvmm.uapi.mman import PROT_NONE, PROT_READ

claim = group("fault-in")

EMPTY = 'thread: "initially the guest has an empty stage-2 (we don\'t require pre-faulting everything)"'
HVA = 'thread: "the host handler finds the corresponding memslot and does the ipa->hva conversion"'
PIN = 'thread: "In our current implementation it uses a longterm GUP pin on the corresponding page"'
ABORT = "arch/arm64/kvm/mmu.c, pkvm_mem_abort()"
RET = 0xD65F_03C0
KIB = HOST_PAGE >> 10
"""KiB of a page."""
CAP_SYS_RESOURCE = 24
"""include/uapi/linux/capability.h"""


@claim(none="memfd guest_memfd private", emulated="memfd guest_memfd", pkvm="memfd", origin=EMPTY, faults=True)
def every_fresh_page_faults(x: Experiment) -> None:
    """The guest's stage 2 starts empty: every page of a fresh range faults when the guest first touches it."""
    x.start()
    range_ = x.page(32)
    x.tell("faults in the range before the guest touched it", len(x.faults(range_, 32)))
    x.picture("before the guest touches the pages")
    x.time("32 first touches", x.guest.touch(range_, 32).ticks)
    x.check("pages that faulted, of 32 touched", len({fault.gpa for fault in x.faults(range_, 32)}), 32)
    x.picture("after it has")


@claim(none="memfd guest_memfd private", emulated="memfd guest_memfd", pkvm="memfd", origin=EMPTY, faults=True)
def a_first_read_faults_once(x: Experiment) -> None:
    """The first load of a page faults once, and a second load does not fault."""
    page = x.page()
    x.time("first load", x.guest.timed_read(page).ticks)
    x.check("faults after the first load", len(x.faults(page)), 1)
    x.time("second load", x.guest.timed_read(page).ticks)
    x.check("faults after the second", len(x.faults(page)), 1)


@claim(none="memfd guest_memfd private", emulated="memfd guest_memfd", pkvm="memfd", origin=EMPTY, faults=True)
def a_first_write_faults_once(x: Experiment) -> None:
    """The first store to a page faults once, and a second store does not fault."""
    page = x.page()
    x.time("first store", x.guest.write64(page, 1))
    x.check("faults after the first store", len(x.faults(page)), 1)
    x.time("second store", x.guest.write64(page, 2))
    x.check("faults after the second", len(x.faults(page)), 1)


@claim(none="memfd guest_memfd private", emulated="memfd guest_memfd", pkvm="memfd", origin=EMPTY, faults=True)
def a_first_fetch_faults_once(x: Experiment) -> None:
    """The first instruction fetch from a page faults once, and running it again does not fault."""
    page = x.page()
    x.time("first fetch", x.guest.touch(page, 1, access=Access.EXECUTE).ticks)
    x.check("faults after the first fetch", len(x.faults(page)), 1)
    x.time("second fetch", x.guest.touch(page, 1, access=Access.EXECUTE).ticks)
    x.check("faults after the second", len(x.faults(page)), 1)


@claim(
    none="memfd guest_memfd private",
    emulated="memfd guest_memfd",
    pkvm="memfd",
    faults=True,
    origin="arch/arm64/kvm/mmu.c, user_mem_abort() and gmem_abort(): execute permission on demand",
)
def code_costs_no_second_fault(x: Experiment) -> None:
    """A page the guest wrote code to runs without another fault."""
    page = x.page()
    x.guest.write64(page, RET)
    x.guest.flush(page, 8)
    before = len(x.faults(page))
    x.guest.execute(page)
    x.check("faults of the fetch", len(x.faults(page)) - before, 0)
    x.guest.execute(page)
    x.check("faults of a second call", len(x.faults(page)) - before, 0)


@claim(
    none="memfd guest_memfd private",
    emulated="memfd",
    pkvm="memfd",
    faults=True,
    origin="arch/arm64/kvm/mmu.c: a read fault maps writable where the host's page is",
)
def a_write_after_a_read_costs_no_fault(x: Experiment) -> None:
    """A page the guest has read can be written without another fault."""
    page = x.page()
    x.guest.read64(page)
    before = len(x.faults(page))
    x.guest.write64(page, 1)
    x.check("faults of the store", len(x.faults(page)) - before, 0)


@claim(
    none="memfd guest_memfd thp hugetlb",
    pkvm="memfd thp",
    emulated="memfd",
    faults=True,
    origin='thread: "the guest can then proceed to run, and possibly faults in many more pages"',
)
def a_fault_brings_one_page(x: Experiment) -> None:
    """A fault maps the page that was touched and none of its neighbours."""
    range_ = x.page(64)
    x.guest.touch(range_, 8, stride=8)
    first = len(x.faults(range_, 64))
    x.guest.touch(range_, 64)
    x.check("faults when every 8th of 64 pages is touched", first, 8)
    x.check("faults when all of them are touched after that", len(x.faults(range_, 64)) - first, 56)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=HVA)
def slot_edges_lead_to_the_right_page(x: Experiment) -> None:
    """On both sides of the border of two slots the guest finds the right file's page, and beyond them nothing."""
    low, high = Memfd(1 << 16), Memfd(1 << 16)
    low.load((1 << 16) - 8, (0x1111).to_bytes(8, "little"))
    high.load(0, (0x2222).to_bytes(8, "little"))
    x.memory.add(BEYOND, low)
    x.memory.add(BEYOND + (1 << 16), high)
    x.check("last word of the lower slot", x.guest.read64(BEYOND + (1 << 16) - 8), 0x1111)
    x.check("first word of the upper slot", x.guest.read64(BEYOND + (1 << 16)), 0x2222)
    x.check("a load behind the last page", x.went(x.guest.start_read64(BEYOND + (1 << 17))), "external abort")
    x.check("a load before the first page", x.went(x.guest.start_read64(BEYOND - 8)), "external abort")


@claim(none="memfd guest_memfd", emulated="memfd", pkvm="memfd", origin=HVA)
def crossed_slots_lead_to_the_right_page(x: Experiment) -> None:
    """Two slots whose guest addresses are in the reverse order of their places in one file do not mix up pages."""
    half = 16 * HOST_PAGE
    file = SharedGuestMemfd(x.machine.vm, 2 * half) if x.backing == "guest_memfd" else Memfd(2 * half)
    for page in range(32):
        file.load(page * HOST_PAGE, (page + 1).to_bytes(8, "little"))
    x.memory.add(BEYOND, file, offset=half, size=half)
    x.memory.add(BEYOND + half, file, offset=0, size=half)
    numbers = [*range(17, 33), *range(1, 17)]
    right = sum(x.guest.read64(BEYOND + page * HOST_PAGE) == number for page, number in enumerate(numbers))
    x.check("pages found where they belong, of 32", right, 32)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{PIN}; {ABORT}: account_locked_vm(1)")
def each_page_is_locked_when_touched(x: Experiment) -> None:
    """Each page the guest touches is charged to the VMM's locked memory (VmLck), one by one."""
    range_ = x.page(8)
    x.start()
    before = LockedMemory.read().locked
    growth = []
    for page in range(8):
        x.guest.read64(range_ + page * HOST_PAGE)
        growth.append((LockedMemory.read().locked - before) // 1024)
    wanted = " ".join(str(n * KIB) for n in range(1, 9))
    x.check("kB locked after each of 8 first touches", " ".join(map(str, growth)), wanted)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{PIN}; Documentation/filesystems/proc.rst: VmPin")
def pins_are_told_apart(x: Experiment) -> None:
    """The pages pinned for the guest are counted as pinned memory (VmPin), separately from locked memory."""
    x.start()
    before = _status_kib("VmPin")
    x.guest.touch(x.page(8), 8)
    x.check("kB of VmPin that 8 touched pages add", _status_kib("VmPin") - before, 8 * KIB)


@claim(pkvm="memfd", emulated="memfd", origin=f"{ABORT}; unpinned in __pkvm_pgtable_stage2_reclaim()")
def a_share_leaves_the_lock(x: Experiment) -> None:
    """A page the guest shares stays locked memory of the VMM, and an unshare charges it no second time."""
    page = x.page()
    x.start()
    before = LockedMemory.read().locked
    x.guest.write64(page, 1)
    x.check("bytes locked by the first touch", LockedMemory.read().locked - before, HOST_PAGE)
    x.guest.share(page)
    x.check("bytes locked once it is shared", LockedMemory.read().locked - before, HOST_PAGE)
    x.guest.unshare(page)
    x.check("bytes locked once it is taken back", LockedMemory.read().locked - before, HOST_PAGE)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{ABORT}; mm/util.c, account_locked_vm(): -ENOMEM")
def memlock_exhaustion_is_resumable(x: Experiment) -> None:
    """Where RLIMIT_MEMLOCK ends, KVM_RUN fails with ENOMEM, and after the limit is raised the same access succeeds."""
    try:
        drop_capabilities(CAP_IPC_LOCK)
    except OSError as error:
        x.cannot(f"CAP_IPC_LOCK cannot be given up: {error.strerror}")
    range_ = x.page(8)
    x.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = LockedMemory.read().locked + 4 * HOST_PAGE
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, hard))
    for page in range(4):
        x.guest.write64(range_ + page * HOST_PAGE, page)
    order = x.guest.start_write64(range_ + 4 * HOST_PAGE, 0x4444)
    if not x.check("KVM_RUN at the page that is over the limit", x.went(order), "ENOMEM"):
        return
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit + 64 * HOST_PAGE, hard))
    x.retry()
    order.result()
    x.check("the page holds what the guest stored", x.guest.read64(range_ + 4 * HOST_PAGE), 0x4444)
    x.check("the pages before it are as they were", x.guest.read64(range_ + 3 * HOST_PAGE), 3)
    x.tell("soft limit before, unlimited or a number", "unlimited" if soft == resource.RLIM_INFINITY else "a number")


@claim(none="memfd", pkvm="memfd", origin=f"{ABORT}: folio_test_swapbacked(), else -EIO; mm/gup.c for file mappings")
def file_pages_are_refused(x: Experiment) -> None:
    """Pages of a regular file cannot become guest memory: KVM_RUN fails."""
    directory = next((d for d in (os.getcwd(), "/root", "/var/tmp") if _is_file_system(d)), None)
    if directory is None:
        x.cannot("every directory here is on a tmpfs, whose pages are not a file's")
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        file.truncate(1 << 16)
        file.write(b"on disk.")
        file.flush()
        backing = x.stack.enter_context(FileBacking(os.dup(file.fileno()), 1 << 16))
        backing.kind = "file"
        raw.slot(x, BEYOND, backing.size, backing.hva)
        ran = x.went(x.guest.start_read64(BEYOND))
        x.tell("KVM_RUN", ran)
        x.check("the guest's load fails", ran != "went on")


@claim(none="memfd", pkvm="memfd", origin=f"{ABORT}: hugetlb folios are not swapbacked, -EIO")
def hugetlb_pages_are_refused(x: Experiment) -> None:
    """Huge pages of hugetlbfs cannot become guest memory: KVM_RUN fails with EIO."""
    x.stack.enter_context(x.setting(settings.HUGE_PAGES, "2"))
    backing = x.stack.enter_context(Memfd(HUGE_SIZE, hugetlb=True))
    raw.slot(x, BEYOND, backing.size, backing.hva)
    x.check("KVM_RUN", x.went(x.guest.start_read64(BEYOND)), "EIO")


@claim(none="memfd", pkvm="memfd", origin="arch/arm64/kvm/mmu.c: no page behind the hva, -EFAULT, exit_reason 0")
def an_unmapped_hva_is_efault(x: Experiment) -> None:
    """Where the host's mapping is PROT_NONE, KVM_RUN fails with EFAULT, without details, and can be tried again."""
    page = x.page()
    x.start()
    mman.protect(x.memory.hva(page), HOST_PAGE, PROT_NONE)
    order = x.guest.start_write64(page, 7)
    failure = x.failed(order)
    x.check("KVM_RUN", failure.name if failure else "went on", "EFAULT")
    x.check("exit_reason", failure.exit_reason if failure else None, 0)
    mman.protect(x.memory.hva(page), HOST_PAGE, mman.PROT_RW)
    x.retry()
    order.result()
    x.check("then the guest reads its store", x.guest.read64(page), 7)


@claim(none="memfd", pkvm="memfd", origin=f"{ABORT}: pin_user_pages(FOLL_WRITE) whatever the access")
def a_read_only_mapping_serves_loads(x: Experiment) -> None:
    """A page that the host has mapped read-only can be read by the guest."""
    page = x.page()
    x.memory.write(page, (9).to_bytes(8, "little"))
    x.start()
    mman.protect(x.memory.hva(page), HOST_PAGE, PROT_READ)
    order = x.guest.start_read64(page)
    if x.check("KVM_RUN", x.went(order), "went on"):
        x.check("the guest reads", order.result(), 9)


@claim(
    none="memfd guest_memfd",
    emulated="memfd",
    pkvm="memfd",
    cpus=4,
    faults=True,
    origin="arch/arm64/kvm/hyp/nvhe/mem_protect.c: a page is donated once; pkvm_mem_abort(): -EAGAIN is retried",
)
def vcpus_race_for_one_page(x: Experiment) -> None:
    """Four vCPUs that first touch the same pages at the same moment all get them, and no page is locked twice."""
    x.start()
    vcpus = [x.guest, *x.others()]
    range_ = x.page(64)
    for vcpu in vcpus:
        vcpu.touch(x.page(), 1)  # its stack's and its code's own faults come before the count
    before = LockedMemory.read().locked
    orders = [vcpu.start_touch(range_, 64, access=Access.WRITE) for vcpu in vcpus]
    x.check("touches done, of 4 times 64", sum(order.result().pages for order in orders), 256)
    locked = LockedMemory.read().locked - before
    x.tell("bytes locked by 64 pages", locked)
    x.check("no page is locked twice", locked in (0, 64 * HOST_PAGE))
    x.check("pages that faulted", len({fault.gpa for fault in x.faults(range_, 64)}), 64)


@claim(
    none="memfd guest_memfd",
    emulated="memfd",
    pkvm="memfd",
    faults=True,
    origin="Documentation/virt/kvm/api.rst: KVM_PRE_FAULT_MEMORY is not on arm64; madvise(2), MADV_POPULATE_WRITE",
)
def populating_spares_no_fault(x: Experiment) -> None:
    """Pages that the host has populated before still cost the guest one fault each."""
    range_ = x.page(32)
    x.memory.populate(range_, 32 * HOST_PAGE)
    x.time("32 first touches of populated pages", x.guest.touch(range_, 32).ticks)
    x.time("32 first touches of others", x.guest.touch(x.page(32), 32).ticks)
    x.check("pages that faulted, of 32", len({fault.gpa for fault in x.faults(range_, 32)}), 32)


@claim(none="memfd guest_memfd", pkvm="memfd", origin="mem_protect.c, __pkvm_host_donate_guest(): contents are kept")
def until_the_first_touch_a_page_is_the_hosts(x: Experiment) -> None:
    """While the guest runs, the host can write a page that the guest has not touched, and the guest finds the data."""
    page = x.page()
    x.start()
    x.check("the host stores to it", x.host_stores(page, 0x77))
    x.check("the guest reads that", x.guest.read64(page), 0x77)


def _status_kib(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{field}:"))


def _is_file_system(directory: str) -> bool:
    tmpfs = 0x0102_1994
    room = (ctypes.c_long * 64)()
    ok = ctypes.CDLL(None).statfs(directory.encode(), ctypes.byref(room)) == 0
    return ok and room[0] != tmpfs
