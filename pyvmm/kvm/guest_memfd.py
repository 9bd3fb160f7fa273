"""A guest_memfd: a file of guest memory that belongs to one VM. Made by Vm.create_guest_memfd.

Guest memory is mapped, punched and allocated by the memory package: see SharedGuestMemfd and PrivateGuestMemfd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyvmm.kvm import libc
from pyvmm.kvm.fd import Fd
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

    def mmap(self) -> int:
        """Return the address of the whole file, mapped once, shared; unmapped on close. KvmError if it is not to be."""
        if not self._hva:
            address, errno = libc.mmap(self.size, PROT_READ | PROT_WRITE, MAP_SHARED, self.fileno(), 0)
            if errno:
                raise self.error("mmap", errno, size=self.size, flags=self.flags)
            self._hva = address
        return self._hva

    def _release(self) -> None:
        hva, self._hva = self._hva, 0
        if hva and (errno := libc.munmap(hva, self.size)):
            raise self.error("munmap", errno, address=hva, size=self.size)
