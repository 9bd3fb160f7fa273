# SPDX-License-Identifier: Apache-2.0
"""Missing pages served from a buffer by C: each reader gets the right page, and refusals have clear errors."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, cast

import pytest

from pyvmm._native import ffi, lib
from pyvmm.errors import PyvmmError, UsageError
from pyvmm.memory.backing import Memfd
from pyvmm.memory.fault_server import Answer, Server
from pyvmm.memory.source_server import SourceServer
from pyvmm.memory.userfault import Userfault, UserfaultError
from pyvmm.pages import HOST_PAGE

PAGES = 64
SIZE = PAGES * HOST_PAGE
SOURCE = b"".join(page.to_bytes(8, "little") * (HOST_PAGE // 8) for page in range(PAGES))


@pytest.fixture
def memory(userfault: Userfault) -> Iterator[Memfd]:
    """Make unpopulated guest memory, and register it."""
    with Memfd(SIZE) as backing:
        userfault.register(backing.hva, SIZE, missing=True)
        yield backing
        userfault.close()  # waiting readers still continue


def look(address: int, size: int = 8) -> bytes:
    """Read memory as guarded copies do: without Python's lock."""
    data = bytearray(size)
    done = lib.pv_copy(ffi.from_buffer("uint8_t[]", data), ffi.cast("void *", address), size)
    return bytes(data[:done])


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_every_page_is_its_part_of_the_buffer_whichever_reader_is_first(
    userfault: Userfault, memory: Memfd, kind: type[bytearray] | type[bytes] | type[memoryview]
) -> None:
    asked = [page * 7 % PAGES for page in range(4 * PAGES)]  # each by several threads, in random order
    with SourceServer(userfault, memory.hva, kind(SOURCE)) as server, ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda page: look(memory.hva + page * HOST_PAGE + 16), asked))
        assert seen == [page.to_bytes(8, "little") for page in asked]
        assert look(memory.hva, SIZE) == SOURCE
        assert PAGES <= server.served <= len(asked)


def test_the_items_of_a_buffer_may_have_any_size(userfault: Userfault, memory: Memfd) -> None:
    with SourceServer(userfault, memory.hva, memoryview(SOURCE).cast("Q")):
        assert look(memory.hva, SIZE) == SOURCE


