# SPDX-License-Identifier: Apache-2.0
"""Claims about irreversible changes of pages, vCPUs and memory slots, and what the VMM can still do."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from pyvmm._native import lib
from pyvmm.atlas.claim import group
from pyvmm.errors import hex_
from pyvmm.experiment import BEYOND, PATIENCE, Experiment, raw
from pyvmm.experiment.host import access, processes
from pyvmm.guest.puppet import Puppet
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.machine.machine import Machine
from pyvmm.memory.address import Gpa
from pyvmm.pages import HOST_PAGE
from pyvmm.uapi.kvm import KVM_CHECK_EXTENSION, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_RUN
from pyvmm.uapi.kvm_arm64 import ARM64_SYS_REG, core_reg
from pyvmm.uapi.kvm_cap import KVM_CAP_USER_MEMORY
from pyvmm.uapi.kvm_run import ExitReason
from pyvmm.uapi.kvm_state import KVM_GET_MP_STATE, kvm_mp_state
from pyvmm.vcpu.outcome import Ending

if TYPE_CHECKING:
    from pyvmm._native import pv_vcpu

claim = group("fatal")
everywhere = partial(claim, none="memfd", emulated="memfd", pkvm="memfd")

RECLAIM = "nvhe/mem_protect.c, forced reclaim; arch/arm64/kvm/pkvm.c: a poisoned page is -EFAULT"
TEARDOWN = 'thread: "the host can\'t unmap anything from the guest stage-2, it can only tear it down entirely"'
SLOTS = "arch/arm64/kvm/mmu.c, kvm_arch_prepare_memory_region()"
CONTEXT = "nvhe/hyp-main.c: a protected vCPU's context is the host's, copied on every entry and exit"
NOP, RET, MRS_X0 = 0xD503_201F, 0xD65F_03C0, 0xD538_0000
LDP, LDR_POST = 0xA940_0801, 0xF840_8401
"""ldp x1, x2, [x0]; ldr x1, [x0], #8"""
WAIT = (0xD280_0001, 0xB400_0001, 0xAA01_03E0, RET)
"""mov x1, #0; cbz x1, .; mov x0, x1; ret"""
TAINT_USER = 1 << 6
"""include/linux/panic.h"""
ID_REGISTERS = {"ID_AA64PFR0_EL1": 4, "ID_AA64DFR0_EL1": 5, "ID_AA64ISAR0_EL1": 6, "ID_AA64MMFR0_EL1": 7}
"""Their CRm; op0 is 3, op1, CRn and op2 are 0."""


@claim(pkvm="memfd", origin=RECLAIM)
def a_reclaimed_page_is_efault(x: Experiment) -> None:
    """After the host's kernel reads a private page, the host has zeros there, and the guest's next access is EFAULT."""
    page = _reclaimed(x)
    failure = x.failed(x.guest.start_read64(page))
    x.check("KVM_RUN", failure.name if failure else "went on", "EFAULT")
    x.check("exit_reason, gpa and size told with it", _told(failure), "0, none")
    x.check("a load of the host's sees", x.host64(page), 0)
    x.check("the host can store there", x.host_stores(page, 1))


@claim(pkvm="memfd", origin=RECLAIM)
def poison_stays(x: Experiment) -> None:
    """A page taken back by force stays lost: every later run fails at it, and a new page behind it does not help."""
    page = _reclaimed(x)
    order = x.guest.start_read64(page)
    runs = [x.went(order)]
    for _ in range(3):
        x.retry()
        runs.append(x.went(order))
    x.check("four runs", " ".join(runs), "EFAULT EFAULT EFAULT EFAULT")
    backing, offset = raw.place(x, page)
    x.tell("the host punches the old page out of its file", raw.punch(backing.fd, offset, HOST_PAGE))
    x.tell("and stores to the new one", x.host_stores(page, 1))
    x.retry()
    x.check("another run", x.went(order), "EFAULT")


@claim(pkvm="memfd", cpus=2, origin=RECLAIM)
def other_vcpus_go_on(x: Experiment) -> None:
    """While a vCPU is stopped for good at a page taken back by force, another one of the guest goes on elsewhere."""
    [other] = x.others()
    good = x.page()
    page = _reclaimed(x)
    x.check("the first vCPU's run", x.went(x.guest.start_read64(page)), "EFAULT")
    other.write64(good, 5)
    x.check("the second one stores and loads", other.read64(good), 5)
    other.share(good)
    x.check("it shares that with the host", x.host64(good), 5)
    x.check("a fresh page is donated to it", x.went(other.start_read64(x.page())), "went on")
    x.check("its run at the lost page", x.went(other.start_read64(page)), "EFAULT")


