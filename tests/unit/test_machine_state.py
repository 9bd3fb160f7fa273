# SPDX-License-Identifier: Apache-2.0
"""Registers, interrupt controller and clock between KVM and a snapshot: their order, and what is refused."""

from __future__ import annotations

import errno
import json
from ctypes import c_uint32, c_uint64
from typing import Any

import pytest

from pyvmm.errors import HostError, KvmError, UsageError
from pyvmm.machine import layout, state
from pyvmm.uapi import kvm_arm64 as uapi
from pyvmm.uapi.kvm_arm64_vcpu import KVM_GET_VCPU_EVENTS, kvm_vcpu_events
from pyvmm.uapi.kvm_state import MpState

X0, PC, CNT = uapi.core_reg("x0"), uapi.core_reg("pc"), uapi.KVM_REG_ARM_TIMER_CNT
DIST, REDIST, LEVEL = (
    uapi.KVM_DEV_ARM_VGIC_GRP_DIST_REGS,
    uapi.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
    uapi.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO,
)
SYSREGS, CTRL, ITS = (
    uapi.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS,
    uapi.KVM_DEV_ARM_VGIC_GRP_CTRL,
    uapi.KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
)
SECOND = layout.mpidr(1) << 32


class Vcpu:
    """A fake vCPU that has only these registers."""

    def __init__(self, **registers: int) -> None:
        self.label = "vcpu0"
        self.registers = {int(name[1:], 16): value for name, value in registers.items()}
        self.mp_state = MpState.KVM_MP_STATE_RUNNABLE
        self.events = bytes(64)
        self.written: list[int] = []
        self.fixed: set[int] = set()

    def reg_list(self) -> list[int]:
        return list(self.registers)

    def get_reg(self, id: int) -> int:
        return self.registers[id]

    def set_reg(self, id: int, value: int) -> None:
        if id in self.fixed:
            raise KvmError("KVM_SET_ONE_REG", f"id={id:#x}", errno.EINVAL)
        self.written.append(id)
        self.registers[id] = value

    def call(self, request: Any, argument: Any) -> None:
        if request is KVM_GET_VCPU_EVENTS:
            argument.exception.serror_esr = 7
        else:
            self.events = bytes(argument)


def vcpu(x0: int, pc: int, cnt: int) -> Any:
    return Vcpu(**{f"r{X0:x}": x0, f"r{PC:x}": pc, f"r{CNT:x}": cnt})


def test_a_vcpu_is_restored_and_its_clock_comes_last() -> None:
    one, other = vcpu(1, 2, 1000), vcpu(0, 2, 5)
    one.mp_state = MpState.KVM_MP_STATE_STOPPED
    saved = json.loads(json.dumps(state.save_vcpu(one)))
    state.load_vcpu(other, saved)
    # Equal registers are not written: some are read-only.
    assert other.written == [X0]
    assert other.mp_state is MpState.KVM_MP_STATE_STOPPED
    assert kvm_vcpu_events.from_buffer_copy(other.events).exception.serror_esr == 7
    state.load_clock(other, saved)
    assert other.written == [X0, CNT]
    assert other.registers == one.registers


def test_another_kind_of_cpu_is_refused_with_the_different_register() -> None:
    saved = state.save_vcpu(vcpu(1, 2, 3))
    lacking = vcpu(0, 0, 0)
    del lacking.registers[X0]
    with pytest.raises(HostError, match=f"has register {X0:#x}, which this host"):
        state.load_vcpu(lacking, saved)
    stubborn = vcpu(0, 0, 0)
    stubborn.fixed = {X0}
    with pytest.raises(HostError, match=f"register {X0:#x} cannot be set to 0x1 on this host"):
        state.load_vcpu(stubborn, saved)


class Device:
    """A fake device: attributes as KVM keeps them, and the order of writes."""

    def __init__(self, label: str, lacks: frozenset[int] = frozenset()) -> None:
        self.label = label
        self.values: dict[tuple[int, int], int] = {(DIST, 4): 1}  # GICD_TYPER: 64 interrupts
        self.written: list[tuple[int, int]] = []
        self.lacks = lacks

    def get_attr(self, group: int, attr: int, room: c_uint32 | c_uint64) -> None:
        assert isinstance(room, c_uint64 if group in (SYSREGS, ITS) else c_uint32)
        if attr & 0xFFFF in self.lacks and group == SYSREGS:
            raise KvmError("KVM_GET_DEVICE_ATTR", f"attr={attr:#x}", errno.EINVAL)
        room.value = self.values.get((group, attr), 0)

    def set_attr(self, group: int, attr: int, room: c_uint32 | c_uint64 | None = None) -> None:
        self.written.append((group, attr))
        if room is not None:
            self.values[group, attr] = room.value


def saved_gic(values: dict[tuple[int, int], int], its_values: dict[int, int]) -> tuple[Any, Any, dict[str, Any]]:
    gic: Any = Device("gic", lacks=frozenset({uapi.ARM64_SYS_REG(3, 0, 12, 9, 1) & 0xFFFF}))
    its: Any = Device("its")
    gic.values.update(values)
    its.values.update({(ITS, offset): value for offset, value in its_values.items()})
    saved = json.loads(json.dumps(state.save_gic(gic, its, 2)))
    return gic, its, saved


