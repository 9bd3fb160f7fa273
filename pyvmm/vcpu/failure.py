# SPDX-License-Identifier: Apache-2.0
"""Explain a failed KVM_RUN from its errno, the kernel's details, and further probing.

Under pKVM the kernel returns EFAULT without details (arch/arm64/kvm/mmu.c, pkvm_mem_abort). Only the kvm_guest_fault
tracepoint has the address. The vCPU runs into the same fault once more to get it, since the guest has not moved.
"""

from __future__ import annotations

import errno
import os

from pyvmm._native import lib
from pyvmm.errors import hex_
from pyvmm.kvm.faulttrace import guest_fault
from pyvmm.memory.address import Gpa
from pyvmm.memory.ledger import PageState
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from pyvmm.uapi.errno import EHWPOISON
from pyvmm.vcpu.outcome import Ending, Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import pv_vcpu
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.memory.memory import Memory


def explain(vcpu: Vcpu, native: pv_vcpu, memory: Memory) -> Outcome | int:
    """Return why KVM_RUN of ``vcpu`` failed, as the outcome of the run.

    If the second try succeeds, returns the enum pv_stop of that run instead.
    """
    index, number = native.index, native.error
    name = errno.errorcode.get(number, str(number))
    prefix = f"KVM_RUN(vcpu={index}): {name}"
    where = vcpu.place
    match native.failure:
        case lib.PV_FAIL_ENOMEM:
            return Outcome(
                Ending.FAILED,
                f"{prefix}: the kernel cannot lock another page for the guest ({where}); {memory.locked_report()}",
                index,
                "raise the limit (ulimit -l, or LimitMEMLOCK=), or give the guest less memory",
            )
        case lib.PV_FAIL_MEMORY | lib.PV_FAIL_EHWPOISON if native.fault_size:
            gpa = Gpa(native.fault_gpa)
            cause = (
                "the page is poisoned by a hardware error"
                if number == EHWPOISON
                else "its guest_memfd is gone or cannot give a page"
            )
            return Outcome(
                Ending.CRASH,
                f"{prefix} with KVM_EXIT_MEMORY_FAULT: the guest touched gpa {hex_(gpa)} "
                f"({native.fault_size} bytes, {memory.describe(gpa)}), and {cause} ({where})",
                index,
                "replace the slot: delete it, add one with another backing, and run on",
            )
        case lib.PV_FAIL_OTHER if number == errno.ENOSYS:
            # mmio.c, io_mem_abort: no memslot there, and the syndrome does not name the access's register.
            return Outcome(
                Ending.CRASH,
                f"{prefix}: the guest touched an address without memory or device, with an instruction that KVM cannot "
                f"decode ({where})",
                index,
                "use single ldr/str without write-back for device registers",
            )
        case lib.PV_FAIL_EFAULT:
            return _efault(native, memory, prefix, where)
        case _:
            return Outcome(Ending.FAILED, f"{prefix}: {os.strerror(number)} ({where})", index)


def _efault(native: pv_vcpu, memory: Memory, prefix: str, where: str) -> Outcome | int:
    index = native.index
    stops: list[int] = []
    gpa, why_not = guest_fault(lambda: stops.append(lib.pv_run(native)))
    if stops and not (stops[0] == lib.PV_STOP_FAILED and native.failure == lib.PV_FAIL_EFAULT):
        return stops[0]
    if gpa is None:
        at = f"some page ({why_not})"
    else:
        page = Gpa(gpa & -HOST_PAGE)
        at = f"page at gpa {hex_(page)}"
    if memory.protection is Protection.PKVM and (gpa is None or memory.contains(Gpa(gpa), 1)):
        # When the host accesses a donated page through the kernel, the hypervisor takes it back by force, zeroes it,
        # and poisons it in the guest's stage 2 (mem_protect.c, __pkvm_host_force_reclaim...). Every later guest access
        # fails.
        if gpa is not None:
            memory.ledger.set(gpa & -HOST_PAGE, PageState.POISONED)
        return Outcome(
            Ending.CRASH,
            f"{prefix}: {at} was reclaimed by the host: its contents are lost and the guest cannot go on ({where})",
            index,
            "something read the guest's private memory through the kernel (a debugger, process_vm_readv, "
            "/proc/PID/mem, a core dump, a read of the memfd); or, if the guest had not touched it yet, the kernel "
            "could not pin it (a userfaultfd, or a mapping that is gone or closed)",
        )
    return Outcome(
        Ending.CRASH,
        f"{prefix}: the host has no page it can give the guest for {at} ({where})",
        index,
        "the mapping behind the slot is gone, read-only, or PROT_NONE",
    )