@claim(emulated="memfd guest_memfd", pkvm="memfd", origin=f"{TEARDOWN}; mm/shmem.c, FALLOC_FL_PUNCH_HOLE")
def a_hole_splits_the_brain(x: Experiment) -> None:
    """A hole punched in the file under a private page leaves the guest its page and gives the host another one."""
    page = x.page()
    x.guest.write64(page, 1)
    x.memory.punch(page, HOST_PAGE, unsafe=True)
    x.event("punch", page)
    x.check("the host loads", x.host64(page), 0)
    x.check("the guest loads", x.guest.read64(page), 1)
    x.check("the host can store", x.host_stores(page, 2))
    x.check("the guest then loads", x.guest.read64(page), 1)
    x.check("the host then loads", x.host64(page), 2)


@claim(none="memfd", pkvm="memfd", origin=f"{SLOTS}: -EPERM once the guest has run; {TEARDOWN}")
def a_slot_stays(x: Experiment) -> None:
    """A slot of a guest that has run can be neither deleted nor moved (EPERM), touched or not."""
    backing = raw.make(x, 2 * HOST_PAGE)
    touched = raw.slot(x, BEYOND, HOST_PAGE, backing.hva)
    fresh = raw.slot(x, BEYOND + HOST_PAGE, HOST_PAGE, backing.hva + HOST_PAGE)
    x.guest.write64(BEYOND, 7)
    vm, away = x.machine.vm, BEYOND + 0x10_0000
    for slot, hva, kind in ((touched, backing.hva, "touched"), (fresh, backing.hva + HOST_PAGE, "fresh")):
        moved = raw.answer(partial(vm.set_memory, slot, away, HOST_PAGE, hva))
        x.check(f"moving a {kind} slot", moved, "EPERM")
        x.check(f"deleting a {kind} slot", raw.answer(partial(vm.delete_memory, slot)), "EPERM")


@everywhere(origin=SLOTS)
def slots_come_at_any_time(x: Experiment) -> None:
    """Before the first run slots can be added, moved and deleted, and after it they can still be added."""
    backing = raw.make(x, 2 * HOST_PAGE)
    backing.load(HOST_PAGE, (7).to_bytes(8, "little"))
    vm, slot = x.machine.vm, raw.slot(x, BEYOND, HOST_PAGE, backing.hva)
    moved = raw.answer(lambda: vm.set_memory(slot, BEYOND + 0x10_0000, HOST_PAGE, backing.hva))
    x.check("before the first run, moving one", moved, "ok")
    x.check("deleting it", raw.answer(lambda: vm.delete_memory(slot)), "ok")
    x.start()
    x.check("adding one later", raw.answer(lambda: raw.slot(x, BEYOND, HOST_PAGE, backing.hva + HOST_PAGE)), "ok")
    x.check("the guest loads from it", x.guest.read64(BEYOND), 7)


@claim(none="memfd", pkvm="memfd", origin=f"{SLOTS}: -EPERM for flags")
def no_slot_is_logged_or_read_only(x: Experiment) -> None:
    """KVM_MEM_LOG_DIRTY_PAGES and KVM_MEM_READONLY are refused with EPERM, before the guest has run and after."""
    backing = raw.make(x, HOST_PAGE)
    for when in ("before the first run", "after it"):
        for name, flag in (("LOG_DIRTY_PAGES", KVM_MEM_LOG_DIRTY_PAGES), ("READONLY", KVM_MEM_READONLY)):
            answer = raw.answer(partial(_trial_slot, x, backing.hva, flag))
            x.check(f"KVM_MEM_{name} {when}", answer, "EPERM")
        x.start()


@everywhere(origin="nvhe/pkvm.c: the number of vCPUs is fixed when EL2 makes the VM")
def a_vcpu_can_come_later(x: Experiment) -> None:
    """A vCPU that is made after the guest's first run can run too."""
    x.start()
    made: list[Vcpu] = []
    x.check("KVM_CREATE_VCPU", raw.answer(lambda: made.append(x.machine.vm.create_vcpu(1))), "ok")
    for vcpu in made:
        vcpu.init(power_off=True)
        vcpu.run.immediate_exit = 1
        x.check("KVM_RUN with immediate_exit", raw.name(vcpu.attempt(KVM_RUN)[1]), "EINTR")
    x.check("the first vCPU goes on", x.went(x.guest.start_read64(x.page())), "went on")


@everywhere(origin=CONTEXT)
def registers_stay_open(x: Experiment) -> None:
    """The VMM can read and change the registers of a guest that has run, with KVM_GET_ONE_REG and KVM_SET_ONE_REG."""
    code = _code(x, *WAIT)
    vcpu = x.machine.vcpus[0]
    if not x.check("KVM_GET_ONE_REG of the pc", raw.answer(lambda: vcpu.pc), "ok"):
        return
    order = x.guest.start_execute(code, 0x1234)
    with _stopped_at(x, code + 4):
        x.check("KVM_GET_ONE_REG of x0 tells its argument", hex_(vcpu.get_reg(core_reg("x0"))), hex_(0x1234))
        vcpu.set_reg(core_reg("x1"), 0x5678)
    x.check("KVM_SET_ONE_REG of x1 is what it goes on with", hex_(order.result().value), hex_(0x5678))


