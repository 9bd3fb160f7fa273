# SPDX-License-Identifier: Apache-2.0
"""Claims about memory that is missing at the guest's first access, and faults that wait for userfaultfd."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyvmm._native import lib
from pyvmm.atlas.claim import group
from pyvmm.experiment import BEYOND, Experiment, raw
from pyvmm.guest.orders import Access
from pyvmm.memory.address import Gpa, Hva
from pyvmm.memory.backing import Memfd
from pyvmm.memory.fault_server import Answer, Server
from pyvmm.memory.memlock import LockedMemory
from pyvmm.memory.on_demand import OnDemand
from pyvmm.memory.userfault import Fault, FaultKind, Userfault
from pyvmm.pages import HOST_PAGE, HUGE_SIZE

if TYPE_CHECKING:
    from pyvmm._native import pv_vcpu

claim = group("lazy")

WAIT = "mm/userfaultfd.c, handle_userfault(): the vCPU's thread sleeps inside KVM_RUN"
NO_RETRY = "arch/arm64/kvm/mmu.c, pkvm_mem_abort(): pins without FOLL_UNLOCKABLE, so no fault may wait: -EFAULT"
UFFD = "Documentation/admin-guide/mm/userfaultfd.rst"
SLOT = "virt/kvm/kvm_main.c, kvm_set_memory_region(): a slot can be made while vCPUs run"
HVA = 'thread: "the host handler finds the corresponding memslot and does the ipa->hva conversion"'
DONATED = 'thread: "once it has a page, the host handler issues a hypercall to donate the page to the guest"'
POPULATED = 'thread: "we don\'t require pre-faulting everything"'
VALUE = 42
PAGES = 4
SIZE = PAGES * HOST_PAGE


def _page(value: int) -> bytes:
    """Return a page's worth of one word."""
    return value.to_bytes(8, "little") * (HOST_PAGE // 8)


def _userfault(x: Experiment, *, user_mode_only: bool = False) -> Userfault:
    return x.stack.enter_context(Userfault.open(user_mode_only=user_mode_only))


def _late_file(x: Experiment, *, full: bool) -> tuple[Memfd, Hva]:
    """Give the guest a slot over a new, unmapped file, with or without pages. Returns KVM's address."""
    file = Memfd(SIZE)
    file.separate_view()
    if full:
        file.load(0, _page(VALUE) * PAGES)
    x.memory.add(BEYOND, file)
    return file, x.memory.hva(BEYOND, SIZE)


@claim(none="memfd thp", emulated="memfd", pkvm="memfd", origin=f"{UFFD}, UFFDIO_REGISTER_MODE_MISSING; {NO_RETRY}")
def a_missing_page_is_served(x: Experiment) -> None:
    """The guest's first access to a missing page is reported by userfaultfd, and the guest finds the provided page."""
    page, asked = x.page(PAGES), list[Fault]()
    userfault, hva = _userfault(x), x.memory.hva(page, SIZE)
    x.start()
    userfault.register(hva, SIZE, missing=True)
    x.picture("before the guest's first touch")

    def answer(fault: Fault) -> bytes:
        asked.append(fault)
        return _page(VALUE)

    with Server(userfault, answer):
        if x.check("the guest's load", x.went(x.guest.start_read64(page)), "went on"):
            x.check("the guest reads", x.guest.read64(page), VALUE)
            x.time("load of a missing page", x.guest.timed_read(page + HOST_PAGE).ticks)
            x.guest.write64(page + 2 * HOST_PAGE, 1)
            x.check("behind a store, the guest reads", x.guest.read64(page + 2 * HOST_PAGE + 8), VALUE)
        x.check("faults told, as pages", " ".join(str((each.page - hva) // HOST_PAGE) for each in asked), "0 1 2")
        x.check("stores among them", sum(each.write for each in asked), 1)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{UFFD}, UFFDIO_REGISTER_MODE_MINOR; {NO_RETRY}")
def a_minor_fault_is_served(x: Experiment) -> None:
    """A page that is in the file but not in KVM's mapping is reported once, and UFFDIO_CONTINUE maps it."""
    userfault = _userfault(x)
    x.start()
    _, hva = _late_file(x, full=True)
    userfault.register(hva, SIZE, minor=True)
    with Server(userfault, lambda _: Answer.CONTINUE) as server:
        if x.check("the guest's load", x.went(x.guest.start_read64(BEYOND)), "went on"):
            x.check("the guest reads what the file holds", x.guest.read64(BEYOND), VALUE)
        x.check("minor faults told", server.served[FaultKind.MINOR], 1)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{UFFD}, UFFDIO_WRITEPROTECT; mmu notifiers unmap stage 2")
def a_store_to_a_protected_page_is_told(x: Experiment) -> None:
    """After a page of the running guest is write-protected, its next store is reported and waits, and loads are not."""
    page = x.page(PAGES)
    userfault, hva = _userfault(x), x.memory.hva(page, SIZE)
    x.guest.write64(page, 1)
    userfault.register(hva, SIZE, wp=True)
    userfault.write_protect(hva, SIZE)
    with Server(userfault, lambda _: Answer.UNPROTECT) as server:
        x.check("the guest reads", x.guest.read64(page), 1)
        x.check("faults told of a load", server.served[FaultKind.WP], 0)
        x.check("the guest's store", x.went(x.guest.start_write64(page, 2)), "went on")
        x.check("faults told of it", server.served[FaultKind.WP], 1)
        x.check("the guest reads after that", x.guest.read64(page), 2)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{UFFD}, UFFDIO_RWPROTECT; mmu notifiers unmap stage 2")
def any_access_to_a_protected_page_is_told(x: Experiment) -> None:
    """After a page of the running guest is read-write-protected, its next access is reported and waits, once."""
    page = x.page(PAGES)
    userfault, hva = _userfault(x), x.memory.hva(page, SIZE)
    x.guest.write64(page, 1)
    userfault.register(hva, SIZE, rwp=True)
    userfault.rwprotect(hva, SIZE)
    with Server(userfault, lambda _: Answer.UNPROTECT) as server:
        order = x.guest.start_read64(page)
        if x.check("the guest's load", x.went(order), "went on"):
            x.check("the guest reads", order.result(), 1)
        x.check("faults told of it", server.served[FaultKind.RWP], 1)
        x.guest.write64(page, 2)
        x.check("faults told, with a store after it", server.served[FaultKind.RWP], 1)


@claim(pkvm="memfd", origin=NO_RETRY)
def a_refused_access_is_made_good_by_hand(x: Experiment) -> None:
    """A KVM_RUN that fails at a page under userfaultfd is not reported, and succeeds once the page is provided."""
    userfault = _userfault(x)
    x.start()
    file, hva = _late_file(x, full=True)
    file.punch(0, HOST_PAGE)
    places: dict[str, Callable[[Hva], None]] = {
        "missing": lambda at: userfault.copy(at, _page(VALUE)),
        "minor": userfault.continue_,
        "wp": lambda at: userfault.write_protect(at, on=False),
        "rwp": lambda at: userfault.rwprotect(at, on=False),
    }
    for number, (mode, put_right) in enumerate(places.items()):
        at = Hva(hva + number * HOST_PAGE)
        if mode in ("wp", "rwp"):
            raw.load64(at)  # a page that is mapped: only such a one can be rw-protected
        userfault.register(at, HOST_PAGE, **{mode: True})
        if mode in ("wp", "rwp"):
            (userfault.write_protect if mode == "wp" else userfault.rwprotect)(at)
        order = x.guest.start_read64(BEYOND + number * HOST_PAGE)
        if x.check(f"{mode}: the guest's load", x.went(order), "EFAULT"):
            x.check(f"{mode}: faults told", len(userfault.read()), 0)
            put_right(at)
            x.retry()
            x.check(f"{mode}: put right, the guest's load", x.went(order), "went on")
        x.check(f"{mode}: the guest reads", order.result(), VALUE)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{POPULATED}; {UFFD}, UFFDIO_COPY")
def pages_put_in_advance_do_not_wait(x: Experiment) -> None:
    """A page that UFFDIO_COPY has provided before the guest's first access causes no reported fault."""
    page = x.page(PAGES)
    userfault, hva = _userfault(x), x.memory.hva(page, SIZE)
    x.start()
    userfault.register(hva, SIZE, missing=True)
    userfault.copy(hva, _page(VALUE) * 2)
    order = x.guest.start_read64(page)
    if x.check("the guest's load", x.went(order), "went on"):
        x.check("the guest reads", order.result(), VALUE)
        x.time("load of a page put there before", x.guest.timed_read(page + HOST_PAGE).ticks)
    x.check("faults told", len(userfault.read()), 0)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{UFFD}, UFFD_USER_MODE_ONLY; {NO_RETRY}")
def without_privilege_the_guest_can_be_served(x: Experiment) -> None:
    """A userfaultfd made with UFFD_USER_MODE_ONLY, which needs no privilege, serves the guest's faults too."""
    page = x.page(PAGES)
    userfault, hva = _userfault(x, user_mode_only=True), x.memory.hva(page, SIZE)
    x.start()
    userfault.register(hva, SIZE, missing=True)
    with Server(userfault, lambda _: _page(VALUE)) as server:
        x.check("the guest's load", x.went(x.guest.start_read64(page)), "went on")
        x.check("faults told", server.served[FaultKind.MISSING], 1)


@claim(
    none="memfd thp hugetlb guest_memfd private",
    pkvm="memfd",
    origin="mm/userfaultfd.c, vma_can_userfault(): vm_ops->uffd_ops",
)
def the_mapping_takes_a_userfaultfd(x: Experiment) -> None:
    """The mapping of the guest's memory can be registered with a userfaultfd, for missing and for minor faults."""
    page = x.page(HUGE_SIZE // HOST_PAGE, align=HUGE_SIZE)
    userfault, hva = _userfault(x), x.memory.hva(page, HUGE_SIZE)
    x.check("UFFDIO_REGISTER, missing", raw.answer(lambda: userfault.register(hva, HUGE_SIZE, missing=True)), "ok")
    x.check("UFFDIO_REGISTER, minor", raw.answer(lambda: userfault.register(hva, HUGE_SIZE, minor=True)), "ok")


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{UFFD}, UFFDIO_REGISTER_MODE_MISSING; fallocate(2)")
def a_punched_page_is_missing_again(x: Experiment) -> None:
    """After a punch, userfaultfd reports the guest's next access, and the guest finds the provided page."""
    page = x.page(PAGES)
    userfault, hva = _userfault(x), x.memory.hva(page, SIZE)
    x.guest.write64(page, 1)
    userfault.register(hva, SIZE, missing=True)
    x.memory.punch(page, HOST_PAGE, unsafe=True)
    x.event("punch", page)
    with Server(userfault, lambda _: _page(VALUE)) as server:
        order = x.guest.start_read64(page)
        if x.check("the guest's load", x.went(order), "went on"):
            x.check("the guest reads", order.result(), VALUE)
        x.check("faults told", server.served[FaultKind.MISSING], 1)


@claim(none="memfd", emulated="memfd", cpus=2, origin=f"{WAIT}; UFFDIO_COPY: -EEXIST for a page that is there")
def two_vcpus_wait_for_one_page(x: Experiment) -> None:
    """Two vCPUs that access the same missing page both wait, one UFFDIO_COPY resumes both, and a second is EEXIST."""
    page = x.page(PAGES)
    [other] = x.others()
    userfault, hva = _userfault(x), x.memory.hva(page, SIZE)
    userfault.register(hva, SIZE, missing=True)
    orders = [vcpu.start_read64(page) for vcpu in (x.guest, other)]
    told: list[Fault] = []
    while len(told) < 2 and userfault.wait(5):
        told += userfault.read()
    x.check("faults told", len(told), 2)
    x.check("of threads", len({fault.tid for fault in told}), 2)
    x.check("vCPUs that wait", sum(not order.done() for order in orders), 2)
    x.check("UFFDIO_COPY", raw.answer(lambda: userfault.copy(hva, _page(VALUE))), "ok")
    x.check("the vCPUs read", " ".join(str(order.result()) for order in orders), f"{VALUE} {VALUE}")
    x.check("UFFDIO_COPY again", raw.answer(lambda: userfault.copy(hva, _page(1))), "EEXIST")
    x.check("the guest still reads", x.guest.read64(page), VALUE)


@claim(none="memfd", emulated="memfd", origin=f"{WAIT}; arch/arm64/kvm/mmu.c, user_mem_abort(): no FOLL_INTERRUPTIBLE")
def a_vcpu_that_waits_can_be_kicked_out(x: Experiment) -> None:
    """A vCPU that waits for its page leaves KVM_RUN on a signal, so that the machine can be paused."""
    page = x.page(PAGES)
    userfault, hva = _userfault(x), x.memory.hva(page, SIZE)
    x.start()
    userfault.register(hva, SIZE, missing=True)
    order = x.guest.start_read64(page)
    x.check("a fault is told", userfault.wait(5))
    pause = threading.Thread(target=x.machine.pause)
    pause.start()
    pause.join(1)
    x.check("the machine is paused within a second", not pause.is_alive())
    userfault.copy(hva, _page(VALUE))
    pause.join()
    x.machine.resume()
    x.check("the guest reads", order.result(), VALUE)


@claim(none="memfd", emulated="memfd", origin="mm/userfaultfd.c, userfaultfd_release(): all waiters are woken")
def closing_the_userfaultfd_lets_the_guest_go(x: Experiment) -> None:
    """A vCPU that waits goes on with a page of zeros when the userfaultfd is closed."""
    page = x.page(PAGES)
    userfault, hva = _userfault(x), x.memory.hva(page, SIZE)
    x.start()
    userfault.register(hva, SIZE, missing=True)
    order = x.guest.start_read64(page)
    x.check("a fault is told", userfault.wait(5))
    x.check("the vCPU waits", not order.done())
    userfault.close()
    x.check("the guest reads", order.result(), 0)


# -- memory that comes with its slot


def _on_demand(x: Experiment, size: int, **more: Any) -> OnDemand:
    """Provide ``size`` bytes of memory at BEYOND on demand by slots, each page filled with its number, from 1."""

    def fill(gpa: Gpa, size: int) -> bytes:
        first = (gpa - BEYOND) // HOST_PAGE + 1
        return b"".join(map(_page, range(first, first + size // HOST_PAGE)))

    x.unclaimed = lazy = OnDemand([(BEYOND, size)], fill=fill, **more)
    lazy.attach(x.memory)
    x.start()
    return lazy


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin="arch/arm64/kvm/mmio.c, io_mem_abort(): KVM_EXIT_MMIO")
def an_access_without_memory_is_told(x: Experiment) -> None:
    """An access without a slot leaves KVM_RUN with its address, its width and the stored value."""
    told: list[str] = []

    def answer(native: pv_vcpu) -> bool:
        at, bits = native.gpa - BEYOND, native.size * 8
        told.append(f"store {native.value:#x} {at:#x}/{bits}" if native.is_write else f"load {at:#x}/{bits}")
        if not native.is_write:
            lib.pv_mmio_reply(native, VALUE)
        return True

    x.unclaimed = answer
    x.check("a load is answered", x.guest.read64(BEYOND + 0x18), VALUE)
    x.check("of 16 bits", x.guest.read16(BEYOND + 0x22), VALUE)
    x.guest.write64(BEYOND + 0x1000, 0x1122_3344_5566_7788)
    x.guest.write8(BEYOND + 0x1001, 0x99)
    wanted = "load 0x18/64, load 0x22/16, store 0x1122334455667788 0x1000/64, store 0x99 0x1001/8"
    x.check("told", ", ".join(told), wanted)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{SLOT}; {HVA}")
def memory_comes_at_the_first_load(x: Experiment) -> None:
    """A slot made while the guest waits in a load serves that load, which reads the file's contents."""
    lazy = _on_demand(x, SIZE, granule=SIZE)
    before = raw.exits(x)
    x.check("the guest reads", x.guest.read64(BEYOND + HOST_PAGE), 2)
    x.event("slot", BEYOND, PAGES)
    x.picture("after the first load")
    x.check("and in the next page", x.guest.read64(BEYOND + 2 * HOST_PAGE), 3)
    x.check("slots made", lazy.slots, 1)
    x.check("exits", raw.exits(x) - before, 1)
    x.check("beyond the range", x.went(x.guest.start_read64(BEYOND + SIZE)), "external abort")


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{SLOT}; {HVA}")
def memory_comes_at_the_first_store(x: Experiment) -> None:
    """A slot made while the guest waits in a store takes that store, and the rest of the page keeps its contents."""
    lazy = _on_demand(x, SIZE, granule=SIZE)
    before = raw.exits(x)
    x.time("first store, slot and all", x.guest.write64(BEYOND, VALUE))
    x.event("slot", BEYOND, PAGES)
    x.check("the guest reads its store", x.guest.read64(BEYOND), VALUE)
    x.check("and behind it", x.guest.read64(BEYOND + 8), 1)
    x.check("slots made", lazy.slots, 1)
    x.check("exits", raw.exits(x) - before, 1)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=DONATED)
def late_memory_is_the_guests_alone(x: Experiment) -> None:
    """A page provided at its first access is private from then on: the host cannot access it."""
    _on_demand(x, SIZE, granule=SIZE)
    before = LockedMemory.read().locked
    x.guest.write64(BEYOND, VALUE)
    x.tell("bytes locked by that page", LockedMemory.read().locked - before)
    x.check("a host load faults", x.host64(BEYOND) is None)
    x.check("a host store faults", not x.host_stores(BEYOND, 1))
    x.check("the guest reads", x.guest.read64(BEYOND), VALUE)
    x.guest.share(BEYOND)
    x.check("when the guest shares it the host reads", x.host64(BEYOND), VALUE)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{SLOT}; KVM_CAP_NR_MEMSLOTS")
def memory_comes_piece_by_piece(x: Experiment) -> None:
    """Memory can be added in 64 slots, each at the first access to its 16 KiB, in any order, at one exit each."""
    lazy = _on_demand(x, 64 * SIZE, granule=SIZE)
    before = raw.exits(x)
    x.time("first touches of 64 slots", x.guest.touch(BEYOND, 64, stride=PAGES, seed=7).ticks)
    x.check("slots made", lazy.slots, 64)
    x.check("exits", raw.exits(x) - before, 64)
    x.picture("all 64 slots")
    words = HOST_PAGE // 8
    x.check("the sum of all words", x.guest.sum(BEYOND, 64 * SIZE), words * sum(range(1, 64 * PAGES + 1)))
    x.check("exits when all of it is touched", raw.exits(x) - before, 64)


@claim(none="memfd", emulated="memfd", pkvm="memfd", cpus=4, origin=f"{SLOT}, under srcu")
def vcpus_race_for_late_memory(x: Experiment) -> None:
    """Four vCPUs that first touch the same 16 slots at the same moment all go on, and with the same memory."""
    lazy = _on_demand(x, 16 * SIZE, granule=SIZE)
    vcpus = [x.guest, *x.others()]
    orders = [vcpu.start_touch(BEYOND, 16 * PAGES, access=Access.WRITE) for vcpu in vcpus]
    x.check("touches done, of 4 times 64", sum(order.result().pages for order in orders), 4 * 16 * PAGES)
    x.check("slots made", lazy.slots, 16)
    for number, vcpu in enumerate(vcpus):
        vcpu.write64(BEYOND + 8 * number, number + 10)
    words = {vcpu.vcpu: vcpu.words(BEYOND, 4) for vcpu in vcpus}
    x.check("vCPUs that read all four's stores", sum(each == (10, 11, 12, 13) for each in words.values()), 4)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin="arch/arm64/kvm/mmu.c, kvm_handle_guest_abort()")
def a_fetch_brings_memory_too(x: Experiment) -> None:
    """An instruction fetch from where no slot is can be answered with a slot, as a load can."""
    lazy = _on_demand(x, SIZE, granule=SIZE)
    x.check("the guest's fetch", x.went(x.guest.start_touch(BEYOND, 1, access=Access.EXECUTE)), "went on")
    x.check("slots made", lazy.slots, 1)
