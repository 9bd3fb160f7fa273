# SPDX-License-Identifier: Apache-2.0
"""Claims about the cost of conversions, and concurrent accesses, for each policy, with ticks."""

from __future__ import annotations

from pyvmm import abi
from pyvmm.atlas.claim import group
from pyvmm.atlas.claims.share_together import together
from pyvmm.experiment import Experiment
from pyvmm.guest.orders import Access
from pyvmm.memory.address import Gpa
from pyvmm.pages import HOST_PAGE

claim = group("conversion")

IN_PLACE = "arch/arm64/kvm/hyp/nvhe/mem_protect.c, __pkvm_guest_share_host() and __pkvm_guest_unshare_host()"
CLEARS = 'thread: "defining the semantics to state that the trusted hypervisor will clear that page on conversion"'
PUNCH = 'thread: "The hole doesn\'t get punched in guest IPA space, it gets punched in the private backing store"'
TIME = 'thread: "We\'re trying hard to keep the amount of zeroing/memcpy-ing to an absolute minimum"'
SLOTS = "Documentation/virt/kvm/api.rst, KVM_SET_USER_MEMORY_REGION2: one file a slot, moved by deleting it"
PLAIN = "memfd thp guest_memfd"
ALL = "memfd thp guest_memfd private"


@claim(emulated=PLAIN, pkvm="memfd thp", conversion="preserve", origin=TIME)
def a_range_converts_in_place(x: Experiment) -> None:
    """256 pages change hands with a call each, there and back, and keep their contents."""
    _range(x, kept=True)


@claim(emulated=PLAIN, conversion="zero", origin=TIME)
def a_range_is_cleared(x: Experiment) -> None:
    """256 pages change hands with a call each, there and back, and all are cleared each time."""
    _range(x, kept=False)


@claim(emulated=PLAIN, conversion="punch", origin=TIME)
def a_range_is_replaced(x: Experiment) -> None:
    """256 pages change hands with a call each, there and back, and each is replaced by a new one each time."""
    _range(x, kept=False)


@claim(emulated=ALL, conversion="copy", origin=f"{TIME}; {SLOTS}")
def a_range_is_copied(x: Experiment) -> None:
    """32 pages change hands with a call each, there and back, each copied to another file, and keep their contents."""
    _range(x, 32, kept=True)


def _range(x: Experiment, count: int = 256, *, kept: bool) -> None:
    one, many = x.page(), x.page(count)
    for gpa, pages in ((one, 1), (many, count)):
        x.guest.fill(gpa, pages * HOST_PAGE, 1)
        words = pages * HOST_PAGE // 8
        what = "a page" if pages == 1 else f"{pages} pages"
        shared = x.guest.share(gpa, pages, how=abi.SHARE_HVC)
        x.time(f"share {what}", shared.ticks)
        x.check(f"{what}: shared", shared.pages, pages)
        expected = (1).to_bytes(8, "little") * words if kept else bytes(8 * words)
        x.check(f"{what}: the host finds what the policy leaves", x.memory.read(gpa, pages * HOST_PAGE) == expected)
        x.memory.write(gpa, (2).to_bytes(8, "little") * words)
        taken = x.guest.unshare(gpa, pages, how=abi.SHARE_HVC)
        x.time(f"unshare {what}", taken.ticks)
        x.check(f"{what}: taken back", taken.pages, pages)
        x.check(f"{what}: the guest's sum", x.guest.sum(gpa, pages * HOST_PAGE), 2 * words if kept else 0)


