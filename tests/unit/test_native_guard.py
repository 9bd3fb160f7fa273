# SPDX-License-Identifier: Apache-2.0
"""Guarded copies: their exact behaviour at pages the host may not access, and the faults they pass on."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def map_(fd: int, size: int) -> int:
    address = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    assert isinstance(address, int)
    return address


def protect(address: int, size: int, protection: int) -> None:
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection) == 0


class Memory:
    """Two open pages, then one that faults: by SIGSEGV (no access) or by SIGBUS (beyond the end of its file)."""

    def __init__(self, how: str) -> None:
        self.fd = os.memfd_create("memory")
        os.ftruncate(self.fd, 3 * PAGE if how == "SIGSEGV" else 2 * PAGE)
        self.address = map_(self.fd, 3 * PAGE)
        if how == "SIGSEGV":
            protect(self.address + 2 * PAGE, PAGE, 0)

    def at(self, offset: int) -> Any:
        return ffi.cast("uint8_t *", self.address + offset)

    def bytes(self, offset: int, n: int) -> bytes:
        return bytes(ffi.buffer(self.at(offset), n))

    def close(self) -> None:
        libc.munmap(ctypes.c_void_p(self.address), ctypes.c_size_t(3 * PAGE))
        os.close(self.fd)


@pytest.fixture(autouse=True, scope="module")
def signals() -> None:
    assert lib.pv_install_signals() == 0


@pytest.fixture(params=["SIGSEGV", "SIGBUS"])
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    made = Memory(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("how", ["SIGSEGV", "SIGBUS"])
@settings(max_examples=60)
@given(
    before=st.integers(0, 300), n=st.integers(0, 400), shift=st.integers(0, 7), seed=st.binary(min_size=8, max_size=8)
)
def test_copies_end_exactly_at_the_first_byte_that_faults(
    how: str, before: int, n: int, shift: int, seed: bytes
) -> None:
    memory = Memory(how)
    try:
        here = 2 * PAGE - before
        possible = min(n, before)
        data = (seed * (n // 8 + 1))[:n]
        source = ffi.new("uint8_t[]", n + shift + 1)
        ffi.memmove(source + shift, data, n)
        assert lib.pv_copy(memory.at(here), source + shift, n) == possible
        assert memory.bytes(here, possible) == data[:possible]
        assert memory.bytes(here - 8, 8) == bytes(8)
        back = ffi.new("uint8_t[]", n + shift + 1)
        assert lib.pv_copy(back + shift, memory.at(here), n) == possible
        assert bytes(ffi.buffer(back + shift, possible)) == data[:possible]
        assert bytes(ffi.buffer(back, shift)) == bytes(shift)
        assert bytes(ffi.buffer(back + shift + possible, n - possible)) == bytes(n - possible)
        assert lib.pv_fill(memory.at(here), 0xA7, n) == possible
        assert memory.bytes(here, possible) == b"\xa7" * possible
    finally:
        memory.close()


def test_copies_work_again_after_a_fault(memory: Memory) -> None:
    buffer = ffi.new("uint8_t[]", 64)
    for _ in range(100):
        assert lib.pv_copy(buffer, memory.at(2 * PAGE), 64) == 0
        assert lib.pv_copy(buffer, memory.at(2 * PAGE - 32), 64) == 32


def test_a_hole_in_the_middle_stops_a_copy_and_a_copy_beyond_it_works(memory: Memory) -> None:
    protect(memory.address + PAGE, PAGE, 0)
    assert lib.pv_fill(memory.at(0), 1, 3 * PAGE) == PAGE
    assert lib.pv_fill(memory.at(PAGE), 1, PAGE) == 0
    protect(memory.address + PAGE, PAGE, 3)
    assert lib.pv_fill(memory.at(PAGE), 1, PAGE) == PAGE


def test_faults_of_several_threads_are_independent(memory: Memory) -> None:
    wrong: list[tuple[int, int]] = []

    def hammer(before: int) -> None:
        buffer = ffi.new("uint8_t[]", 256)
        for _ in range(2000):
            done = lib.pv_copy(buffer, memory.at(2 * PAGE - before), 256)
            if done != before:
                wrong.append((before, done))

    threads = [threading.Thread(target=hammer, args=(before,)) for before in (0, 1, 8, 100, 255)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_closing_a_page_during_a_copy_ends_the_copy_there(memory: Memory) -> None:
    over = threading.Event()

    def flip() -> None:
        while not over.is_set():
            protect(memory.address + PAGE, PAGE, 0)
            protect(memory.address + PAGE, PAGE, 3)

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        for n in range(300):
            done = lib.pv_fill(memory.at(0), n % 256, 2 * PAGE)
            assert PAGE <= done <= 2 * PAGE
    finally:
        over.set()
        thread.join()


def make_vm(memory: Memory, regions: list[tuple[int, int, int]]) -> tuple[Any, list[Any]]:
    """Make a VM with regions of (gpa, offset in memory, size)."""
    ledger = ffi.new("uint8_t[]", 3)
    array = ffi.new("struct pv_region[]", len(regions))
    for entry, (gpa, offset, size) in zip(array, regions, strict=True):
        entry.gpa, entry.size, entry.view = gpa, size, memory.at(offset)
        entry.ledger = ledger + offset // PAGE
    map_ = ffi.new("struct pv_map *", {"count": len(regions), "regions": array})
    return ffi.new("struct pv_vm *", {"map": map_}), [ledger, array, map_]


def test_guest_copies_cross_adjacent_regions_and_stop_where_memory_ends(memory: Memory) -> None:
    low, high = 0x8000_0000, 0x8000_1000
    vm, keep = make_vm(memory, [(low, PAGE, PAGE), (high, 0, PAGE)])
    stopped = ffi.new("uint64_t *")
    assert lib.pv_write(vm, high - 4, b"abcdefgh", 8, stopped) == 8
    assert memory.bytes(2 * PAGE - 4, 4) + memory.bytes(0, 4) == b"abcdefgh"
    to = ffi.new("uint8_t[]", 8)
    assert lib.pv_read(vm, high - 4, to, 8, stopped) == 8
    assert bytes(to) == b"abcdefgh"
    assert stopped[0] == 0
    assert lib.pv_write(vm, high + PAGE - 3, b"abcdefgh", 8, stopped) == 3
    assert stopped[0] == high + PAGE
    assert lib.pv_read(vm, low - 1, to, 8, stopped) == 0
    assert stopped[0] == low - 1
    assert lib.pv_read(vm, 2**64 - 1, to, 8, stopped) == 0
    assert keep


def test_guest_copies_report_the_gpa_of_the_page_that_faults(memory: Memory) -> None:
    vm, keep = make_vm(memory, [(0x4000, 0, 3 * PAGE)])
    stopped = ffi.new("uint64_t *")
    to = ffi.new("uint8_t[]", 3 * PAGE)
    assert lib.pv_read(vm, 0x4000, to, 3 * PAGE, stopped) == 2 * PAGE
    assert stopped[0] == 0x6000
    assert [lib.pv_probe(vm, gpa) for gpa in (0x3FFF, 0x4000, 0x5FFF, 0x6000, 0x6FFF, 0x7000)] == [-1, 1, 1, 0, 0, -1]
    assert keep


def test_a_region_without_a_view_is_not_accessible(memory: Memory) -> None:
    vm, keep = make_vm(memory, [(0x4000, 0, PAGE)])
    vm.map.regions[0].view = ffi.NULL
    assert lib.pv_probe(vm, 0x4000) == 0
    assert keep


def test_the_ledger_has_an_entry_for_every_page(memory: Memory) -> None:
    vm, keep = make_vm(memory, [(0x4000, 0, 3 * PAGE)])
    vm.pages[lib.PV_PAGE_ABSENT] = 3
    assert lib.pv_ledger_set(vm, 0x5000, lib.PV_PAGE_PRIVATE | lib.PV_PAGE_ASSUMED) == lib.PV_PAGE_ABSENT
    assert lib.pv_ledger_set(vm, 0x5FFF, lib.PV_PAGE_SHARED) == lib.PV_PAGE_PRIVATE | lib.PV_PAGE_ASSUMED
    assert lib.pv_ledger_set(vm, 0x6000, lib.PV_PAGE_SHARED) == lib.PV_PAGE_ABSENT
    assert lib.pv_ledger_set(vm, 0x7000, lib.PV_PAGE_SHARED) == -1
    assert lib.pv_ledger_set(vm, 0x6000, lib.PV_PAGE_STATES) == -1
    assert list(vm.pages) == [1, 0, 0, 2, 0, 0, 0, 0]
    assert keep


# ---- faults and signals outside copies: each in a separate process, which they end


def child(body: str) -> subprocess.CompletedProcess[str]:
    prelude = "import ctypes, faulthandler, mmap, os, signal, sys, threading\nfrom pyvmm._native import ffi, lib\n"
    script = prelude + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


def test_a_wild_access_still_kills_the_process() -> None:
    assert child("lib.pv_install_signals(); ctypes.string_at(8)").returncode == -signal.SIGSEGV


def test_a_wild_access_in_another_thread_during_a_copy_still_kills_the_process() -> None:
    done = child("""
        lib.pv_install_signals()
        room = ffi.new("uint8_t[]", 1 << 26)
        threading.Thread(target=lambda: [lib.pv_fill(room, 1, 1 << 26) for _ in range(200)], daemon=True).start()
        ctypes.string_at(8)
    """)
    assert done.returncode == -signal.SIGSEGV


def test_an_earlier_handler_is_called_with_the_fault() -> None:
    done = child("""
        faulthandler.enable()
        lib.pv_install_signals()
        assert lib.pv_fill(ffi.cast("void *", 0x1000), 0, 8) == 0
        ctypes.string_at(8)
    """)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS"])
def test_a_sent_signal_is_not_taken_for_a_fault(name: str) -> None:
    done = child(f"""
        lib.pv_install_signals()
        os.kill(os.getpid(), signal.{name})
        print("alive")
    """)
    assert (done.returncode, done.stdout) == (-getattr(signal, name), "")


def test_an_ignored_signal_stays_ignored_when_sent_but_a_fault_kills() -> None:
    done = child("""
        signal.signal(signal.SIGSEGV, signal.SIG_IGN)
        lib.pv_install_signals()
        os.kill(os.getpid(), signal.SIGSEGV)
        print("alive", flush=True)
        ctypes.string_at(8)
    """)
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "alive\n")


def test_a_python_handler_gets_a_sent_signal_and_copies_still_work() -> None:
    done = child("""
        heard = []
        signal.signal(signal.SIGBUS, lambda *_: heard.append(1))
        assert lib.pv_install_signals() == 0 == lib.pv_install_signals()
        os.kill(os.getpid(), signal.SIGBUS)
        assert lib.pv_fill(ffi.cast("void *", 0x1000), 0, 8) == 0
        print(heard)
    """)
    assert (done.returncode, done.stdout) == (0, "[1]\n")


def test_the_kick_signal_interrupts_and_has_no_other_effect() -> None:
    woken = threading.Event()

    def sleeper() -> None:
        time.sleep(0.2)
        woken.set()

    thread = threading.Thread(target=sleeper)
    thread.start()
    assert thread.ident is not None
    signal.pthread_kill(thread.ident, lib.pv_kick_signal())
    thread.join()
    assert woken.is_set()
    assert signal.SIGRTMIN < lib.pv_kick_signal() <= signal.SIGRTMAX


@pytest.mark.parametrize("call", ["copy(room, page", "fill(page, 1"])
@pytest.mark.parametrize("size", [8, 4096])
def test_a_fault_is_caught_whatever_signal_mask_the_process_inherited(call: str, size: int) -> None:
    # A fault whose signal is blocked kills the process, even with a handler.
    done = child(f"""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGSEGV, signal.SIGBUS])
        lib.pv_install_signals()
        room = ffi.new("uint8_t[]", 4096)
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        page = ffi.cast("uint8_t *", libc.mmap(None, 4096, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0))
        sys.exit(lib.pv_{call}, {size}))
    """)
    assert (done.returncode, done.stderr) == (0, "")
