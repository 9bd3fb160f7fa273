# SPDX-License-Identifier: Apache-2.0
"""What guest memory is made of: anonymous memory, memfd (4 KiB, THP advice, hugetlb), guest_memfd, shared or private.

A backing owns its file descriptor, if it has one, and its mappings; whoever made it closes it, or hands it to a
``Memory``, which closes it then. A backing has two addresses: ``hva``, through which KVM faults pages in, and ``view``,
through which the host's own code (in C, guarded) looks at them. They are one mapping until
:meth:`Backing.separate_view`, which the emulated protection uses so that a page can be taken from the host without
taking it from KVM.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os

from pyvmm._native import ffi, lib
from pyvmm.errors import GuestMemoryError, HostError, UsageError, hex_
from pyvmm.memory import mman
from pyvmm.memory.address import HUGE_SIZE, PAGE_SIZE, Hva, is_aligned
from pyvmm.memory.mman import MappingError
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
    MFD_HUGE_2MB,
    MFD_HUGETLB,
    MFD_NOEXEC_SEAL,
)
from pyvmm.uapi.mman import MADV_DONTNEED, MADV_HUGEPAGE, MADV_POPULATE_WRITE, PROT_NONE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Self

    from pyvmm.kvm.guest_memfd import GuestMemfd
    from pyvmm.kvm.vm import Vm

HUGE_POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB"


class Backing:
    """Guest memory, mapped at ``hva``. Close it, or use it as a context manager."""

    kind: str
    host_access: ClassVar[bool] = True
    """Whether the host can reach the contents at all while its mapping is accessible."""
    guest_memfd: GuestMemfd | None = None
    """The KVM file, where it is one: the slot is bound to it and KVM does not fault through ``hva``."""

    def __init__(self, size: int, hva: Hva, *, fd: int = -1, granule: int = PAGE_SIZE) -> None:
        self.fd = fd
        """The file, or -1 where there is none, and once it is closed."""
        self.size = size
        self.granule = granule
        """Bytes of the smallest piece that can be punched."""
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
        """Give the host's code a mapping of its own; ``hva`` is KVM's alone from now on. Idempotent."""
        self._check_open()
        if self.view == self.hva:
            self.view = mman.map_shared(self.fd, self.size)

    def hide(self, offset: int, size: int) -> None:
        """Take ``[offset, offset + size)`` of a separate view from the host's code: touching it faults."""
        self._check_range(offset, size)
        if self.view == self.hva:
            raise UsageError(f"{self!r} has one mapping for KVM and the host: hiding it would take it from the guest")
        mman.protect(self.view + offset, size, PROT_NONE)

    def load(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data`` into the file at ``offset`` through the host's view, before the guest may own it.

        Raises :class:`GuestMemoryError` (its gpa is the offset in the file) where the host cannot.
        """
        self._check_range(offset, len(data))
        done = lib.pv_copy(ffi.cast("void *", self.view + offset), ffi.from_buffer("uint8_t[]", data), len(data))
        if done < len(data):
            what = f"loading {len(data)} bytes at {hex_(offset)} of {self!r}"
            raise GuestMemoryError(what, offset + done, done, "out of the host's reach")

    def load_file(self, offset: int, fd: int, at: int, size: int) -> int:
        """Read ``size`` bytes at ``at`` of another file to ``offset``, in one copy, before the guest may own it.

        Returns how many there were. OSError where they cannot be read, or the host cannot write here (EFAULT).
        """
        self._check_range(offset, size)
        room = memoryview(ffi.buffer(ffi.cast("uint8_t *", self.view + offset), size))
        done = 0
        while done < size and (now := os.preadv(fd, [room[done:]], at + done)):
            done += now
        return done

    def punch(self, offset: int, size: int) -> None:
        """Drop the pages of ``[offset, offset + size)`` from the file; they read as zeros when touched again.

        Both ends must be multiples of ``granule``. A THP or otherwise large folio that is hit in part is zeroed by
        the kernel through its own mapping: harmless, except to pages donated to a protected guest, which it destroys.
        """
        self._check_granules(offset, size)
        mman.fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)

    def populate(self, offset: int, size: int) -> None:
        """Allocate and zero the pages of a range now, and map them where KVM looks for them.

        Contents that are there stay. HostError where the kernel lacks MADV_POPULATE_WRITE (before Linux 5.14).
        """
        self._check_range(offset, size)
        try:
            mman.advise(self.hva + offset, size, MADV_POPULATE_WRITE)
        except MappingError as error:
            if error.errno == errno.EINVAL:
                raise HostError(
                    f"this kernel cannot populate guest memory in advance: {error.message}",
                    hint="MADV_POPULATE_WRITE is there since Linux 5.14; leave it out, the guest faults pages in",
                ) from error
            if error.errno in (errno.ENOMEM, errno.EFAULT):
                raise HostError(
                    f"not all of {size:#x} bytes of guest memory could be allocated: {error.message}",
                    hint="the machine, this control group or the huge page pool is out of memory; ask for less",
                ) from error
            raise

    def close(self) -> None:
        """Unmap and close. Idempotent. The VM goes first: a live slot would see whatever is mapped here next."""
        if self.closed:
            return
        self.closed = True
        fd, self.fd = self.fd, -1
        try:
            # After a fork the mappings are not here (DONTFORK), and something else may be at their address.
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
    """This process's own memory, which most hosts back by huge pages unasked: the cheapest to touch first.

    Not for the emulated protection, whose private pages need a second mapping of the same memory.
    """

    kind = "anonymous memory"

    def __init__(self, size: int) -> None:
        _check_size(size, PAGE_SIZE)
        super().__init__(size, mman.map_anonymous(size))
        with contextlib.suppress(MappingError):  # a kernel without huge pages gives small ones
            mman.advise(self.hva, size, MADV_HUGEPAGE)

    def __repr__(self) -> str:
        return f"<{self.kind} of {self.size:#x} bytes>"

    def separate_view(self) -> None:
        """Refuse: there is nothing to map a second time."""
        raise UsageError(f"{self!r} cannot be mapped a second time, for the host alone", hint="use a memfd")

    def punch(self, offset: int, size: int) -> None:
        """Drop the pages of a range, as :class:`Backing` does; of a huge page hit in part the rest stays."""
        self._check_granules(offset, size)
        mman.advise(self.hva + offset, size, MADV_DONTNEED)

    def _close_file(self, fd: int) -> None:
        """There is none."""


class FileBacking(Backing):
    """All of a file whose descriptor it takes, mapped shared; ``reserve`` sets the pages aside now."""

    kind = "file"

    def __init__(self, fd: int, size: int, *, granule: int = PAGE_SIZE, reserve: bool = False) -> None:
        super().__init__(size, mman.map_shared(fd, size, reserve=reserve), fd=fd, granule=granule)


class Memfd(FileBacking):
    """Anonymous shared memory, the backing every protection takes.

    ``thp`` advises huge pages, which has effect where /sys/kernel/mm/transparent_hugepage/shmem_enabled is ``advise``
    (Debian: ``never``). ``hugetlb`` takes 2 MiB pages from the kernel's pool, all of them now; a protected guest
    cannot use them. The file is sealed against growing and shrinking, so that no mapping of it ever dangles.
    """

    kind = "memfd"

    def __init__(self, size: int, *, thp: bool = False, hugetlb: bool = False) -> None:
        granule = HUGE_SIZE if hugetlb else PAGE_SIZE
        _check_size(size, granule)
        if thp and hugetlb:
            raise UsageError("a memfd takes huge page advice (thp) or hugetlb pages, not both")
        if hugetlb:
            self.kind = "memfd of 2 MiB pages"
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
                raise HostError("this kernel has no transparent huge pages", hint="leave thp out") from error


class _GuestMemfdBacking(FileBacking):
    def __init__(self, vm: Vm, size: int, flags: int) -> None:
        _check_size(size, PAGE_SIZE)
        file = vm.create_guest_memfd(size, flags)
        try:
            super().__init__(file.fileno(), size)
        except BaseException:
            file.close()
            raise
        self.guest_memfd = self._file = file

    def populate(self, offset: int, size: int) -> None:
        """Allocate and zero the pages of a range now; the guest maps them when it touches them."""
        self._check_range(offset, size)
        mman.fallocate(self.fd, FALLOC_FL_KEEP_SIZE, offset, size)

    def _close_file(self, fd: int) -> None:  # noqa: ARG002 - its owner closes it
        self._file.close()


class SharedGuestMemfd(_GuestMemfdBacking):
    """guest_memfd that the host may map and touch (MMAP and INIT_SHARED), page by page, never huge."""

    kind = "shared guest_memfd"

    def __init__(self, vm: Vm, size: int) -> None:
        super().__init__(vm, size, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)


class PrivateGuestMemfd(_GuestMemfdBacking):
    """guest_memfd that the host may map but not touch (MMAP alone): an access is SIGBUS, so nothing can be loaded."""

    kind = "private guest_memfd"
    host_access = False

    def __init__(self, vm: Vm, size: int) -> None:
        super().__init__(vm, size, GUEST_MEMFD_FLAG_MMAP)


def guard_copies() -> None:
    """Make guarded copies safe in this process, with signal handlers; idempotent. HostError where it refuses them."""
    if error := lib.pv_install_signals():
        raise HostError(f"the handlers that guarded copies need cannot be installed: {os.strerror(-error)}")


def check_usable(protection: Protection, what: str, *, guest_memfd: bool, huge: bool) -> None:
    """Raise UsageError for a kind of backing that no slot in this protection can use; ``what`` names it."""
    if protection is Protection.PKVM and guest_memfd:
        raise UsageError(
            f"{what} cannot back a protected guest: the kernel takes the slot, but pins a protected guest's "
            "pages through the host's mapping, and KVM_RUN fails with EIO on those of a guest_memfd",
            hint="use a memfd; pKVM makes its pages private when the guest touches them",
        )
    if protection is Protection.PKVM and huge:
        raise UsageError(
            f"{what} cannot back a protected guest: pages are donated one by one, and KVM_RUN fails with EIO "
            "on hugetlb pages",
            hint="use a memfd of 4 KiB pages",
        )
    if protection is Protection.EMULATED and huge:
        raise UsageError(
            f"{what} cannot back the emulated protection: 4 KiB pages change hands, and a mapping of huge "
            "pages opens and closes by 2 MiB",
            hint="use a memfd, or guest_memfd",
        )


def _memfd_create(hugetlb: bool) -> int:
    flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (MFD_HUGETLB | MFD_HUGE_2MB if hugetlb else 0)
    try:
        try:
            return os.memfd_create("pyvmm-guest", flags | MFD_NOEXEC_SEAL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return os.memfd_create("pyvmm-guest", flags)  # before Linux 6.3
    except OSError as error:
        if hugetlb and error.errno in (errno.EINVAL, errno.ENODEV, errno.ENOSYS):
            raise HostError("this kernel has no huge pages of 2 MiB", hint="use a plain memfd, or thp=True") from error
        raise HostError(
            f"memfd_create failed: {error.strerror}", hint="see `ulimit -n` and /proc/sys/vm/memfd_noexec"
        ) from error


def _check_size(size: int, granule: int) -> None:
    if size <= 0 or not is_aligned(size, granule):
        raise UsageError(f"guest memory of {size:#x} bytes: a multiple of {granule:#x}, at least one, is needed")


def _pool_too_small(size: int) -> HostError:
    def count(name: str) -> str:
        try:
            with open(f"{HUGE_POOL}/{name}") as file:
                return file.read().strip()
        except OSError:
            return "unknown"

    need = size // HUGE_SIZE
    return HostError(
        f"guest memory of {size:#x} bytes needs {need} huge pages of 2 MiB: the kernel's pool has "
        f"{count('nr_hugepages')}, of which {count('free_hugepages')} are free and {count('resv_hugepages')} promised",
        hint=f"as root: echo N > {HUGE_POOL}/nr_hugepages, N at least {need} more; or use a plain memfd",
    )
