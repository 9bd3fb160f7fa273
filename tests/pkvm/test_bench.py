# SPDX-License-Identifier: Apache-2.0
"""The benchmark on a real host: each case's series, KVM's counts, and points that cannot be measured.

Tests do not check how long anything took. They check that every page has a plausible value.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from statistics import median

import pytest

from pyvmm.bench import case as cases
from pyvmm.bench import history, linux, transfers
from pyvmm.bench.cases.exit import COUNT as EXITS
from pyvmm.bench.measure import Bench
from pyvmm.bench.model import ROUNDS, Point, Series
from pyvmm.bench.task import Task, measure_point
from pyvmm.experiment import raw
from pyvmm.experiment.runner import run
from pyvmm.guest.orders import Access
from pyvmm.machine.layout import RAM_BASE
from pyvmm.memory.address import MIB, Gpa
from pyvmm.protection import Protection
from tests.pkvm.harness import ALL, puppet
from tests.pkvm.required import kernel_directory

pytestmark = pytest.mark.pkvm
PAGES = 16
INTERRUPTS = 500
"""Of a host, each second, on a CPU that runs a guest: twice its timer's (CONFIG_HZ=250)."""

# A point of each case, and how many values a round of each metric brings.
POINTS = [
    ("fault", {"protection": "pkvm", "pages": PAGES}, {"touch": PAGES, "whole range": 1, "KVM's exits": 1}),
    ("fault", {"protection": "none", "pages": PAGES, "cpus": 2, "order": "random"},
     {"touch": 2 * PAGES, "whole range": 1, "KVM's exits": 1}),
    ("fault", {"protection": "emulated", "provider": "userfaultfd in C", "pages": 64},
     {"touch": 16, "whole range": 1, "KVM's exits": 1}),
    ("exit", {"protection": "pkvm", "kind": "registers"}, {"exit": EXITS, "in the VMM": 1, "KVM's exits": 1}),
    ("exit", {"protection": "none", "kind": "ioeventfd"}, {"exit": EXITS, "KVM's exits": 1}),
    ("scaling", {"protection": "pkvm", "kind": "python", "cpus": 2}, {"exits": 1, "exits of a vCPU": 2}),
    ("scaling", {"protection": "none", "kind": "registers"}, {"exits": 1, "exits of a vCPU": 1}),
    ("share", {"protection": "pkvm", "pages": PAGES}, {"share": PAGES, "unshare": PAGES, "announced share": 1}),
    ("convert", {"policy": "zero"},
     dict.fromkeys(("share", "unshare", "touch after share", "touch after unshare"), 64)),
    ("punch", {"protection": "none", "hole": "range"}, {"punch": 4}),
    ("punch", {"protection": "pkvm", "hole": "page"}, {"punch": 64}),
    ("teardown", {"protection": "pkvm", "size": 1}, {"VM": 1, "memory": 1}),
    ("prefault", {"protection": "pkvm", "size": 1, "means": "--prefault"},
     {"prepare": 1, "touch": 1, "together": 1}),
]  # fmt: skip


def named(value: object) -> str | None:
    return "-".join(map(str, value.values())) if isinstance(value, dict) and "protection" in value else None


def of(series: list[Series], metric: str) -> Series:
    (found,) = (each for each in series if each.metric == metric)
    assert not found.unavailable
    return found


@pytest.mark.parametrize(("name", "point", "wanted"), POINTS, ids=named)
def test_a_case_keeps_every_value_of_every_round_and_the_first_round_is_warm_up(
    name: str, point: Point, wanted: dict[str, int]
) -> None:
    series = measure_point(name, point)
    assert {each.unavailable for each in series} == {""}
    assert {each.metric: each.rounds for each in series} == {
        metric: (count,) * ROUNDS for metric, count in wanted.items()
    }
    for each in series:
        assert each.warmup == wanted[each.metric]
        assert len(each.values) == ROUNDS * wanted[each.metric]
        assert point.items() <= each.point.items()
        # Each value is below a second. Where nothing is counted, only the subtracted cost is left.
        assert all(-1e6 < value < 1e9 for value in each.values)
        if each.unit == "ns":
            assert max(each.kept) > 0


def test_bench_measures_the_footprint_once_and_finds_some_megabytes() -> None:
    series = of(measure_point("footprint", {"protection": "pkvm"}), "PSS less guest memory")
    assert (series.rounds, series.warmup, series.unit) == ((1,), 0, "bytes")
    assert 1e6 < series.values[0] < 100e6


def test_the_vmm_stays_small_with_a_linux_guest_with_every_device() -> None:
    kernel_directory("own:")
    point: Point = {"protection": "pkvm", "kernel": "own:", "memory": 256}
    series = of(measure_point("footprint", point), "PSS less guest memory")
    assert 1e6 < series.values[0] < 25 << 20


