# SPDX-License-Identifier: Apache-2.0
"""Claims about the conditions of a VM's end, and the host afterwards: descriptors, dying processes, many VMs."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import time

from pyvmm.atlas.claim import group
from pyvmm.errors import KvmError
from pyvmm.experiment import BEYOND, Experiment, raw
from pyvmm.experiment.host.bare import HOLDERS, Bare, locked, look
from pyvmm.experiment.host.forked import Forked
from pyvmm.guest.orders import Access
from pyvmm.kvm.vm import Vm
from pyvmm.memory.address import Gpa
from pyvmm.memory.backing import FileBacking, Memfd
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from pyvmm.uapi.kvm import KVM_VM_TYPE_ARM_PROTECTED

claim = group("teardown")

TORN = 'thread: "it can\'t have it back until the guest has been entirely torn down"'
UNPIN = "arch/arm64/kvm/pkvm.c, __pkvm_pgtable_stage2_reclaim(): pages are unpinned and unaccounted"
REFERENCES = "virt/kvm/kvm_main.c, kvm_put_kvm(): the VM's, each vCPU's and each guest_memfd's file hold the VM"
EXIT = f"{TORN}; kernel/exit.c: a process that ends, in whatever way, lets go of its descriptors"
MAX_PVMS = "arch/arm64/include/asm/kvm_pkvm.h, KVM_MAX_PVMS"
WORD = 0x5EC2E7
PAGES = 16
MOST = 255
ENOUGH = 300
"""VMs at once after which no limit is looked for any more."""
LAST = {"vm": "the VM's descriptor", "vcpu": "the vCPU's descriptor", "run": "the mapping of kvm_run"}


# -- references


@claim(pkvm="memfd", origin=f"{REFERENCES}; {UNPIN}", seconds=60)
def the_order_of_closing_does_not_matter(x: Experiment) -> None:
    """In whatever order a VM's descriptors and mappings go, its pages are cleared and unlocked when all have gone."""
    before = locked()
    orders = list(itertools.permutations(("vm", "vcpu", "memory", "memfd")))
    ran = cleared = unlocked = 0
    for order in orders:
        with Bare(x.protection) as bare:
            ran += bare.run() == "off"
            bare.let_go("run")
            for holder in order:
                bare.let_go(holder)
            cleared += bare.clear_pages() == bare.pages - 1
            unlocked += locked() == before
    x.check("guests that ran, of 24", ran, len(orders))
    x.check("orders, of 24, after which as much is locked as before", unlocked, len(orders))
    x.check("orders, of 24, after which the guest's pages read as zeros", cleared, len(orders))


@claim(pkvm="memfd", origin=REFERENCES)
def the_last_reference_ends_the_vm(x: Experiment) -> None:
    """A VM lives while its descriptor, a vCPU's or a mapping of kvm_run is left, whichever it is, and ends with it."""
    before = locked()
    for last, what in LAST.items():
        with Bare(x.protection) as bare:
            bare.run()
            for holder in HOLDERS:
                if holder != last:
                    bare.let_go(holder)
            x.check(f"with {what} alone it lives: its pages are locked", locked() != before)
            bare.let_go(last)
            x.check(f"with {what} gone it has ended: its pages are clear", bare.clear_pages(), bare.pages - 1)
            x.check(f"with {what} gone as much is locked as before", locked() == before)


@claim(none="memfd", pkvm="memfd", origin=REFERENCES)
def a_vcpu_runs_without_the_vms_descriptor(x: Experiment) -> None:
    """A vCPU runs, and the guest is given pages, after the descriptors of the VM and of its memory were closed."""
    with Bare(x.protection) as bare:
        bare.let_go("vm")
        bare.let_go("memfd")
        x.check("KVM_RUN ends in the guest's power-off", bare.run(), "off")
        x.tell("the host reaches a page that the guest stored to", look(bare.witness + HOST_PAGE) is not None)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=f"{REFERENCES}; a system call holds the file it is made on")
def a_running_vcpu_keeps_its_vm(x: Experiment) -> None:
    """A guest whose descriptors are closed while its vCPU is inside KVM_RUN runs on, and is gone when that returns."""
    before = locked()
    page, stop = x.page(), x.page()
    for gpa in (page, stop):
        x.guest.write64(gpa, 0)
        x.guest.share(gpa)
    x.guest.start_count(page, 1 << 40, until=stop)
    _counts_on(x, page)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    x.stack.callback(os.close, null)
    for file in (x.machine.vcpus[0], x.machine.vm):
        os.dup2(null, file.fileno(), inheritable=False)
    x.check("with both descriptors closed the guest goes on storing", _counts_on(x, page))
    x.host_stores(stop, 1)
    x.check("the KVM_RUN after the one it was in", x.failure().name, "ENOTTY")
    x.end()
    x.check("then as much is locked as before the run", locked() == before)


@claim(pkvm="memfd", origin=f"{REFERENCES}; fork(2): descriptors are inherited")
def a_fork_keeps_the_vm_alive(x: Experiment) -> None:
    """A forked process keeps the VM whose descriptors it inherited, and its pages locked, until it ends itself."""
    before = locked()
    with Bare(x.protection) as bare:
        bare.run()
        with Forked(Forked.wait_for_end) as heir:
            for holder in HOLDERS:
                bare.let_go(holder)
            x.check("with all of the VMM's own gone, its pages are locked", locked() != before)
            x.check("and the host reaches the guest's", look(bare.witness + HOST_PAGE) is not None, False)
            heir.end()
        x.check("once the other process has ended, as much is locked as before", locked() == before)
        x.check("and the guest's pages read as zeros", bare.clear_pages(), bare.pages - 1)


