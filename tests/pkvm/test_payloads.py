# SPDX-License-Identifier: Apache-2.0
"""What each payload shows, on a real host in every protection."""

from __future__ import annotations

import re
import struct

import pytest

from pyvmm import abi
from pyvmm.machine.machine import Machine
from pyvmm.payloads import payload
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import ALL, config, run

pytestmark = pytest.mark.pkvm
each_protection = pytest.mark.parametrize("protection", ALL, ids=lambda p: p.value)


@each_protection
def test_hello_knows_whether_it_is_protected(protection: Protection) -> None:
    word = b"protected" if protection.isolates else b"plain"
    assert run("payload:hello", protection).output.startswith(b"hello from a " + word + b" guest\n")


@each_protection
def test_echo_prints_every_step_on_every_vcpu(protection: Protection) -> None:
    printed = run("payload:echo", protection, cpus=4, params=("rounds=5",)).output.decode()
    assert [int(n) for n in re.findall(r"^vCPU (\d)$", printed, re.M)] == [0, 1, 2, 3]
    assert printed.count("  a page not shared: not shared\n") == 4
    assert printed.count("  hello, host -> HELLO, HOST\n") == 4
    assert printed.count("  answered 5, wrong 0\n") == 4
    assert printed.count("  taken back: 0, then: no page\n") == 4
    assert printed.endswith("20 requests answered, 0 vCPUs failed\n")


@each_protection
def test_smp_loses_no_addition(protection: Protection) -> None:
    printed = run("payload:smp", protection, cpus=4, params=("rounds=2000",)).output
    assert b"counted 8000 of 8000\n" in printed
    assert b"CPU_ON of this vCPU says -4, of one that is not there -2\n" in printed


@each_protection
@pytest.mark.parametrize("access", ["read", "write", "execute"])
def test_touch_leaves_the_ticks_of_every_page_in_shared_memory(access: str, protection: Protection) -> None:
    pages, passes = 48, 2
    params = (f"access={access}", f"pages={pages}", f"repeat={passes}", "order=random")
    with Machine(config("payload:touch", protection, params=params)) as machine:
        assert machine.run().ending is Ending.POWEROFF
        gpa, size, count, status = machine.mailboxes.notes()
        assert (count, status) == (pages * passes, 0)
        assert size >= 8 * count
        ticks = struct.unpack(f"<{2 * count}I", machine.memory.read(gpa, 8 * count))[::2]
    assert min(ticks) > 0
    cold, mapped = sorted(ticks[:pages]), sorted(ticks[pages:])
    assert cold[pages // 2] > 5 * mapped[pages // 2], "a page's first touch is a fault, its second is not"


@pytest.mark.parametrize(
    ("way", "none", "emulated", "pkvm"),
    [
        ("share-twice", "statuses 0 0", "statuses 0 -3", "statuses 0 -3"),
        ("bell-private", "status 0", "status -1", "status -1"),
        ("bell-misaligned", "status -3", "status -3", "status -3"),
        ("bell-huge", "status -3", "status -3", "status -3"),
    ],
)
def test_a_wrong_announcement_of_a_share_is_refused_and_does_no_harm(
    way: str, none: str, emulated: str, pkvm: str
) -> None:
    for protection, says in zip(ALL, (none, emulated, pkvm), strict=True):
        result = run("payload:crash", protection, params=(f"way={way}",))
        assert result.outcome.ending is Ending.POWEROFF
        assert result.output.decode().splitlines() == [f"crash: way={way}", says, "crash: survived"], protection


@each_protection
def test_a_guest_cannot_share_addresses_without_memory(protection: Protection) -> None:
    result = run("payload:crash", protection, params=("way=share-outside",))
    if protection is Protection.PKVM:
        assert result.outcome.ending is Ending.CRASH
        assert "external abort" in result.outcome.reason
    else:
        assert b"status -3\n" in result.output


@each_protection
def test_an_access_to_an_address_without_memory_or_device_aborts(protection: Protection) -> None:
    result = run("payload:crash", protection, params=("way=noslot",))
    assert result.outcome.ending is Ending.CRASH
    assert "data abort: load from 0x8100_0000, external abort" in result.outcome.reason


@each_protection
def test_the_reported_pc_is_that_of_the_failing_instruction(protection: Protection) -> None:
    with Machine(config("payload:crash", protection, params=("way=undefined",))) as machine:
        assert machine.run().ending is Ending.CRASH
        trap = machine.mailboxes.trap(0)
        assert trap is not None
        assert (trap.vector, trap.exception_class, trap.vcpu) == (4, 0, 0)
        at = trap.elr - machine.entry.pc
        assert struct.unpack_from("<I", payload("crash"), at) == (1,), "udf #1"


@each_protection
def test_a_guest_that_waits_forever_ends_at_the_deadline(protection: Protection) -> None:
    result = run("payload:crash", protection, params=("way=wait",), deadline=1.0)
    assert result.outcome.ending is Ending.DEADLINE


@each_protection
def test_run_returns_the_exit_code_of_a_payload(protection: Protection) -> None:
    with Machine(config("payload:crash", protection, params=("way=status", "code=42"))) as machine:
        outcome = machine.run()
        assert (outcome.ending, outcome.status) == (Ending.UNWELL, 3)
        assert outcome.reason == "the guest powered off with exit code 42"
        assert machine.mailboxes.notes()[abi.NOTE_EXIT_CODE] == 42
