# SPDX-License-Identifier: Apache-2.0
"""Memfds as guest memory: sealed, excluded from forks and dumps, aligned, and errors with explanations."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from pyvmm._native import ffi
from pyvmm.errors import GuestMemoryError, HostError, KvmError, UsageError
from pyvmm.memory import backing as backing_module
from pyvmm.memory import mman
from pyvmm.memory.address import MIB
from pyvmm.memory.backing import Anonymous, Memfd, PrivateGuestMemfd, SharedGuestMemfd
from pyvmm.pages import HOST_PAGE, HUGE_SIZE
from pyvmm.uapi.kvm_cap import KVM_CAP_GUEST_MEMFD
from pyvmm.uapi.memfd import F_GET_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK
from pyvmm.uapi.mman import MADV_HUGEPAGE

HUGE_POOL = Path(backing_module.HUGE_POOL)


def vm_flags(address: int) -> set[str]:
    """Return the flags of the mapping that starts at ``address``: see VmFlags in Documentation/filesystems/proc.rst."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            found = line.startswith(f"{address:x}-")
        elif found and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise LookupError(hex(address))


def test_a_memfd_can_be_neither_grown_nor_shrunk_nor_unsealed() -> None:
    with Memfd(MIB) as backing:
        seals = fcntl.fcntl(backing.fd, F_GET_SEALS)
        assert seals & (F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) == F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL
        for size in (0, 2 * MIB):
            with pytest.raises(PermissionError):
                os.ftruncate(backing.fd, size)


def test_the_descriptor_of_a_memfd_is_not_inherited() -> None:
    with Memfd(MIB) as backing:
        assert not os.get_inheritable(backing.fd)


def test_both_mappings_are_shared_and_excluded_from_forks_and_dumps() -> None:
    with Memfd(MIB) as backing:
        backing.separate_view()
        assert backing.view != backing.hva
        for address in (backing.hva, backing.view):
            assert {"sh", "dc", "dd"} <= vm_flags(address)  # shared, don't copy on fork, don't dump


def test_a_part_mapped_over_a_view_keeps_the_advice() -> None:
    with Memfd(MIB) as backing, Memfd(MIB) as other:
        backing.separate_view()
        mman.map_over(backing.view, HOST_PAGE, other.fd, 0, 0)
        assert {"sh", "dc", "dd"} <= vm_flags(backing.view)


def test_large_memory_starts_on_a_huge_page() -> None:
    for size in (HUGE_SIZE, 3 * HUGE_SIZE + HOST_PAGE):
        with Memfd(size) as backing:
            backing.separate_view()
            assert backing.hva % HUGE_SIZE == backing.view % HUGE_SIZE == 0


def test_hiding_a_view_leaves_kvms_mapping_open() -> None:
    with Memfd(MIB) as backing:
        backing.load(0, b"data")
        with pytest.raises(UsageError, match="hide it from the guest"):
            backing.hide(0, MIB)
        backing.separate_view()
        backing.hide(0, HOST_PAGE)
        with pytest.raises(GuestMemoryError, match="after 0 bytes"):
            backing.load(0, b"x")
        backing.load(HOST_PAGE, b"x")
        assert "rd" in vm_flags(backing.hva)


def test_loaded_data_goes_to_the_file() -> None:
    with Memfd(MIB) as backing:
        backing.load(MIB - 3, b"end")
        assert os.pread(backing.fd, 3, MIB - 3) == b"end"
        with pytest.raises(UsageError, match="not inside"):
            backing.load(MIB - 3, b"over")
        with pytest.raises(UsageError, match="not inside"):
            backing.load(-1, b"under")


@pytest.mark.parametrize("size", [0, -HOST_PAGE, 1, HOST_PAGE + 1])
def test_sizes_that_are_not_whole_pages_are_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"a multiple of {HOST_PAGE:#x}"):
        Memfd(size)


def test_the_error_for_memory_that_does_not_fit_explains_it() -> None:
    with pytest.raises(mman.MappingError, match="ENOMEM: this process's address space") as caught:
        Memfd(1 << 47)
    assert caught.value.hint is not None


def test_the_error_names_the_address_space_limit() -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
            Memfd(2 << 30)
        except mman.MappingError as error:
            status = 0 if "is used up" in error.message and "ulimit -v" in (error.hint or "") else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_the_error_for_a_lack_of_descriptors_explains_it() -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
            Memfd(MIB)
        except HostError as error:
            status = 0 if "Too many open files" in error.message and "ulimit -n" in (error.hint or "") else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_closing_twice_has_no_effect_and_use_after_close_is_an_error() -> None:
    backing = Memfd(MIB)
    backing.close()
    backing.close()
    assert backing.closed
    for use in (backing.separate_view, lambda: backing.punch(0, HOST_PAGE), lambda: backing.populate(0, HOST_PAGE)):
        with pytest.raises(UsageError, match="is closed"):
            use()


def test_the_error_distinguishes_a_kernel_without_populate_write_from_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(code: int) -> Callable[..., None]:
        def advise(*_: int) -> None:
            raise mman.MappingError("madvise", "", code)

        return advise

    with Memfd(MIB) as backing:
        monkeypatch.setattr(mman, "advise", fail(errno.EINVAL))
        with pytest.raises(HostError, match="cannot populate") as caught:
            backing.populate(0, MIB)
        assert "5.14" in (caught.value.hint or "")
        monkeypatch.setattr(mman, "advise", fail(errno.ENOMEM))
        with pytest.raises(HostError, match="could be allocated"):
            backing.populate(0, MIB)
        monkeypatch.setattr(mman, "advise", fail(errno.EPERM))
        with pytest.raises(mman.MappingError):
            backing.populate(0, MIB)


