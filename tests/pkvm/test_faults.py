# SPDX-License-Identifier: Apache-2.0
"""Guests and hosts that misbehave: each run ends with a clear reason and leaves nothing behind."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time

import pytest

from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import ALL, Footprint, puppet, run

pytestmark = pytest.mark.pkvm
each_protection = pytest.mark.parametrize("protection", ALL, ids=lambda p: p.value)
RAM = 0x8000_0000


@each_protection
@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("undefined", "Unknown reason"),
        ("unmapped", "Data Abort"),
        ("jump", "Instruction Abort"),
    ],
)
def test_pyvmm_reports_a_crash_with_its_syndrome(way: str, words: str, protection: Protection) -> None:
    result = run("payload:crash", protection, params=(f"way={way}",))
    assert result.outcome.ending is Ending.CRASH
    assert result.outcome.status == 3
    assert words.lower() in result.outcome.reason.lower(), result.outcome.reason
    for register in ("ESR", "FAR", "ELR"):
        assert register in result.outcome.reason


@each_protection
def test_a_loop_ends_at_its_deadline(protection: Protection) -> None:
    before = Footprint.now()
    result = run("payload:crash", protection, params=("way=loop",), deadline=1.0)
    assert (result.outcome.ending, result.outcome.status) == (Ending.DEADLINE, 4)
    assert "1 s" in result.outcome.reason
    assert Footprint.now() == before


@each_protection
def test_a_flood_of_output_loses_no_byte(protection: Protection) -> None:
    """The payload never checks for room. More than a FIFO's worth of output still arrives whole."""
    count = 6000
    result = run("payload:crash", protection, params=("way=flood", f"bytes={count}"))
    line = bytes(range(ord("0"), ord("0") + 63)) + b"\n"
    expected = (line * (count // len(line) + 1))[:count]
    head, _, body = result.output.partition(b"\n")
    assert head.startswith(b"crash: way=flood")
    assert body[:count] == expected


@each_protection
def test_a_reset_ends_the_run_with_status_3(protection: Protection) -> None:
    result = run("payload:crash", protection, params=("way=reset",))
    assert (result.outcome.ending, result.outcome.status) == (Ending.RESET, 3)


def read_through_the_kernel(address: int) -> bytes:
    """Read this process with process_vm_readv, as a debugger does."""

    class Iovec(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))

    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(4096)
    local, remote = Iovec(ctypes.addressof(buffer), 4096), Iovec(address, 4096)
    done = libc.process_vm_readv(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    assert done == 4096, os.strerror(ctypes.get_errno())
    return buffer.raw


def test_a_forced_reclaim_ends_the_run_and_the_reason_names_the_page() -> None:
    gpa = RAM + 0x80_0000
    with puppet(Protection.PKVM) as (machine, guest):
        guest.write64(gpa, 0x1234_5678)
        slot = next(slot for slot in machine.memory.slots if slot.gpa <= gpa < slot.end)
        hva = slot.hva + gpa - slot.gpa
        assert read_through_the_kernel(hva) == bytes(4096)
        order = guest.start_read64(gpa)
        outcome = machine.wait(10)
        assert outcome.ending is Ending.CRASH
        assert f"page at gpa {gpa >> 16:#x}_{gpa & 0xFFFF:04x} was reclaimed by the host" in outcome.reason
        with pytest.raises(Exception, match="did not answer"):
            order.result(1)


def test_guarded_access_to_every_page_reclaims_nothing() -> None:
    """pyvmm never forces a reclaim when it looks at memory."""
    with puppet(Protection.PKVM) as (machine, guest):
        first, pages = RAM + 0x80_0000, 64
        for page in range(0, pages, 2):
            guest.write64(first + page * 4096, page)
        seen = [machine.memory.probe(first + page * 4096) for page in range(pages)]
        assert seen[::2] == [False] * (pages // 2)
        assert [guest.read64(first + page * 4096) for page in range(0, pages, 2)] == list(range(0, pages, 2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_ends_the_run_cleanly(number: signal.Signals) -> None:
    before = Footprint.now()
    heard = threading.Event()
    with puppet(Protection.PKVM, cpus=2) as (machine, guest):

        def hear(*_: object) -> None:
            heard.set()
            machine.stop(number.name)

        previous = signal.signal(number, hear)
        try:
            guest.ping()
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            outcome = machine.wait(10)
        finally:
            signal.signal(number, previous)
        assert heard.is_set()
        assert (outcome.ending, outcome.reason) == (Ending.INTERRUPTED, number.name)
    assert Footprint.now() == before


@each_protection
def test_an_access_that_kvm_cannot_decode_is_reported_as_a_guest_crash(protection: Protection) -> None:
    """The access is outside memory and has no syndrome. The kernel returns ENOSYS or aborts the guest."""
    result = run("payload:crash", protection, params=("way=sea",))
    assert (result.outcome.ending, result.outcome.status) == (Ending.CRASH, 3)
    assert "external abort" in result.outcome.reason or "cannot decode" in result.outcome.reason
