# SPDX-License-Identifier: Apache-2.0
"""Values derived from the hypervisor's entries and exits: visits, and the cost of an operation at EL2."""

from __future__ import annotations

import pytest

from pyvmm.bench.el2 import Cost, Residency, Window, residency, visits
from pyvmm.bench.split import PARTS, WHOLE, Measured
from pyvmm.observe.hyptrace import HypEvent


def stretch(cpu: int, begin: int, end: int, reason: str, left: str = "eret_host") -> list[HypEvent]:
    """Return a visit."""
    return [HypEvent(begin, cpu, True, reason, 0), HypEvent(end, cpu, False, left, 0)]


DONATION = [
    *stretch(0, 100, 110, "guest_exit"),
    *stretch(0, 150, 155, "host_abort"),
    *stretch(0, 170, 200, "hvc"),
    *stretch(0, 230, 245, "hvc", "eret_guest"),
]
SHARE = stretch(0, 300, 320, "guest_exit", "eret_guest")
OTHERS = [*stretch(1, 105, 125, "hvc"), *stretch(1, 310, 340, "guest_exit", "eret_guest")]


def in_time(*parts: list[HypEvent]) -> list[HypEvent]:
    return sorted((event for part in parts for event in part), key=lambda event: event.ns)


def test_half_visits_at_the_ends_are_not_counted() -> None:
    assert visits([HypEvent(5, 0, False, "eret_host", 0), *DONATION[:-1]]) == visits(DONATION[:-2])


def test_residency_is_the_mean_of_visits_that_begin_in_the_window_by_reason() -> None:
    seen = visits(in_time(DONATION, SHARE, OTHERS))
    assert residency(seen, Window(100, 300, 2), cpus=[0]) == Residency(
        2,
        {"guest_exit": 5, "host_abort": 2.5, "hvc": 22.5},
        {"guest_exit": 0.5, "host_abort": 0.5, "hvc": 1},
    )
    assert residency(seen, Window(100, 300, 2)).total == 30 + 10
    assert residency(seen, Window(0, 50, 2)).total == 0
    assert Residency(1, {}, {"hvc": 0.5}).error == pytest.approx(1000 / 12**0.5)  # with one timestamp
    with pytest.raises(ValueError, match="no operations"):
        residency(seen, Window(100, 300, 0))


def test_costs_that_do_not_belong_to_an_operation_are_subtracted() -> None:
    seen = visits(in_time(DONATION, SHARE))
    both = residency(seen, Window(100, 320, 2))
    assert (both.total, both.visits) == (40, 2.5)
    rest = both.less(residency(seen, Window(300, 320)), times=0.5)
    assert (rest.ns["guest_exit"], rest.entries["guest_exit"]) == (15 - 10, 1 - 0.5)
    assert both.without_tracing(2).total == 40 - 5


def traced(el2: float, visits: int, rest: float, event: float) -> Cost:
    """Return the measured cost of an operation with this cost untraced. One of a visit's two events is inside EL2."""
    seen = Residency(1, {"hvc": el2 + event * visits}, {"hvc": visits})
    return Cost(el2 + rest + 2 * event * visits, seen, event)


@pytest.mark.parametrize("event", [0, 100])
def test_the_parts_are_those_of_an_untraced_donation(event: float) -> None:
    way, pin, allocation, call = 1500, 2600, 6200, 40
    found = Measured(
        cold=traced(7500, 4, way + pin + allocation, event),
        populated=traced(6000, 3, way + pin, event),
        exit=traced(2500, 2, way, event),
        populating=traced(1500, 1, allocation + call, event),
        again=traced(0, 0, call, event),
    ).split()
    assert [found[part] for part in PARTS] == [7500, pin, allocation, way]
    assert found[WHOLE] == sum(found[part] for part in PARTS)