def test_thp_advises_the_mapping_that_kvm_uses() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("this kernel has no transparent huge pages")
    with Memfd(2 * HUGE_SIZE, thp=True) as backing:
        assert "hg" in vm_flags(backing.hva)
    with pytest.raises(UsageError, match="not both"):
        Memfd(HUGE_SIZE, thp=True, hugetlb=True)


def test_a_kernel_without_thp_is_reported_and_nothing_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    real = mman.advise

    def advise(address: int, size: int, advice: int) -> None:
        if advice == MADV_HUGEPAGE:
            raise mman.MappingError("madvise", "", errno.EINVAL)
        real(address, size, advice)

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(mman, "advise", advise)
    with pytest.raises(HostError, match="no transparent huge pages"):
        Memfd(HUGE_SIZE, thp=True)
    assert len(os.listdir("/proc/self/fd")) == before


def free_huge_pages() -> int:
    if not HUGE_POOL.is_dir():
        pytest.skip("this kernel has no 2 MiB huge pages")
    return int((HUGE_POOL / "free_hugepages").read_text())


def test_a_hugetlb_pool_that_is_too_small_is_refused_before_a_page_is_touched() -> None:
    need = free_huge_pages() + int((HUGE_POOL / "nr_overcommit_hugepages").read_text()) + 1
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match=f"needs {need} huge pages of 2 MiB: the kernel's pool has") as caught:
        Memfd(need * HUGE_SIZE, hugetlb=True)
    assert "nr_hugepages" in (caught.value.hint or "")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Provide four free huge pages, from the pool or added to it for the test."""
    missing = 4 - free_huge_pages()
    size = HUGE_POOL / "nr_hugepages"
    before = size.read_text()
    if missing > 0:
        try:
            size.write_text(str(int(before) + missing))
        except OSError:
            pytest.skip("no huge pages, and no permission to make some")
    if free_huge_pages() < 4:
        size.write_text(before)
        pytest.skip("the kernel finds no huge pages")
    yield
    if missing > 0:
        size.write_text(before)


@pytest.mark.usefixtures("huge_pages")
def test_hugetlb_pages_are_taken_and_returned() -> None:
    free = free_huge_pages()
    with Memfd(2 * HUGE_SIZE, hugetlb=True) as backing:
        backing.load(HUGE_SIZE - 2, b"over")
        backing.separate_view()
        assert free_huge_pages() == free - 2
        with pytest.raises(UsageError, match="multiples of 0x200000"):
            backing.punch(0, HOST_PAGE)
        backing.punch(0, HUGE_SIZE)
        assert free_huge_pages() == free - 1
    assert free_huge_pages() == free


def test_a_size_that_is_not_whole_huge_pages_is_refused_for_hugetlb() -> None:
    with pytest.raises(UsageError, match=f"a multiple of {HUGE_SIZE:#x}"):
        Memfd(MIB, hugetlb=True)


def test_anonymous_memory_is_excluded_from_forks_and_dumps_and_advised_to_be_huge() -> None:
    with Anonymous(2 * HUGE_SIZE) as memory:
        assert memory.hva % HUGE_SIZE == 0
        assert memory.fd == -1
        assert {"dc", "dd", "hg"} <= vm_flags(memory.hva)
        assert "sh" not in vm_flags(memory.hva)
    assert memory.closed


def test_a_hole_in_anonymous_memory_reads_as_zeros() -> None:
    with Anonymous(2 * MIB) as memory:
        memory.load(0, b"x" * 2 * HOST_PAGE)
        memory.punch(HOST_PAGE, HOST_PAGE)
        there = ffi.buffer(ffi.cast("uint8_t *", memory.view), 2 * HOST_PAGE)[:]
        assert there == b"x" * HOST_PAGE + bytes(HOST_PAGE)
        with pytest.raises(UsageError, match=f"multiples of {HOST_PAGE:#x}"):
            memory.punch(1, HOST_PAGE)


def test_anonymous_memory_has_no_second_view() -> None:
    with Anonymous(HOST_PAGE) as memory, pytest.raises(UsageError, match="cannot be mapped twice"):
        memory.separate_view()
    with pytest.raises(UsageError, match="is closed"):
        memory.load(0, b"x")


class RefusingVm:
    def __init__(self, code: int, *, has_guest_memfd: bool) -> None:
        self.code, self.has_guest_memfd = code, has_guest_memfd

    def offers(self, cap: int) -> int:
        return int(self.has_guest_memfd and cap == KVM_CAP_GUEST_MEMFD)

    def create_guest_memfd(self, size: int, flags: int) -> NoReturn:
        raise KvmError("KVM_CREATE_GUEST_MEMFD", f"size={size:#x}, flags={flags:#x}", self.code)


@pytest.mark.parametrize("code", [errno.ENOTTY, errno.EINVAL])
@pytest.mark.parametrize("backing", [PrivateGuestMemfd, SharedGuestMemfd])
def test_a_kernel_without_guest_memfd_is_a_host_that_cannot(
    backing: type[PrivateGuestMemfd | SharedGuestMemfd], code: int
) -> None:
    with pytest.raises(HostError, match="this host's kernel has no guest_memfd") as caught:
        backing(RefusingVm(code, has_guest_memfd=False), HOST_PAGE)  # type: ignore[arg-type]
    assert caught.value.exit_status == 5


def test_what_a_kernel_with_guest_memfd_refuses_is_told_as_it_is() -> None:
    with pytest.raises(KvmError, match="EINVAL"):
        PrivateGuestMemfd(RefusingVm(errno.EINVAL, has_guest_memfd=True), HOST_PAGE)  # type: ignore[arg-type]
