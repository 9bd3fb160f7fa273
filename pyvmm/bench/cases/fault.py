# SPDX-License-Identifier: Apache-2.0
"""The cost of a page's first access: from a guest's access to its next instruction."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from typing import Final

from pyvmm.bench.case import case
from pyvmm.bench.history import FIRST, HISTORIES
from pyvmm.bench.measure import Bench, Exits, Ticks
from pyvmm.bench.model import Point
from pyvmm.experiment import BEYOND, Experiment, raw
from pyvmm.experiment.host.syscalls import madvise
from pyvmm.guest.orders import Access, Touch
from pyvmm.guest.puppet import Puppet
from pyvmm.memory.address import Gpa
from pyvmm.memory.choices import BACKINGS
from pyvmm.memory.fault_server import Server
from pyvmm.memory.on_demand import OnDemand
from pyvmm.memory.source_server import SourceServer
from pyvmm.memory.userfault import Userfault
from pyvmm.pages import HOST_PAGE, HUGE_SIZE
from pyvmm.protection import PROTECTIONS
from pyvmm.uapi.kvm import KVM_MEM_LOG_DIRTY_PAGES
from pyvmm.uapi.mman import MADV_DONTNEED

PAGES: Final = 256
HUGE_PAGES: Final = 8
"""Pages per round if an access maps 2 MiB: one in each."""
SLOW: Final = 4
"""Only one page in this many is accessed if each needs a separate thread or slot."""
STRIDE: Final = 16
IN_A_HUGE_PAGE: Final = HUGE_SIZE // HOST_PAGE
ACCESSES: Final = {"read": Access.READ, "write": Access.WRITE, "execute": Access.EXECUTE}
STATES: Final = ("cold", "allocated", "populated", "punched", "dontneed", "relaxed", "write-protected", "mapped")
PROVIDERS: Final = ("the VMM", "userfaultfd in C", "userfaultfd in Python", "slot on demand")
HUGE: Final = ("thp", "hugetlb")
LEAST: Final = 0.5
"""Exits per page. With fewer there was no fault, and only the overhead was timed."""


def _nonsense(point: Point) -> str:
    state, access, backing = point["state"], point["access"], point["backing"]
    if state == "relaxed" and access != "execute":
        return "relaxed pages were read before and are executed now: access is execute"
    if state == "write-protected" and (access != "write" or backing != "memfd"):
        return "write-protected pages, of a memfd, are written: access is write"
    if point["provider"] != PROVIDERS[0] and (state, backing) != ("cold", "memfd"):
        return f"{point['provider']} provides cold pages of a memfd"
    if point["provider"] == PROVIDERS[3] and point["cpus"] != 1:
        return "slots on demand are measured with one vCPU"
    if point["range"] == "same" and point["cpus"] == 1:
        return "one vCPU alone is on no range with others"
    if point["history"] == FIRST and point["protection"] != "pkvm":
        return "only a protected guest is the first protected one after a boot"
    if backing in HUGE and state != "cold":
        return "huge pages are measured cold"
    return ""


@case(
    says="a page's first touch: by access, order, what is there before, the backing, the number of vCPUs at it, and who"
    " provides the page; mapped is a second touch, the measuring itself; of vCPUs in the same range the one that waited"
    " longest for a page counts; history first is of the first protected guest after a boot, where the host still"
    " maps memory in blocks",
    axes={
        "protection": PROTECTIONS,
        "state": STATES,
        "access": tuple(ACCESSES),
        "order": ("sequential", "random", "strided"),
        "backing": BACKINGS,
        "cpus": (1, 2, 3, 4),
        "range": ("distinct", "same"),
        "provider": PROVIDERS,
        "pages": (PAGES, 1024, 4096),
        "history": HISTORIES,
    },
    quick=("state", "access"),
    extra=(
        {"state": "relaxed", "access": "execute"},
        {"state": "write-protected", "access": "write"},
        {"cpus": 2, "range": "same"},
        {"cpus": 4, "range": "same"},
    ),
    nonsense=_nonsense,
    seconds=300.0,
)
def fault(bench: Bench) -> None:
    """Access a fresh range each round, every page timed by the guest. vCPUs are started one after the other."""
    plan = _Plan(bench)
    on_demand = OnDemand([(BEYOND, plan.room)], granule=HOST_PAGE) if bench["provider"] == PROVIDERS[3] else None
    with bench.guest(room=plan.room, cpus=plan.cpus, unclaimed=on_demand) as x:
        if on_demand:
            on_demand.attach(x.memory)
        guests = [x.guest, *x.others()]
        ticks = [Ticks(x, plan.pages, guest) for guest in guests]
        area = BEYOND if on_demand else plan.area(x)
        values, last, kvm, walls, exits = [], list[Touch](), [], [], Exits(x)
        for number in range(bench.rounds):
            begin = Gpa(area + number * plan.round)
            plan.prepare(x, begin)
            with plan.provided(x, begin):
                exits.begin()
                seen = _touch(bench, x, plan, begin, guests, ticks, number + 1)
                exited = exits.end()  # excludes the exits for reading the ticks
            last = [each.with_each(buffer.read(8 * plan.pages)) for each, buffer in zip(seen, ticks, strict=True)]
            walls.append([max(each.ticks for each in last) * ticks[0].scale / plan.pages])
            if bench["range"] == "same":
                last = [_longest(last)]
            kvm.append([exited / sum(each.pages for each in last)])
            values.append([each.per_page[page] * ticks[0].scale for each in last for page in each.order])
        places = [vcpu * plan.apart + page * plan.stride for vcpu, each in enumerate(last) for page in each.order]
        warm, began = _before(values, last, ticks[0].scale)
        faulted = statistics.median(each for [each] in kvm)
        if bench["state"] != "mapped" and faulted < LEAST:
            bench.cannot(f"most pages were there already, for the guest keeps what it had: {faulted:.2f} exits a page")
        bench.keep(
            "touch",
            values,
            places=[*(0 for _ in warm), *places],
            began=[*warm, *began],
            per=plan.per,
            pages=sum(each.pages for each in last),
            stride=plan.stride,
        )
        bench.keep("whole range", walls, per=plan.per)
        bench.keep("KVM's exits", kvm, clock="kvm", unit="count", per=plan.per)


def _touch(
    bench: Bench, x: Experiment, plan: _Plan, begin: Gpa, guests: list[Puppet], ticks: list[Ticks], seed: int
) -> list[Touch]:
    """Have every vCPU touch its part of a round, and return what each saw."""
    orders = [
        guest.start_touch(
            begin + vcpu * plan.apart * HOST_PAGE,
            plan.pages,
            stride=plan.stride,
            access=ACCESSES[bench["access"]],
            seed=seed if bench["order"] == "random" else 0,
            ticks_at=ticks[vcpu].gpa,
        )
        for vcpu, guest in enumerate(guests)
    ]
    seen = []
    for order in orders:
        if failure := x.failed(order, timeout=bench.seconds):
            bench.cannot(f"KVM_RUN failed at the guest's first touch: {failure}")
        seen.append(order.result())
    return seen


def _longest(seen: list[Touch]) -> Touch:
    """Return the longest time of any vCPU for each page: later vCPUs find the page present."""
    longest = tuple(max(ticks) for ticks in zip(*(each.per_page for each in seen), strict=True))
    return seen[0]._replace(per_page=longest)


def _before(values: list[list[float]], last: list[Touch], scale: float) -> tuple[list[float], list[float]]:
    """Return the start times of accesses, by each vCPU's clock; zeros except for the last round, which is drawn."""
    began = []
    for each in last:
        at = 0.0
        for page in each.order:
            began.append(at)
            at += each.per_page[page] * scale
    return [0.0] * sum(map(len, values[:-1])), began


