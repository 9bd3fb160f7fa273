# SPDX-License-Identifier: Apache-2.0
"""A balloon's pages of 4 KiB on a host with larger ones: only what the guest has named in full is returned.

Holds on hosts with pages of any size; test_page_sizes runs it with larger ones.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.virtio.balloon import DEFLATE, F_DEFLATE_ON_OOM, F_MUST_TELL_HOST, VirtioBalloon
from pyvmm.devices.virtio.balloon_pages import PARTS, NamedPages
from pyvmm.pages import GUEST_PAGE, HOST_PAGE
from tests.unit.plain_guest import BASE
from tests.unit.queue_driver import RAM
from tests.unit.test_virtio_balloon import Guest, Memory

PLACE = BASE + 0x20_0000
FIRST = PLACE // GUEST_PAGE
larger = pytest.mark.skipif(PARTS == 1, reason="the host's pages are the balloon's")


@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 3 * PARTS - 1), max_size=2 * PARTS)), max_size=8))
def test_pages_are_returned_when_their_last_part_is_named_and_none_is_taken_back(
    calls: list[tuple[bool, set[int]]],
) -> None:
    pages, model = NamedPages(), set[int]()
    for give, numbers in calls:
        if not give:
            pages.take(numbers)
            model -= numbers
            continue
        model |= numbers
        asked = {number // PARTS for number in numbers}
        whole = {page for page in asked if model >= set(range(page * PARTS, (page + 1) * PARTS))}
        ranges = list(pages.give(numbers))
        assert all(gpa % HOST_PAGE == size % HOST_PAGE == 0 for gpa, size in ranges)
        assert {gpa // HOST_PAGE + n for gpa, size in ranges for n in range(size // HOST_PAGE)} == whole


@larger
def test_a_part_of_a_page_is_kept_until_the_rest_is_named() -> None:
    guest = Guest()
    with guest.driver:
        guest.driver.write(PLACE, b"x" * HOST_PAGE)
        guest.name(range(FIRST, FIRST + PARTS - 1))
        assert guest.memory.punched == []
        assert guest.driver.read(PLACE, HOST_PAGE) == b"x" * HOST_PAGE
        guest.name([FIRST + PARTS - 1])
        assert guest.memory.punched == [(PLACE, HOST_PAGE)]
        assert guest.driver.read(PLACE, HOST_PAGE) == bytes(HOST_PAGE)


@larger
def test_a_page_that_the_guest_takes_back_is_not_dropped_with_its_neighbours() -> None:
    guest = Guest()
    with guest.driver:
        guest.name(range(FIRST, FIRST + PARTS - 1))
        guest.name([FIRST], DEFLATE)
        guest.driver.write(PLACE, b"in use again")
        guest.name([FIRST + PARTS - 1])
        assert guest.memory.punched == []
        assert guest.driver.read(PLACE, 12) == b"in use again"


@larger
def test_a_guest_that_does_not_tell_before_use_must_name_a_page_at_once() -> None:
    guest = Guest()
    with guest.driver:
        guest.balloon.stop()
        guest.balloon.start(guest.driver.queues, F_DEFLATE_ON_OOM)
        guest.name(range(FIRST, FIRST + PARTS - 1))
        guest.name([FIRST + PARTS - 1])
        assert guest.memory.punched == []
        guest.name(range(FIRST, FIRST + PARTS))
        assert guest.memory.punched == [(PLACE, HOST_PAGE)]


def test_only_whole_pages_of_the_host_are_reported() -> None:
    guest = Guest()
    with guest.driver:
        guest.report((PLACE + GUEST_PAGE, 3 * HOST_PAGE))
    first, last = (PLACE, 3) if PARTS == 1 else (PLACE, 2)
    assert guest.memory.punched == [(first + HOST_PAGE, last * HOST_PAGE)]


def test_the_guest_must_tell_before_use_where_pages_have_parts() -> None:
    assert bool(VirtioBalloon(Memory(), RAM).features & F_MUST_TELL_HOST) == (PARTS > 1)
