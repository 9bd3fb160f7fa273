# SPDX-License-Identifier: Apache-2.0
"""What a debugger can do to a guest, in every protection. The guest always continues afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from pyvmm import abi
from pyvmm.debug.server import GdbServer
from pyvmm.devices.trap import Trap
from pyvmm.guest.orders import GuestFault
from pyvmm.guest.puppet import Puppet
from pyvmm.machine import layout
from pyvmm.machine.machine import Machine
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.gdb_client import Client, field
from tests.pkvm.harness import ALL, DEADLINE, config
from tests.pkvm.required import kernel_directory, program
from tests.pkvm.test_faults import read_through_the_kernel

pytestmark = pytest.mark.pkvm
each_protection = pytest.mark.parametrize("protection", ALL, ids=lambda p: p.value)

CODE = 0x8080_0000
DATA = 0x8090_0000
NOP, ADD_X0_X0_1, BRK, RET = 0xD503_201F, 0x9100_0400, 0xD420_0000, 0xD65F_03C0
BRK_CLASS = 0x3C
MODE = 0b1111


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for a condition on the guest. Raises AssertionError if it never becomes true."""
    deadline = time.monotonic() + 4 * DEADLINE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@dataclass
class Debugged:
    """A started machine, and the address its debugger connects to."""

    machine: Machine
    guest: Puppet
    path: str

    def client(self, **more: bool) -> Client:
        return Client(self.path, **more)

    def code(self, *words: int) -> int:
        """Have the running guest write code into its memory."""
        for number, word in enumerate(words):
            self.guest.write32(CODE + 4 * number, word)
        self.guest.flush(CODE, 4 * len(words))
        return CODE


@contextlib.contextmanager
def debugged(
    protection: Protection, tmp_path: Path, kernel: str = "payload:puppet", where: str = "", **more: object
) -> Iterator[Debugged]:
    path = str(tmp_path / "gdb")
    with (
        GdbServer(path + where) as server,
        Machine(config(kernel, protection, **more), intercept=server.intercept) as machine,
        server.serving(machine),
    ):
        machine.start()
        try:
            yield Debugged(machine, Puppet(machine.mailboxes, timeout=DEADLINE), path)
        finally:
            machine.stop("the test is over")
            server.ended(machine.wait(DEADLINE))


@each_protection
def test_a_guest_waits_before_its_first_instruction_and_is_stepped_from_there(
    protection: Protection, tmp_path: Path
) -> None:
    with debugged(protection, tmp_path) as run, run.client() as gdb:
        entry = run.machine.entry
        assert gdb.ask("?").startswith("T05")
        assert (gdb.register("pc"), gdb.register("x0")) == (entry.pc, entry.fdt)
        stop = gdb.go("vCont;s:1")  # a branch over the image's head
        assert (stop[:3], field(stop, "thread"), field(stop, "hwbreak")) == ("T05", "1", None)
        start = gdb.register("pc")
        assert start > entry.pc + 4
        gdb.go("s")
        assert gdb.register("pc") == start + 4
        values = {"x7": 2**64 - 5, "sp": 0x8000_1230, "v31": 2**127 + 9, "fpcr": 0x0300_0000, "cpsr": 0x6000_03C5}
        for name, value in values.items():
            gdb.set_register(name, value)
        assert {name: gdb.register(name) for name in values} == values
        assert gdb.register("SP_EL1") == gdb.register("sp") != gdb.register("SP_EL0")
        gdb.set_register("TPIDR_EL1", 2**63)
        assert gdb.register("TPIDR_EL1") == 2**63
        everything = gdb.ask("g")
        assert gdb.ask(f"G{everything}") == "OK"
        assert gdb.ask("g") == everything