class _Plan:
    """The pages of a round: their number, their distance, and their preparation."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.cpus: int = bench["cpus"]
        huge = bench["backing"] in HUGE
        self.per = "huge page" if huge else "page"
        """The unit that is accessed once. Values are per unit."""
        self.pages: int = HUGE_PAGES * bench["pages"] // PAGES if huge else bench["pages"]
        if bench["provider"] != PROVIDERS[0]:
            self.pages //= SLOW
        self.stride = IN_A_HUGE_PAGE if huge else STRIDE if bench["order"] == "strided" else 1
        self.apart = 0 if bench["range"] == "same" else self.pages * self.stride
        """Pages from one vCPU's part to the next one's."""
        span = self.pages * self.stride if bench["range"] == "same" else self.cpus * self.apart
        self.round = span * HOST_PAGE
        """Bytes of a round."""
        self.room = bench.rounds * self.round
        self._slot = False

    def area(self, x: Experiment) -> Gpa:
        """Return where the first round begins."""
        if self._bench["state"] != "write-protected":
            return x.page(self.room // HOST_PAGE, align=HUGE_SIZE)
        file = raw.make(x, self.room)
        self._number = raw.slot(x, BEYOND, self.room, file.hva)
        self._hva = file.hva
        return BEYOND

    def prepare(self, x: Experiment, begin: Gpa) -> None:
        """Prepare the pages of a round."""
        state, pages = self._bench["state"], self.round // HOST_PAGE
        match state:
            case "allocated":
                backing, offset = raw.place(x, begin)
                if (answer := raw.allocate(backing.fd, offset, self.round)) != "ok":
                    self._bench.cannot(f"fallocate(2): {answer}")
            case "populated":
                x.memory.populate(begin, self.round)
            case "punched" | "dontneed" | "relaxed" | "mapped" | "write-protected":
                access = Access.READ if state == "relaxed" else ACCESSES[self._bench["access"]]
                x.guest.start_touch(begin, pages, access=access).result(self._bench.seconds)
        if state == "punched":
            x.memory.punch(begin, self.round)
        elif state == "dontneed":
            madvise(x.memory.hva(begin), self.round, MADV_DONTNEED)
        elif state == "write-protected":
            self._log_dirty(x)

    def _log_dirty(self, x: Experiment) -> None:
        """Start dirty logging, or restart it, which write-protects the guest's mapped pages."""
        vm = x.machine.vm
        if not self._slot:
            flags = KVM_MEM_LOG_DIRTY_PAGES
            vm.set_memory(self._number, BEYOND, self.room, self._hva, flags=flags)
            self._slot = True
        else:
            vm.dirty_log(self._number, self.room // HOST_PAGE)

    @contextlib.contextmanager
    def provided(self, x: Experiment, begin: Gpa) -> Iterator[None]:
        """Serve the round's missing pages during the block, if a userfaultfd provides them."""
        provider = self._bench["provider"]
        if not provider.startswith("userfaultfd"):
            yield
            return
        hva, page = x.memory.hva(begin), bytes(HOST_PAGE)
        with Userfault.open() as userfault:
            userfault.register(hva, self.round, missing=True)
            in_c = provider == PROVIDERS[1]
            with SourceServer(userfault, hva, bytes(self.round)) if in_c else Server(userfault, lambda _: page):
                yield
