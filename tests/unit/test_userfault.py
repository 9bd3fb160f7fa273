# SPDX-License-Identifier: Apache-2.0
"""userfaultfd on this host's own kernel: faults are reported and answered, and errors are clear."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest

from pyvmm._native import ffi, lib
from pyvmm.errors import HostError, PyvmmError, UsageError
from pyvmm.kvm import libc
from pyvmm.memory import userfault as module
from pyvmm.memory.backing import Memfd
from pyvmm.memory.fault_server import Answer, Server
from pyvmm.memory.userfault import FaultKind, Userfault, UserfaultError
from pyvmm.pages import HOST_PAGE
from pyvmm.uapi.userfaultfd import UFFD_FEATURE_EVENT_FORK, UFFD_FEATURE_RWP, UFFD_FEATURE_THREAD_ID

SIZE = 16 * HOST_PAGE

NO_ANSWERS: dict[int, Answer] = {}


@pytest.fixture
def memory() -> Iterator[Memfd]:
    """Make unpopulated guest memory."""
    with Memfd(SIZE) as backing:
        yield backing


def look(address: int, size: int = 8) -> bytes:
    """Read memory as guarded copies do: without Python's lock."""
    data = bytearray(size)
    done = lib.pv_copy(ffi.from_buffer("uint8_t[]", data), ffi.cast("void *", address), size)
    return bytes(data[:done])


def write(address: int, data: bytes) -> int:
    copied: int = lib.pv_copy(ffi.cast("void *", address), ffi.from_buffer("uint8_t[]", data), len(data))
    return copied


def test_a_missing_page_is_reported_and_its_reader_waits_for_the_contents(userfault: Userfault, memory: Memfd) -> None:
    userfault.register(memory.hva, SIZE, missing=True)
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(lambda: (threading.get_native_id(), look(memory.hva + HOST_PAGE + 8)))
        assert userfault.wait(10)
        (fault,) = userfault.read()
        assert (fault.page, fault.kind, fault.write) == (memory.hva + HOST_PAGE, FaultKind.MISSING, False)
        assert not reader.done()
        userfault.copy(fault.page, b"contents" * (HOST_PAGE // 8))
        tid, seen = reader.result(10)
        assert seen == b"contents"
        assert fault.tid == (tid if userfault.features & UFFD_FEATURE_THREAD_ID else None)
        assert userfault.read() == []
        assert not userfault.wait(0)


def test_a_server_answers_with_the_result_of_its_callback(userfault: Userfault, memory: Memfd) -> None:
    userfault.register(memory.hva, SIZE, missing=True)

    def resolve(fault: module.Fault) -> Answer | bytes:
        index = (fault.page - memory.hva) // HOST_PAGE
        return Answer.ZERO if index == 3 else bytes([index]) * HOST_PAGE

    with Server(userfault, resolve) as server, ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda index: look(memory.hva + index % 8 * HOST_PAGE, 1)[0], range(64)))
        assert seen == [index % 8 if index % 8 != 3 else 0 for index in range(64)]
        assert server.served[FaultKind.MISSING] - server.late == 8
    assert not server.alive


def test_an_answer_may_have_several_pages_and_keeps_existing_ones(userfault: Userfault, memory: Memfd) -> None:
    write(memory.hva + 2 * HOST_PAGE, b"kept")
    userfault.register(memory.hva, SIZE, missing=True)
    with Server(userfault, lambda _fault: b"new." * (SIZE // 4)) as server:
        assert look(memory.hva, 4) == b"new."
        assert [look(memory.hva + index * HOST_PAGE, 4) for index in range(4)] == [b"new.", b"new.", b"kept", b"new."]
        assert (dict(server.served), server.late) == ({FaultKind.MISSING: 1}, 0)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"short", "is 5 bytes, which are not whole pages"),
        (b"", "is 0 bytes"),
        (Answer.CONTINUE, "is not a valid answer to the missing fault"),
        (Answer.UNPROTECT, "is not a valid answer"),
        (None, "NoneType is not a valid answer"),
    ],
)
def test_an_invalid_answer_leaves_the_reader_waiting_and_raises(
    userfault: Userfault, memory: Memfd, answer: Answer | bytes | None, words: str
) -> None:
    userfault.register(memory.hva, SIZE, missing=True)
    heard = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        server = Server(userfault, lambda _fault: cast(Answer, answer), failed=lambda _error: heard.set())
        reader = pool.submit(look, memory.hva)
        assert heard.wait(10)
        with pytest.raises(PyvmmError, match=words), server:
            assert not reader.done()
        userfault.zeropage(memory.hva)
        assert reader.result(10) == bytes(8)


