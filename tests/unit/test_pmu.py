# SPDX-License-Identifier: Apache-2.0
"""A PMU: asked of each vCPU, told in the device tree, and refused where there is none."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from pyvmm.errors import HostError, OptionError
from pyvmm.kvm.causes import Value
from pyvmm.kvm.fd import CData, Fd
from pyvmm.kvm.stand_in import StandIn
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.fdt import parse
from pyvmm.machine.machine import Machine
from pyvmm.machine.plan import Plan
from pyvmm.memory.address import MIB
from pyvmm.protection import Protection
from pyvmm.uapi.ioctl import Ioctl
from pyvmm.uapi.kvm_cap import KVM_CAP_ARM_PMU_V3

CONFIG = MachineConfig("payload:hello", memory=8 * MIB, cpus=2, pmu=True)


@pytest.mark.parametrize(("gic", "flags"), [(3, 4), (2, 0x304)])
def test_each_vcpu_gets_its_interrupt_once_the_controller_is_ready(gic: int, flags: int) -> None:
    with Plan(CONFIG, gic=gic) as plan:
        features = [call.values["features"] for call in plan.calls if call.name == "KVM_ARM_VCPU_INIT"]
        set_up = [call for call in plan.calls if call.name == "KVM_SET_DEVICE_ATTR"]
        assert features == ["2+3", "0+2+3"]
        assert [call.on for call in set_up[-4:]] == ["vcpu0", "vcpu0", "vcpu1", "vcpu1"]
        assert [(call.values["attr"], call.values.get("value")) for call in set_up[-4:]] == [(0, 23), (1, None)] * 2
        [node] = [node for node in parse(plan.machine.entry.device_tree, "tree").children if node.name == "pmu"]
        assert node.properties["compatible"] == b"arm,armv8-pmuv3\0"
        assert node.properties["interrupts"] == b"".join(cell.to_bytes(4, "big") for cell in (1, 7, flags))


def test_a_guest_has_no_pmu_unless_it_is_asked_for() -> None:
    with Plan(CONFIG._replace(pmu=False)) as plan:
        assert [call.values["features"] for call in plan.calls if call.name == "KVM_ARM_VCPU_INIT"] == ["2", "0+2"]
        assert "pmu" not in [node.name for node in parse(plan.machine.entry.device_tree, "tree").children]


def test_a_host_without_a_pmu_is_told() -> None:
    class Without(StandIn):
        def ioctl(self, fd: Fd, request: Ioctl, argument: int | CData, values: Mapping[str, Value]) -> tuple[int, int]:
            if request.name == "KVM_CHECK_EXTENSION" and argument == KVM_CAP_ARM_PMU_V3:
                return 0, 0
            return super().ioctl(fd, request, argument, values)

    with pytest.raises(HostError, match="no PMU for guests"), Machine(CONFIG, kernel=Without()):
        pass


@pytest.mark.parametrize("protection", [Protection.PKVM, Protection.EMULATED])
def test_only_plain_guests_can_have_a_pmu(protection: Protection) -> None:
    with pytest.raises(OptionError, match=f"a PMU with protection {protection.value}"):
        CONFIG._replace(protection=protection).check()
