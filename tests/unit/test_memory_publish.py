# SPDX-License-Identifier: Apache-2.0
"""A table of slots is freed once it is replaced, and never while a reader uses it."""

from __future__ import annotations

import os
import platform
import random
import re
import subprocess
import threading
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import pytest

from native import build as native_build
from pyvmm._native import ffi, lib
from pyvmm.errors import GuestMemoryError
from pyvmm.kvm.system import System
from pyvmm.memory import slots
from pyvmm.memory.backing import Memfd
from pyvmm.memory.memory import Memory
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from pyvmm.uapi.kvm_x86 import kvm_regs
from tests.memory_helper import BASE, build, build_empty

MANY = 2000
HERE = Path(__file__).resolve().parent


class Watched:
    """The native library, with a record of every published table."""

    def __init__(self) -> None:
        self.tables: list[weakref.ref[object]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def pv_publish_map(self, vm: Any, table: Any) -> None:
        if table:
            self.tables.append(weakref.ref(table))
        lib.pv_publish_map(vm, table)

    @property
    def alive(self) -> int:
        return sum(table() is not None for table in self.tables)


def test_thousands_of_slots_added_one_by_one_keep_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched()
    monkeypatch.setattr(slots, "lib", watched)
    _, memory = build_empty(most=MANY)
    with memory:
        backing = Memfd(MANY * HOST_PAGE)
        order = list(range(MANY))
        random.Random(1).shuffle(order)
        tracemalloc.start()
        try:
            for index in order:
                memory.add(BASE + index * HOST_PAGE, backing, offset=index * HOST_PAGE, size=HOST_PAGE)
                assert index % 50 or watched.alive == 1
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(watched.tables) == MANY
        assert peak < 4 << 20  # keeping only the tables of the last hundred slots would need more
        assert [slot.gpa for slot in memory.slots] == [BASE + index * HOST_PAGE for index in range(MANY)]
        memory.fill(BASE, MANY * HOST_PAGE, 7)
        assert memory.read(BASE + HOST_PAGE * 999 - 4, 8) == b"\7" * 8
        for slot in memory.slots[::2]:
            memory.remove(slot)
        assert watched.alive == 1
        assert memory.native.map.count == MANY // 2
        with pytest.raises(GuestMemoryError):
            memory.read(BASE + 2 * HOST_PAGE, 1)
        assert memory.read(BASE + 3 * HOST_PAGE, 1) == b"\7"
    assert watched.alive == 0


def test_removing_a_slot_frees_its_ledger() -> None:
    _, memory, _ = build()
    with memory:
        backing = Memfd(HOST_PAGE)
        slot = memory.add(BASE + (1 << 30), backing)
        gone = weakref.ref(slot.area.entries)
        memory.remove(slot)
        del slot
        assert gone() is None


def test_a_table_may_be_overwritten_as_soon_as_it_has_been_replaced() -> None:
    """Guarded copies run without Python's lock, while each old table is overwritten as soon as it may be freed."""
    _, memory = build_empty(most=64)
    with memory:
        backing = Memfd(64 * HOST_PAGE)
        for index in range(4):
            memory.add(BASE + 2 * index * HOST_PAGE, backing, offset=index * HOST_PAGE, size=HOST_PAGE)
            memory.fill(BASE + 2 * index * HOST_PAGE, HOST_PAGE, index)
        native, stop, wrong = memory.native, threading.Event(), []

        def reader(seed: int) -> None:
            chance = random.Random(seed)
            data = bytearray(8)
            into = ffi.from_buffer("uint8_t[]", data)
            while not stop.is_set():
                index = chance.randrange(4)
                if lib.pv_read(native, BASE + 2 * index * HOST_PAGE, into, 8, ffi.NULL) != 8 or data[0] != index:
                    wrong.append(index)
                lib.pv_ledger_set(native, BASE + 2 * index * HOST_PAGE, lib.PV_PAGE_HOST)

        threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        slot = None
        for round_ in range(1000):
            regions, table = memory._table._regions, memory._table._map
            if slot is None:
                slot = memory.add(BASE + 64 * HOST_PAGE, backing, offset=(4 + round_ % 60) * HOST_PAGE, size=HOST_PAGE)
            else:
                memory.remove(slot)
                slot = None
            ffi.memmove(regions, b"\xff" * ffi.sizeof(regions), ffi.sizeof(regions))
            ffi.memmove(table, b"\xff" * ffi.sizeof("struct pv_map"), ffi.sizeof("struct pv_map"))
        stop.set()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert list(native.readers) == [0, 0]


def race(
    tmp_path: Path, sanitizer: str, rounds: int, *, mutate: tuple[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Build the loop and memory_publish.c with a sanitizer, and run them."""
    cc = native_build.compiler(platform.machine())
    if cc is None:
        pytest.skip("no C compiler")
    sources = []
    for path in native_build.c_files():
        text = path.read_text()
        if mutate and path.name == "map.c":
            assert mutate[0] in text
            text = text.replace(*mutate)
        sources.append(tmp_path / path.name)
        sources[-1].write_text(text)
    flags: list[str | Path] = [
        "-O1",
        "-g",
        "-w",
        "-std=gnu11",
        f"-fsanitize={sanitizer}",
        "-include",
        HERE / "memory_publish.h",
    ]
    where = [f"-I{native_build.NATIVE}", "-D_GNU_SOURCE", '-DPV_SOURCE_HASH=""']
    out = tmp_path / "race"
    command: list[str | Path] = [*cc, *flags, *where, *sources, HERE / "memory_publish.c", "-o", out, "-lpthread"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        assert re.search(r"lib[at]san|-l[at]san|-fsanitize", built.stderr), built.stderr
        pytest.skip(f"this compiler has no {sanitizer} sanitizer: {built.stderr.strip().splitlines()[-1]}")
    done = subprocess.run([out, str(rounds)], capture_output=True, text=True, timeout=300, check=False)
    if "FATAL: ThreadSanitizer" in done.stderr or "Shadow memory range interleaves" in done.stderr:
        pytest.skip(f"the {sanitizer} sanitizer does not run here: {done.stderr.splitlines()[0]}")
    return done


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_no_reader_sees_a_freed_table_or_ledger(tmp_path: Path, sanitizer: str) -> None:
    done = race(tmp_path, sanitizer, 2000)
    assert (done.returncode, done.stdout) == (0, "0 wrong\n"), done.stderr


@pytest.mark.parametrize(
    "mutation",
    [("i < PV_MAP_PHASES", "i < 0"), ("i < PV_MAP_PHASES", "i < 1")],
    ids=["no wait at all", "a wait for one counter only"],
)
def test_the_race_test_detects_a_table_freed_too_early(tmp_path: Path, mutation: tuple[str, str]) -> None:
    done = race(tmp_path, "address", 200_000, mutate=mutation)
    assert done.returncode
    assert "heap-use-after-free" in done.stderr


@pytest.mark.kvm
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the guest is x86 code; tests/pkvm has arm64's")
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm that we may open")
def test_hundreds_of_slots_can_be_added_while_a_guest_and_copies_use_others() -> None:
    code, data = 0x1000, 0x4000
    native = ffi.new("struct pv_vm *")
    with System.open() as system, Memory(system.create_vm(), Protection.NONE, native) as memory:
        vm = memory._table._vm
        native.fd, native.protection = vm.fileno(), lib.PV_NONE
        memory.add(code, Memfd(HOST_PAGE))
        memory.add(data, Memfd(HOST_PAGE))
        # loop: inc word [bx]; jmp loop
        memory.write(code, bytes.fromhex("ff07 ebfc"))
        memory.seal()
        vcpu = vm.create_vcpu(0)
        sregs = vcpu.get_sregs()
        for segment in (sregs.cs, sregs.ds):
            segment.base = segment.selector = 0
        vcpu.set_sregs(sregs)
        vcpu.set_regs(kvm_regs(rip=code, rbx=data, rflags=2))
        cpu = ffi.new("struct pv_vcpu *", {"fd": vcpu.fileno(), "vm": native})
        cpu.run = ffi.cast("void *", vcpu.run_address)
        stop = threading.Event()
        seen: set[object] = set()
        guest = threading.Thread(target=lambda: seen.add(("stop", lib.pv_run(cpu))))

        def reader() -> None:
            while not stop.is_set():
                seen.add(memory.read(data, 2))

        reading = threading.Thread(target=reader)
        guest.start()
        reading.start()
        try:
            many = min(400, memory._table.free)
            backing = Memfd(many * HOST_PAGE)
            for index in range(many):
                memory.add((1 << 20) + 2 * index * HOST_PAGE, backing, offset=index * HOST_PAGE, size=HOST_PAGE)
        finally:
            stop.set()
            reading.join()
            lib.pv_kick(cpu)
            guest.join()
        assert ("stop", lib.PV_STOP_KICK) in seen
        assert len(seen) > 2  # the guest kept counting
        assert len(memory.slots) == many + 2
