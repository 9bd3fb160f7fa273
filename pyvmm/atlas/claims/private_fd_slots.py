# SPDX-License-Identifier: Apache-2.0
"""Claims about slots over a guest_memfd: the source of their pages, and the effect of losing the file."""

from __future__ import annotations

from functools import partial

from pyvmm.atlas.claim import group
from pyvmm.experiment import BEYOND, Experiment, raw
from pyvmm.labenv import in_lab
from pyvmm.memory import mman
from pyvmm.memory.address import Gpa
from pyvmm.memory.backing import Memfd, SharedGuestMemfd
from pyvmm.pages import HOST_PAGE
from pyvmm.uapi.kvm import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from pyvmm.uapi.kvm_cap import KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_MEMORY_FAULT_INFO
from pyvmm.uapi.kvm_memory import KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_SET_MEMORY_ATTRIBUTES, kvm_memory_attributes
from pyvmm.uapi.kvm_run import ExitReason

claim = group("private-fd")

BIND = "virt/kvm/guest_memfd.c, kvm_gmem_bind()"
RELEASE = "virt/kvm/guest_memfd.c, kvm_gmem_release()"
REGION = "virt/kvm/kvm_main.c, kvm_set_memory_region()"
ABORT = "arch/arm64/kvm/mmu.c, kvm_handle_guest_abort(): a protected VM's faults go to pkvm_mem_abort()"
NO_WAY_BACK = 'thread: "Once it has donated a page to a guest, it can\'t have it back until ... torn down"'
FATAL = 'thread: "when a whole gets punched in the fd KVM will go and unmap the page in the private SPTEs"'
SIZE = 1 << 16
VALUE = 42
FILES = "memfd guest_memfd private"


# -- where the pages come from


@claim(none=FILES, emulated=FILES, pkvm="memfd", origin=f"{BIND}: the slot begins at guest_memfd_offset")
def two_slots_on_one_file_are_two_parts(x: Experiment) -> None:
    """Two slots on two parts of one file show the guest different pages, and a punch hits the one it is meant for."""
    file = raw.make(x, 2 * SIZE)
    there = Gpa(BEYOND + (1 << 30))
    x.memory.add(BEYOND, file, offset=SIZE, size=SIZE)
    x.memory.add(there, file, offset=0, size=SIZE)
    x.guest.write64(BEYOND, 1)
    x.guest.write64(there, 2)
    x.check("the guest reads in the one", x.guest.read64(BEYOND), 1)
    x.check("in the other", x.guest.read64(there), 2)
    x.check("punching the file's first page", raw.punch(file.fd, 0, HOST_PAGE), "ok")
    x.event("punch", there)
    x.check("in the one, which is further on in the file", x.guest.read64(BEYOND), 1)
    x.check("in the other, which begins there", x.guest.read64(there), 0)


@claim(none=FILES, pkvm="memfd", origin=f"{BIND}: -EEXIST where a binding is there")
def a_page_has_one_place_in_the_guest(x: Experiment) -> None:
    """A second slot over a part of the file that has one is refused with EEXIST."""
    file, there = raw.make(x, SIZE), BEYOND + (1 << 30)
    raw.slot(x, BEYOND, SIZE, file.hva, file=file.guest_memfd)
    second = raw.answer(partial(raw.slot, x, there, SIZE, file.hva, file=file.guest_memfd))
    x.check("a second slot", second, "EEXIST")
    x.guest.write64(BEYOND, VALUE)
    if second == "ok":
        order = x.guest.start_read64(there)
        went = x.went(order)
        x.tell("the guest's load through the second", went)
        if went == "went on":
            x.tell("reads of the first's store", order.result())
    else:
        x.check("the guest reads through the first", x.guest.read64(BEYOND), VALUE)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"api.rst: KVM_MEM_GUEST_MEMFD; {ABORT}")
