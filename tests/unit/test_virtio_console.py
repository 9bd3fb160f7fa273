# SPDX-License-Identifier: Apache-2.0
"""The console device: bytes both ways, slow readers, emergency writes, and hostile guests."""

from __future__ import annotations

import contextlib
import os
import select
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.devices.virtio.console import F_EMERG_WRITE, F_SIZE, PART, RX, TX, VirtioConsole
from tests.unit.plain_guest import BASE, PAGE, SIZE, Segment
from tests.unit.queue_driver import Driver

DATA = BASE + 0x1_0000


class Ends:
    """A console between two pipes, and its driver."""

    def __init__(self, **options: object) -> None:
        self.out, self._out = os.pipe()
        self._source, self.keys = os.pipe()
        self.unheard: list[OSError] = []
        self.console = VirtioConsole(self._out, self._source, unheard=self.unheard.append, **options)  # type: ignore[arg-type]
        self.driver = Driver(self.console)
        self.rx, self.tx = self.driver.rings

    def close(self) -> None:
        self.console.abort()
        self.driver.__exit__()
        for fd in (self.out, self._out, self._source, self.keys):
            if fd >= 0:
                os.close(fd)

    def print(self, data: bytes, gpa: int = DATA) -> int:
        self.driver.write(gpa, data)
        return self.tx.give(Segment(gpa, len(data)))


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def test_output_is_written_in_order(ends: Ends) -> None:
    ends.driver.write(DATA, b"onetwothree")
    ends.tx.give(Segment(DATA, 3), Segment(DATA + 3, 3))
    ends.tx.give(Segment(DATA + 6, 5))
    assert ends.tx.wait(2) == [(0, 0), (2, 0)]
    assert os.read(ends.out, 64) == b"onetwothree"


def test_input_waits_for_the_guests_buffers_and_fills_them_in_turn(ends: Ends) -> None:
    os.write(ends.keys, b"hello world")
    ends.rx.give(Segment(DATA, 5, True))
    ends.rx.give(Segment(DATA + 5, 64, True))
    assert ends.rx.wait(2) == [(0, 5), (1, 6)]
    assert ends.driver.read(DATA, 11) == b"hello world"


def test_offered_keys_reach_the_guest_if_there_is_room(ends: Ends) -> None:
    assert ends.console.offer(b"x" * PART)
    assert not ends.console.offer(b"x" * PART + b"y")
    ends.rx.give(Segment(DATA, PART, True))
    assert ends.rx.wait() == [(0, PART)]
    ends.driver.until(lambda: ends.console.offer(b"\r"))
    ends.rx.give(Segment(DATA, 8, True))
    assert ends.rx.wait() == [(1, 1)]
    ends.console.stop()
    assert not ends.console.offer(b"\r")