@claim(emulated=PLAIN, pkvm="memfd thp", conversion="preserve", origin=TIME)
def a_thousand_conversions_in_a_row(x: Experiment) -> None:
    """1,000 conversions of 125 pages, one after the other, lose no contents and leave nothing shared."""
    range_ = x.page(125)
    x.guest.fill(range_, 125 * HOST_PAGE, 3)
    done = ticks = 0
    for _ in range(4):
        for order in (x.guest.share, x.guest.unshare):
            converted = order(range_, 125, how=abi.SHARE_HVC)
            done, ticks = done + converted.pages, ticks + converted.ticks
    x.time("1000 conversions", ticks)
    x.check("conversions", done, 1000)
    x.check("the guest's sum is as before", x.guest.sum(range_, 125 * HOST_PAGE) == 125 * HOST_PAGE // 8 * 3)
    open_ = sum(x.memory.probe(range_ + page * HOST_PAGE) for page in range(125))
    x.check("pages the host reaches", open_, 0)


@claim(emulated=ALL, conversion="copy", origin=f"{SLOTS}; virt/kvm/kvm_main.c: a slot has one file")
def slots_are_cut_and_joined(x: Experiment) -> None:
    """A shared page that lies alone costs two memory slots, neighbours share theirs, and in the end all are joined."""
    range_ = x.page(16)
    slot = next(slot for slot in x.memory.slots if slot.gpa <= range_ < slot.end)
    x.start()
    before = len(slot.pieces)
    for page in range(1, 16, 2):
        x.guest.share(range_ + page * HOST_PAGE)
    x.picture("every second page of 16 is shared")
    x.check("slots more with 8 pages shared, apart from each other", len(slot.pieces) - before, 16)
    for page in range(2, 16, 2):
        x.guest.share(range_ + page * HOST_PAGE)
    x.check("slots more once the 7 between them are shared, too", len(slot.pieces) - before, 2)
    x.guest.unshare(range_ + HOST_PAGE, 15)
    x.check("slots more once all are private again", len(slot.pieces) - before, 0)


@claim(emulated="memfd guest_memfd", pkvm="memfd thp", conversion="preserve", faults=True, origin=IN_PLACE)
def other_pages_stay_mapped(x: Experiment) -> None:
    """A conversion in place costs the guest no new fault on any page, the converted one included."""
    _neighbours(x)


@claim(emulated=PLAIN, conversion="punch", faults=True, origin=PUNCH)
def a_hole_unmaps_one_page(x: Experiment) -> None:
    """A conversion that punches a hole costs the guest a new fault on the converted page, but on none beside it."""
    _neighbours(x, itself=1)


@claim(
    emulated="memfd guest_memfd",
    conversion="copy",
    faults=True,
    origin="virt/kvm/kvm_main.c: deleting a slot drops every stage-2 mapping of it",
)
def moving_slots_unmaps_one_page(x: Experiment) -> None:
    """A conversion that moves slots costs the guest a new fault on the converted page, but on none beside it."""
    _neighbours(x, itself=1)


def _neighbours(x: Experiment, itself: int = 0) -> None:
    range_ = x.page(64)
    x.guest.touch(range_, 64, access=Access.WRITE)
    page = range_ + 32 * HOST_PAGE
    before, before_itself = len(x.faults(range_, 64)), len(x.faults(page))
    x.event("share", page)
    x.guest.share(page)
    x.guest.touch(range_, 64, access=Access.WRITE)
    new, new_itself = len(x.faults(range_, 64)) - before, len(x.faults(page)) - before_itself
    x.check("new faults on the page that is shared", new_itself, itself)
    x.check("new faults on the 63 beside it", new - new_itself, 0)


@claim(emulated=PLAIN, pkvm="memfd thp", conversion="preserve", cpus=4, seconds=60, origin=IN_PLACE)
def in_place_under_load(x: Experiment) -> None:
    """Conversions in place lose no store of three vCPUs: one stores to the very page, two to the pages beside it."""
    _under_load(x, very_page=True)


@claim(emulated="memfd guest_memfd", conversion="zero", cpus=4, seconds=60, origin=CLEARS)
def clearing_under_load(x: Experiment) -> None:
    """Conversions that clear a page lose no store of three vCPUs that store to other pages."""
    _under_load(x, very_page=False)


@claim(emulated=PLAIN, conversion="punch", cpus=4, seconds=60, origin=PUNCH)
def punching_under_load(x: Experiment) -> None:
    """Conversions that punch a hole lose no store of three vCPUs that store to other pages."""
    _under_load(x, very_page=False)


@claim(emulated="memfd guest_memfd", conversion="copy", cpus=4, seconds=60, origin=f"{SLOTS}; vCPUs wait meanwhile")
def copying_under_load(x: Experiment) -> None:
    """Conversions that move slots lose no store of three vCPUs: one stores to the very page, two to those beside it."""
    _under_load(x, very_page=True)


def _under_load(x: Experiment, *, very_page: bool) -> None:
    left, page, right, far, stop = (Gpa(x.page()) for _ in range(5))
    x.guest.write64(stop, 0)
    targets = (left, page if very_page else far, right)
    orders = [vcpu.start_count(gpa, 1 << 40, until=stop) for vcpu, gpa in zip(x.others(), targets, strict=True)]
    for gpa in targets:
        while not x.guest.read64(gpa):
            pass
    done = 0
    for _ in range(10):
        done += x.guest.share(page, how=abi.SHARE_HVC).pages
        done += x.guest.unshare(page, how=abi.SHARE_HVC).pages
    x.check("conversions meanwhile", done, 20)
    x.guest.write64(stop, 1)
    x.check("how the vCPUs' loops ended", " ".join(sorted({x.went(order) for order in orders})), "went on")
    counted = [x.guest.read64(gpa) == order.result() for gpa, order in zip(targets, orders, strict=True)]
    x.check("pages, of 3, that have every store", sum(counted), 3)


@claim(emulated=PLAIN, pkvm="memfd thp", conversion="preserve", cpus=2, origin=IN_PLACE)
def two_vcpus_convert_in_place_at_once(x: Experiment) -> None:
    """Two vCPUs that convert different pages at the same time are both served."""
    _two_at_once(x)


@claim(emulated="memfd guest_memfd private", conversion="copy", cpus=2, seconds=60, origin=SLOTS)
def two_vcpus_move_slots_at_once(x: Experiment) -> None:
    """Two vCPUs whose conversions move slots at the same time are both served."""
    _two_at_once(x)


def _two_at_once(x: Experiment) -> None:
    other = x.others()[0]
    first, second = x.page(16), x.page(16)
    for call, done in ((abi.HVC_SHARE, "shared"), (abi.HVC_UNSHARE, "taken back")):
        answers = together(x, (x.guest, other), call, (first, second), 16)
        pages = sum(answer == 0 for both in answers for answer in both)
        x.check(f"pages of 32 {done}", pages, 32)