def pages_come_from_the_fd_not_the_address(x: Experiment) -> None:
    """A guest_memfd slot whose userspace_addr is another file's mapping shows the guest the guest_memfd's pages."""
    file, other = (x.stack.enter_context(each) for each in (SharedGuestMemfd(x.machine.vm, SIZE), Memfd(SIZE)))
    file.load(0, (0xFD).to_bytes(8, "little"))
    other.load(0, (0xAD).to_bytes(8, "little"))
    raw.slot(x, BEYOND, SIZE, other.hva, file=file.guest_memfd)
    source = {0xFD: "the guest_memfd", 0xAD: "userspace_addr"}.get(x.guest.read64(BEYOND), "neither")
    x.check("the guest reads from", source, "the guest_memfd")


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{FATAL}; {ABORT}")
def a_punch_of_the_slots_fd_reaches_the_guest(x: Experiment) -> None:
    """A page punched from a slot's guest_memfd, whatever its userspace_addr is, is zeros at the guest's next load."""
    file, other = (x.stack.enter_context(each) for each in (SharedGuestMemfd(x.machine.vm, SIZE), Memfd(SIZE)))
    raw.slot(x, BEYOND, SIZE, other.hva, file=file.guest_memfd)
    x.guest.write64(BEYOND, VALUE)
    x.check("the punch", raw.punch(file.fd, 0, HOST_PAGE), "ok")
    x.event("punch", BEYOND)
    x.check("the guest reads", x.guest.read64(BEYOND), 0)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{ABORT}: folio_test_swapbacked(), else -EIO")
def a_mapped_guest_memfd_serves_the_guest(x: Experiment) -> None:
    """A slot on a guest_memfd, its own mapping for userspace_addr, is accepted and serves the guest."""
    file = x.stack.enter_context(SharedGuestMemfd(x.machine.vm, SIZE))
    x.check("the slot", raw.answer(partial(raw.slot, x, BEYOND, SIZE, file.hva, file=file.guest_memfd)), "ok")
    x.check("the guest's store", x.went(x.guest.start_write64(BEYOND, VALUE)), "went on")


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{BIND}: file->private_data->kvm is this VM, or -EINVAL")
def the_file_serves_one_vm(x: Experiment) -> None:
    """A slot of another VM on the file is refused with EINVAL."""
    file = x.stack.enter_context(SharedGuestMemfd(x.machine.vm, SIZE))
    other = x.stack.enter_context(x.machine.system.create_vm(0))
    said = raw.answer(partial(other.set_memory, 0, BEYOND, SIZE, file.hva, guest_memfd=file.guest_memfd))
    x.check("the other VM's slot", said, "EINVAL")
    x.check("this VM's", raw.answer(partial(raw.slot, x, BEYOND, SIZE, file.hva, file=file.guest_memfd)), "ok")


@claim(none="guest_memfd private", origin=f"{BIND}: offset and size in pages, within the file")
def a_slot_lies_within_its_file(x: Experiment) -> None:
    """A slot at an unaligned offset, or that ends beyond the file, is refused with EINVAL."""
    file = raw.make(x, SIZE)
    for what, offset, size in (
        ("from the middle of a page", 512, HOST_PAGE),
        ("that ends a page behind it", 0, SIZE + HOST_PAGE),
        ("that begins behind it", SIZE, HOST_PAGE),
        ("whose end wraps around", (1 << 64) - HOST_PAGE, 2 * HOST_PAGE),
    ):
        said = raw.answer(partial(raw.slot, x, BEYOND, size, file.hva, file=file.guest_memfd, offset=offset))
        x.check(f"a slot {what}", said, "EINVAL")


# -- what can be asked of a slot


@claim(none=FILES, pkvm="memfd", origin=f"{REGION}: check_memory_region_flags()")
def slots_are_neither_logged_nor_read_only(x: Experiment) -> None:
    """A slot on the file with KVM_MEM_LOG_DIRTY_PAGES or KVM_MEM_READONLY is refused with EINVAL."""
    file = raw.make(x, SIZE)
    for name, gpa, flags in (
        ("LOG_DIRTY_PAGES", BEYOND, KVM_MEM_LOG_DIRTY_PAGES),
        ("READONLY", BEYOND + SIZE, KVM_MEM_READONLY),
    ):
        said = raw.answer(partial(raw.slot, x, gpa, SIZE, file.hva, file=file.guest_memfd, flags=flags))
        x.check(f"a slot with {name}", said, "EINVAL")


