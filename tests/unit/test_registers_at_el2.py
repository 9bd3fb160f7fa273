# SPDX-License-Identifier: Apache-2.0
"""pyvmm on a pKVM host whose EL2 keeps protected guests' registers and answers PSCI, as documented for Linux 7.4.

The host is :mod:`tests.fake_pkvm`. The command, the session, the machine and the native loop are pyvmm's own. Most
tests also run on the host of Linux 7.3, whose kernel does both.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm.atlas.claim import all_claims
from pyvmm.atlas.model import Atlas
from pyvmm.debug.target import GuestTarget
from pyvmm.errors import HostError, KvmError
from pyvmm.experiment.record import Verdict
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.fake_kvm import NAME, built
from tests.fake_pkvm import SERIES

ROOT = Path(__file__).resolve().parents[2]
HOST = Path(__file__).resolve().parent / "fake_pkvm_host.py"
CLAIMS = "pyvmm.atlas.claims.fatal_registers"
ASKED = "KVM_GET_ONE_REG of the pc of a vCPU that has run"
UNTOLD = "a pc that the kernel does not tell"

EITHER = pytest.mark.parametrize("series", SERIES)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("native") / f"{NAME}.abi3.so")


class Ran(SimpleNamespace):
    """How a command ended."""

    status: int
    out: str
    err: str


def on(series: str, native: Path, guest: str, *words: str) -> Ran:
    """Run a command line on the host of a series, whose machines run this guest."""
    done = subprocess.run(
        [sys.executable, str(HOST), series, str(native), guest, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
    )
    assert "this is a bug" not in done.stderr
    assert "Traceback" not in done.stderr
    return Ran(status=done.returncode, out=done.stdout, err=done.stderr)


RUN = ("run", "--pkvm", "payload:hello", "--deadline", "20")


@EITHER
def test_every_step_of_the_demo_is_as_it_should_be(native: Path, series: str) -> None:
    ran = on(series, native, "puppet", "demo", "--here")
    assert ran.out.endswith("Every step was as it should be.\n")
    assert "NO" not in ran.out
    assert ran.out.count("\n   ok  ") > 20
    assert ran.status == 0


@EITHER
def test_the_report_of_a_crash_is_the_guests_own(native: Path, series: str) -> None:
    ran = on(series, native, "trap", *RUN)
    assert "undefined instruction (unknown reason); vCPU 0, ELR 0x8008_1234" in ran.err
    assert ran.status == Ending.CRASH.status


def test_an_unclaimed_access_is_an_abort_in_the_guest_where_the_kernel_injects_it(native: Path) -> None:
    ran = on("7.3", native, "unclaimed", *RUN)
    assert "at='pc 0x8008_0000'" in ran.err
    assert ran.out == "abort at 0xc000010\n"
    assert ran.status == 0


def test_an_unclaimed_access_ends_the_run_with_its_address_where_the_kernel_injects_none(native: Path) -> None:
    ran = on("7.4", native, "unclaimed", *RUN)
    [why] = [line for line in ran.err.splitlines() if line.startswith("pyvmm: crashed")]
    assert f"the guest made a 4-byte load from gpa 0xc00_0010, outside of memory and devices ({UNTOLD})" in why
    assert "EPERM: EL2 injects no external abort" in why
    assert ran.out == ""
    assert ran.status == Ending.CRASH.status


@pytest.mark.parametrize(("series", "where"), [("7.3", "pc 0x8008_0000"), ("7.4", UNTOLD)])
def test_the_report_of_a_lost_page_says_where_the_guest_is_if_the_kernel_tells(
    native: Path, series: str, where: str
) -> None:
    ran = on(series, native, "poisoned", *RUN)
    assert "pyvmm: crashed: KVM_RUN(vcpu=0): EFAULT" in ran.err
    assert f"its contents are lost and the guest cannot go on ({where})" in ran.err
    assert ran.status == Ending.CRASH.status


@EITHER
def test_a_pair_load_from_no_memory_is_an_abort_in_the_guest(native: Path, series: str) -> None:
    ran = on(series, native, "pair", *RUN)
    assert ran.out == "abort at 0xc000010\n"
    assert ran.status == 0


@pytest.mark.parametrize(
    ("series", "where"),
    [("7.3", ["vCPU 0 at pc 0x8008_0000", "vCPU 1 at pc 0x0"]), ("7.4", [f"vCPU {n} at {UNTOLD}" for n in range(2)])],
)
def test_the_report_of_a_deadline_says_where_the_guest_is_if_the_kernel_tells(
    native: Path, series: str, where: list[str]
) -> None:
    ran = on(series, native, "loop", "run", "--pkvm", "-c", "2", "--deadline", "0.3", "payload:hello")
    assert f"the guest was still running at its deadline of 0.3 s: {', '.join(where)}" in ran.err
    assert ran.status == Ending.DEADLINE.status


def test_a_protected_guest_runs_without_a_debugger_where_the_kernel_allows_one(native: Path, tmp_path: Path) -> None:
    ran = on("7.3", native, "hello", *RUN, "--gdb", f"{tmp_path}/gdb,nowait")
    assert ran.out == "hello\n"
    assert ran.status == 0


@pytest.mark.parametrize("nowait", ["", ",nowait"])
def test_gdb_is_refused_with_the_reason_where_the_kernel_debugs_no_protected_guest(
    native: Path, tmp_path: Path, nowait: str
) -> None:
    ran = on("7.4", native, "hello", *RUN, "--gdb", f"{tmp_path}/gdb{nowait}")
    assert ran.err.splitlines() == [
        "pyvmm: --gdb: this kernel cannot debug a guest under pkvm (KVM_CAP_SET_GUEST_DEBUG is 0)",
        "  hint: debug it under --protection emulated or none",
    ]
    assert ran.out == ""
    assert ran.status == 5
    assert list(tmp_path.iterdir()) == []


def test_gdb_is_still_there_for_a_plain_guest(native: Path, tmp_path: Path) -> None:
    ran = on("7.4", native, "hello", "run", "--gdb", f"{tmp_path}/gdb,nowait", "--deadline", "20", "payload:hello")
    assert ran.out == "hello\n"
    assert ran.status == 0


@EITHER
@pytest.mark.parametrize("cpus", [2, 8])
def test_a_guest_can_switch_every_vcpu_on_with_its_first_instructions(native: Path, series: str, cpus: int) -> None:
    ran = on(series, native, "smp", *RUN, "-c", str(cpus))
    assert ran.out == f"CPU_ON answered {[0] * (cpus - 1)}\n"
    assert ran.status == 0


@EITHER
def test_a_reset_ends_the_run(native: Path, series: str) -> None:
    ran = on(series, native, "reset", *RUN)
    assert ran.out == "a life\n"
    assert ran.status == Ending.RESET.status


@EITHER
def test_a_reboot_is_a_new_vm(native: Path, series: str) -> None:
    ran = on(series, native, "reset", "run", "--pkvm", "-c", "2", "--reboot", "--deadline", "1", "payload:hello")
    assert ran.out == "a life\n" * ran.out.count("\n")
    assert ran.out.count("\n") > 1
    assert "EPERM" not in ran.err
    assert ran.status == Ending.DEADLINE.status


# ---- what the atlas claims of both


@EITHER
def test_every_claim_of_registers_holds_on_both_hosts(native: Path, series: str, tmp_path: Path) -> None:
    claims = [claim for claim in all_claims(["fatal"]) if claim.function.__module__ == CLAIMS]
    assert len(claims) == 13
    ran = on(series, native, "puppet", "atlas", "--json", f"{tmp_path}/json", *(claim.id for claim in claims))
    assert ran.status == 0, ran.err
    results = Atlas.load(tmp_path / "json").results
    assert {result.key for result in results} == {
        (claim.id, place.protection.value, place.backing) for claim in claims for place in claim.places
    }
    wrong = [(result.key, result.reason, result.evidence) for result in results if result.verdict is not Verdict.HOLDS]
    assert not wrong
    # The kernel told each claim which host it is.
    told = {result.protection: {entry.saw for entry in result.evidence if entry.what == ASKED} for result in results}
    assert told == {"none": {"ok"}, "pkvm": {"EPERM" if series == "7.4" else "ok"}}


@pytest.mark.parametrize(
    ("claim", "missing"),
    [
        ("fatal/registers-stay-open", "KVM_GET_ONE_REG of the pc"),
        ("fatal/a-reset-is-told-and-the-vcpu-starts-over", "KVM_ARM_VCPU_INIT"),
        ("fatal/these-calls-on-a-vcpu-work", "KVM_SET_GUEST_DEBUG"),
    ],
)
def test_a_claim_of_open_registers_does_not_hold_where_el2_keeps_them(
    native: Path, claim: str, missing: str, tmp_path: Path
) -> None:
    on("7.4", native, "puppet", "atlas", "--protection", "pkvm", "--json", f"{tmp_path}/json", claim)
    [result] = Atlas.load(tmp_path / "json").results
    assert result.verdict is Verdict.FAILS
    assert [(entry.what, entry.saw) for entry in result.evidence if entry.ok is False] == [(missing, "EPERM")]


# ---- a kernel that tells of debugging, and refuses it


def refusing(number: int, protection: Protection) -> Any:
    """Return a machine whose kernel refuses KVM_SET_GUEST_DEBUG."""

    def refuse(_control: int) -> None:
        raise KvmError("KVM_SET_GUEST_DEBUG", "vcpu0=7", number)

    return SimpleNamespace(
        config=SimpleNamespace(protection=protection),
        vm=SimpleNamespace(offers=lambda _cap: 1),
        vcpus=[SimpleNamespace(set_guest_debug=refuse)],
    )


def test_gdb_is_refused_with_the_kernels_answer_where_only_the_call_tells() -> None:
    with pytest.raises(HostError, match=r"does not let a guest under pkvm be debugged: .*EPERM") as caught:
        GuestTarget(refusing(errno.EPERM, Protection.PKVM), lambda: None)
    assert caught.value.hint == "debug it under --protection emulated or none"


def test_the_refusal_of_a_plain_guests_debugging_advises_no_other_protection() -> None:
    with pytest.raises(HostError, match=r"a guest under none be debugged: .*EINVAL") as caught:
        GuestTarget(refusing(errno.EINVAL, Protection.NONE), lambda: None)
    assert caught.value.hint is None