# -- the VMM's own end


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=EXIT, seconds=60)
def a_killed_vmm_leaves_a_clean_host(x: Experiment) -> None:
    """When a VMM is killed (SIGKILL) while its vCPUs run, its guest's private pages are cleared, shared ones kept."""
    _vmm_ends(x, signal.SIGKILL)


@claim(none="memfd", emulated="memfd", pkvm="memfd", origin=EXIT, seconds=60)
def a_vmm_that_just_exits_leaves_a_clean_host(x: Experiment) -> None:
    """When a VMM exits while its vCPUs run, closing nothing, its private pages are cleared and shared ones kept."""
    _vmm_ends(x, None)


def _vmm_ends(x: Experiment, number: signal.Signals | None) -> None:
    file = x.stack.enter_context(Memfd(PAGES * HOST_PAGE))
    with Forked(lambda other: _vmm(x.protection, file.fd, other)) as vmm:
        if not vmm.heard(30):
            x.cannot("the guest of another process did not run")
        x.tell("a mapping of ours reaches the guest's private page", look(file.hva) is not None)
        if number is None:
            vmm.end()
        else:
            os.kill(vmm.pid, number)
            vmm.wait()
    pages = [look(file.hva + page * HOST_PAGE) for page in range(PAGES)]
    x.check("private pages, of 15, that read as zeros", sum(page == bytes(HOST_PAGE) for page in pages[:-1]), PAGES - 1)
    x.check("the shared page keeps its contents", pages[-1] == WORD.to_bytes(8, "little") * (HOST_PAGE // 8))
    with Experiment(x.protection) as again:
        page = again.page()
        again.guest.write64(page, 0x11)
        x.check("a new VM's guest reads its store", again.guest.read64(page), 0x11)


def _vmm(protection: Protection, fd: int, other: Forked) -> None:
    """Run a guest of two vCPUs over a file, in a child process, until told to exit."""
    with Experiment(protection, cpus=2) as x:
        backing = FileBacking(os.dup(fd), PAGES * HOST_PAGE)
        backing.kind = "memfd"
        x.memory.add(BEYOND, backing)
        x.guest.fill(BEYOND, PAGES * HOST_PAGE, WORD)
        x.guest.share(BEYOND + (PAGES - 1) * HOST_PAGE)
        for vcpu, page in ((x.others()[0], 0), (x.guest, 1)):
            vcpu.start_hammer(BEYOND + page * HOST_PAGE, HOST_PAGE, 1 << 40, Access.READ)
        other.say()
        other.wait_for_end()
        os._exit(0)


# -- many VMs


@claim(none="memfd", pkvm="memfd", origin=f"{MAX_PVMS} 255", seconds=120)
def a_host_runs_255_vms(x: Experiment) -> None:
    """A host has 255 VMs at once, plain or every eighth of them protected, and refuses one more with ENOMEM."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    vms: list[Vm] = []
    refused = "not refused"
    while len(vms) + 1 < ENOUGH and refused == "not refused":
        protected = x.protection is Protection.PKVM and len(vms) % 8 == 0
        try:
            vms.append(x.machine.system.create_vm(KVM_VM_TYPE_ARM_PROTECTED if protected else 0))
        except KvmError as error:
            refused = raw.name(error.errno or 0)
    kinds = "every eighth protected" if x.protection is Protection.PKVM else "all plain"
    x.check(f"VMs at once, {kinds}, that of this experiment among them", len(vms) + 1, MOST)
    x.check("KVM_CREATE_VM of one more", refused, "ENOMEM")
    vms.pop().close()
    vms.append(x.machine.system.create_vm(0))
    x.tell("once one is closed, another can be made", len(vms) + 1)
    x.check("the guest that was there before them runs", x.guest.ping().el, 1)


@claim(none="memfd", pkvm="memfd", origin=f"{UNPIN}; arch/arm64/kvm/pkvm.c: a VM's handle is free again", seconds=120)
def forty_vms_leak_nothing(x: Experiment) -> None:
    """40 VMs one after the other, each with a guest that runs to its end, leave no descriptor, mapping or lock."""
    before = _held()
    ran = 0
    for _ in range(40):
        with Bare(x.protection) as bare:
            ran += bare.run() == "off"
    after = _held()
    x.check("guests that ran", ran, 40)
    for what in before:
        x.check(f"{what} more than before", after[what] - before[what], 0)


def _held() -> dict[str, int]:
    with open("/proc/self/maps") as maps:
        ours = sum("memfd:" in line or "kvm" in line for line in maps)
    lock, pin = locked()
    return {"descriptors": len(os.listdir("/proc/self/fd")), "mappings": ours, "kB of VmLck": lock, "kB of VmPin": pin}


def _counts_on(x: Experiment, page: Gpa) -> bool:
    """Wait until the word at ``page`` changes; False if it has not for some seconds."""
    first, deadline = x.host64(page), time.monotonic() + 5
    while x.host64(page) == first:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
