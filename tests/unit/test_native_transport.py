# SPDX-License-Identifier: Apache-2.0
"""Accesses to a virtio-mmio transport that the loop answers itself or leaves to Python, in a fake kernel."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.fake_kvm import load, store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fake_kvm import Rig

DEVICE = 0x0A00_0000


def eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK)


def rung(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


# ---- registers of virtio


@pytest.fixture
def transport(rig: Rig) -> Iterator[Any]:
    """Yield a transport with two queues on the bus. The value of each register outside queues is its offset."""
    line = rig.new("struct pv_interrupt *", {"fd": eventfd()})
    slots = rig.new("struct pv_doorbell_slot[]", [(0x50, number, eventfd()) for number in range(2)])
    made = {
        "interrupt": line,
        "bell": rig.new("struct pv_doorbell *", {"count": 2, "slots": slots}),
        "queues": rig.new("struct pv_virtio_queue[]", [(8, 1), (4, 0)]),
        "offered": [0x10, 0x11, 0x12, 0x13],
        "registers": list(range(0, 0x100, 4)),
    }
    transport = rig.new("struct pv_virtio_mmio *", made)
    rig.bus((DEVICE, 0x200, "VIRTIO", transport))
    yield transport
    for fd in (line.fd, slots[0].fd, slots[1].fd):
        os.close(fd)


def counts(rig: Rig) -> dict[str, int]:
    """Return how often the loop stopped for an MMIO, by kind."""
    kinds = ("COLD", "DOORBELL", "VIRTIO", "UNCLAIMED")
    found = {kind: rig.vcpus[0].native.stats[getattr(rig.lib, f"PV_EXIT_MMIO_{kind}")].count for kind in kinds}
    return {kind: count for kind, count in found.items() if count}


def test_virtio_registers_are_read_in_the_loop(rig: Rig, transport: Any) -> None:
    rig.lib.pv_virtio_configure(transport, b"\x01\x02\x03\x04\x05", 5, 0xFC)
    wanted = {offset: offset for offset in range(0, 0x100, 4)}
    wanted |= {0x10: 0x10, 0x34: 8, 0x44: 1, 0x50: 0, 0x54: 0, 0x60: 0, 0x100: 0x0403_0201, 0x104: 5, 0x1FC: 0}
    exits = rig.script(*[load(DEVICE + offset, 4) for offset in wanted])
    assert rig.run() == "OTHER"
    assert {offset: exit.answer for offset, exit in zip(wanted, exits, strict=False)} == wanted
    assert counts(rig) == {"VIRTIO": len(wanted) - 2, "DOORBELL": 2}


def test_virtio_selectors_select_and_a_queue_beyond_the_last_reads_as_zero(rig: Rig, transport: Any) -> None:
    steps = []
    for number in (1, 3, 4, 2**32 - 1):
        steps += [store(DEVICE + 0x14, number, 4), load(DEVICE + 0x10, 4)]
        steps += [store(DEVICE + 0x30, number, 4), load(DEVICE + 0x34, 4), load(DEVICE + 0x44, 4)]
    exits = rig.script(*steps, store(DEVICE + 0x24, 2, 4))
    assert rig.run() == "OTHER"
    answers = [[exits[5 * turn + n].answer for n in (1, 3, 4)] for turn in range(4)]
    assert answers == [[0x11, 4, 0], [0x13, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert transport.driver_features_sel == 2


@pytest.mark.parametrize("offset", [0x00, 0x10, 0x20, 0x38, 0x44, 0x70, 0x80, 0xA4, 0xFC, 0x100, 0x1FF])
def test_virtio_writes_with_side_effects_go_to_python(rig: Rig, transport: Any, offset: int) -> None:
    before = bytes(rig.ffi.buffer(transport))
    size = 1 if offset == 0x1FF else 4
    rig.script(store(DEVICE + offset, 7, size))
    vcpu = rig.vcpus[0].native
    assert (rig.run(), vcpu.offset, vcpu.value, vcpu.size) == ("MMIO", offset, 7, size)
    assert counts(rig) == {"COLD": 1}
    assert bytes(rig.ffi.buffer(transport)) == before


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1), (0, 2), (0, 8), (1, 4), (0x6F, 4), (0x70, 8), (0xFC, 8), (0xFF, 1)]
)
def test_virtio_registers_are_accessed_whole_or_not_at_all(rig: Rig, transport: Any, offset: int, size: int) -> None:
    before = bytes(rig.ffi.buffer(transport))
    exits = rig.script(load(DEVICE + offset, size), store(DEVICE + offset, 2**64 - 1, size))
    assert rig.run() == "OTHER"
    assert exits[0].answer == 0
    assert bytes(rig.ffi.buffer(transport)) == before


@pytest.mark.parametrize(("offset", "size"), [(0x1FF, 2), (0x1FD, 4), (0x1F9, 8), (0x200, 1)])
def test_a_virtio_access_beyond_the_end_is_unclaimed(rig: Rig, transport: Any, offset: int, size: int) -> None:
    rig.script(load(DEVICE + offset, size))
    assert rig.run() == "UNCLAIMED"
    assert transport.lock == 0


def test_virtio_configuration_allows_any_width_and_reads_zeros_beyond_its_end(rig: Rig, transport: Any) -> None:
    rig.lib.pv_virtio_configure(transport, bytes(range(1, 256)) + b"\xff", 256, 1)
    widths = [(0x100, 1), (0x101, 2), (0x102, 8), (0x1F8, 8), (0x1FF, 1)]
    exits = rig.script(*[load(DEVICE + offset, size) for offset, size in widths], load(DEVICE + 0x104, 4))
    assert rig.run() == "OTHER"
    content = bytes(range(1, 256)) + b"\xff"
    wanted = [int.from_bytes(content[at - 0x100 :][:size], "little") for at, size in widths]
    assert [exit.answer for exit in exits[0 : len(widths)]] == wanted
    rig.lib.pv_virtio_configure(transport, b"\x09", 1, 2)
    exits = rig.script(load(DEVICE + 0x100, 8), load(DEVICE + 0xFC, 4), load(DEVICE + 0x1F8, 8))
    assert rig.run() == "OTHER"
    assert [exit.answer for exit in exits[0:3]] == [9, 2, 0]


def test_virtio_kicks_ring_the_named_queue(rig: Rig, transport: Any) -> None:
    slots = transport.bell.slots
    rig.script(store(DEVICE + 0x50, 1, 4), store(DEVICE + 0x50, 2, 4), store(DEVICE + 0x54, 0, 4))
    assert rig.run() == "OTHER"
    assert (rung(slots[0].fd), rung(slots[1].fd), transport.bell.missed) == (0, 1, 2)
    assert counts(rig) == {"DOORBELL": 3}


def test_virtio_configuration_is_never_torn(make_rig: Callable[..., Rig]) -> None:
    """Each vCPU reads generation, contents, generation. If the contents changed meanwhile, the generation differs."""
    rig = make_rig(vcpus=2)
    transport = rig.new("struct pv_virtio_mmio *")
    rig.bus((DEVICE, 0x200, "VIRTIO", transport))
    read = [load(DEVICE + 0xFC, 4), load(DEVICE + 0x100, 8), load(DEVICE + 0x108, 8), load(DEVICE + 0xFC, 4)]
    done = threading.Event()

    def publish() -> None:
        number = 0
        while not done.is_set():
            number += 1
            rig.lib.pv_virtio_configure(transport, bytes([number % 256]) * 16, 16, number)

    publisher = threading.Thread(target=publish)
    publisher.start()
    whole = 0
    try:
        for turn in range(300):
            exits = rig.script(*read * 8, vcpu=turn % 2)
            assert rig.run(turn % 2) == "OTHER"
            for at in range(0, 32, 4):
                before, low, high, after = (exits[at + n].answer for n in range(4))
                assert all(len(set(word.to_bytes(8, "little"))) == 1 for word in (low, high))
                whole += before == after
                assert before != after or low == high
    finally:
        done.set()
        publisher.join()
    assert whole


# ---- interrupts of virtio


def test_interrupts_are_raised_once_until_they_are_acknowledged(rig: Rig) -> None:
    line = eventfd()
    interrupt = rig.new("struct pv_interrupt *", {"fd": line})
    bell = rig.new("struct pv_doorbell *")
    rig.bus((DEVICE, 0x200, "VIRTIO", rig.new("struct pv_virtio_mmio *", {"interrupt": interrupt, "bell": bell})))
    used, config = rig.lib.PV_INTERRUPT_USED, rig.lib.PV_INTERRUPT_CONFIG
    for bits, edges in ((used, 1), (used, 0), (used | config, 1), (config, 0)):
        rig.lib.pv_interrupt(interrupt, bits)
        assert rung(line) == edges
    exits = rig.script(load(DEVICE + 0x60, 4), store(DEVICE + 0x64, used, 4), load(DEVICE + 0x60, 4))
    assert rig.run() == "OTHER"
    assert (exits[0].answer, exits[2].answer) == (used | config, config)
    rig.lib.pv_interrupt(interrupt, used)
    assert rung(line) == 1
    assert interrupt.sent == 3
    os.close(line)
