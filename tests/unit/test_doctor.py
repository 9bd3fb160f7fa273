# SPDX-License-Identifier: Apache-2.0
"""The doctor: its findings are right on this machine, and helpful on any other."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from typing import cast

import pytest

from pyvmm import probes
from pyvmm.cli import doctor, main
from pyvmm.cli.doctor import Diagnosis
from pyvmm.errors import HostError, pip_install
from pyvmm.kvm.system import System
from pyvmm.probes import FAIL, INFO, OK, WARN, Finding


def findings(found: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


def test_json_is_one_object_that_agrees_with_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert out.count("\n") == 1
    assert err == ""
    assert status == (0 if answer["direct"] or answer["lab"] else 5)
    assert {finding["section"] for finding in answer["findings"]} == {"host", "kvm", "python", "lab"}
    assert {finding["status"] for finding in answer["findings"]} <= {OK, INFO, WARN, FAIL}


def test_the_table_names_every_finding_and_ends_with_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.splitlines()[-1].startswith("Next: ")
    for finding in Diagnosis.make().findings:
        assert finding.name in out


@pytest.mark.skipif(platform.machine() != "x86_64", reason="says what an x86_64 machine is told")
def test_the_doctor_suggests_the_lab_on_an_x86_machine() -> None:
    assert findings(probes.host())["architecture"].value.startswith("x86_64: arm64 guests run in the lab")
    assert not Diagnosis.make().direct


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs a /dev/kvm that may be opened")
def test_the_doctor_asks_the_kernel_for_the_capabilities_of_kvm() -> None:
    assert findings(probes.kvm())["/dev/kvm"].status == OK


def no_kvm(*_args: object) -> None:
    raise HostError("this host has no KVM", hint="load KVM")


def test_missing_kvm_is_a_failure_only_where_guests_could_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvmm.kvm.system.System.open", no_kvm)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    (found,) = probes.kvm()
    assert (found.status, found.hint) == (INFO, None)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    (found,) = probes.kvm()
    assert (found.status, found.hint) == (FAIL, "load KVM")


class Kvm:
    def __init__(self, protected: HostError | bool) -> None:
        self.protected = protected

    def supports_protected(self) -> bool:
        if isinstance(self.protected, Exception):
            raise self.protected
        return self.protected


@pytest.mark.parametrize(
    ("answer", "status", "word"),
    [(True, OK, "pKVM"), (False, WARN, "plain and emulated guests run here"), (HostError("busy"), FAIL, "busy")],
)
def test_the_doctor_reports_whether_the_host_is_pkvm(answer: HostError | bool, status: str, word: str) -> None:
    found = probes._protected(cast(System, Kvm(answer)))
    assert found.status == status
    assert word in found.value


@pytest.mark.parametrize(("page", "status"), [(4096, OK), (16384, WARN), (65536, WARN)])
def test_the_doctor_warns_of_large_pages(page: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "HOST_PAGE", page)
    found = findings(probes.host())["page size"]
    assert found.status == status
    assert found.value.startswith(f"{page} bytes")


def test_the_doctor_names_a_missing_module_and_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in ("structlog", "elftools") else object()
    )
    found = findings(probes.python())
    assert (found["structlog"].status, found["structlog"].hint) == (FAIL, pip_install("structlog"))
    assert found["pyelftools"].status == WARN
    assert found["cffi"].status == OK


@pytest.mark.parametrize(
    ("status", "direct", "in_lab", "step"),
    [
        ({}, True, False, "pyvmm demo"),
        ({"kvm": FAIL}, False, True, "pyvmm demo"),
        ({"kvm": WARN}, True, False, "pyvmm demo"),
        ({"kvm": FAIL, "lab": FAIL}, False, False, "mend lab"),
        ({"python": FAIL, "lab": FAIL}, False, False, "mend python"),
    ],
)
def test_the_doctor_tells_an_arm64_machines_abilities_and_the_next_step(
    monkeypatch: pytest.MonkeyPatch, status: dict[str, str], direct: bool, in_lab: bool, step: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    made = Diagnosis([Finding(s, s, status.get(s, OK), "x", f"mend {s}") for s in ("host", "kvm", "python", "lab")])
    assert (made.direct, made.in_lab, made.next_step) == (direct, in_lab, step)


def test_an_arm64_machine_without_pkvm_runs_protected_guests_in_the_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    found = [Finding("host", "kernel", OK, "Linux"), probes._protected(cast(System, Kvm(False)))]
    made = Diagnosis(found)
    assert (made.direct, made.in_lab) == (False, True)
    assert made.verdict == "This machine runs protected guests in the lab, and plain and emulated guests directly."
    monkeypatch.setattr(probes, "host", lambda: found[:1])
    monkeypatch.setattr(probes, "kvm", lambda: found[1:])
    monkeypatch.setattr(probes, "python", list)
    monkeypatch.setattr(probes, "lab", lambda: [Finding("lab", "QEMU", FAIL, "not installed", "apt install qemu")])
    examined = Diagnosis.make()
    assert (examined.direct, examined.in_lab, examined.next_step) == (False, False, "apt install qemu")


def test_the_doctor_exits_5_and_says_what_to_do_on_a_machine_that_can_do_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Diagnosis([Finding("lab", "QEMU", FAIL, "not installed", "apt install qemu-system-arm")])
    monkeypatch.setattr(doctor.Diagnosis, "make", lambda: bad)
    assert main(["doctor"]) == 5
    out = capsys.readouterr().out
    assert "NO  QEMU" in out
    assert out.endswith("cannot run protected guests yet.\nNext: apt install qemu-system-arm\n")


def test_only_terminals_get_colours() -> None:
    made = Diagnosis([Finding("lab", "QEMU", FAIL, "not installed")])
    assert "\x1b[31mNO\x1b[0m" in "\n".join(made.lines(colours=True))
    assert "\x1b" not in "\n".join(made.lines())
