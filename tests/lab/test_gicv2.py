# SPDX-License-Identifier: Apache-2.0
"""Hosts with a GICv2 and no GICv3, such as a Raspberry Pi 4: they run plain and emulated guests, and refuse others."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pyvmm.lab import Lab, LabOptions, build_image
from pyvmm.lab.peers import Prepared, prepare
from tests.nightly import NIGHTLY

pytestmark = pytest.mark.lab

PYVMM = ["python3", "-P", "-m", "pyvmm"]
TESTS = ("gic", "plan", "snapshot", "gdb", "virtio")
"""Files of tests/pkvm about interrupts, snapshots of the interrupt controller, and debuggers."""
GICV3 = ("gicv3", "message")
"""Words in the names of tests that need a GICv3."""
BOOTS = [("none", 2)]
if NIGHTLY:
    BOOTS = [(protection, cpus) for protection in ("none", "emulated") for cpus in (1, 2, 8)]


@pytest.fixture(scope="module")
def shown() -> Prepared:
    return prepare(["debian:", "gdb"])


@pytest.fixture(scope="module")
def lab(shown: Prepared) -> Iterator[Lab]:
    with Lab(LabOptions(mode="nvhe", gic=2), image=build_image(), arguments=shown.paths) as lab:
        yield lab


def test_the_tests_of_interrupts_snapshots_and_debuggers_pass_with_a_gicv2(lab: Lab, shown: Prepared) -> None:
    names = f"(none or emulated or NONE or EMULATED) and not {' and not '.join(GICV3)}"
    files = [f"tests/pkvm/test_{name}.py" for name in TESTS]
    command = ["python3", "-m", "pytest", "-p", "no:cacheprovider", "-q", *files, "-k", names]
    environment = {**shown.environment, "CI": os.environ.get("CI", "")}
    done = lab.capture(command, env=environment, timeout=900)
    said = done.stdout.decode()
    assert done.status == 0, said + done.stderr.decode()
    assert int(said.rpartition(" passed")[0].split()[-1]) > 20


@pytest.mark.parametrize(("protection", "cpus"), BOOTS)
def test_debians_kernel_boots_with_a_gicv2(lab: Lab, shown: Prepared, protection: str, cpus: int) -> None:
    # The kernel's own messages would be written in the middle of a line of the command's.
    words = "console=ttyAMA0 loglevel=1 audit=0 lsm= mitigations=off panic=-1 -- cat /proc/interrupts"
    options = ["--protection", protection, "-c", str(cpus), "-i", "shell:", "-p", words, "debian:"]
    done = lab.capture([*PYVMM, "run", "--deadline", "300", *options], env=shown.environment, timeout=400)
    said = done.stdout.decode()
    assert done.status == 0, said + done.stderr.decode()
    told = [line.split() for line in said.splitlines() if "CPU0" in line or "arch_timer" in line]
    assert len(told) == 2, said
    header, timer = told
    assert len(header) == cpus
    assert timer[cpus + 1] == "GIC-0"
    assert all(int(count) > 0 for count in timer[1 : cpus + 1])


def test_pyvmm_refuses_more_vcpus_than_a_gicv2_serves_and_names_the_limit(lab: Lab) -> None:
    done = lab.capture([*PYVMM, "run", "-c", "9", "payload:hello"])
    assert done.status == 5
    assert b"this host has a GICv2, which cannot have 9 vCPUs: its limit is 8" in done.stderr


def test_doctor_and_plan_name_the_gicv2(lab: Lab) -> None:
    examined = lab.capture([*PYVMM, "doctor"]).stdout
    assert b"GICv2: guests have up to 8 vCPUs" in examined
    assert b"plain and emulated guests run here, protected ones do not" in examined
    assert b"This machine runs protected guests directly" not in examined
    planned = lab.capture([*PYVMM, "run", "--dry-run", "payload:hello"]).stdout
    assert b"GICv2 CPU, in the kernel" in planned
    assert b"KVM_CREATE_DEVICE(vm, type=KVM_DEV_TYPE_ARM_VGIC_V2" in planned