def test_the_next_server_answers_faults_that_one_left(userfault: Userfault, memory: Memfd) -> None:
    userfault.register(memory.hva, SIZE, missing=True)
    going_on, asked = threading.Event(), threading.Event()

    def slow(_fault: module.Fault) -> Answer:
        asked.set()
        going_on.wait(10)
        return Answer.ZERO

    with ThreadPoolExecutor(4) as pool:
        with Server(userfault, slow) as first:
            readers = [pool.submit(look, memory.hva + index * HOST_PAGE) for index in range(4)]
            assert asked.wait(10)
            threading.Timer(0.05, going_on.set).start()
        assert first.served[FaultKind.MISSING] < 4
        with Server(userfault, lambda _fault: Answer.ZERO) as second:
            assert [reader.result(10) for reader in readers] == [bytes(8)] * 4
            assert first.served[FaultKind.MISSING] + second.served[FaultKind.MISSING] >= 4


def test_closing_stops_the_server_and_releases_waiting_readers(userfault: Userfault, memory: Memfd) -> None:
    userfault.register(memory.hva, SIZE, missing=True)
    with ThreadPoolExecutor(1) as pool:
        server = Server(userfault, lambda _fault: NO_ANSWERS[1])
        reader = pool.submit(look, memory.hva)
        while not server.failures:
            pass
        userfault.close()
        userfault.close()
        assert reader.result(10) == bytes(8)
    assert not server.alive
    server.stop()
    for attempt in (userfault.read, lambda: userfault.register(memory.hva, SIZE, missing=True)):
        with pytest.raises(UserfaultError, match="EBADF: it is closed"):
            attempt()


def test_there_is_one_server_at_a_time(userfault: Userfault) -> None:
    with Server(userfault, lambda _fault: Answer.ZERO), pytest.raises(UsageError, match="already has a server"):
        Server(userfault, lambda _fault: Answer.ZERO)
    Server(userfault, lambda _fault: Answer.ZERO).stop()


def test_unregistering_releases_waiting_readers(userfault: Userfault, memory: Memfd) -> None:
    userfault.register(memory.hva, SIZE, missing=True)
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(look, memory.hva)
        assert userfault.wait(10)
        userfault.unregister(memory.hva, SIZE)
        assert reader.result(10) == bytes(8)


def test_pages_that_the_file_has_are_minor_faults(userfault: Userfault, memory: Memfd) -> None:
    memory.separate_view()
    memory.load(0, b"file")
    userfault.register(memory.hva, SIZE, minor=True)
    with Server(userfault, lambda _fault: Answer.CONTINUE) as server:
        assert look(memory.hva, 4) == b"file"
        assert server.served == {FaultKind.MINOR: 1}
    with pytest.raises(UserfaultError, match="EEXIST: the page is mapped already"):
        userfault.continue_(memory.hva)
    with pytest.raises(UserfaultError, match="EFAULT: the file has no page there yet"):
        userfault.continue_(memory.hva + HOST_PAGE)


def test_a_store_to_a_write_protected_page_waits_until_it_is_allowed(userfault: Userfault, memory: Memfd) -> None:
    write(memory.hva, b"before")
    userfault.register(memory.hva, SIZE, wp=True, missing=True)
    userfault.write_protect(memory.hva)
    with Server(userfault, lambda fault: Answer.UNPROTECT if fault.write else NO_ANSWERS[0]) as server:
        assert look(memory.hva, 6) == b"before"
        assert not server.served
        write(memory.hva, b"after.")
        write(memory.hva, b"later.")
        assert server.served == {FaultKind.WP: 1}
    userfault.copy(memory.hva + HOST_PAGE, bytes(HOST_PAGE), wp=True)
    with Server(userfault, lambda _fault: Answer.UNPROTECT) as server:
        write(memory.hva + HOST_PAGE, b"x")
        assert server.served == {FaultKind.WP: 1}


