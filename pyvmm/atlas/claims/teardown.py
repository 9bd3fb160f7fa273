# SPDX-License-Identifier: Apache-2.0
"""Claims about the end of a VM: its pages and the locked memory afterwards.

Private pages are read through KVM's mapping, because that of the host's own code may be closed.
"""

from __future__ import annotations

import os
import time

from pyvmm.atlas.claim import group
from pyvmm.errors import KvmError
from pyvmm.experiment import BEYOND, Experiment, raw
from pyvmm.experiment.host.access import process_vm_readv
from pyvmm.experiment.host.bare import HOLDERS, Bare, locked, look, store64
from pyvmm.kvm.guest_memfd import GuestMemfd
from pyvmm.memory import mman
from pyvmm.memory.address import Gpa
from pyvmm.memory.backing import FileBacking
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from pyvmm.uapi.kvm import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP
from pyvmm.vcpu.outcome import Ending

claim = group("teardown")

TORN = 'thread: "it can\'t have it back until the guest has been entirely torn down"'
POISONED = 'thread: "at which point all of memory is poisoned by the hypervisor obviously"'
RECLAIM = "arch/arm64/kvm/hyp/nvhe/mem_protect.c: of a dying VM, owned pages are cleared, shared ones are not"
UNPIN = "arch/arm64/kvm/pkvm.c, __pkvm_pgtable_stage2_reclaim(): pages are unpinned and unaccounted"
FORCED = "arch/arm64/kvm/hyp/nvhe/mem_protect.c: a page taken by force is poisoned in the guest's stage 2"
GMEM = "virt/kvm/guest_memfd.c: the file holds a reference to its VM, and is that VM's alone"
TIME = 'thread: "one of the main goals is the spend as little time as possible in that context"'
WORD = 0x5EC2E7
SHARED_FILE = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED


@claim(none="memfd guest_memfd", emulated="memfd", pkvm="memfd thp", origin=f"{POISONED}; {RECLAIM}")
def private_pages_come_back_as_zeros(x: Experiment) -> None:
    """When the VM is gone, every page that was private reads as zeros to the host."""
    range_ = x.page(64)
    x.guest.fill(range_, 64 * HOST_PAGE, WORD)
    x.picture("while the guest lives")
    x.guest.off()
    x.machine.wait(10)
    x.end()
    x.check("pages, of 64, that read as zeros", _zero_pages(x, range_, 64), 64)


@claim(emulated="memfd guest_memfd", pkvm="memfd thp", origin=f"{POISONED}; {RECLAIM}")
def pages_taken_back_come_back_as_zeros(x: Experiment) -> None:
    """When the VM is gone, pages that were shared and taken back read as zeros, what the host put there included."""
    range_ = x.page(8)
    x.guest.fill(range_, 8 * HOST_PAGE, WORD)
    x.guest.share(range_, 8)
    x.memory.fill(range_, 8 * HOST_PAGE, 0x11)
    x.guest.unshare(range_, 8)
    x.end()
    x.check("pages, of 8, that read as zeros", _zero_pages(x, range_, 8), 8)


@claim(none="memfd", emulated="memfd guest_memfd", pkvm="memfd thp", origin=f"{TORN}; {RECLAIM}")
def shared_pages_keep_their_contents(x: Experiment) -> None:
    """When the VM is gone, a page that the guest had shared still holds what both had stored there."""
    page = x.page()
    x.guest.share(page)
    x.guest.write64(page, 0x11)
    x.host_stores(page + 8, 0x22)
    x.end()
    x.check("the guest's word", x.host64(page), 0x11)
    x.check("the host's word", x.host64(page + 8), 0x22)


@claim(none="memfd guest_memfd", emulated="memfd guest_memfd", pkvm="memfd thp", origin=f"{RECLAIM}; others never left")
def untouched_pages_keep_their_contents(x: Experiment) -> None:
    """When the VM is gone, a page that the guest never touched still holds what the host had loaded there."""
    page = x.page()
    x.memory.write(page, _word(0x33))
    x.start()
    x.end()
    x.check("the host reads", (look(x.memory.hva(page)) or b"")[:8] == _word(0x33))


@claim(none="memfd", emulated="memfd", pkvm="memfd thp", origin=f"{TORN}; {UNPIN}")
def locked_memory_returns(x: Experiment) -> None:
    """When the VM is gone, the VMM's locked and pinned memory is what it was before the run."""
    before = locked()
    range_ = x.page(64)
    x.guest.touch(range_, 64)
    x.guest.share(range_, 16)
    x.guest.unshare(range_, 8)
    x.tell("at least 256 kB are locked while the guest lives", locked()[0] - before[0] >= 256)
    x.end()
    x.check("kB of VmLck more than before", locked()[0] - before[0], 0)
    x.check("kB of VmPin more than before", locked()[1] - before[1], 0)


@claim(pkvm="memfd thp", origin=TORN)
def power_off_gives_nothing_back(x: Experiment) -> None:
    """A guest's power-off gives no page back: they stay locked, and the host locked out, until the VM is gone."""
    page = x.page()
    x.guest.write64(page, WORD)
    before = locked()
    x.guest.off()
    x.check("the guest powered off", x.machine.wait(10).ending is Ending.POWEROFF)
    x.check("as much is locked as before", locked() == before)
    x.check("the host reaches the page", x.host64(page) is not None, False)
    x.end()
    x.check("once the VM is gone, the host reads", x.host64(page), 0)