@each_protection
def test_breakpoints_and_watchpoints_stop_a_guest_and_registers_reach_it(
    protection: Protection, tmp_path: Path
) -> None:
    with debugged(protection, tmp_path, where=",nowait") as run:
        code = run.code(NOP, NOP, ADD_X0_X0_1, RET)
        run.guest.write64(DATA, 7)
        with run.client() as gdb:
            for kind, reason in ((1, "hwbreak"), (0, "swbreak")):
                assert gdb.ask(f"Z{kind},{code + 8:x},4") == "OK"
                gdb.send("vCont;c")
                order = run.guest.start_execute(code, 1)
                stop = gdb.answer()
                assert (stop[:3], field(stop, "thread"), field(stop, reason)) == ("T05", "1", "")
                assert (gdb.register("pc"), gdb.register("x0")) == (code + 8, 1)
                gdb.set_register("x0", 41)
                assert gdb.ask(f"z{kind},{code + 8:x},4") == "OK"
                assert gdb.go("vCont;s:1").startswith("T05")
                assert gdb.register("x0") == 42
                gdb.send("vCont;c")
                assert order.result().value == 42
                assert gdb.interrupt().startswith("T02")

            for kind, reason in ((2, "watch"), (3, "rwatch")):
                assert gdb.ask(f"Z{kind},{DATA + 4:x},2") == "OK"
                gdb.send("vCont;c")
                access = run.guest.start_write64(DATA, 9) if kind == 2 else run.guest.start_read64(DATA)
                stop = gdb.answer()
                assert DATA <= int(field(stop, reason) or "0", 16) < DATA + 8, stop
                assert not access.done()
                assert gdb.ask(f"z{kind},{DATA + 4:x},2") == "OK"
                gdb.send("vCont;c")
                access.result()
                gdb.interrupt()
            gdb.send("vCont;c")
            assert run.guest.read64(DATA) == 9


@each_protection
def test_vector_registers_reach_the_guest_and_come_back(protection: Protection, tmp_path: Path) -> None:
    with debugged(protection, tmp_path, where=",nowait") as run:
        # movz x1, #0x30, lsl #16; msr cpacr_el1, x1; isb; fmov x0, d0; fmov d1, x1; nop; ret
        code = run.code(0xD2A0_0601, 0xD518_1041, 0xD503_3FDF, 0x9E66_0000, 0x9E67_0021, NOP, RET)
        with run.client() as gdb:
            assert gdb.ask(f"Z1,{code:x},4") == "OK"
            gdb.send("vCont;c")
            order = run.guest.start_execute(code)
            assert gdb.answer().startswith("T05")
            gdb.set_register("v0", 5 << 64 | 0x1234_5678_9ABC)
            assert gdb.ask(f"z1,{code:x},4") == "OK"
            assert gdb.ask(f"Z1,{code + 20:x},4") == "OK"
            assert gdb.go().startswith("T05")
            assert (gdb.register("v0"), gdb.register("v1")) == (5 << 64 | 0x1234_5678_9ABC, 0x30_0000)
            assert gdb.ask("D") == "OK"
        assert order.result().value == 0x1234_5678_9ABC


@each_protection
def test_a_guest_stops_between_instructions_even_at_a_device_access(protection: Protection, tmp_path: Path) -> None:
    with debugged(protection, tmp_path, where=",nowait") as run:
        # str x1, [x0]; subs x2, x2, #1; b.ne .-8; ret: each store adds x1 to the counter
        code = run.code(0xF900_0001, 0xF100_0442, 0x54FF_FFC1, RET)
        rounds = 1 << 40
        with run.client() as gdb:
            assert gdb.ask(f"Z1,{code:x},4") == "OK"
            gdb.send("vCont;c")
            order = run.guest.start_execute(code, layout.BENCH.start + abi.BENCH_COUNTER)
            assert gdb.answer().startswith("T05")
            gdb.set_register("x1", 1)
            gdb.set_register("x2", rounds)
            assert gdb.ask(f"z1,{code:x},4") == "OK"
            stored = 0

            def counted_beyond(before: int) -> bool:
                counter: int = run.machine.exit_targets.save()["counter"]
                return counter > before

            for _ in range(5):
                gdb.send("vCont;c")
                wait_until(partial(counted_beyond, stored))
                assert gdb.interrupt().startswith("T02")
                stored = run.machine.exit_targets.save()["counter"]
                done = {code: 0, code + 4: 1, code + 8: 0}[gdb.register("pc")]
                assert stored == rounds - gdb.register("x2") + done
            gdb.set_register("pc", code + 12)
            assert gdb.ask("D") == "OK"
        order.result()


