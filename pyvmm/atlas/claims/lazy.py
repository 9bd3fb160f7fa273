"""Memory that is not there at the guest's first touch: faults that wait for userfaultfd, and whose faults can."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pyvmm.atlas import raw
from pyvmm.atlas.claim import group
from pyvmm.atlas.experiment import BEYOND, Experiment
from pyvmm.memory.address import PAGE_SIZE, Hva
from pyvmm.memory.backing import Memfd
from pyvmm.memory.fault_server import Answer, Server
from pyvmm.memory.userfault import Fault, FaultKind, Userfault

claim = group("lazy")

WAIT = "mm/userfaultfd.c, handle_userfault(): the vCPU's thread sleeps inside KVM_RUN"
NO_RETRY = "pkvm_mem_abort() pins without FOLL_UNLOCKABLE, so handle_userfault() may not wait: SIGBUS, -EFAULT"
UFFD = "Documentation/admin-guide/mm/userfaultfd.rst"
POPULATED = "thread: \"we don't require pre-faulting everything\""
VALUE = 42
PAGES = 4
SIZE = PAGES * PAGE_SIZE


def _page(value: int) -> bytes:
    """Return a page's worth of one word."""
    return value.to_bytes(8, "little") * (PAGE_SIZE // 8)


def _userfault(x: Experiment, *, user_mode_only: bool = False) -> Userfault:
    return x.stack.enter_context(Userfault.open(user_mode_only=user_mode_only))


def _late_file(x: Experiment, *, full: bool) -> tuple[Memfd, Hva]:
    """Give the guest a slot over a file that nothing maps yet, whose pages are there or not; returns KVM's address."""
    file = Memfd(SIZE)
    file.separate_view()
    if full:
        file.load(0, _page(VALUE) * PAGES)
    x.memory.add(BEYOND, file)
    return file, x.memory.hva(BEYOND, SIZE)


@claim(none="memfd thp", emulated="memfd", pkvm="memfd", origin=f"{UFFD}, UFFDIO_REGISTER_MODE_MISSING; {NO_RETRY}")
def a_missing_page_is_served(x: Experiment) -> None:
    """The guest's first access to a missing page is told to userfaultfd, and the guest finds the page it is given."""
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
            x.time("load of a missing page", x.guest.timed_read(page + PAGE_SIZE).ticks)
            x.guest.write64(page + 2 * PAGE_SIZE, 1)
            x.check("behind a store, the guest reads", x.guest.read64(page + 2 * PAGE_SIZE + 8), VALUE)
        x.check("faults told, as pages", " ".join(str((each.page - hva) // PAGE_SIZE) for each in asked), "0 1 2")
        x.check("stores among them", sum(each.write for each in asked), 1)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{UFFD}, UFFDIO_REGISTER_MODE_MINOR; {NO_RETRY}")
def a_minor_fault_is_served(x: Experiment) -> None:
    """A page that the file has and KVM's mapping has not is told once, and UFFDIO_CONTINUE gives it to the guest."""
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
    """Of a page the guest has, write-protected while it runs, the next store is told and waits, and loads are not."""
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
    """Of a page the guest has, read-write-protected while it runs, the next access is told and waits, once."""
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
    """A KVM_RUN that fails at a page userfaultfd keeps is told to nobody, and succeeds once the page is put right."""
    userfault = _userfault(x)
    x.start()
    file, hva = _late_file(x, full=True)
    file.punch(0, PAGE_SIZE)
    places: dict[str, Callable[[Hva], None]] = {
        "missing": lambda at: userfault.copy(at, _page(VALUE)),
        "minor": userfault.continue_,
        "wp": lambda at: userfault.write_protect(at, on=False),
        "rwp": lambda at: userfault.rwprotect(at, on=False),
    }
    for number, (mode, put_right) in enumerate(places.items()):
        at = Hva(hva + number * PAGE_SIZE)
        if mode in ("wp", "rwp"):
            raw.load64(at)  # a page that is mapped: only such a one can be rw-protected
        userfault.register(at, PAGE_SIZE, **{mode: True})
        if mode in ("wp", "rwp"):
            (userfault.write_protect if mode == "wp" else userfault.rwprotect)(at)
        order = x.guest.start_read64(BEYOND + number * PAGE_SIZE)
        if x.check(f"{mode}: the guest's load", x.went(order), "EFAULT"):
            x.check(f"{mode}: faults told", len(userfault.read()), 0)
            put_right(at)
            x.retry()
            x.check(f"{mode}: put right, the guest's load", x.went(order), "went on")
        x.check(f"{mode}: the guest reads", order.result(), VALUE)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{POPULATED}; {UFFD}, UFFDIO_COPY")
def pages_put_in_advance_do_not_wait(x: Experiment) -> None:
    """A page that was put there with UFFDIO_COPY before the guest's first touch is the guest's without a fault told."""
    page = x.page(PAGES)
    userfault, hva = _userfault(x), x.memory.hva(page, SIZE)
    x.start()
    userfault.register(hva, SIZE, missing=True)
    userfault.copy(hva, _page(VALUE))
    order = x.guest.start_read64(page)
    if x.check("the guest's load", x.went(order), "went on"):
        x.check("the guest reads", order.result(), VALUE)
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


@claim(none="memfd thp hugetlb guest_memfd private", pkvm="memfd",
       origin="mm/userfaultfd.c, vma_can_userfault(): vm_ops->uffd_ops")  # fmt: skip
def the_mapping_takes_a_userfaultfd(x: Experiment) -> None:
    """The mapping of the guest's memory can be registered with a userfaultfd, for missing and for minor faults."""
    size = 2 << 20
    page = x.page(size // PAGE_SIZE, align=size)
    userfault, hva = _userfault(x), x.memory.hva(page, size)
    x.check("UFFDIO_REGISTER, missing", raw.answer(lambda: userfault.register(hva, size, missing=True)), "ok")
    x.check("UFFDIO_REGISTER, minor", raw.answer(lambda: userfault.register(hva, size, minor=True)), "ok")


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{UFFD}, UFFDIO_REGISTER_MODE_MISSING; fallocate(2)")
def a_punched_page_is_missing_again(x: Experiment) -> None:
    """After a punch the guest's next access to that page is told to userfaultfd, and finds the page it is given."""
    page = x.page(PAGES)
    userfault, hva = _userfault(x), x.memory.hva(page, SIZE)
    x.guest.write64(page, 1)
    userfault.register(hva, SIZE, missing=True)
    x.memory.punch(page, PAGE_SIZE, unsafe=True)
    x.event("punch", page)
    with Server(userfault, lambda _: _page(VALUE)) as server:
        order = x.guest.start_read64(page)
        if x.check("the guest's load", x.went(order), "went on"):
            x.check("the guest reads", order.result(), VALUE)
        x.check("faults told", server.served[FaultKind.MISSING], 1)


@claim(none="memfd", emulated="memfd", cpus=2, origin=f"{WAIT}; UFFDIO_COPY: -EEXIST for a page that is there")
def two_vcpus_wait_for_one_page(x: Experiment) -> None:
    """Two vCPUs that want the same missing page both wait, one UFFDIO_COPY lets both go on, and a second is EEXIST."""
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
    """A vCPU that waits for its page leaves KVM_RUN when it is sent a signal, so that the machine can be paused."""
    page = x.page(PAGES)
    userfault, hva = _userfault(x), x.memory.hva(page, SIZE)
    x.start()
    userfault.register(hva, SIZE, missing=True)
    order = x.guest.start_read64(page)
    x.check("a fault is told", userfault.wait(5))
    pause = threading.Thread(target=x.machine.pause)
    pause.start()
    pause.join(0.5)
    x.check("the machine is paused within half a second", not pause.is_alive())
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
