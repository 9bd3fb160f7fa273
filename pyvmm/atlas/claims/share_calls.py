# SPDX-License-Identifier: Apache-2.0
"""Claims about the calls MEM_SHARE and MEM_UNSHARE: their answers, their discovery, and refusals."""

from __future__ import annotations

from pyvmm import abi
from pyvmm.atlas.claim import group
from pyvmm.atlas.claims.share_together import together
from pyvmm.experiment import BEYOND, Experiment
from pyvmm.experiment.host.access import process_vm_readv
from pyvmm.guest.orders import GuestFault, Hvc, Order
from pyvmm.pages import HOST_PAGE

claim = group("share")

CALLS = "Documentation/virt/kvm/arm/hypercalls.rst"
HYPERVISOR = "arch/arm64/kvm/hyp/nvhe/pkvm.c, kvm_handle_pvm_hvc64()"
STATES = "arch/arm64/kvm/hyp/nvhe/mem_protect.c, __pkvm_guest_share_host() and __pkvm_guest_unshare_host()"
EXIT = 'thread: "the host kernel at that point can exit back to userspace to relay that information to the VMM"'
ALL = "memfd thp guest_memfd private"
INVALID_PARAMETER = -3
NOT_SUPPORTED = -1
PAGES = 64
CALL_UID = 0x8600_FF01
UID = "0xb66fb428 0xe911c52e 0x564bcaa9 0x743a004d"
"""28b46fb6-2ec5-11e9-a9ca-4b564d003a74 as x0..x3."""


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{CALLS}: FEATURES (0x86000000); {HYPERVISOR}")
def the_guest_is_offered_share_and_unshare(x: Experiment) -> None:
    """FEATURES offers itself, HYP_MEMINFO, MEM_SHARE, MEM_UNSHARE (0x1d); HYP_MEMINFO answers the host's page."""
    x.check("x0 of FEATURES", hex(x.guest.hvc(abi.HVC_FEATURES).regs[0]), "0x1d")
    x.check("x0 of HYP_MEMINFO", x.guest.hvc(abi.HVC_MEMINFO).status, HOST_PAGE)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{CALLS}: the UID of the vendor specific hypervisor range")
def the_vendor_uid_is_kvms(x: Experiment) -> None:
    """The call for the vendor's UID (0x8600ff01) names KVM, by which a guest knows that it may ask for FEATURES."""
    x.check("x0 to x3", " ".join(map(hex, x.guest.hvc(CALL_UID).regs)), UID)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin="Android's include/linux/arm-smccc.h: functions 5 to 9")
def androids_calls_are_not_offered(x: Experiment) -> None:
    """MMIO_GUARD and MEM_RELINQUISH, which Android's kernels have, are neither listed in FEATURES nor answered."""
    features = x.guest.hvc(abi.HVC_FEATURES).regs[0]
    x.check("bits 5 to 9 of FEATURES", features >> 5 & 0x1F, 0)
    page = x.page()
    x.guest.write64(page, 0x11)
    for number, name in enumerate(("INFO", "ENROLL", "MAP", "UNMAP")):
        x.check(f"x0 of MMIO_GUARD_{name}", x.guest.hvc(0xC600_0005 + number, page).status, NOT_SUPPORTED)
    x.check("x0 of MEM_RELINQUISH", x.guest.hvc(0xC600_0009, page).status, NOT_SUPPORTED)
    x.check("the page it named is the guest's as before", x.guest.read64(page), 0x11)


@claim(emulated=ALL, pkvm="memfd thp", origin=f"{STATES}: the state must be OWNED")
def a_second_share_is_refused(x: Experiment) -> None:
    """A share of a page that is shared is answered INVALID_PARAMETER (-3), and the page is as it was."""
    page = x.page()
    x.guest.share(page)
    x.guest.write64(page, 0x11)
    x.check("x0 of a second MEM_SHARE", x.guest.hvc(abi.HVC_SHARE, page).status, INVALID_PARAMETER)
    x.check("the host reads", x.host64(page), 0x11)
    x.check("the host stores", x.host_stores(page, 0x22))
    x.check("the guest reads", x.guest.read64(page), 0x22)
    x.check("x0 of one MEM_UNSHARE then", x.guest.hvc(abi.HVC_UNSHARE, page).status, 0)
    x.check("the host reaches it after", x.host64(page) is not None, False)


