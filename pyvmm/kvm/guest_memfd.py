# SPDX-License-Identifier: Apache-2.0
"""A guest_memfd: a file of guest memory that belongs to one VM. Made by Vm.create_guest_memfd.

Guest memory is mapped, punched and allocated by the memory package: see SharedGuestMemfd and PrivateGuestMemfd.
"""

from __future__ import annotations

from pyvmm.kvm.fd import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.kvm.vm import Vm


class GuestMemfd(Fd):
    """``size`` bytes of guest memory in pages of the host. After closing it, guest accesses to its slot fault."""

    kind = "guest_memfd"

    def __init__(self, fd: int, vm: Vm, size: int, flags: int) -> None:
        super().__init__(fd, vm)
        self.size = size
        self.flags = flags
