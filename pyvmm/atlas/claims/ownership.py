# SPDX-License-Identifier: Apache-2.0
"""Claims about access to a private page: by the host's own code, and by its kernel in every possible way."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pyvmm.atlas.claim import group
from pyvmm.atlas.claims.ownership_pages import (
    GUESTS,
    WORDS,
    Access,
    by_address,
    by_file,
    harmless,
    kept_out,
    outcome,
    what_it_finds,
)
from pyvmm.experiment import Experiment
from pyvmm.experiment.host import access, processes, settings, uring
from pyvmm.experiment.host.syscalls import Answer, pread_file
from pyvmm.experiment.host.zram import Zram

claim = group("ownership")
anywhere = partial(claim, none="private", emulated="memfd guest_memfd", pkvm="memfd")
"""Wherever a guest has private pages."""

UNMAPPED = 'thread: the hypervisor "will unmap it from the host stage-2"'
USER = "arch/arm64/mm/fault.c, __do_kernel_fault(): a fault of the kernel at a user address is fixed up"
LINEAR = "arch/arm64/mm/fault.c and pkvm's mem_protect.c: a fault of the kernel in its own mapping takes the page back"
FAULT = "a fault"


def _load(x: Experiment) -> Access:
    def load(gpa: int) -> Answer:
        word = x.host64(gpa)
        return Answer(-1, 0, b"", FAULT) if word is None else Answer(0, 0, word.to_bytes(8, "little"))

    return load


def _store(x: Experiment) -> Access:
    word = int.from_bytes(access.PATTERN[:8], "little")
    return lambda gpa: Answer(0, 0) if x.host_stores(gpa, word) else Answer(-1, 0, b"", FAULT)


@anywhere(origin=UNMAPPED)
def a_host_load_faults(x: Experiment) -> None:
    """A load of the host's from a private page faults, and does the guest no harm."""
    kept_out(x, "a load of {}", _load(x))


@anywhere(origin=UNMAPPED)
def a_host_store_faults(x: Experiment) -> None:
    """A store of the host's to a private page faults, and does the guest no harm."""
    kept_out(x, "a store to {}", _store(x))


@anywhere(origin=f"{UNMAPPED}; arch/arm64/mm/fault.c: SIGSEGV")
def a_forked_child_is_locked_out(x: Experiment) -> None:
    """A load by a forked child that inherits the mapping of a private page kills it, and does the guest no harm."""
    kept_out(x, "a child's load of {}", by_address(x, processes.child_load))


@anywhere(origin=UNMAPPED)
def a_new_mapping_is_locked_out(x: Experiment) -> None:
    """A second mapping of the file gives no access to a private page either, and does the guest no harm."""
    kept_out(x, "write(2) from a new mapping of {}", by_file(x, access.map_file))


@anywhere(origin=USER)
def read_into_it_fails(x: Experiment) -> None:
    """A read(2) into a private page fails and does the guest no harm."""
    kept_out(x, "read(2) into {}", by_address(x, access.read_into))


@anywhere(origin=USER)
def write_from_it_fails(x: Experiment) -> None:
    """A write(2) from a private page fails and does the guest no harm."""
    kept_out(x, "write(2) from {}", by_address(x, access.write_from))


@anywhere(origin=f"{USER}; kernel/futex, futex_get_value_locked()")
def a_futex_in_it_fails(x: Experiment) -> None:
    """A futex(2) on a word of a private page fails and does the guest no harm."""
    kept_out(x, "FUTEX_WAIT on {}", by_address(x, access.futex))


@anywhere(origin=f"{LINEAR}; mm/process_vm_access.c")
def process_vm_readv_fails(x: Experiment) -> None:
    """A process_vm_readv(2) of a private page fails and does the guest no harm."""
    kept_out(x, "process_vm_readv(2) of {}", by_address(x, access.process_vm_readv))


@anywhere(origin=f"{LINEAR}; mm/process_vm_access.c")
def process_vm_writev_fails(x: Experiment) -> None:
    """A process_vm_writev(2) of a private page fails and does the guest no harm."""
    kept_out(x, "process_vm_writev(2) of {}", by_address(x, access.process_vm_writev))


@anywhere(origin=f"{LINEAR}; fs/proc/base.c, mem_rw()")
def reading_proc_mem_fails(x: Experiment) -> None:
    """A pread(2) of a private page through /proc/self/mem fails and does the guest no harm."""
    kept_out(x, "pread(2) of /proc/self/mem at {}", by_address(x, access.proc_mem_read))


@anywhere(origin=f"{LINEAR}; fs/proc/base.c, mem_rw()")
def writing_proc_mem_fails(x: Experiment) -> None:
    """A pwrite(2) to a private page through /proc/self/mem fails and does the guest no harm."""
    kept_out(x, "pwrite(2) to /proc/self/mem at {}", by_address(x, access.proc_mem_write))


@anywhere(origin=f"{LINEAR}; kernel/ptrace.c, ptrace_access_vm()")
def a_debugger_reads_nothing(x: Experiment) -> None:
    """A debugger's PTRACE_PEEKDATA of a private page fails and does the guest no harm."""
    kept_out(x, "PTRACE_PEEKDATA of {}", by_address(x, processes.ptrace_peek))