def test_its_tables_are_saved_before_registers_and_restored_before_the_its_is_enabled() -> None:
    gic, its, saved = saved_gic({}, {0x0: 1, 0x80: 1 << 63, 0x88: 0x40, 0x90: 0x40, 0x108: 1 << 63})
    assert gic.written == [(CTRL, uapi.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES)]
    assert its.written == [(CTRL, uapi.KVM_DEV_ARM_ITS_SAVE_TABLES)]
    fresh: Any = Device("its")
    state.load_gic(Device("gic"), fresh, saved)  # type: ignore[arg-type]
    assert fresh.written == [
        (ITS, 0x80),
        (ITS, 0x90),
        (ITS, 0x88),
        (ITS, 0x108),
        (CTRL, uapi.KVM_DEV_ARM_ITS_RESTORE_TABLES),
        (ITS, 0x0),
    ]


def test_pending_states_are_restored_after_triggers_and_lpis_after_their_tables() -> None:
    gicd_pending, gicd_kind, gicd_level, route = (DIST, 0x204), (DIST, 0xC08), (LEVEL, 32), (DIST, 0x6000 + 8 * 40)
    ppi_pending, ppi_kind, ppi_level = (REDIST, SECOND | 0x1_0200), (REDIST, SECOND | 0x1_0C04), (LEVEL, SECOND)
    lpis, table, priority = (REDIST, SECOND), (REDIST, SECOND | 0x74), (SYSREGS, SECOND | 0xC230)
    each = (gicd_pending, gicd_kind, gicd_level, route, ppi_pending, ppi_kind, ppi_level, lpis, table, priority)
    _, _, saved = saved_gic(dict.fromkeys(each, 3), {})
    fresh: Any = Device("gic")
    state.load_gic(fresh, Device("its"), saved)  # type: ignore[arg-type]
    assert {key: fresh.values[key] for key in each} == dict.fromkeys(each, 3)
    at = fresh.written.index
    assert at(gicd_kind) < at(gicd_level) < at(gicd_pending)
    assert at(ppi_kind) < at(ppi_level) < at(ppi_pending)
    assert at(table) < at(lpis)
    assert set(fresh.written) == set(each)


def test_registers_only_for_cpus_with_more_priorities_are_neither_read_nor_saved() -> None:
    _, _, saved = saved_gic({}, {})
    absent = uapi.ARM64_SYS_REG(3, 0, 12, 9, 1) & 0xFFFF
    names = {int(attr, 16) for group, attr, _ in saved["registers"] if group == SYSREGS}
    assert absent not in names
    assert SECOND | absent not in names
    assert uapi.ARM64_SYS_REG(3, 0, 12, 9, 0) & 0xFFFF in names


def test_a_host_without_an_its_cannot_restore_one() -> None:
    _, _, saved = saved_gic({}, {})
    with pytest.raises(UsageError, match="only one of the snapshot and this host has an ITS"):
        state.load_gic(Device("gic"), None, saved)  # type: ignore[arg-type]


def test_the_error_names_a_register_that_this_host_does_not_accept() -> None:
    _, _, saved = saved_gic({(DIST, 0x8): 0x1000}, {})
    fresh: Any = Device("gic")

    def refuse(group: int, attr: int, _room: object) -> None:
        raise KvmError("KVM_SET_DEVICE_ATTR", f"group={group}, attr={attr:#x}", errno.EINVAL)

    fresh.set_attr = refuse
    with pytest.raises(HostError, match="gic: group 1, register 0x8 cannot be set to 0x1000 on this host"):
        state.load_gic(fresh, Device("its"), saved)  # type: ignore[arg-type]


# -- a GICv2

CPU = uapi.KVM_DEV_ARM_VGIC_GRP_CPU_REGS
CPU1 = 1 << uapi.KVM_DEV_ARM_VGIC_CPUID_SHIFT


def gicv2(values: dict[tuple[int, int], int]) -> Any:
    device: Any = Device("gic")
    device.values.update(values)
    return device


def test_a_gicv2_is_restored_with_the_registers_of_each_vcpu() -> None:
    enabled, target, sender, active, mask, control = (
        (DIST, CPU1 | 0x100),
        (DIST, 0x828),
        (DIST, CPU1 | 0xF24),
        (DIST, 0x304),
        (CPU, CPU1 | 0x4),
        (CPU, CPU1),
    )
    each = dict.fromkeys((enabled, target, sender, active, mask, control), 3)
    saved = json.loads(json.dumps(state.save_gicv2(gicv2(each), 2)))
    fresh = gicv2({})
    state.load_gicv2(fresh, saved, lambda number: pytest.fail(f"interrupt {number} is up"))
    assert {key: fresh.values[key] for key in each} == each
    # KVM accepts groups from user space only after this. Interrupts are enabled only when all is restored.
    assert fresh.written[0] == (DIST, 0x8)
    assert fresh.written[-1] == control


def test_edges_of_a_gicv2_stay_pending_and_levels_are_raised_again() -> None:
    edge, level = 40, 41
    values = {
        (DIST, 0xC08): 0b10 << 2 * (edge - 32),
        (DIST, 0x204): 1 << edge - 32 | 1 << level - 32,
        # SGI 3 is an edge. KVM itself raises the timer's PPI 27 again.
        (DIST, 0xC00): 0xAAAA_AAAA,
        (DIST, 0x200): 1 << 27 | 1 << 3,
    }
    saved = json.loads(json.dumps(state.save_gicv2(gicv2(values), 1)))
    fresh, up = gicv2({}), list[int]()
    state.load_gicv2(fresh, saved, up.append)
    assert up == [level]
    assert fresh.values[DIST, 0x204] == 1 << edge - 32
    assert (DIST, 0x200) not in fresh.written
    at = fresh.written.index
    assert at((DIST, 0xC08)) < at((DIST, 0x204))
