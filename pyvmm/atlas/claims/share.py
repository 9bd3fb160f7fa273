# SPDX-License-Identifier: Apache-2.0
"""Claims about shares and unshares of a page: its contents for guest and host, access to it, and concurrency."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence

from pyvmm import abi
from pyvmm.atlas.claim import group
from pyvmm.experiment import Experiment
from pyvmm.experiment.host.syscalls import NR_VMSPLICE, Iovec, call
from pyvmm.guest.orders import Access
from pyvmm.memory.address import Gpa
from pyvmm.memory.relay import ShareEvent
from pyvmm.pages import HOST_PAGE

claim = group("share")

CALLS = "Documentation/virt/kvm/arm/hypercalls.rst"
HYPERVISOR = "arch/arm64/kvm/hyp/nvhe/pkvm.c, kvm_handle_pvm_hvc64()"
IN_PLACE = "arch/arm64/kvm/hyp/nvhe/mem_protect.c, __pkvm_guest_share_host() and __pkvm_guest_unshare_host()"
SHARE = 'thread: "when it wants to, the guest can then issue a hypercall to share a page back with the host"'
EXIT = 'thread: "the host kernel at that point can exit back to userspace to relay that information to the VMM"'
ALL = "memfd thp guest_memfd private"

# A64: MOV X1, X0; MOV X0, #3 (MEM_SHARE) or #4; MOVK X0, #0xC600, LSL #16; MOV X2, #0; MOV X3, #0; HVC #0; RET
SHARE_CODE = (0xAA00_03E1, 0xD280_0060, 0xF2B8_C000, 0xD280_0002, 0xD280_0003, 0xD400_0002, 0xD65F_03C0)
UNSHARE_CODE = (SHARE_CODE[0], 0xD280_0080, *SHARE_CODE[2:])
# 1: LDR X1, [X0]; CBZ X1, 1b; MOV X0, X1; RET
WAIT_CODE = (0xF940_0001, 0xB4FF_FFE1, 0xAA01_03E0, 0xD65F_03C0)
# TLBI VMALLE1; DSB SY; ISB; RET
FORGET_CODE = (0xD508_871F, 0xD503_3F9F, 0xD503_3FDF, 0xD65F_03C0)


@claim(emulated=ALL, pkvm="memfd thp", origin=f"{SHARE}; {IN_PLACE}")
def what_the_guest_wrote_the_host_reads(x: Experiment) -> None:
    """A share opens the page to the host with the contents that the guest had left in it."""
    page = x.page()
    x.guest.write64(page, 0x1122_3344)
    x.check("the host reaches it before", x.host64(page) is not None, False)
    x.picture("the guest has written to the page")
    x.time("share", x.guest.share(page).ticks)
    x.picture("and shares it")
    x.check("the host reads", x.host64(page), 0x1122_3344)


@claim(emulated=ALL, pkvm="memfd thp", origin=f"{CALLS}: MEM_UNSHARE; {IN_PLACE}")
def what_the_host_wrote_the_guest_keeps(x: Experiment) -> None:
    """An unshare takes the page back with what guest and host had stored in it."""
    page = x.page()
    x.guest.share(page)
    x.guest.write64(page, 0x55)
    x.check("the host stores to the shared page", x.host_stores(page + 8, 0x66))
    x.time("unshare", x.guest.unshare(page).ticks)
    x.check("the host reaches it after", x.host64(page) is not None, False)
    x.check("the guest's own word", x.guest.read64(page), 0x55)
    x.check("the host's word", x.guest.read64(page + 8), 0x66)


@claim(emulated="memfd thp guest_memfd", pkvm="memfd thp", origin=f"{SHARE}; {HYPERVISOR}: faulted in, tried again")
def an_untouched_page_can_be_shared(x: Experiment) -> None:
    """A page that the guest has never touched can be shared, and holds what the host loaded there before, or zeros."""
    loaded, fresh = x.page(), x.page()
    x.memory.write(loaded, (0x77).to_bytes(8, "little"))
    x.check("x0 of MEM_SHARE of a page that the host loaded", x.guest.hvc(abi.HVC_SHARE, loaded).status, 0)
    x.check("the host reads", x.host64(loaded), 0x77)
    x.check("the guest reads", x.guest.read64(loaded), 0x77)
    x.check("x0 of MEM_SHARE of a page that nobody touched", x.guest.hvc(abi.HVC_SHARE, fresh).status, 0)
    x.check("the host reads zeros", not any(x.memory.read(fresh, HOST_PAGE)))
    x.check("the guest's sum of it", x.guest.sum(fresh, HOST_PAGE), 0)


@claim(emulated="memfd guest_memfd", pkvm="memfd thp", faults=True, origin=f"{HYPERVISOR}: it makes up a write fault")
def a_share_faults_an_untouched_page_in(x: Experiment) -> None:
    """A share of an untouched page costs one stage-2 fault, so that the page is mapped in the guest when it returns."""
    range_ = x.page(16)
    x.start()
    x.event("share", range_, 16)
    x.time("share of 16 untouched pages", x.guest.share(range_, 16, how=abi.SHARE_HVC).ticks)
    x.check("faults of 16 shares", len(x.faults(range_, 16)), 16)
    x.guest.touch(range_, 16)
    x.check("faults once the guest has touched them, too", len(x.faults(range_, 16)), 16)


@claim(emulated="memfd guest_memfd private", pkvm="memfd thp", faults=True, origin=f"{IN_PLACE}: replaced in place")
def a_mapped_page_stays_mapped(x: Experiment) -> None:
    """A page that the guest has touched stays mapped in it: neither a share nor an unshare costs another fault."""
    page = x.page()
    x.guest.write64(page, 1)
    before = len(x.faults(page))
    x.event("share", page)
    x.guest.share(page)
    x.guest.read64(page)
    x.check("faults after a share and a load", len(x.faults(page)) - before, 0)
    x.event("unshare", page)
    x.guest.unshare(page)
    x.guest.write64(page, 2)
    x.check("faults after an unshare and a store", len(x.faults(page)) - before, 0)


@claim(emulated="memfd thp guest_memfd", pkvm="memfd thp", origin=f"{SHARE}; {IN_PLACE}")
def fifty_round_trips_keep_a_page(x: Experiment) -> None:
    """Through 50 shares and unshares a page keeps all of its contents, what each side adds to it included."""
    page = x.page()
    x.guest.fill(page, HOST_PAGE, 0x0101_0101)
    good = 0
    for number in range(50):
        x.guest.write64(page + 16 * number, number)
        x.guest.share(page, how=abi.SHARE_HVC)
        good += x.host64(page + 16 * number) == number and x.host_stores(page + 16 * number + 8, number)
        x.guest.unshare(page, how=abi.SHARE_HVC)
    x.check("round trips in which the host read the guest's word and stored its own", good, 50)
    words = x.guest.words(page, 100)
    x.check("words of both, of 100, that are there", sum(word == at // 2 for at, word in enumerate(words)), 100)
    rest = x.guest.sum(page + 800, HOST_PAGE - 800)
    x.check("the rest of the page is as it was", rest == 0x0101_0101 * (HOST_PAGE // 8 - 100))


@claim(emulated="memfd guest_memfd", pkvm="memfd thp", origin=f"{CALLS}: MEM_UNSHARE revokes the host's access")
def no_host_store_arrives_after_an_unshare(x: Experiment) -> None:
    """Once an unshare has returned to the guest, no store arrives from a host that keeps storing all the while."""
    page = x.page()
    x.start()
    good = 0
    for _ in range(10):
        x.guest.write64(page, 0)
        x.guest.share(page)
        host = threading.Thread(target=_store_until_refused, args=(x, page))
        host.start()
        while not x.guest.read64(page):
            pass
        x.guest.unshare(page)
        x.guest.write64(page, 1 << 40)
        host.join(10)
        good += x.guest.read64(page) == 1 << 40 and not host.is_alive()
    x.check("unshares, of 10, after which no store of the host arrived", good, 10)


@claim(
    emulated=ALL,
    pkvm="memfd thp",
    cpus=2,
    origin=f"{IN_PLACE}: kvm_pgtable_stage2_map() of a page that is mapped: break before make",
)
def no_store_of_another_vcpu_is_lost(x: Experiment) -> None:
    """A vCPU that keeps storing to a page while another shares and unshares it loses no store and takes no trap."""
    page, stop = x.page(), x.page()
    x.guest.write64(stop, 0)
    counting = x.others()[0].start_count(page, 1 << 40, until=stop)
    before = x.guest.read64(page)
    for _ in range(25):
        x.guest.share(page, how=abi.SHARE_HVC)
        x.guest.unshare(page, how=abi.SHARE_HVC)
    after = x.guest.read64(page)
    x.guest.write64(stop, 1)
    if x.check("the vCPU that stores", x.went(counting), "went on"):
        x.check("it stored while the page changed hands", before != after)
        x.check("the page has every store", x.guest.read64(page) == counting.result())


@claim(
    none="memfd private",
    emulated=ALL,
    pkvm="memfd thp",
    origin=f"{CALLS}: MEM_SHARE grants the host access, to one page that both have mapped",
)
def both_see_each_others_stores_at_once(x: Experiment) -> None:
    """While a page is shared, each side loads what the other has just stored, without a further call."""
    page = x.page()
    x.guest.share(page)
    good = 0
    for number in range(1, 21):
        x.guest.write64(page, number)
        good += x.host64(page) == number
        good += x.host_stores(page + 8, number) and x.guest.read64(page + 8) == number
    x.check("exchanges, of 40, in which the other side saw the store", good, 40)


@claim(emulated="memfd guest_memfd", pkvm="memfd thp", origin=f"{IN_PLACE}: the guest keeps execute permission")
def a_call_can_share_the_page_it_is_made_from(x: Experiment) -> None:
    """Code that shares and unshares the very page it runs in goes on at the next instruction of that page."""
    page = x.page()
    _write_code(x, page, SHARE_CODE)
    _write_code(x, Gpa(page + 256), UNSHARE_CODE)
    order = x.guest.start_execute(page, page)
    if x.check("the code that shares", x.went(order), "went on"):
        x.check("x0 of MEM_SHARE", order.result().value, 0)
    x.check("the host reads the code", (x.host64(page) or 0) & 0xFFFF_FFFF == SHARE_CODE[0])
    order = x.guest.start_execute(page + 256, page)
    if x.check("the code that unshares", x.went(order), "went on"):
        x.check("x0 of MEM_UNSHARE", order.result().value, 0)
    x.check("the host reaches the page", x.host64(page) is not None, False)


@claim(emulated="memfd guest_memfd", pkvm="memfd thp", cpus=2, origin=f"{IN_PLACE}: the guest keeps execute permission")
def a_page_of_running_code_can_be_shared(x: Experiment) -> None:
    """A vCPU goes on executing a page that another vCPU shares and unshares under it 20 times."""
    page, stop = x.page(), x.page()
    x.guest.write64(stop, 0)
    _write_code(x, page, WAIT_CODE)
    running = x.others()[0].start_execute(page, stop)
    for _ in range(20):
        x.guest.share(page, how=abi.SHARE_HVC)
        x.guest.unshare(page, how=abi.SHARE_HVC)
    x.check("the code still runs", not running.done())
    x.guest.write64(stop, 0x33)
    if x.check("the vCPU that runs it", x.went(running), "went on"):
        x.check("what the code returned", running.result().value, 0x33)


@claim(emulated="memfd guest_memfd", pkvm="memfd thp", origin=f"{IN_PLACE}: nothing is said of what a page holds")
def the_guests_own_page_tables_can_be_shared(x: Experiment) -> None:
    """A guest may share its own stage-1 translation table, which the host then reads, and runs on with it."""
    table = Gpa(x.guest.ping().table & ((1 << 48) - HOST_PAGE))
    code, page = x.page(), x.page()
    _write_code(x, code, FORGET_CODE)
    x.guest.share(table)
    x.guest.execute(code)
    x.guest.write64(page, 0x11)
    x.check("with its TLB emptied the guest reads", x.guest.read64(page), 0x11)
    descriptor = x.host64(table + 8 * (page >> 30)) or 0
    x.check("the host reads the descriptor of the guest's memory: valid", descriptor & 1, 1)
    x.check("and its output address, in GiB", (descriptor & (1 << 48) - 1) >> 30, page >> 30)
    x.guest.unshare(table)
    x.guest.execute(code)
    x.check("the host reaches the table after", x.host64(table) is not None, False)
    x.check("the guest runs on", x.guest.read64(page), 0x11)


@claim(emulated="memfd", pkvm="memfd", memory=64, seconds=60, origin=f"{CALLS}: one page a call; {IN_PLACE}")
def thousands_of_pages_can_be_shared(x: Experiment) -> None:
    """A guest can share 2,048 pages, one call each, all open to the host at once, and take all of them back."""
    range_, size = x.page(2048), 2048 * HOST_PAGE
    x.guest.touch(range_, 2048, access=Access.WRITE)
    done = x.guest.share(range_, 2048, how=abi.SHARE_HVC)
    x.time("2048 shares", done.ticks)
    x.check("pages shared", done.pages, 2048)
    x.check("the host reads all of them", x.memory.read(range_, size) == bytes(size))
    done = x.guest.unshare(range_, 2048, how=abi.SHARE_HVC)
    x.time("2048 unshares", done.ticks)
    x.check("pages taken back", done.pages, 2048)
    pages = range(range_, range_ + size, 16 * HOST_PAGE)
    x.check("pages, of every 16th, that the host still reaches", sum(x.memory.probe(page) for page in pages), 0)


@claim(emulated="memfd guest_memfd private", pkvm="memfd", origin=f"{EXIT}; else the guest rings a doorbell")
def a_share_is_told_before_the_guest_goes_on(x: Experiment) -> None:
    """Devices hear of a share while the guest waits: they find the page open and the next one not yet shared."""
    range_ = x.page(2)
    x.guest.touch(range_, 2, access=Access.WRITE)
    heard: list[tuple[ShareEvent, bool, bool]] = []

    def subscriber(event: ShareEvent) -> None:
        heard.append((event, x.host64(event.gpa) is not None, x.host64(range_ + HOST_PAGE) is not None))

    x.machine.relay.subscribe(subscriber)
    x.guest.share(range_, 2)
    x.guest.unshare(range_)
    if x.check("conversions told of two shares and an unshare", len(heard), 3):
        (first, *opened), (second, *also), (back, *still) = heard
        x.tell("told by", first.source.name.lower())
        x.check("the first page is open when it is told, the second is not yet", opened == [True, False])
        x.check("the second is open when it is told", also == [True, True])
        x.check("the page to be taken back is still open when that is told", still == [True, True])
        x.check("they were told in order", (first.shared, second.shared, back.shared) == (True, True, False))
    x.check("the host reaches the page that was taken back", x.host64(range_) is not None, False)


@claim(emulated="memfd", pkvm="memfd thp", origin="vmsplice(2); arch/arm64/mm/fault.c: a fault in the kernel")
def a_reference_is_of_no_use_after_an_unshare(x: Experiment) -> None:
    """A pipe that the host put a shared page into shows nothing of it after the unshare, and harms no guest."""
    page = x.page()
    x.guest.share(page)
    read, write = os.pipe2(os.O_CLOEXEC)
    x.stack.callback(os.close, read)
    x.stack.callback(os.close, write)
    if not (answer := call(NR_VMSPLICE, write, ctypes.byref(Iovec(x.view(page), HOST_PAGE)), 1, 0)).ok:
        x.cannot(f"vmsplice of the shared page: {answer.name}")
    x.guest.unshare(page)
    x.guest.write64(page, 0x5EC2E7)
    x.check("the pipe shows what the guest stored since", os.read(read, 8) == (0x5EC2E7).to_bytes(8, "little"), False)
    order = x.guest.start_read64(page)
    if x.check("KVM_RUN at the guest's next load", x.went(order), "went on"):
        x.check("the guest reads", order.result(), 0x5EC2E7)


def _write_code(x: Experiment, page: Gpa, code: Sequence[int]) -> None:
    for at, word in enumerate(code):
        x.guest.write32(page + 4 * at, word)
    x.guest.flush(page, 4 * len(code))


def _store_until_refused(x: Experiment, page: Gpa) -> None:
    number = 1
    while x.host_stores(page, number):
        number += 1