@everywhere(origin="nvhe/sys_regs.c: a protected guest's ID registers are EL2's")
def id_registers_are_told_as_they_are(x: Experiment) -> None:
    """KVM_GET_ONE_REG returns the CPU's ID registers as the guest reads them."""
    vcpu = x.machine.vcpus[0]
    for name, crm in ID_REGISTERS.items():
        reads, register = x.guest.execute(_code(x, MRS_X0 | crm << 8, RET)).value, ARM64_SYS_REG(3, 0, 0, crm, 0)
        if x.check(f"KVM_GET_ONE_REG of {name}", raw.answer(partial(vcpu.get_reg, register)), "ok"):
            x.check(f"{name}, as the guest reads it", hex_(reads), hex_(vcpu.get_reg(register)))


@everywhere(origin="Documentation/virt/kvm/api.rst, KVM_SET_GUEST_DEBUG")
def a_guest_can_be_single_stepped(x: Experiment) -> None:
    """KVM_GUESTDBG_SINGLESTEP leaves KVM_RUN with KVM_EXIT_DEBUG once after each of the guest's instructions."""
    steps: list[int] = []

    def step(stop: int, _native: pv_vcpu) -> bool | None:
        if stop != lib.PV_STOP_DEBUG:
            return None
        at = machine.vcpus[0].pc
        if at in range(code, code + HOST_PAGE):
            steps.append(at - code)
        elif steps:
            machine.vcpus[0].single_step(False)
        return True

    code = x.page()
    machine = x.stack.enter_context(Machine(x.config, intercept=step))
    machine.start()
    guest = Puppet(machine.mailboxes, timeout=PATIENCE)
    _write_code(guest, code, *[NOP] * 8, RET)
    guest.execute(code)
    x.check("exits without single step", len(steps), 0)
    if not x.check("KVM_SET_GUEST_DEBUG", raw.answer(partial(machine.vcpus[0].single_step, True)), "ok"):
        return
    guest.execute(code)
    x.check("places of the exits in a page of 9 instructions", " ".join(map(str, steps)), "0 4 8 12 16 20 24 28 32")
    guest.execute(code)
    x.check("exits once it is off again", len(steps) - 9, 0)


@everywhere(origin="Documentation/virt/kvm/api.rst, KVM_EXIT_SYSTEM_EVENT and KVM_ARM_VCPU_INIT")
def a_reset_is_told_and_the_vcpu_starts_over(x: Experiment) -> None:
    """KVM_RUN reports the guest's PSCI SYSTEM_RESET, and the vCPU, initialised again, starts over from the entry."""
    x.guest.reset()
    x.check("KVM_EXIT_SYSTEM_EVENT tells of a reset", x.machine.wait(PATIENCE).ending is Ending.RESET)
    vcpu, entry = x.machine.vcpus[0], x.machine.entry
    if not x.check("KVM_ARM_VCPU_INIT", raw.answer(vcpu.init), "ok"):
        return
    x.check("x0 is then", vcpu.get_reg(core_reg("x0")), 0)
    vcpu.set_reg(core_reg("pc"), entry.pc)
    vcpu.set_reg(core_reg("x0"), entry.fdt)
    vcpu.run.immediate_exit = 0
    x.check("KVM_RUN from the entry", raw.name(vcpu.attempt(KVM_RUN)[1]), "ok")
    first = (ExitReason.KVM_EXIT_MMIO, ExitReason.KVM_EXIT_HYPERCALL)
    x.check("the guest gets as far as a device or a call", vcpu.run.exit_reason in first)


@everywhere(origin=f"{TEARDOWN}; so a reset is a new VM")
def after_a_reset_the_image_can_be_loaded_again(x: Experiment) -> None:
    """After a reset the VMM can load the guest's image into the memory of the same VM once more."""
    x.guest.reset()
    x.machine.wait(PATIENCE)
    page = x.machine.entry.pc
    x.check("a store of the host's to the image's first page", x.host_stores(page, x.host64(page) or 0))


@everywhere(origin=TEARDOWN)
def after_a_reset_a_new_vm_runs(x: Experiment) -> None:
    """After a reset the same process can make a new VM of the same kind beside the old one, and it runs."""
    x.guest.reset()
    x.machine.wait(PATIENCE)
    with Experiment(x.protection, x.backing) as again:
        page = again.page()
        again.guest.write64(page, 7)
        x.check("the new guest stores and loads", again.guest.read64(page), 7)