@pytest.mark.parametrize(
    ("point", "exits"),
    [
        ({"protection": "pkvm"}, 1.0),
        ({"protection": "pkvm", "state": "mapped"}, 0.0),
        ({"protection": "none", "state": "mapped"}, 0.0),
        ({"protection": "none", "state": "punched"}, 1.0),
        ({"protection": "none", "state": "dontneed", "backing": "private"}, 1.0),
        ({"protection": "none", "state": "write-protected", "access": "write"}, 1.0),
    ],
    ids=named,
)
def test_the_guest_exits_once_for_each_faulting_page_and_never_for_mapped_pages(point: Point, exits: float) -> None:
    series = measure_point("fault", {"pages": 64, **point})
    counted, took = of(series, "KVM's exits"), of(series, "whole range")
    assert median(counted.kept) >= exits - 0.1
    # The host's interrupts cause exits as well. A busy machine takes longer for a round and has more of them.
    of_guest = [count - INTERRUPTS * ns / 1e9 for count, ns in zip(counted.kept, took.kept, strict=True)]
    assert median(of_guest) <= exits + 0.1


def test_the_touches_of_each_vcpu_have_their_places_in_the_series() -> None:
    series = of(measure_point("fault", {"protection": "pkvm", "cpus": 2, "order": "strided", "pages": 4}), "touch")
    last = slice(-series.rounds[-1], None)
    assert series.places[last] == tuple(range(0, 8 * 16, 16))
    assert len(series.began) == len(series.values)
    for vcpu in (0, 4):
        began = series.began[last][vcpu : vcpu + 4]
        assert began[0] == 0
        assert list(began) == sorted(began)


# -- what the host did before


def test_a_protected_guest_settles_the_host_and_none_is_the_first_after_it() -> None:
    assert history.settle(MIB, seconds=60) == ""
    assert not history.is_new()
    [nothing] = measure_point("fault", {"protection": "pkvm", "history": "first"})
    assert "not the first protected VM since the host's boot" in nothing.unavailable


# -- what cannot be measured


@pytest.mark.parametrize(
    ("name", "point", "why"),
    [
        (
            "fault",
            {"protection": "pkvm", "state": "write-protected", "access": "write"},
            r"KVM_SET_USER_MEMORY_REGION\(.*flags=0x1\): EPERM",
        ),
        ("fault", {"protection": "pkvm", "provider": "userfaultfd in C"}, "KVM_RUN failed at .*: EFAULT"),
        ("punch", {"protection": "pkvm", "backing": "guest_memfd"}, "cannot back a protected guest: .*EIO"),
    ],
    ids=named,
)
def test_a_point_that_the_kernel_refuses_is_a_series_with_the_errno(name: str, point: Point, why: str) -> None:
    *_, nothing = measure_point(name, point)
    assert (nothing.values, nothing.notes) == ((), {})
    assert re.search(why, nothing.unavailable)


def test_a_crash_and_a_deadline_leave_series_that_say_so_and_bench_goes_on() -> None:
    def made(function: Callable[[Bench], None], seconds: float = 60.0) -> Task:
        known = cases.all_cases()["fault"]
        return Task(cases.Case("fault", "", known.axes, function, (), (), known.nonsense, seconds), known.base)

    def crash(bench: Bench) -> None:
        with bench.guest() as x:
            x.guest.ping()
            os.abort()

    def sleep(bench: Bench) -> None:
        with bench.guest() as x:
            x.guest.ping()
            time.sleep(60)

    def touch(bench: Bench) -> None:
        with bench.guest() as x:
            bench.keep("touch", [[x.guest.touch(x.page(), 1, access=Access.WRITE).ticks]])

    [crashed], [late], [good] = run([made(crash), made(sleep, 3.0), made(touch)])
    assert crashed.unavailable.startswith("the process was killed by SIGABRT")
    assert late.unavailable.startswith("not done after 3 s, and killed")
    assert crashed.notes == late.notes == {"crashed": True}
    assert good.values[0] > 0


# -- memory populated before the start


@pytest.mark.parametrize("protection", ALL, ids=lambda each: each.value)
@pytest.mark.parametrize("prefault", [False, True], ids=["", "prefault"])
def test_a_prefaulted_machine_has_pages_before_the_guest_touches_them(protection: Protection, prefault: bool) -> None:
    with puppet(protection, prefault=prefault) as (machine, guest):
        guest.ping()
        page = Gpa(RAM_BASE + machine.config.memory // 2)
        assert raw.present(machine.memory.hva(page)) is prefault
        guest.write64(page, 1)
        assert guest.read64(page) == 1


# -- Linux guests


def test_bench_times_every_phase_of_a_boot_in_order() -> None:
    kernel_directory("own:")
    with linux.files("own:") as guest:
        boot = linux.boot(linux.pyvmm(guest, "pkvm", 1), 600)
    assert boot.executed < boot.entered < boot.init < boot.ended


@pytest.mark.parametrize(
    ("operation", "lacking"), [("blk read", ""), ("blk read", "KVM_CAP_IOEVENTFD"), ("net round trip", "")]
)
def test_a_linux_guest_times_its_devices_and_kicks_them_through_the_kernel(operation: str, lacking: str) -> None:
    kernel_directory("own:")
    wanted = transfers.OPERATIONS[operation]
    with transfers.host(lacking=lacking) as here:
        if wanted.device == "net":
            here.serve()
        done = transfers.passes(transfers.pyvmm(here, wanted, "pkvm", 2), wanted, 600)
    assert len(done.took) == 2
    assert min(done.took) > 0
    assert (done.kicks > 0, done.rings > 0) == (not lacking, bool(lacking))