@claim(pkvm="memfd", origin=f"{TIME}; {UNPIN}: page by page, when the VM's last reference goes")
def all_pages_are_back_when_the_last_close_returns(x: Experiment) -> None:
    """When the close of a VM's last descriptor returns, every private page is cleared and none is still locked."""
    before = locked()
    for pages in (256, 1024):
        for protection in (Protection.NONE, x.protection):
            with Bare(protection, pages + 1) as bare:
                bare.run()
                for holder in HOLDERS[1:]:
                    bare.let_go(holder)
                begun = time.perf_counter_ns()
                bare.let_go(HOLDERS[0])
                ended = time.perf_counter_ns()
                kind = "private pages" if protection.isolates else "pages of a plain VM"
                x.time(f"end of a VM with {pages} {kind} ns", ended - begun)
                if protection.isolates:
                    x.check(f"of {pages} private pages read as zeros", bare.clear_pages(), pages)
                    x.check(f"with {pages} private pages, as much is locked then as before", locked() == before)


@claim(pkvm="memfd", origin=FORCED)
def a_page_taken_by_force_is_usable_again(x: Experiment) -> None:
    """A page that the host took back by force is an ordinary page once the VM is gone, and good for the next guest."""
    page = x.page()
    x.guest.write64(page, WORD)
    x.check("process_vm_readv of the page reads", process_vm_readv(x.memory.hva(page)).word, 0)
    x.check("KVM_RUN at the guest's next load", x.went(x.guest.start_read64(page)), "EFAULT")
    file = _end_and_keep(x)
    x.check("the host reads", x.host64(page), 0)
    x.check("the host stores", x.host_stores(page, 0x44))
    with Experiment(x.protection) as again:
        again.memory.add(BEYOND, file)
        x.check("the next VM's guest reads that", again.guest.read64(_beyond(x, page)), 0x44)
        x.check("the host reaches it then", x.host64(page) is not None, False)


@claim(none="memfd", emulated="memfd", pkvm="memfd thp", origin=f"{POISONED}; {UNPIN}")
def the_memory_of_a_dead_vm_backs_the_next(x: Experiment) -> None:
    """The memfd of a VM that is gone can back another one, whose guest finds none of what was private before."""
    page, kept = x.page(), x.page()
    x.guest.write64(page, WORD)
    x.guest.share(kept)
    x.guest.write64(kept, 0x55)
    file = _end_and_keep(x)
    with Experiment(x.protection) as again:
        again.memory.add(BEYOND, file)
        x.check("the next guest reads in the page that was private", again.guest.read64(_beyond(x, page)), 0)
        x.check("and in the one that was shared", again.guest.read64(_beyond(x, kept)), 0x55)
        again.guest.write64(_beyond(x, page), 0x66)
        x.check("it reads its own store", again.guest.read64(_beyond(x, page)), 0x66)


@claim(none="memfd", pkvm="memfd", origin=GMEM)
def a_guest_memfd_outlives_its_vm(x: Experiment) -> None:
    """A guest_memfd keeps its contents after its VM's descriptors are closed, and no other VM can have it (EINVAL)."""
    fd, address = _guest_memfd(x)
    x.stack.callback(os.close, fd)
    x.stack.callback(mman.unmap, address, 1 << 16)
    x.start()
    x.end()
    x.check("after the VM's descriptors are closed it reads as before", look(address, 8) == _word(0x77))
    with Bare(x.protection) as other:
        file = GuestMemfd(os.dup(fd), other.vm, 1 << 16, SHARED_FILE)
        try:
            other.vm.set_memory(1, BEYOND, 1 << 16, address, guest_memfd=file)
            x.check("a slot of another VM over it", "taken", "EINVAL")
        except KvmError as error:
            x.check("a slot of another VM over it", raw.name(error.errno or 0), "EINVAL")


@claim(pkvm="memfd", origin=f"{GMEM}; {UNPIN}")
def a_guest_memfd_keeps_a_protected_vm_alive(x: Experiment) -> None:
    """While a guest_memfd of a protected VM is open, or mapped, the VM's own pages stay locked and out of reach."""
    before = locked()
    page = x.page()
    fd, address = _guest_memfd(x)
    x.guest.write64(page, WORD)
    x.end()
    x.check("memory is locked while the guest_memfd is open and mapped", locked() != before)
    os.close(fd)
    x.check("memory is locked while it is mapped", locked() != before)
    x.check("the host reaches the guest's page", x.host64(page) is not None, False)
    mman.unmap(address, 1 << 16)
    x.check("once it is unmapped, as much is locked as before", locked() == before)
    x.check("and the host reads", x.host64(page), 0)


def _word(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _zero_pages(x: Experiment, gpa: Gpa, pages: int) -> int:
    return sum(look(x.memory.hva(gpa + page * HOST_PAGE)) == bytes(HOST_PAGE) for page in range(pages))


def _end_and_keep(x: Experiment) -> FileBacking:
    """End the VM and return its memory's file, for the next one to own."""
    old = x.memory.slots[0].backing
    file = FileBacking(os.dup(old.fd), old.size)
    file.kind = old.kind
    x.end()
    return file


def _beyond(x: Experiment, gpa: Gpa) -> Gpa:
    """Return a page's gpa in a VM that has the memory of ``x`` at BEYOND."""
    return Gpa(BEYOND + gpa - x.memory.slots[0].gpa)


def _guest_memfd(x: Experiment) -> tuple[int, int]:
    """Make a guest_memfd that no slot uses, and store to it. Returns its descriptor and its mapping's address."""
    file = x.machine.vm.create_guest_memfd(1 << 16, SHARED_FILE)
    fd = os.dup(file.fileno())
    file.close()
    address = mman.map_shared(fd, 1 << 16)
    if not store64(address, 0x77):
        x.cannot("this kernel's guest_memfd cannot be stored to by the host")
    return fd, address