@claim(emulated="memfd", pkvm="memfd", origin="nvhe/pkvm.c: a share of an untouched page is a fault there first")
def a_share_outside_memory_is_an_abort(x: Experiment) -> None:
    """A share of an address in no slot is a synchronous external abort for the guest, which goes on with a handler."""
    x.check("MEM_SHARE", x.went(x.guest.start_share(BEYOND)), "external abort")
    x.check("the guest goes on", x.went(x.guest.start_read64(x.page())), "went on")


@everywhere(origin="arch/arm64/kvm/mmio.c, io_mem_abort(): no valid syndrome")
def a_pair_outside_memory_is_an_abort(x: Experiment) -> None:
    """A load pair from an address in no slot, which KVM cannot decode, is an external abort there."""
    x.check("ldp from no memory", x.went(x.guest.start_execute(_code(x, LDP, RET), BEYOND)), "external abort")


@everywhere(origin="arch/arm64/kvm/mmio.c, io_mem_abort(): no valid syndrome")
def a_write_back_outside_memory_is_an_abort(x: Experiment) -> None:
    """A load with write-back from an address in no slot, which KVM cannot decode, is an external abort there."""
    x.check("ldr with write-back", x.went(x.guest.start_execute(_code(x, LDR_POST, RET), BEYOND)), "external abort")


@everywhere(origin="virt/kvm/kvm_main.c: -EIO where kvm->mm is not the caller's")
def a_forked_child_is_refused(x: Experiment) -> None:
    """A child that inherits a VM's descriptors is refused calls on it and its vCPUs with EIO: two of each are tried."""
    x.start()
    vm, vcpu = x.machine.vm, x.machine.vcpus[0]

    def child(fd: int) -> None:
        answers = (
            raw.name(vm.attempt(KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY)[1]),
            raw.answer(lambda: vm.create_vcpu(1)),
            raw.name(vcpu.attempt(KVM_GET_MP_STATE, kvm_mp_state())[1]),
            raw.answer(lambda: vcpu.get_reg(core_reg("pc"))),
        )
        os.write(fd, " ".join(answers).encode())

    code, said = processes.in_child(child)
    if code:
        x.cannot(f"the child ended with status {code}")
    what = "KVM_CHECK_EXTENSION and KVM_CREATE_VCPU of the VM, KVM_GET_MP_STATE and KVM_GET_ONE_REG of a vCPU"
    x.check(f"the child's {what}", said.decode(), "EIO EIO EIO EIO")
    x.check("the guest goes on", x.went(x.guest.start_read64(x.page())), "went on")


@claim(pkvm="memfd", origin="arch/arm64/kvm/pkvm.c: add_taint(TAINT_USER), with a warning")
def making_one_taints_the_kernel(x: Experiment) -> None:
    """The host's kernel is tainted (TAINT_USER, U) once a protected VM has been made."""
    with open("/proc/sys/kernel/tainted") as file:
        x.check("TAINT_USER is set", bool(int(file.read()) & TAINT_USER))


def _reclaimed(x: Experiment) -> Gpa:
    """Return a page that the guest has written and the host's kernel has then read."""
    page = x.page()
    x.guest.write64(page, 1)
    answer = access.process_vm_readv(x.view(page))
    if not answer.ok:
        x.cannot(f"process_vm_readv(2) reads no private page here: {answer.name}")
    return page


@contextlib.contextmanager
def _stopped_at(x: Experiment, pc: int) -> Iterator[None]:
    """Keep the guest's first vCPU waiting at an address during the block."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        x.machine.pause()
        try:
            if x.machine.vcpus[0].pc == pc:
                yield
                return
        finally:
            x.machine.resume()
        time.sleep(0.001)
    x.cannot(f"KVM_GET_ONE_REG never tells a pc of {hex_(pc)}")


def _told(failure: Any) -> str:
    if failure is None:
        return "nothing failed"
    return f"{failure.exit_reason}, {'none' if not failure.size else hex_(failure.gpa)}"


def _trial_slot(x: Experiment, hva: int, flags: int) -> None:
    """Try to make a slot with flags, and remove it again."""
    number = raw.slot(x, BEYOND, HOST_PAGE, hva, flags=flags)
    x.machine.vm.delete_memory(number)


def _code(x: Experiment, *words: int) -> Gpa:
    """Have the guest write code to a private page, and return its address."""
    page = x.page()
    _write_code(x.guest, page, *words)
    return page


def _write_code(guest: Puppet, page: Gpa, *words: int) -> None:
    for number, word in enumerate(words):
        guest.write(page + 4 * number, word, 4)
    guest.flush(page, 4 * len(words))
