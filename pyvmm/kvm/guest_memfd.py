"""A guest_memfd: a file of guest memory that belongs to one VM. Made by Vm.create_guest_memfd; owns its mapping."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyvmm.kvm import libc
from pyvmm.kvm.fd import Fd
from pyvmm.uapi.falloc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from pyvmm.uapi.kvm import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP
from pyvmm.uapi.mman import MAP_SHARED, PROT_READ, PROT_WRITE

if TYPE_CHECKING:
    from pyvmm.kvm.vm import Vm


class GuestMemfd(Fd):
    """``size`` bytes of guest memory, of 4 KiB pages; closed under a live slot, the guest's next touch is a fault."""

    kind = "guest_memfd"

    def __init__(self, fd: int, vm: Vm, size: int, flags: int) -> None:
        super().__init__(fd, vm)
        self.size = size
        self.flags = flags
        self._hva = 0

    @property
    def mappable(self) -> bool:
        """Whether the host may map it at all (GUEST_MEMFD_FLAG_MMAP)."""
        return bool(self.flags & GUEST_MEMFD_FLAG_MMAP)

    @property
    def shared(self) -> bool:
        """Whether the host may touch what it mapped (GUEST_MEMFD_FLAG_INIT_SHARED); otherwise a touch is SIGBUS."""
        return bool(self.flags & GUEST_MEMFD_FLAG_INIT_SHARED)

    def mmap(self) -> int:
        """Return the address of the whole file, mapped once, shared; unmapped on close. KvmError if it is not to be."""
        if not self._hva:
            address, errno = libc.mmap(self.size, PROT_READ | PROT_WRITE, MAP_SHARED, self.fileno(), 0)
            if errno:
                raise self.error("mmap", errno, size=self.size, flags=self.flags)
            self._hva = address
        return self._hva

    def punch(self, offset: int, size: int) -> None:
        """Drop pages: the guest's next touch finds zeros, without an exit. Both in bytes, multiples of 4096."""
        self._fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)

    def allocate(self, offset: int, size: int) -> None:
        """Allocate and zero pages now, so that the guest's touch has only to map them. As :meth:`punch`."""
        self._fallocate(FALLOC_FL_KEEP_SIZE, offset, size)

    def _fallocate(self, mode: int, offset: int, size: int) -> None:
        if errno := libc.fallocate(self.fileno(), mode, offset, size):
            raise self.error("fallocate", errno, mode=mode, offset=offset, size=size)

    def _release(self) -> None:
        if self._hva:
            libc.munmap(self._hva, self.size)
            self._hva = 0