def test_any_access_to_a_read_write_protected_page_waits(userfault: Userfault, memory: Memfd) -> None:
    if not userfault.features & UFFD_FEATURE_RWP:
        with pytest.raises(HostError, match="does not report rwp faults"):
            userfault.register(memory.hva, SIZE, rwp=True)
        pytest.skip("this kernel has no UFFD_FEATURE_RWP")
    write(memory.hva, b"before")
    userfault.register(memory.hva, SIZE, rwp=True)
    userfault.rwprotect(memory.hva, SIZE)
    with Server(userfault, lambda _fault: Answer.UNPROTECT) as server:
        assert look(memory.hva, 6) == b"before"
        assert server.served == {FaultKind.RWP: 1}


def test_an_existing_page_is_not_overwritten(userfault: Userfault, memory: Memfd) -> None:
    write(memory.hva + HOST_PAGE, b"kept")
    userfault.register(memory.hva, SIZE, missing=True)
    with pytest.raises(UserfaultError, match=r"UFFDIO_COPY\(.*size=0x3000.*EEXIST: a page is there") as caught:
        userfault.copy(memory.hva, bytes(3 * HOST_PAGE))
    assert (caught.value.errno, caught.value.done) == (errno.EEXIST, HOST_PAGE)
    with pytest.raises(UserfaultError, match="EEXIST"):
        userfault.zeropage(memory.hva)
    assert look(memory.hva + HOST_PAGE, 4) == b"kept"


@pytest.mark.parametrize(
    ("modes", "kind", "words"),
    [
        ({}, UsageError, "one of missing, minor, wp and rwp"),
        ({"wp": True, "rwp": True}, PyvmmError, "rwp"),
    ],
)
def test_invalid_modes_are_refused_with_a_clear_error(
    userfault: Userfault, memory: Memfd, modes: dict[str, bool], kind: type[PyvmmError] | type[UsageError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        userfault.register(memory.hva, SIZE, **modes)


def test_refusals_of_the_kernel_have_clear_errors(userfault: Userfault, memory: Memfd) -> None:
    with pytest.raises(UserfaultError, match=r"UFFDIO_REGISTER\(uffd=\d+, 0x.*, size=0x10000, mode=0x1\): EINVAL"):
        userfault.register(memory.hva + 1, SIZE, missing=True)
    with pytest.raises(UserfaultError, match="ENOENT: the range is not registered for this"):
        userfault.zeropage(memory.hva)
    with Userfault.open(user_mode_only=True) as other:
        other.register(memory.hva, SIZE, missing=True)
        with pytest.raises(UserfaultError, match="EBUSY: part of it is registered with another"):
            userfault.register(memory.hva, SIZE, missing=True)


def test_events_that_nobody_would_read_are_refused() -> None:
    with pytest.raises(UsageError, match="events"):
        Userfault.open(features=UFFD_FEATURE_EVENT_FORK)


@pytest.mark.parametrize(
    ("code", "words", "hint"),
    [
        (errno.EPERM, "may not handle faults inside the kernel", r"CAP_SYS_PTRACE.*vm.unprivileged_userfaultfd=1"),
        (errno.ENOSYS, "no userfaultfd", "populate"),
        (errno.EMFILE, "EMFILE", None),
    ],
)
def test_the_error_without_userfaultfd_gives_the_reason_and_a_hint(
    monkeypatch: pytest.MonkeyPatch, code: int, words: str, hint: str | None
) -> None:
    monkeypatch.setattr(module, "DEVICE", "/nonexistent")
    monkeypatch.setattr(libc, "syscall", lambda *_: (-1, code))
    with pytest.raises(HostError, match=words) as caught:
        Userfault.open()
    assert caught.value.hint is None if hint is None else re.search(hint, caught.value.hint or "")


def test_the_system_call_or_the_device_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("/nonexistent", module.DEVICE):
        monkeypatch.setattr(module, "DEVICE", device)
        try:
            with Userfault.open(user_mode_only=True) as userfault:
                assert userfault.available
        except HostError as error:
            pytest.skip(error.message)


@pytest.mark.usefixtures("userfault")
def test_a_server_leaves_no_thread_and_no_descriptor(memory: Memfd) -> None:
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        with Userfault.open(user_mode_only=True) as other, Server(other, lambda _fault: Answer.ZERO):
            other.register(memory.hva, SIZE, missing=True)
            look(memory.hva)
        memory.punch(0, SIZE)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