@each_protection
def test_the_debugger_reads_only_memory_that_the_host_may_read(protection: Protection, tmp_path: Path) -> None:
    with debugged(protection, tmp_path, where=",nowait") as run:
        guest = run.guest
        guest.write64(DATA, 0x1122_3344)
        guest.write64(DATA + 4096, 0x5566_7788)
        guest.share(DATA)
        with run.client() as gdb:
            if protection is Protection.NONE:  # its page tables can be read: an identity map
                assert gdb.read(DATA, 8) == (0x1122_3344).to_bytes(8, "little")
                assert "is gpa 0x8090_0000" in gdb.monitor(f"info {DATA:#x}")
            else:
                with pytest.raises(ValueError, match="E14"):
                    gdb.read(DATA, 8)
                assert "the guest's table at gpa" in gdb.monitor("info")
            with pytest.raises(ValueError, match="E14"):
                gdb.read(0xDEAD_0000_0000, 8)
            assert "physical" in gdb.monitor("phys on")
            assert gdb.read(DATA, 8) == (0x1122_3344).to_bytes(8, "little")
            assert gdb.write(DATA + 8, b"told") == "OK"
            assert gdb.ask(b"X%x,4:" % (DATA + 12) + b"}\x03}\x04ab") == "OK"
            if protection.isolates:
                with pytest.raises(ValueError, match="E14"):
                    gdb.read(DATA + 4096, 8)
                assert gdb.write(DATA + 4096, b"never") == "E14"
                assert "is private to the guest" in gdb.monitor("info")
                # The answer has the bytes up to the private page.
                assert gdb.read(DATA + 4088, 16) == bytes(8)
            assert gdb.ask("D") == "OK"
        assert guest.read64(DATA + 8) == int.from_bytes(b"told#$ab", "little")
        assert guest.read64(DATA + 4096) == 0x5566_7788


