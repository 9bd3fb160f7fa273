# SPDX-License-Identifier: Apache-2.0
"""The address map, its drawing and its table agree with each other."""

from __future__ import annotations

import re
from pathlib import Path

from pyvmm.devices.mailbox import STRIDE
from pyvmm.machine import layout

SOURCE = Path(layout.__file__).read_text()


def table() -> dict[str, tuple[int, int, int]]:
    row = re.compile(r"^#   (\S.*?)\s+(0x[\da-f_]+)\s+(0x[\da-f_]+)\s+(0x[\da-f_]+)", re.MULTILINE)
    return {name: (int(a, 16), int(b, 16), int(c, 16)) for name, a, b, c in row.findall(SOURCE)}


def test_the_table_above_the_constants_agrees_with_them() -> None:
    assert table() == {window.name: (window.start, window.end, window.size) for window in layout.MAP}


def test_windows_are_ordered_disjoint_whole_pages_and_below_ram() -> None:
    end = 0
    for window in layout.MAP:
        assert end <= window.start < window.end
        assert window.start % 0x1000 == 0
        assert window.size % 0x1000 == 0
        end = window.end
    assert end <= layout.RAM_BASE


def test_the_drawing_shows_every_boundary_in_order() -> None:
    drawn = [int(address, 16) for address in re.findall(r"^#   (0x[\da-f_]+) [+|]", SOURCE, re.MULTILINE)]
    assert drawn == sorted(drawn)
    assert {layout.RAM_BASE, layout.RAM_BASE + layout.FLAT_OFFSET} <= set(drawn)
    for window in layout.MAP:
        # In the drawing a window is in the last band that starts at or below it.
        band = max(address for address in drawn if address <= window.start)
        assert window.end <= min(address for address in drawn if address > band)


def test_every_vcpu_has_a_separate_mailbox_and_redistributor() -> None:
    assert layout.MAILBOX.size >= layout.MAX_VCPUS * STRIDE
    assert layout.GIC_REDISTRIBUTORS.size >= layout.MAX_VCPUS * 0x2_0000
    assert len({layout.mpidr(n) & 0xFF for n in range(layout.MAX_VCPUS)}) == layout.MAX_VCPUS


def test_mpidr_is_the_same_as_in_kvm() -> None:
    assert [layout.mpidr(n) for n in (0, 15, 16, 4096)] == [0, 15, 0x100, 0x1_0000]


def test_interrupt_numbers_are_unique() -> None:
    numbers = [window.spi for window in layout.MAP if window.spi is not None]
    assert len(numbers) == len(set(numbers))
    assert all(0 <= number < 988 for number in numbers)