@anywhere(origin=f"{LINEAR}; mm/gup.c, get_dump_page()")
def a_core_dump_is_without_it(x: Experiment) -> None:
    """A core dump of a process that has a private page mapped has zeros in its place, and does the guest no harm."""
    x.stack.enter_context(x.setting(settings.CORE_PATTERN, "core"))
    kept_out(x, "a core dump with {}", by_address(x, processes.core_dump), zeros=True)


@anywhere(origin=f"{LINEAR}; fs/splice.c, vmsplice_to_pipe()")
def vmsplice_fails(x: Experiment) -> None:
    """A vmsplice(2) of a private page into a pipe, or reading it there, fails and does the guest no harm."""
    kept_out(x, "vmsplice(2) of {} and a read", by_address(x, access.vmsplice))


@anywhere(origin=f"{LINEAR}; mm/shmem.c, shmem_file_read_iter()")
def reading_the_file_fails(x: Experiment) -> None:
    """A pread(2) of a private page from the file behind it fails and does the guest no harm."""
    kept_out(x, "pread(2) of the file at {}", by_file(x, pread_file))


@anywhere(origin=f"{LINEAR}; mm/shmem.c, shmem_file_write_iter()")
def writing_the_file_fails(x: Experiment) -> None:
    """A pwrite(2) to a private page in the file behind it fails and does the guest no harm."""
    kept_out(x, "pwrite(2) to the file at {}", by_file(x, access.pwrite_file))


@anywhere(origin=f"{LINEAR}; mm/shmem.c, shmem_file_splice_read()")
def splicing_the_file_fails(x: Experiment) -> None:
    """A splice(2) of a private page from its file to a pipe, or reading it there, fails and does the guest no harm."""
    kept_out(x, "splice(2) of the file at {} and a read", by_file(x, access.splice_file))


@anywhere(origin=f"{LINEAR}; drivers/block/zram, zram_bvec_write()")
def direct_io_from_it_fails(x: Experiment) -> None:
    """An O_DIRECT write of a private page to a block device fails and does the guest no harm."""
    disk = _disk(x)
    kept_out(x, "an O_DIRECT write from {}", by_address(x, lambda address: access.direct_write(address, disk)))


@anywhere(origin=f"{LINEAR}; drivers/block/zram, zram_bvec_read()")
def direct_io_into_it_fails(x: Experiment) -> None:
    """An O_DIRECT read from a block device into a private page fails and does the guest no harm."""
    disk = _disk(x)
    kept_out(x, "an O_DIRECT read into {}", by_address(x, lambda address: access.direct_read(address, disk)))


@anywhere(origin="io_uring/rsrc.c, io_sqe_buffer_register(): pinned, not read")
def registering_a_buffer_is_harmless(x: Experiment) -> None:
    """Registering a private page as a fixed buffer of io_uring, granted or refused, does the guest no harm."""
    harmless(x, "IORING_REGISTER_BUFFERS of {}", by_address(x, uring.register))


@anywhere(origin=f"{LINEAR}; io_uring/rw.c, IORING_OP_WRITE_FIXED")
def a_fixed_buffers_write_fails(x: Experiment) -> None:
    """An io_uring write from a private page as a fixed buffer fails and does the guest no harm."""
    kept_out(x, "IORING_OP_WRITE_FIXED from {}", by_address(x, uring.write_fixed))


@anywhere(origin=f"{LINEAR}; io_uring/rw.c, IORING_OP_READ_FIXED")
def a_fixed_buffers_read_fails(x: Experiment) -> None:
    """An io_uring read into a private page as a fixed buffer fails and does the guest no harm."""
    kept_out(x, "IORING_OP_READ_FIXED into {}", by_address(x, lambda a: uring.read_fixed(a, access.PATTERN)))


@claim(emulated="memfd", pkvm="memfd", origin='thread: "maps the page back in the host stage-2"')
def a_shared_page_is_open_to_all(x: Experiment) -> None:
    """What works on ordinary memory works on a page the guest shares: each access sees the guest's data."""
    ways: dict[str, Access] = {
        "a load": _load(x),
        "a child's load": by_address(x, processes.child_load),
        "a new mapping": by_file(x, access.map_file),
        "write(2)": by_address(x, access.write_from),
        "process_vm_readv(2)": by_address(x, access.process_vm_readv),
        "pread(2) of /proc/self/mem": by_address(x, access.proc_mem_read),
        "PTRACE_PEEKDATA": by_address(x, processes.ptrace_peek),
        "vmsplice(2) and a read": by_address(x, access.vmsplice),
        "pread(2) of the file": by_file(x, pread_file),
        "splice(2) of the file and a read": by_file(x, access.splice_file),
        "IORING_OP_WRITE_FIXED": by_address(x, uring.write_fixed),
    }
    page = x.page()
    for name, way in ways.items():
        x.guest.write64(page, GUESTS)
        x.guest.share(page)
        x.check(name, outcome(way(page)), "ok, sees the guest's data")
        x.guest.unshare(page)
    x.check("in the end the guest finds there", what_it_finds(x, page), WORDS[GUESTS])


def _disk(x: Experiment) -> Path:
    try:
        return x.stack.enter_context(Zram(1 << 20)).path
    except OSError as error:
        x.cannot(f"no block device to try it with: {error.strerror or error}")