@claim(emulated=ALL, pkvm="memfd thp", origin=f"{STATES}: it must be SHARED_OWNED")
def an_unshare_of_a_private_page_is_refused(x: Experiment) -> None:
    """An unshare of a page that is not shared, touched or not, is answered INVALID_PARAMETER (-3) and does nothing."""
    page, untouched = x.page(), x.page()
    x.guest.write64(page, 0x11)
    for what, gpa in (("a private page", page), ("an untouched page", untouched)):
        x.check(f"x0 of MEM_UNSHARE of {what}", x.guest.hvc(abi.HVC_UNSHARE, gpa).status, INVALID_PARAMETER)
    x.check("the host reaches the private page", x.host64(page) is not None, False)
    x.check("the guest reads", x.guest.read64(page), 0x11)


@claim(emulated="memfd", pkvm="memfd", origin=f"{CALLS}: the base IPA must be aligned to the granule")
def an_unaligned_address_is_refused(x: Experiment) -> None:
    """A share or unshare of an address that is not a page's first is answered INVALID_PARAMETER (-3)."""
    page, shared = x.page(), x.page()
    x.guest.write64(page, 0x11)
    x.guest.share(shared)
    for offset in (1, 8, 2048, 4095):
        share, unshare = x.guest.hvc(abi.HVC_SHARE, page + offset), x.guest.hvc(abi.HVC_UNSHARE, shared + offset)
        x.check(f"x0 of MEM_SHARE and of MEM_UNSHARE, {offset} bytes off", f"{share.status} {unshare.status}", "-3 -3")
    x.check("the host reaches the private page", x.host64(page) is not None, False)
    x.check("the host reaches the shared page", x.host64(shared), 0)


@claim(emulated="memfd", pkvm="memfd", origin=f"{CALLS}: reserved arguments must be zero")
def reserved_arguments_must_be_zero(x: Experiment) -> None:
    """The calls are answered INVALID_PARAMETER (-3) when a reserved argument is not 0, and do nothing."""
    page = x.page()
    x.guest.write64(page, 0x11)
    for name, arguments in (("x2 = 1", (page, 1)), ("x3 = 1", (page, 0, 1))):
        x.check(f"x0 of MEM_SHARE with {name}", x.guest.hvc(abi.HVC_SHARE, *arguments).status, INVALID_PARAMETER)
    x.check("the host reaches the page", x.host64(page) is not None, False)
    x.guest.share(page)
    for name, arguments in (("x2 = 1", (page, 1)), ("x3 = 1", (page, 0, 1))):
        x.check(f"x0 of MEM_UNSHARE with {name}", x.guest.hvc(abi.HVC_UNSHARE, *arguments).status, INVALID_PARAMETER)
    x.check("the host still reads the shared page", x.host64(page), 0x11)
    for number in (1, 2, 3):
        status = x.guest.hvc(abi.HVC_MEMINFO, *(int(at == number) for at in (1, 2, 3))).status
        x.check(f"x0 of HYP_MEMINFO with x{number} = 1", status, INVALID_PARAMETER)


@claim(emulated="memfd", pkvm="memfd", origin=f"{CALLS}; {HYPERVISOR}: the fault that it makes up has no syndrome")
def an_address_outside_memory_is_answered(x: Experiment) -> None:
    """A share or unshare of an address in no memory slot is answered INVALID_PARAMETER (-3), not with an abort."""
    x.check("MEM_SHARE", _answer(x.guest.start_hvc(abi.HVC_SHARE, BEYOND)), "x0 = -3")
    x.check("MEM_UNSHARE", _answer(x.guest.start_hvc(abi.HVC_UNSHARE, BEYOND)), "x0 = -3")
    page = x.page()
    x.guest.share(page)
    x.check("the guest goes on, and shares another page", x.host64(page), 0)