@claim(none=FILES, pkvm="memfd", origin=f"{REGION}: KVM_MEM_GUEST_MEMFD slots are immutable, -EINVAL")
def a_slot_can_only_be_deleted(x: Experiment) -> None:
    """A slot can be neither changed nor moved (EINVAL), only deleted, and its pages outlive it in the file."""
    file, vm = raw.make(x, SIZE), x.machine.vm
    number = raw.slot(x, BEYOND, SIZE, file.hva, file=file.guest_memfd)
    x.guest.write64(BEYOND, VALUE)
    there = BEYOND + (1 << 30)
    again = partial(vm.set_memory, number, size=SIZE, hva=file.hva, guest_memfd=file.guest_memfd)
    logged = raw.answer(partial(again, gpa=BEYOND, flags=KVM_MEM_LOG_DIRTY_PAGES))
    x.check("giving it LOG_DIRTY_PAGES", logged, "EINVAL")
    x.check("moving it", raw.answer(partial(again, gpa=there)), "EINVAL")
    x.check("deleting it", raw.answer(partial(vm.delete_memory, number)), "ok")
    made = raw.answer(partial(raw.slot, x, there, SIZE, file.hva, file=file.guest_memfd))
    if x.check("a new one elsewhere", made, "ok"):
        order = x.guest.start_read64(there)
        if x.check("the guest's load through that", x.went(order), "went on"):
            x.check("the guest reads there", order.result(), VALUE)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin="Documentation/virt/kvm/api.rst, KVM_SET_MEMORY_ATTRIBUTES")
def pages_can_be_declared_private(x: Experiment) -> None:
    """Userspace can tell KVM which pages are private and which are shared (KVM_SET_MEMORY_ATTRIBUTES)."""
    page, vm = x.page(), x.machine.vm
    x.check("KVM_CAP_MEMORY_ATTRIBUTES has PRIVATE", vm.check(KVM_CAP_MEMORY_ATTRIBUTES), KVM_MEMORY_ATTRIBUTE_PRIVATE)
    wanted = kvm_memory_attributes(address=page, size=HOST_PAGE, attributes=KVM_MEMORY_ATTRIBUTE_PRIVATE)
    x.check("KVM_SET_MEMORY_ATTRIBUTES", raw.name(vm.attempt(KVM_SET_MEMORY_ATTRIBUTES, wanted)[1]), "ok")


# -- when the file goes


@claim(none=FILES, pkvm="memfd", origin=f"{RELEASE}: at the last reference, and a mapping holds one")
def a_mapping_keeps_a_closed_file(x: Experiment) -> None:
    """While a mapping is there the file's descriptor can be closed, and the guest keeps its page and gets new ones."""
    file = raw.make(x, SIZE)
    raw.slot(x, BEYOND, SIZE, file.hva, file=file.guest_memfd)
    x.guest.write64(BEYOND, VALUE)
    held = mman.map_shared(file.fd, SIZE)
    x.stack.callback(mman.unmap, held, SIZE)
    file.close()
    for what, gpa, wanted in (("a page it has", BEYOND, VALUE), ("a new page", BEYOND + HOST_PAGE, 0)):
        order = x.guest.start_read64(gpa)
        if not x.check(f"the guest's load of {what}", x.went(order), "went on"):
            return
        x.check(f"the guest reads in {what}", order.result(), wanted)


@claim(none=FILES, pkvm="memfd", origin=f"{RELEASE}; arch/arm64/kvm/mmu.c, gmem_abort()")
def a_file_that_is_gone_is_a_memory_fault(x: Experiment) -> None:
    """Once the file has gone under a live slot, the guest's access is EFAULT with KVM_EXIT_MEMORY_FAULT for KVM_RUN."""
    file = raw.make(x, SIZE)
    raw.slot(x, BEYOND, SIZE, file.hva, file=file.guest_memfd)
    page = BEYOND + HOST_PAGE
    x.guest.write64(page, VALUE)
    file.close()
    failure = x.failed(x.guest.start_read64(page + 8))
    x.check("KVM_RUN", failure.name if failure else "went on", "EFAULT")
    if failure:
        x.check("exit_reason", failure.exit_reason, ExitReason.KVM_EXIT_MEMORY_FAULT.value)
        x.check("gpa told, from the slot's start", failure.gpa - BEYOND if failure.gpa else "none", HOST_PAGE)
        x.check("size told", failure.size, HOST_PAGE)
        x.check("flags told (8 would be private)", failure.flags, 0)


