# SPDX-License-Identifier: Apache-2.0
"""A slot's memory comes from a file at the first touch. If that fails, waiting threads are handled."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm._native import ffi, lib
from pyvmm.errors import HostError, PyvmmError, hex_
from pyvmm.machine.lazy import LazySlot
from pyvmm.machine.snapshot import checksums
from pyvmm.memory.backing import Memfd
from pyvmm.memory.userfault import Userfault
from pyvmm.pages import HOST_PAGE

PAGES = 16
SIZE = PAGES * HOST_PAGE
OFFSET = 2 * HOST_PAGE
SUMS = OFFSET + SIZE


def look(address: int) -> bytes:
    """Read eight bytes as guarded copies do; returns nothing if the page cannot be read."""
    data = bytearray(8)
    done = lib.pv_copy(ffi.from_buffer("uint8_t[]", data), ffi.cast("void *", address), 8)
    return bytes(data[:done])


@pytest.fixture
def slot(userfault: Userfault, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make an untouched slot. Its faults come from user space, which needs no privilege."""
    monkeypatch.setattr(Userfault, "open", lambda: userfault)
    with Memfd(SIZE) as backing:
        yield SimpleNamespace(hva=backing.hva, size=SIZE, gpa=0x8000_0000)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "memory"
    memory = b"".join(bytes([page + 1]) * HOST_PAGE for page in range(PAGES))
    path.write_bytes(bytes(OFFSET) + memory + checksums(memory))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def nothing_fails(error: PyvmmError) -> None:
    raise AssertionError(error)


def test_a_page_is_read_from_the_file_when_it_is_first_touched(slot: Any, file: int) -> None:
    lazy = LazySlot(file, OFFSET, SUMS, slot, nothing_fails)
    for page in (3, 0, 15, 3):
        assert look(slot.hva + page * HOST_PAGE) == bytes([page + 1]) * 8
    lazy.close()
    lazy.close()
    assert lazy._server.served == 3
    assert look(slot.hva + 3 * HOST_PAGE) == bytes([4]) * 8


def flip(file: int, offset: int) -> None:
    os.pwrite(file, bytes([os.pread(file, 1, offset)[0] ^ 0x10]), offset)


def become_a_directory(file: int) -> None:
    directory = os.open("/", os.O_RDONLY)
    os.dup2(directory, file)
    os.close(directory)


@pytest.mark.parametrize(
    ("damage", "words", "hint"),
    [
        (lambda file: os.ftruncate(file, OFFSET + 4 * HOST_PAGE), "is behind the end of the file", "truncated"),
        (lambda file: os.ftruncate(file, SUMS), "is behind the end of the file", "truncated"),
        (lambda file: flip(file, OFFSET + 9 * HOST_PAGE), "does not match its checksum", "--verify"),
        (lambda file: flip(file, OFFSET + 10 * HOST_PAGE - 1), "does not match its checksum", "--verify"),
        (lambda file: flip(file, SUMS + 9 * HOST_PAGE // 4096 * 4), "does not match its checksum", "--verify"),
        (become_a_directory, "has the error Is a directory", "changed"),
    ],
    ids=["cut in memory", "cut in checksums", "first bit", "last byte", "checksum", "no file"],
)
def test_a_page_that_is_damaged_or_gone_never_reads_as_anything(
    slot: Any, file: int, damage: Callable[[int], None], words: str, hint: str
) -> None:
    failed: list[PyvmmError] = []
    heard = threading.Event()

    def hear(error: PyvmmError) -> None:
        failed.append(error)
        heard.set()

    lazy = LazySlot(file, OFFSET, SUMS, slot, hear)
    assert look(slot.hva) == bytes([1]) * 8
    damage(file)
    with ThreadPoolExecutor(3) as pool:
        reader = pool.submit(look, slot.hva + 9 * HOST_PAGE + 100)
        assert heard.wait(10)
        # The machine closes the file while it fails.
        for closed in [pool.submit(lazy.close) for _ in range(2)]:
            closed.result(10)
        assert reader.result(10) == b""
    [error] = failed
    gpa = hex_(slot.gpa + 9 * HOST_PAGE)
    assert error.message.startswith(f"a page of the snapshot cannot be read: gpa {gpa}: the page at offset 0x")
    assert error.message.endswith(words)
    assert hint in str(error.hint)
    assert look(slot.hva) == b""


def test_a_thread_that_cannot_start_leaves_nothing_behind(
    slot: Any, file: int, userfault: Userfault, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(HostError, match="start a thread for page faults: can't start new thread"):
        LazySlot(file, OFFSET, SUMS, slot, nothing_fails)
    assert len(os.listdir("/proc/self/fd")) == before - 1
    assert userfault.fd < 0
    gc.collect()  # closing works without the thread and without its file


def test_the_error_says_that_userfaultfd_is_missing(slot: Any, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Userfault:
        raise HostError("no userfaultfd here")

    monkeypatch.setattr(Userfault, "open", refuse)
    with pytest.raises(HostError, match="no userfaultfd"):
        LazySlot(file, OFFSET, SUMS, slot, nothing_fails)
