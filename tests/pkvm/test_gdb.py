"""What a debugger can do to a guest, in every protection: packets in, stops out, and a guest that always goes on."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyvmm.debug.server import GdbServer
from pyvmm.devices.trap import Trap
from pyvmm.guest.puppet import GuestFault, Puppet
from pyvmm.machine.machine import Machine
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.gdb_client import Client, field
from tests.pkvm.harness import ALL, DEADLINE, config

pytestmark = pytest.mark.pkvm
each_protection = pytest.mark.parametrize("protection", ALL, ids=lambda p: p.value)

CODE = 0x8080_0000
DATA = 0x8090_0000
NOP, ADD_X0_X0_1, BRK, RET = 0xD503_201F, 0x9100_0400, 0xD420_0000, 0xD65F_03C0
BRK_CLASS = 0x3C


@dataclass
class Debugged:
    """A machine that is started, and where its debugger connects."""

    machine: Machine
    guest: Puppet
    path: str

    def client(self, **more: bool) -> Client:
        return Client(self.path, **more)

    def code(self, *words: int) -> int:
        """Have the running guest write code for itself."""
        for number, word in enumerate(words):
            self.guest.write32(CODE + 4 * number, word)
        self.guest.flush(CODE, 4 * len(words))
        return CODE


@contextlib.contextmanager
def debugged(
    protection: Protection, tmp_path: Path, kernel: str = "payload:puppet", where: str = "", cpus: int = 1
) -> Iterator[Debugged]:
    path = str(tmp_path / "gdb")
    with (
        GdbServer(path + where) as server,
        Machine(config(kernel, protection, cpus=cpus), intercept=server.intercept) as machine,
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
        everything = gdb.ask("g")
        assert gdb.ask(f"G{everything}") == "OK"
        assert gdb.ask("g") == everything


@each_protection
def test_breakpoints_and_watchpoints_stop_it_and_registers_reach_it(protection: Protection, tmp_path: Path) -> None:
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
def test_memory_is_seen_as_far_as_the_host_may_see_it(protection: Protection, tmp_path: Path) -> None:
    with debugged(protection, tmp_path, where=",nowait") as run:
        guest = run.guest
        guest.write64(DATA, 0x1122_3344)
        guest.write64(DATA + 4096, 0x5566_7788)
        guest.share(DATA)
        with run.client() as gdb:
            if protection is Protection.NONE:  # its tables can be walked: the puppet maps its memory as it is
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
                # What can be read, up to the private page.
                assert gdb.read(DATA + 4088, 16) == bytes(8)
            assert gdb.ask("D") == "OK"
        assert guest.read64(DATA + 8) == int.from_bytes(b"told#$ab", "little")
        assert guest.read64(DATA + 4096) == 0x5566_7788


@each_protection
def test_the_end_of_the_run_is_told_and_the_debugger_can_bring_it_about(protection: Protection, tmp_path: Path) -> None:
    with debugged(protection, tmp_path, kernel="payload:hello") as run, run.client() as gdb:
        gdb.send("vCont;c")
        assert run.machine.wait(DEADLINE).ending is Ending.POWEROFF
    with debugged(protection, tmp_path) as run, run.client(acks=True) as gdb:
        gdb.send("k")
        outcome = run.machine.wait(DEADLINE)
        assert (outcome.ending, outcome.reason) == (Ending.INTERRUPTED, "killed by the debugger")


@each_protection
def test_vcpus_are_threads(protection: Protection, tmp_path: Path) -> None:
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
            # The first vCPU alone goes on; the second stands still in the middle of its order.
            gdb.send("vCont;c:1")
            assert run.guest.ping().el == 1
            assert not order.done()
            gdb.interrupt()
            gdb.send("c")
            order.result()


def test_a_debugger_that_goes_without_a_word_leaves_a_guest_that_runs_on(tmp_path: Path) -> None:
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


@each_protection
def test_the_guests_own_breakpoint_instructions_stay_its_own(protection: Protection, tmp_path: Path) -> None:
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


def test_a_place_that_is_taken_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    path.touch()
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "run", "--gdb", path, "payload:hello"],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, ""), done
    assert f"no debugger can connect at {path}" in done.stderr