@claim(pkvm="memfd thp", origin=f"{STATES}: the page's state must be OWNED, and a poisoned one has none")
def a_page_taken_by_force_cannot_be_shared(x: Experiment) -> None:
    """A share of a page that the host took back by force is answered INVALID_PARAMETER (-3), so the guest can tell."""
    page = x.page()
    x.guest.write64(page, 0x11)
    x.check("process_vm_readv of the page reads", process_vm_readv(x.memory.hva(page)).word, 0)
    x.check("MEM_SHARE", _answer(x.guest.start_hvc(abi.HVC_SHARE, page)), "x0 = -3")
    x.check("MEM_UNSHARE", _answer(x.guest.start_hvc(abi.HVC_UNSHARE, page)), "x0 = -3")
    x.check("KVM_RUN at the guest's next load", x.went(x.guest.start_read64(page)), "EFAULT")


@claim(emulated="memfd guest_memfd private", pkvm="memfd", cpus=2, origin=f"{STATES}: owned by the VM, not by a vCPU")
def one_vcpu_unshares_what_another_shared(x: Experiment) -> None:
    """A page that one vCPU shared can be taken back by another."""
    page, other = x.page(), x.others()[0]
    x.guest.share(page)
    x.check("the host reads it", x.host64(page), 0)
    x.check("x0 of the other vCPU's MEM_UNSHARE", other.hvc(abi.HVC_UNSHARE, page).status, 0)
    x.check("the host reaches it after", x.host64(page) is not None, False)
    x.check("x0 of the first vCPU's MEM_UNSHARE then", x.guest.hvc(abi.HVC_UNSHARE, page).status, INVALID_PARAMETER)


@claim(emulated="memfd guest_memfd private", pkvm="memfd", cpus=2, origin=f"{STATES}: under both components' locks")
def of_two_shares_at_once_one_is_refused(x: Experiment) -> None:
    """Of two vCPUs that share the same page at the same time one is answered 0 and the other INVALID_PARAMETER (-3)."""
    range_, other = x.page(PAGES), x.others()[0]
    answers = together(x, (x.guest, other), abi.HVC_SHARE, (range_, range_), PAGES)
    served = sum(answer == 0 for both in answers for answer in both)
    refused = sum(answer == INVALID_PARAMETER for both in answers for answer in both)
    once = sum(sorted(both) == [INVALID_PARAMETER, 0] for both in answers)
    x.check(f"shares answered 0, of two of each of {PAGES} pages", served, PAGES)
    x.check("shares answered -3", refused, PAGES)
    x.check("pages that one vCPU shared and the other was refused", once, PAGES)


@claim(emulated="memfd guest_memfd private", pkvm="memfd", origin=EXIT)
def a_share_exits_to_userspace(x: Experiment) -> None:
    """Each share and unshare leaves KVM_RUN with KVM_EXIT_HYPERCALL, so that the VMM hears of it from the kernel."""
    range_ = x.page(16)
    x.start()
    before = _hypercall_exits(x)
    x.guest.share(range_, 16, how=abi.SHARE_HVC)
    x.check("exits of 16 shares", _hypercall_exits(x) - before, 16)
    x.guest.unshare(range_, 16, how=abi.SHARE_HVC)
    x.check("exits of 16 shares and 16 unshares", _hypercall_exits(x) - before, 32)


def _answer(order: Order[Hvc]) -> str:
    """Return the guest's answer of a call, as text."""
    try:
        return f"x0 = {order.result().status}"
    except GuestFault as fault:
        return "external abort" if fault.trap and fault.trap.is_external else "trap"


def _hypercall_exits(x: Experiment) -> int:
    return next(exit_.count for exit_ in x.machine.counters.exits if exit_.name == "hypercall")
