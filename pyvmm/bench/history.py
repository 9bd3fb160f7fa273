# SPDX-License-Identifier: Apache-2.0
"""What a host has done before a measurement, as far as it changes what a page costs.

After its boot, a pKVM host's stage 2 maps memory in blocks. The first page of a block that goes to a protected guest
breaks the block, and all other pages of it lose their mapping. The host's next access to each of them faults to EL2
once (host_abort) and maps it as a page. Such a fault in the zeroing of a new page is 10 % of a cold first touch. It
depends on which guests ran before. Blocks are not joined again before the next boot.

A *settled* host has had these faults already, for the pages that the next guest will get.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pyvmm.experiment import Experiment
from pyvmm.guest.orders import Access
from pyvmm.kvm.system import System
from pyvmm.memory.address import MIB, align_up
from pyvmm.memory.backing import Memfd
from pyvmm.pages import HOST_PAGE, HUGE_SIZE
from pyvmm.protection import Protection

SETTLED: Final = "settled"
FIRST: Final = "first"
HISTORIES: Final = (SETTLED, FIRST)
"""Values of an axis ``history``: of a settled host, or of the first protected guest after a boot."""

AMPLE: Final = 2
"""Times the memory to settle. The kernel's allocator does not give all pages of the guest before to the next one."""
SPARE: Final = 12 * MIB
"""Guest memory that cases do not use: the payload, the device tree, the records of ticks."""
TAINTED: Final = Path("/proc/sys/kernel/tainted")
TAINT_USER: Final = 1 << 6


def is_new() -> bool:
    """Whether nobody has made a protected VM since the boot. Probing for protected VMs makes one.

    The kernel tells it by its taint. Other causes of this taint (TAINT_USER) are taken for a VM.
    """
    return not int(TAINTED.read_text()) & TAINT_USER


def settle(size: int, *, seconds: float) -> str:
    """Settle pages for guests of ``size`` bytes, on a host that runs protected guests; elsewhere do nothing.

    A protected guest touches twice as much, at most half of the free memory, in ``seconds`` at most, and ends. Then the
    host itself touches as much: a plain guest does not get quite the same pages as a protected one. Returns the failure
    of the guest's KVM_RUN, or an empty text. Raises Untold if the guest does not answer in time.
    """
    with System.open() as system:
        if not system.supports_protected():
            return ""
    wanted = align_up(min(AMPLE * size, _free() // 2), HUGE_SIZE)
    with Experiment(Protection.PKVM, "memfd", memory=(wanted + SPARE) // MIB) as x:
        pages = wanted // HOST_PAGE
        failure = x.failed(x.guest.start_touch(x.page(pages), pages, access=Access.WRITE), timeout=seconds)
    with Memfd(wanted) as file:
        file.populate(0, wanted)
    return "" if failure is None else str(failure)


def _free() -> int:
    """Return the bytes of memory that programs can get without swapping."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return next(int(words[1]) << 10 for words in lines if words[0] == "MemAvailable:")