@pytest.mark.parametrize("kind", ["native", "python"])
def test_a_server_that_cannot_start_leaves_all_to_the_next(
    userfault: Userfault, memory: Memfd, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, before = bytearray(SOURCE), set(os.listdir("/proc/self/fd"))

    def start() -> SourceServer | Server:
        if kind == "native":
            return SourceServer(userfault, memory.hva, source)
        return Server(userfault, lambda _fault: SOURCE[:HOST_PAGE])

    def eventfd(*_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "eventfd", eventfd)
        with pytest.raises(OSError, match="Too many open files"):
            start()
    source.append(0)  # BufferError while a server holds it
    del source[-1]
    with start() as server:
        with pytest.raises(UsageError, match="already has a server"):
            start()
        with pytest.raises(TypeError, match="bytes-like"):
            SourceServer(userfault, memory.hva, cast("bytes", 7))
        assert look(memory.hva) == SOURCE[:8]
        assert server.alive
    source.append(0)
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_next_server_answers_faults_that_one_left_with_its_own_data(userfault: Userfault, memory: Memfd) -> None:
    with SourceServer(userfault, memory.hva, SOURCE) as first:
        assert look(memory.hva + HOST_PAGE) == (1).to_bytes(8, "little")
    with ThreadPoolExecutor(1) as pool, userfault:
        reader = pool.submit(look, memory.hva + 2 * HOST_PAGE)
        assert userfault.wait(10)
        assert not reader.done()
        with SourceServer(userfault, memory.hva, b"\1" * SIZE) as second:
            assert reader.result(10) == b"\1" * 8
    assert (first.served, second.served) == (1, 1)


def test_a_fault_outside_the_buffer_is_raised_and_its_reader_waits(userfault: Userfault, memory: Memfd) -> None:
    with ThreadPoolExecutor(1) as pool, userfault:
        reader = pool.submit(look, memory.hva)
        server = SourceServer(userfault, memory.hva + HOST_PAGE, SOURCE[HOST_PAGE:])
        server._thread.join(10)
        with pytest.raises(UserfaultError, match=r"UFFDIO_COPY\(after 0 faults served\): EINVAL") as caught, server:
            assert not reader.done()
        assert caught.value.errno == errno.EINVAL
        userfault.zeropage(memory.hva)
        assert reader.result(10) == bytes(8)


def fail(how: str) -> NoReturn:
    """Raise KeyError, which may have an earlier error as its cause, or may hide it."""
    if how == "plain":
        raise KeyError("silent")
    try:
        raise OSError("earlier")
    except OSError as error:
        raise KeyError("silent") from (error if how == "of another" else None)


@pytest.mark.parametrize("how", ["plain", "of another", "from None"])
@pytest.mark.parametrize("kind", ["native", "python"])
def test_the_servers_error_is_the_cause_of_the_blocks(userfault: Userfault, memory: Memfd, kind: str, how: str) -> None:
    with ThreadPoolExecutor(1) as pool, userfault:
        pool.submit(look, memory.hva)
        server: SourceServer | Server
        if kind == "native":
            server = SourceServer(userfault, memory.hva + HOST_PAGE, SOURCE[HOST_PAGE:])
            server._thread.join(10)
        else:
            heard = threading.Event()
            server = Server(userfault, lambda _fault: Answer.UNPROTECT, failed=lambda _error: heard.set())
            assert heard.wait(10)
        with pytest.raises(KeyError) as caught, server:
            fail(how)
        first = caught.value.__cause__ if how == "of another" else caught.value
        assert first is not None
        assert first.__cause__ is server.error
        assert isinstance(server.error, UserfaultError if kind == "native" else PyvmmError)
        shown = "".join(traceback.format_exception(caught.value))
        assert "UFFDIO_COPY" in shown if kind == "native" else "not a valid answer" in shown
        userfault.zeropage(memory.hva)


@pytest.mark.parametrize(("at", "size"), [(8, HOST_PAGE), (0, 8), (0, 0), (0, HOST_PAGE + 8)])
def test_a_buffer_that_is_not_whole_pages_is_refused(userfault: Userfault, memory: Memfd, at: int, size: int) -> None:
    with pytest.raises(UsageError, match=rf"serving {size} bytes at 0x.*: use whole pages"):
        SourceServer(userfault, memory.hva + at, bytes(size))


def test_closing_the_userfaultfd_stops_the_server(userfault: Userfault, memory: Memfd) -> None:
    server = SourceServer(userfault, memory.hva, SOURCE)
    userfault.close()
    assert not server._thread.is_alive()
    server.stop()


def test_the_server_leaves_no_thread_and_no_descriptor_even_if_another_serves(
    userfault: Userfault, memory: Memfd
) -> None:
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        with SourceServer(userfault, memory.hva, SOURCE) as server:
            look(memory.hva)
            with pytest.raises(UsageError, match="already has a server"):
                SourceServer(userfault, memory.hva, SOURCE)
        server.stop()
    with Server(userfault, lambda _fault: Answer.ZERO), pytest.raises(UsageError, match="already has a server"):
        SourceServer(userfault, memory.hva, SOURCE)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


class Meeting:
    """A thread whose two joiners wait for each other, if both get that far."""

    def __init__(self, thread: threading.Thread) -> None:
        self.thread = thread
        self.both = threading.Barrier(2)

    def join(self) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            self.both.wait(0.3)
        self.thread.join()


@pytest.mark.parametrize("kind", ["source", "callback"])
def test_two_threads_may_stop_a_server_at_once(userfault: Userfault, memory: Memfd, kind: str) -> None:
    server: SourceServer | Server
    if kind == "source":
        server = SourceServer(userfault, memory.hva, SOURCE)
    else:
        server = Server(userfault, lambda _fault: Answer.ZERO)
    server._thread = cast(threading.Thread, Meeting(server._thread))
    with ThreadPoolExecutor(2) as pool:
        stops = [pool.submit(server.stop) for _ in range(2)]
        assert [stop.result(10) for stop in stops] == [None, None]
    with Server(userfault, lambda _fault: Answer.ZERO):
        pass  # no other server serves it
