# SPDX-License-Identifier: Apache-2.0
"""Backings of guest memory: anonymous memory, memfd (plain, THP advice, hugetlb), shared or private guest_memfd.

A backing owns its file descriptor, if it has one, and its mappings. Its creator closes it, or passes it to a
``Memory``, which closes it. A backing has two addresses. KVM faults pages in through ``hva``. The host's own code
(guarded copies in C) uses ``view``. Both are one mapping until :meth:`Backing.separate_view`. The emulated protection
separates them, to take a page from the host without taking it from KVM.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os

from pyvmm._native import ffi, lib
from pyvmm.errors import GuestMemoryError, HostError, KvmError, UsageError, hex_
from pyvmm.memory import mman
from pyvmm.memory.address import MIB, Hva, is_aligned
from pyvmm.memory.mman import MappingError
from pyvmm.pages import HOST_PAGE, HUGE_PAGE_SHIFT, HUGE_SIZE
from pyvmm.protection import Protection
from pyvmm.uapi.falloc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from pyvmm.uapi.kvm import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP
from pyvmm.uapi.memfd import (
    F_ADD_SEALS,
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    MFD_ALLOW_SEALING,
    MFD_CLOEXEC,
    MFD_HUGE_SHIFT,
    MFD_HUGETLB,
    MFD_NOEXEC_SEAL,
)
from pyvmm.uapi.mman import MADV_DONTNEED, MADV_HUGEPAGE, MADV_POPULATE_WRITE, PROT_NONE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Self

    from pyvmm.kvm.guest_memfd import GuestMemfd
    from pyvmm.kvm.vm import Vm

HUGE_POOL = f"/sys/kernel/mm/hugepages/hugepages-{HUGE_SIZE >> 10}kB"
_HUGE = f"{HUGE_SIZE // MIB} MiB"


class Backing:
    """Guest memory, mapped at ``hva``. Close it, or use it as a context manager."""

    kind: str
    host_access: ClassVar[bool] = True
    """Whether the host can access the contents through an accessible mapping."""
    guest_memfd: GuestMemfd | None = None
    """The guest_memfd, if it is one. The slot is then bound to it, and KVM does not fault through ``hva``."""

    def __init__(self, size: int, hva: Hva, *, fd: int = -1, granule: int = HOST_PAGE) -> None:
        self.fd = fd
        """The file's descriptor; -1 without a file, and after closing."""
        self.size = size
        self.granule = granule
        """The smallest piece that can be punched, in bytes."""
        self.hva = hva
        self.view: Hva = hva
        self.closed = False
        """Whether :meth:`close` was called."""
        self._pid = os.getpid()
        guard_copies()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.kind} of {self.size:#x} bytes, fd {self.fd}>"

    def separate_view(self) -> None:
        """Give the host's code its own mapping. From now on only KVM uses ``hva``. Idempotent."""
        self._check_open()
        if self.view == self.hva:
            self.view = mman.map_shared(self.fd, self.size)

    def hide(self, offset: int, size: int) -> None:
        """Hide ``[offset, offset + size)`` of a separate view from the host's code: accesses fault."""
        self._check_range(offset, size)
        if self.view == self.hva:
            raise UsageError(f"{self!r} has one mapping for KVM and the host: hiding it would hide it from the guest")
        mman.protect(self.view + offset, size, PROT_NONE)

    def load(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data`` into the file at ``offset`` through the host's view, before the guest may own it.

        Raises :class:`GuestMemoryError` (with the offset in the file as its gpa) if the host cannot access it.
        """
        self._check_range(offset, len(data))
        done = lib.pv_copy(ffi.cast("void *", self.view + offset), ffi.from_buffer("uint8_t[]", data), len(data))
        if done < len(data):
            what = f"loading {len(data)} bytes at {hex_(offset)} of {self!r}"
            raise GuestMemoryError(what, offset + done, done, "not accessible to the host")

    def load_file(self, offset: int, fd: int, at: int, size: int) -> int:
        """Read ``size`` bytes at ``at`` of another file to ``offset``, in one copy, before the guest may own it.

        Returns the number of bytes read. Raises OSError if the read fails, or the host cannot write here (EFAULT).
        """
        self._check_range(offset, size)
        room = memoryview(ffi.buffer(ffi.cast("uint8_t *", self.view + offset), size))
        done = 0
        while done < size and (now := os.preadv(fd, [room[done:]], at + done)):
            done += now
        return done

    def punch(self, offset: int, size: int) -> None:
        """Drop the pages of ``[offset, offset + size)`` from the file. The next access finds zeros.

        Both ends must be multiples of ``granule``. If the range covers only part of a large folio (such as a THP), the
        kernel zeroes that part through its own mapping. This destroys pages donated to a protected guest, and is
        otherwise harmless.
        """
        self._check_granules(offset, size)
        mman.fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)

    def populate(self, offset: int, size: int) -> None:
        """Allocate and zero the pages of a range now, and map them where KVM looks for them.

        Existing contents stay. Raises HostError if the kernel lacks MADV_POPULATE_WRITE (before Linux 5.14).
        """
        self._check_range(offset, size)
        try:
            mman.advise(self.hva + offset, size, MADV_POPULATE_WRITE)
        except MappingError as error:
            if error.errno == errno.EINVAL:
                raise HostError(
                    f"this kernel cannot populate guest memory in advance: {error.message}",
                    hint="use Linux 5.14 (MADV_POPULATE_WRITE), or do not populate: the guest faults pages in",
                ) from error
            if error.errno in (errno.ENOMEM, errno.EFAULT):
                raise HostError(
                    f"not all of {size:#x} bytes of guest memory could be allocated: {error.message}",
                    hint="the machine, this control group or the huge page pool is out of memory; use less memory",
                ) from error
            raise

    def close(self) -> None:
        """Unmap and close. Idempotent. Close the VM first: a live slot would see the next mapping at this address."""
        if self.closed:
            return
        self.closed = True
        fd, self.fd = self.fd, -1
        try:
            # After a fork the mappings are gone (DONTFORK), and another mapping may be at their address.
            if self._pid == os.getpid():
                if self.view != self.hva:
                    mman.unmap(self.view, self.size)
                mman.unmap(self.hva, self.size)
        finally:
            self._close_file(fd)

    def _close_file(self, fd: int) -> None:
        os.close(fd)

    def _check_open(self) -> None:
        if self.closed:
            raise UsageError(f"{self!r} is closed")

    def _check_granules(self, offset: int, size: int) -> None:
        self._check_range(offset, size)
        if not (is_aligned(offset, self.granule) and is_aligned(size, self.granule)):
            raise UsageError(
                f"cannot punch {size:#x} bytes at {hex_(offset)} of {self!r}: both must be multiples of "
                f"{self.granule:#x}"
            )

    def _check_range(self, offset: int, size: int) -> None:
        self._check_open()
        if offset < 0 or size < 0 or offset + size > self.size:
            raise UsageError(f"[{offset:#x}, {offset + size:#x}) is not inside {self!r}")


class Anonymous(Backing):
    """Anonymous memory of this process. Most hosts back it with huge pages by default: first accesses are cheapest.

    The emulated protection cannot use it, because private pages need a second mapping of the same memory.
    """

    kind = "anonymous memory"

    def __init__(self, size: int) -> None:
        _check_size(size, HOST_PAGE)
        super().__init__(size, mman.map_anonymous(size))
        with contextlib.suppress(MappingError):  # a kernel without huge pages uses small ones
            mman.advise(self.hva, size, MADV_HUGEPAGE)

    def __repr__(self) -> str:
        return f"<{self.kind} of {self.size:#x} bytes>"

    def separate_view(self) -> None:
        """Raise an error: anonymous memory cannot be mapped twice."""
        raise UsageError(f"{self!r} cannot be mapped twice, as a separate view needs", hint="use a memfd")

    def punch(self, offset: int, size: int) -> None:
        """Drop the pages of a range, as :class:`Backing` does. The rest of a partly covered huge page stays."""
        self._check_granules(offset, size)
        mman.advise(self.hva + offset, size, MADV_DONTNEED)

    def _close_file(self, fd: int) -> None:
        """Do nothing: there is no file."""


class FileBacking(Backing):
    """A whole file, mapped shared. Takes over its descriptor. ``reserve`` reserves the pages now."""

    kind = "file"

    def __init__(self, fd: int, size: int, *, granule: int = HOST_PAGE, reserve: bool = False) -> None:
        super().__init__(size, mman.map_shared(fd, size, reserve=reserve), fd=fd, granule=granule)


class Memfd(FileBacking):
    """Anonymous shared memory, which every protection accepts.

    ``thp`` advises huge pages. It needs ``advise`` in /sys/kernel/mm/transparent_hugepage/shmem_enabled (Debian:
    ``never``). ``hugetlb`` takes all huge pages from the kernel's pool at once. A protected guest cannot use them. The
    file is sealed against growing and shrinking, so that no mapping loses its pages.
    """

    kind = "memfd"

    def __init__(self, size: int, *, thp: bool = False, hugetlb: bool = False) -> None:
        granule = HUGE_SIZE if hugetlb else HOST_PAGE
        _check_size(size, granule)
        if thp and hugetlb:
            raise UsageError("a memfd takes huge page advice (thp) or hugetlb pages, not both")
        if hugetlb:
            self.kind = f"memfd of {_HUGE} pages"
        fd = _memfd_create(hugetlb)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL)
            super().__init__(fd, size, granule=granule, reserve=hugetlb)
        except BaseException as error:
            os.close(fd)
            if hugetlb and isinstance(error, MappingError) and error.errno == errno.ENOMEM:
                raise _pool_too_small(size) from error
            if isinstance(error, OSError):
                raise HostError(f"cannot make guest memory of {size:#x} bytes: {error.strerror}") from error
            raise
        self.hugetlb = hugetlb
        if thp:
            try:
                mman.advise(self.hva, size, MADV_HUGEPAGE)
            except MappingError as error:
                self.close()
                raise HostError("this kernel has no transparent huge pages", hint="drop thp") from error


class _GuestMemfdBacking(FileBacking):
    def __init__(self, vm: Vm, size: int, flags: int) -> None:
        _check_size(size, HOST_PAGE)
        try:
            file = vm.create_guest_memfd(size, flags)
        except KvmError as error:
            from pyvmm.uapi.kvm_cap import KVM_CAP_GUEST_MEMFD

            # A kernel without it does not know the call: ENOTTY, or EINVAL on arm64 (kvm_arch_vm_ioctl()).
            if error.errno not in (errno.ENOTTY, errno.EINVAL) or vm.offers(KVM_CAP_GUEST_MEMFD):
                raise
            raise HostError(
                "this host's kernel has no guest_memfd (KVM_CAP_GUEST_MEMFD is 0)",
                hint="use a memfd; arm64 has guest_memfd since Linux 6.18",
            ) from error
        try:
            super().__init__(file.fileno(), size)
        except BaseException:
            file.close()
            raise
        self.guest_memfd = self._file = file

    def populate(self, offset: int, size: int) -> None:
        """Allocate and zero the pages of a range now. They are mapped at the guest's first access."""
        self._check_range(offset, size)
        mman.fallocate(self.fd, FALLOC_FL_KEEP_SIZE, offset, size)

    def _close_file(self, fd: int) -> None:  # noqa: ARG002 - its owner closes it
        self._file.close()


class SharedGuestMemfd(_GuestMemfdBacking):
    """guest_memfd that the host may map and access (MMAP and INIT_SHARED). Never huge pages."""

    kind = "shared guest_memfd"

    def __init__(self, vm: Vm, size: int) -> None:
        super().__init__(vm, size, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)


class PrivateGuestMemfd(_GuestMemfdBacking):
    """guest_memfd that the host may map but not access (MMAP only). Accesses raise SIGBUS, so nothing can be loaded."""

    kind = "private guest_memfd"
    host_access = False

    def __init__(self, vm: Vm, size: int) -> None:
        super().__init__(vm, size, GUEST_MEMFD_FLAG_MMAP)


def guard_copies() -> None:
    """Install the signal handlers of guarded copies in this process. Idempotent. Raises HostError if that fails."""
    if error := lib.pv_install_signals():
        raise HostError(f"cannot install the signal handlers of guarded copies: {os.strerror(-error)}")


def check_usable(protection: Protection, what: str, *, guest_memfd: bool, huge: bool) -> None:
    """Raise UsageError for a kind of backing that this protection cannot use. ``what`` names it."""
    if protection is Protection.PKVM and guest_memfd:
        raise UsageError(
            f"{what} cannot back a protected guest: the kernel accepts the slot, but pins a protected guest's "
            "pages through the host's mapping, and KVM_RUN fails with EIO on those of a guest_memfd",
            hint="use a memfd; pKVM makes its pages private at the guest's first access",
        )
    if protection is Protection.PKVM and huge:
        raise UsageError(
            f"{what} cannot back a protected guest: pages are donated one by one, and KVM_RUN fails with EIO "
            "on hugetlb pages",
            hint="use a plain memfd",
        )
    if protection is Protection.EMULATED and huge:
        raise UsageError(
            f"{what} cannot back the emulated protection: it converts pages of {HOST_PAGE >> 10} KiB, but a mapping of "
            f"huge pages is hidden in units of {_HUGE}",
            hint="use a memfd, or guest_memfd",
        )


def _memfd_create(hugetlb: bool) -> int:
    flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (MFD_HUGETLB | HUGE_PAGE_SHIFT << MFD_HUGE_SHIFT if hugetlb else 0)
    try:
        try:
            return os.memfd_create("pyvmm-guest", flags | MFD_NOEXEC_SEAL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return os.memfd_create("pyvmm-guest", flags)  # before Linux 6.3
    except OSError as error:
        if hugetlb and error.errno in (errno.EINVAL, errno.ENODEV, errno.ENOSYS):
            raise HostError(
                f"this kernel has no huge pages of {_HUGE}", hint="use a plain memfd, or thp=True"
            ) from error
        raise HostError(
            f"memfd_create failed: {error.strerror}", hint="see `ulimit -n` and /proc/sys/vm/memfd_noexec"
        ) from error


def _check_size(size: int, granule: int) -> None:
    if size <= 0 or not is_aligned(size, granule):
        raise UsageError(f"guest memory of {size:#x} bytes: use a multiple of {granule:#x}, not 0")


def _pool_too_small(size: int) -> HostError:
    def count(name: str) -> str:
        try:
            with open(f"{HUGE_POOL}/{name}") as file:
                return file.read().strip()
        except OSError:
            return "unknown"

    need = size // HUGE_SIZE
    return HostError(
        f"guest memory of {size:#x} bytes needs {need} huge pages of {_HUGE}: the kernel's pool has "
        f"{count('nr_hugepages')}, of which {count('free_hugepages')} are free and {count('resv_hugepages')} reserved",
        hint=f"as root: echo N > {HUGE_POOL}/nr_hugepages, N at least {need} more; or use a plain memfd",
    )