@claim(none="memfd", pkvm="memfd", origin="Documentation/virt/kvm/api.rst, KVM_CAP_MEMORY_FAULT_INFO")
def memory_faults_are_announced(x: Experiment) -> None:
    """KVM_CAP_MEMORY_FAULT_INFO is reported, as KVM_EXIT_MEMORY_FAULT works."""
    file = x.stack.enter_context(SharedGuestMemfd(x.machine.vm, SIZE))
    raw.slot(x, BEYOND, SIZE, file.hva, file=file.guest_memfd)
    x.start()
    file.close()
    x.tell("a file that is gone makes KVM_RUN fail with", x.went(x.guest.start_read64(BEYOND)))
    x.check("KVM_CAP_MEMORY_FAULT_INFO", x.machine.system.check(KVM_CAP_MEMORY_FAULT_INFO), 1)


@claim(none=FILES, pkvm="memfd", origin=f"{NO_WAY_BACK}; {RELEASE}")
def a_guest_that_lost_its_file_gets_another(x: Experiment) -> None:
    """A slot whose file is gone can be replaced while the vCPU waits in its access, which then succeeds."""
    file, vm = raw.make(x, SIZE), x.machine.vm
    number = raw.slot(x, BEYOND, SIZE, file.hva, file=file.guest_memfd)
    x.guest.write64(BEYOND, VALUE)
    file.close()
    order = x.guest.start_read64(BEYOND)
    failed = x.failed(order)
    x.tell("KVM_RUN", failed.name if failed else "went on")
    if not x.check("deleting the slot", raw.answer(partial(vm.delete_memory, number)), "ok"):
        x.tell("the guest reads", order.result() if not failed else "nothing")
        return
    spare = x.stack.enter_context(Memfd(SIZE))
    spare.load(0, (VALUE + 1).to_bytes(8, "little"))
    raw.slot(x, BEYOND, SIZE, spare.hva)
    x.event("slot", BEYOND, SIZE // HOST_PAGE)
    x.retry()
    x.check("the guest reads what the new file holds", order.result(), VALUE + 1)


@claim(none=FILES, emulated="memfd guest_memfd", pkvm="memfd", origin=f"{NO_WAY_BACK}; {REGION}: KVM_MR_DELETE")
def a_slot_moves_to_another_file_while_the_guest_lives(x: Experiment) -> None:
    """Between two accesses of the guest, which does not notice, its slot can be made anew over another file."""
    file, vm = raw.make(x, SIZE), x.machine.vm
    number = raw.slot(x, BEYOND, SIZE, file.hva, file=file.guest_memfd)
    x.guest.write64(BEYOND, VALUE)
    spare = x.stack.enter_context(Memfd(SIZE))
    spare.load(0, (VALUE + 1).to_bytes(8, "little"))
    before = raw.exits(x)
    deleted = raw.answer(partial(vm.delete_memory, number))
    x.check("deleting the slot", deleted, "ok")
    if deleted == "ok":
        raw.slot(x, BEYOND, SIZE, spare.hva)
        x.event("slot", BEYOND, SIZE // HOST_PAGE)
    x.check("the guest reads", x.guest.read64(BEYOND), VALUE + 1)
    x.check("exits for that", raw.exits(x) - before, 0)


@claim(
    none="guest_memfd",
    pkvm="memfd",
    origin="virt/kvm/guest_memfd.c, kvm_gmem_error_folio(); arch/arm64/kvm/mmu.c, gmem_abort()",
)
def a_poisoned_page_is_told_and_a_punch_cures_it(x: Experiment) -> None:
    """A guest's access to broken memory makes KVM_RUN fail with EHWPOISON, and succeeds once that page is punched."""
    if not in_lab():
        x.cannot("a poisoned page is lost to the host until it boots again: in the lab only")
    page = x.page()
    x.guest.write64(page, VALUE)
    file, offset = raw.place(x, page)
    poisoned = raw.poison(file.fd, offset)
    if poisoned != "ok":
        x.cannot(f"memory cannot be poisoned here (madvise MADV_HWPOISON: {poisoned})")
    order = x.guest.start_read64(page)
    failure = x.failed(order)
    x.check("KVM_RUN", failure.name if failure else "went on", "EHWPOISON")
    if failure is None:
        x.tell("the guest reads", order.result())
        return
    x.check("exit_reason", failure.exit_reason, ExitReason.KVM_EXIT_MEMORY_FAULT.value)
    x.check("it is that page", failure.gpa == page)
    x.memory.punch(page, HOST_PAGE)
    x.event("punch", page)
    x.retry()
    x.check("after a punch the guest reads", order.result(), 0)
