# SPDX-License-Identifier: Apache-2.0
"""Which interrupt controller a machine gets: the newest kind that the host has, its address and its limit."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm.errors import HostError
from pyvmm.kvm.stand_in import Recording, StandIn
from pyvmm.machine import Machine, MachineConfig, layout
from pyvmm.machine.plan import Plan, calls
from pyvmm.protection import Protection
from pyvmm.uapi.kvm import DeviceType

V2, V3 = DeviceType.KVM_DEV_TYPE_ARM_VGIC_V2, DeviceType.KVM_DEV_TYPE_ARM_VGIC_V3


def machine(*missing: DeviceType, **config: Any) -> tuple[Machine, Recording]:
    kernel = Recording(StandIn(*missing))
    return Machine(MachineConfig("payload:hello", Protection.NONE, **config), kernel=kernel), kernel


def test_a_host_with_only_a_gicv2_gives_a_gicv2_with_two_windows() -> None:
    built, kernel = machine(V3, cpus=8)
    with built:
        assert built.gic is not None
        assert built.gic.version == 2
        assert built.gic.windows == (layout.GIC_DISTRIBUTOR, layout.GIC_CPU)
        assert built.interrupts.present
        said = [line for line in calls(built, tuple(kernel.calls)) if "ARM_VGIC" in line and "group=" in line]
    assert [line.split("group=")[1].split(",")[0].rstrip(")") for line in said] == ["NR_IRQS", "ADDR", "ADDR", "CTRL"]


def test_a_host_with_both_gives_a_gicv3() -> None:
    built, _ = machine()
    with built:
        assert built.gic is not None
        assert built.gic.version == 3
        assert layout.GIC_ITS in built.gic.windows


def test_a_host_without_a_gic_gives_no_controller() -> None:
    built, _ = machine(V2, V3)
    with built:
        assert built.gic is None
        assert not built.interrupts.present


def test_more_vcpus_than_a_gicv2_serves_are_refused_with_the_limit() -> None:
    built, _ = machine(V3, cpus=9)
    with pytest.raises(HostError, match="a GICv2, which cannot have 9 vCPUs: its limit is 8") as caught, built:
        pass
    assert caught.value.hint == "-c 8"


@pytest.mark.parametrize(("missing", "saved"), [((V3,), {"registers": []}), ((), {"version": 2})])
def test_a_snapshot_of_another_kind_of_controller_is_refused(missing: tuple[DeviceType, ...], saved: Any) -> None:
    built, _ = machine(*missing)
    with built:
        assert built.gic is not None
        with pytest.raises(HostError, match=r"the snapshot is of a machine with a GICv., and this host makes a GICv."):
            built.gic.load(saved)


def test_a_plan_for_a_host_with_a_gicv2_says_which_windows_the_kernel_answers() -> None:
    with Plan(MachineConfig("payload:hello", Protection.NONE), gic=2) as plan:
        windows = [line.split("  ")[-1] for line in list(plan.lines())[1:5]]
    assert windows == [
        "GIC distributor, in the kernel",
        "GICv2 CPU, in the kernel",
        "GICv3 ITS, not there",
        "GICv3 redist, not there",
    ]