def test_the_device_signals_keys_before_the_descriptor_can_be_closed(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []
    monkeypatch.setattr(os, "eventfd_write", lambda _fd, _n: held.append(ends.console._idle._is_owned()))  # type: ignore[attr-defined]
    assert ends.console.offer(b"x")
    monkeypatch.undo()
    assert held == [True]


def test_input_stays_in_the_pipe_if_the_guest_reads_nothing(ends: Ends) -> None:
    os.set_blocking(ends.keys, False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 1 << 20:
            sent += os.write(ends.keys, b"k" * PART)
    # Only the pipe and one part hold input.
    assert sent <= (1 << 16) + PART


def test_a_slow_reader_stops_the_device_from_taking_more_and_loses_nothing(ends: Ends) -> None:
    flood = 40
    for n in range(flood):
        ends.print(bytes([n]) * PAGE, DATA + n * PAGE)
    ends.driver.until(lambda: not select.select([], [ends._out], [], 0)[1])
    taken = len(ends.tx.used())
    assert taken < flood, "requests beyond what the pipe holds stay in the ring"
    got = b""
    while len(got) < flood * PAGE:
        got += os.read(ends.out, PAGE)
    assert got == b"".join(bytes([n]) * PAGE for n in range(flood))
    assert len(ends.tx.wait(flood - taken)) == flood - taken


def test_a_request_of_gigabytes_uses_a_bounded_part_of_memory(ends: Ends) -> None:
    heads = [Segment(BASE + 0x10_0000, 0x10_0000)] * 60
    ends.tx.give(*heads)
    os.read(ends.out, PAGE)
    ends.driver.device.stop()
    assert len(ends.console._left) <= PART


def test_a_reader_that_has_gone_is_reported_once_and_the_guest_can_still_print(ends: Ends) -> None:
    os.close(ends.out)
    ends.out = -1
    for n in range(3):
        ends.print(b"x", DATA + n)
    ends.tx.wait(3)
    assert len(ends.unheard) == 1


def test_output_in_private_pages_is_dropped_and_other_output_goes_on(ends: Ends) -> None:
    ends.driver.hide(DATA)
    ends.tx.give(Segment(DATA, 4))
    ends.print(b"fine", DATA + PAGE)
    assert len(ends.tx.wait(2)) == 2
    assert os.read(ends.out, 64) == b"fine"


def test_input_is_not_lost_if_the_guests_buffers_are_private(ends: Ends) -> None:
    ends.driver.hide(DATA)
    os.write(ends.keys, b"keys")
    ends.rx.give(Segment(DATA, 8, True))
    ends.rx.give(Segment(DATA + PAGE, 8, True))
    assert ends.rx.wait(2) == [(0, 0), (1, 4)]
    assert ends.driver.read(DATA + PAGE, 4) == b"keys"


def test_broken_rings_end_the_device_until_its_reset(ends: Ends) -> None:
    ends.tx.give(Segment(DATA, 0))
    ends.driver.until(lambda: ends.driver.transport.reset_needed)
    ends.driver.restart()
    ends.print(b"again")
    ends.tx.wait()
    assert os.read(ends.out, 64) == b"again"


def test_end_of_input_and_files_that_cannot_be_waited_for_are_read(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"script\n")
    with open(tmp_path / "in", "rb") as source, open(tmp_path / "out", "wb") as out:
        console = VirtioConsole(out.fileno(), source.fileno())
        with Driver(console) as driver:
            rx, tx = driver.rings
            rx.give(Segment(DATA, 64, True))
            assert rx.wait() == [(0, 7)]
            driver.write(DATA, b"log")
            tx.give(Segment(DATA, 3))
            tx.wait()
        assert (tmp_path / "out").read_bytes() == b"log"


# ---- the configuration space


def test_a_terminals_size_is_offered_and_a_new_size_is_announced() -> None:
    plain, sized = VirtioConsole(), VirtioConsole(size=(80, 25))
    assert (plain.features, sized.features) == (F_EMERG_WRITE, F_EMERG_WRITE | F_SIZE)
    with Driver(plain), Driver(sized) as driver:
        assert struct.unpack("<HHII", sized.config()) == (80, 25, 1, 0)
        sized.resize(100_000, 40)
        assert struct.unpack("<HHII", sized.config()) == (0xFFFF, 40, 1, 0)
        assert driver.transport.changes == 1


def test_emergency_writes_need_no_driver_and_never_wait(ends: Ends) -> None:
    ends.console.stop()
    for character in b"panic":
        ends.console.write_config(8, bytes([character, 0, 0, 0]))
    assert os.read(ends.out, 64) == b"panic"
    for _ in range(40):
        os.write(ends._out, b"x" * PAGE) if select.select([], [ends._out], [], 0)[1] else None
    for _ in range(2 * PART):
        ends.console.write_config(8, b"!")
    assert len(ends.console._emergency) == PART
    ends.console.write_config(4, b"!")
    assert len(ends.console._emergency) == PART


# ---- the end


def test_close_waits_until_the_pending_output_is_read(ends: Ends) -> None:
    for n in range(20):
        ends.print(bytes([n]) * PAGE, DATA + n * PAGE)
    done = threading.Event()

    def drain() -> None:
        ends.console.drain()
        done.set()

    drainer = threading.Thread(target=drain)
    drainer.start()
    assert not done.wait(0.1)
    got = b""
    while len(got) < 20 * PAGE:
        got += os.read(ends.out, 1 << 16)
    drainer.join(20)
    assert done.is_set()


def test_abort_does_not_wait_for_a_reader_that_takes_nothing(ends: Ends) -> None:
    for n in range(20):
        ends.print(bytes([n]) * PAGE, DATA + n * PAGE)
    ends.console.abort()
    ends.console.drain()
    assert ends.console._give_up_at is not None


def test_pending_data_is_saved_and_restored(ends: Ends) -> None:
    for n in range(20):
        ends.print(bytes([n]) * PAGE, DATA + n * PAGE)
    ends.driver.until(lambda: not select.select([], [ends._out], [], 0)[1])
    ends.console.pause()
    saved = ends.console.save()
    back = len(ends.tx.used())
    written = b""
    while select.select([ends.out], [], [], 0)[0]:
        written += os.read(ends.out, PAGE)
    read, write = os.pipe()
    with open(read, "rb") as reader, open(write, "wb") as out:
        other = VirtioConsole(out.fileno())
        other.load(saved)
        other.close()
        out.close()
        written += reader.read()
    assert written == b"".join(bytes([n]) * PAGE for n in range(back))
    ends.console.resume()


def test_keys_offered_during_a_pause_are_saved_too(ends: Ends) -> None:
    ends.rx.give(Segment(DATA, 2, True))
    assert ends.console.offer(b"ls")
    assert ends.rx.wait() == [(0, 2)]
    os.write(ends.keys, b" -l")
    ends.driver.until(lambda: not select.select([ends._source], [], [], 0)[0])
    ends.console.pause()
    assert ends.console.offer(b"\r")
    saved = ends.console.save()
    ends.console.resume()
    assert bytes.fromhex(saved["typed"]) == b" -l\r"


def test_a_pause_keeps_output_until_resume(ends: Ends) -> None:
    ends.console.pause()
    ends.print(b"later")
    assert not select.select([ends.out], [], [], 0.05)[0]
    ends.console.resume()
    ends.tx.wait()
    assert os.read(ends.out, 64) == b"later"
    assert (RX, TX, SIZE % PAGE) == (0, 1, 0)