@each_protection
def test_the_debugger_hears_that_the_run_ends_and_can_end_it(protection: Protection, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        with debugged(protection, tmp_path, kernel="payload:hello") as run:
            gdb = stack.enter_context(run.client())
            gdb.send("vCont;c")
            assert run.machine.wait(DEADLINE).ending is Ending.POWEROFF
        assert gdb.answer() == "W00"
    with debugged(protection, tmp_path) as run, run.client(acks=True) as gdb:
        gdb.send("k")
        outcome = run.machine.wait(DEADLINE)
        assert (outcome.ending, outcome.reason) == (Ending.INTERRUPTED, "killed by the debugger")


@each_protection
def test_the_debugger_sees_each_vcpu_as_a_thread(protection: Protection, tmp_path: Path) -> None:
    with debugged(protection, tmp_path, where=",nowait", cpus=2) as run:
        code = run.code(NOP, NOP, NOP, RET)
        with run.client() as gdb:
            assert (gdb.ask("qfThreadInfo"), gdb.ask("qsThreadInfo")) == ("m1,2", "l")
            assert bytes.fromhex(gdb.ask("qThreadExtraInfo,2")) == b"vCPU 1 (off)"
            gdb.send("vCont;c")
            second = run.guest.cpu_on(1)
            gdb.interrupt()
            assert gdb.ask(f"Z1,{code:x},4") == "OK"
            gdb.send("vCont;c")
            order = second.start_execute(code)
            stop = gdb.answer()
            assert (field(stop, "thread"), field(stop, "hwbreak")) == ("2", "")
            assert gdb.ask(f"z1,{code:x},4") == "OK"
            assert gdb.ask("qC") == "QC2"
            assert field(gdb.go("vCont;s:2;c"), "thread") == "2"
            assert gdb.register("pc") == code + 4
            assert gdb.ask("Hg1") == "OK"
            assert gdb.register("pc") != code + 4
            assert gdb.ask("T3") == "E22"
            # Only the first vCPU continues. The second stays stopped in the middle of its order.
            gdb.send("vCont;c:1")
            assert run.guest.ping().el == 1
            assert not order.done()
            gdb.interrupt()
            gdb.send("c")
            order.result()


def test_a_guest_runs_on_when_its_debugger_disconnects_without_notice(tmp_path: Path) -> None:
    with debugged(Protection.PKVM, tmp_path, where=",nowait") as run:
        code = run.code(NOP, NOP, RET)
        with run.client() as gdb:
            with pytest.raises((EOFError, ConnectionError)):
                run.client()
            assert gdb.ask(f"Z1,{code:x},4") == "OK"
            gdb.send("vCont;c")
            order = run.guest.start_execute(code)
            assert gdb.answer().startswith("T05")
            assert not order.done()
        order.result()
        run.guest.execute(code)
        with run.client() as gdb:
            assert gdb.ask("D") == "OK"
        run.guest.execute(code)


def test_the_debugger_can_inspect_a_failed_vcpu_before_the_run_ends(tmp_path: Path) -> None:
    with debugged(Protection.PKVM, tmp_path, where=",nowait") as run, run.client() as gdb:
        gdb.send("vCont;c")
        run.guest.write64(DATA, 1)
        read_through_the_kernel(run.machine.memory.hva(DATA))
        run.guest.start_read64(DATA)
        stop = gdb.answer()
        assert (stop[:3], field(stop, "thread")) == ("T0b", "1")
        assert gdb.register("SP_EL1") == gdb.register("sp")
        gdb.send("vCont;c")
        outcome = run.machine.wait(DEADLINE)
        assert outcome.ending is Ending.CRASH
        assert "page at gpa 0x8090_0000 was reclaimed by the host" in outcome.reason


@each_protection
def test_the_guest_handles_its_own_breakpoint_instructions(protection: Protection, tmp_path: Path) -> None:
    with debugged(protection, tmp_path, where=",nowait") as run:
        code = run.code(BRK, RET)
        with run.client() as gdb:
            assert gdb.ask(f"Z1,{DATA:x},4") == "OK"
            gdb.send("vCont;c")
            with pytest.raises(GuestFault) as caught:
                run.guest.execute(code)
            trap = caught.value.trap
            assert isinstance(trap, Trap)
            assert (trap.esr >> 26, trap.elr) == (BRK_CLASS, code)
            assert run.guest.ping().el == 1


def test_linux_takes_no_interrupt_while_stepped_and_steps_over_breakpoints(tmp_path: Path) -> None:
    files = kernel_directory("own:")
    console = os.memfd_create("console")
    more = {
        "memory": 256 << 20,
        "initrd": str(files / "shell.cpio"),
        "serial_out": console,
        "deadline": 4 * DEADLINE,
        "params": ("quiet -- echo ready; while :; do :; done",),
    }
    try:
        with debugged(Protection.PKVM, tmp_path, str(files / "Image"), ",nowait", **more) as run:
            wait_until(lambda: b"ready" in os.pread(console, 1 << 16, 0))
            with run.client() as gdb:

                def in_the_shell() -> bool:  # where interrupts are not masked
                    gdb.send("vCont;c")
                    time.sleep(0.02)
                    gdb.interrupt()
                    return not gdb.register("cpsr") & MODE

                wait_until(in_the_shell)
                vectors = gdb.register("VBAR_EL1")
                for _ in range(4):
                    time.sleep(0.02)  # the scheduler's timer ticks meanwhile
                    gdb.go("vCont;s:1")
                    assert gdb.register("pc") not in range(vectors, vectors + 0x800)
                pc = gdb.register("pc")
                for _ in range(3):
                    assert gdb.ask(f"Z1,{pc:x},4") == "OK"
                    gdb.go("vCont;c")
                    assert gdb.register("pc") == pc
                    assert gdb.ask(f"z1,{pc:x},4") == "OK"
                    gdb.go("vCont;s:1")
                    assert gdb.register("pc") != pc
    finally:
        os.close(console)


COMMANDS = (
    'printf "at %#lx in %d threads\\n", $pc, $_inferior_thread_count',
    "stepi",
    "hbreak *($pc + 8)",
    "continue",
    'printf "stopped at %#lx, sp %#lx\\n", $pc, $sp',
    "x/i $pc",
    "monitor info",
    "delete",
    "continue",
)


@each_protection
def test_gdb_itself_debugs_a_guest(protection: Protection, tmp_path: Path) -> None:
    gdb = program("gdb-multiarch", "gdb-multiarch")
    with debugged(protection, tmp_path, "payload:hello", cpus=2) as run:
        commands = [f"--eval-command={text}" for text in (f"target remote {run.path}", *COMMANDS)]
        debugger = subprocess.Popen(
            [gdb, "-nx", "-batch", "-l", "60", *commands],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        outcome = run.machine.wait(4 * DEADLINE)
        start = run.machine.entry.pc
    said, _ = debugger.communicate(timeout=4 * DEADLINE)
    assert outcome.ending is Ending.POWEROFF, said
    assert f"at {start:#x} in 2 threads" in said
    place = re.search(r"Hardware assisted breakpoint 1 at (0x\w+)", said)
    assert place is not None, said
    assert re.search(rf"stopped at {place[1]}, sp 0x8\w+", said), said
    private = protection.isolates
    assert (f"Cannot access memory at address {place[1]}" in said) == private
    assert ("is private to the guest" in said) == private
    assert (re.search(rf"=> {place[1]}:\s+[a-z]", said) is None) == private, said
    assert "exited normally" in said


def test_an_address_in_use_is_refused_before_the_guest_runs(tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    path.touch()
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "run", "--gdb", path, "payload:hello"],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    assert f"no debugger can connect at {path}" in done.stderr
