# SPDX-License-Identifier: Apache-2.0
"""Save and load KVM's state besides memory: registers of vCPUs, the interrupt controller, the clock.

Functions that convert between KVM's objects and JSON values, for snapshots of unprotected VMs. A machine must be paused
to save it, and must not have run to load it. Register values are written in hexadecimal.

Linux Documentation/virt/kvm/devices/arm-vgic-v3.rst and arm-vgic-its.rst define the order. A register that already has
the saved value is not written, so read-only registers with the same value on both hosts do no harm.
"""

from __future__ import annotations

import errno
from ctypes import c_uint32, c_uint64, sizeof
from typing import TYPE_CHECKING, Any, Final

from pyvmm.errors import HostError, KvmError, UsageError
from pyvmm.machine import layout
from pyvmm.uapi import kvm_arm64 as uapi
from pyvmm.uapi.kvm_arm64_vcpu import KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, kvm_vcpu_events
from pyvmm.uapi.kvm_state import MpState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pyvmm.kvm.device import KvmDevice
    from pyvmm.kvm.vcpu import Vcpu

State = dict[str, Any]

CLOCKS: Final = (uapi.KVM_REG_ARM_TIMER_CNT, uapi.KVM_REG_ARM_PTIMER_CNT)
"""Counters of the whole VM, which run during saving and loading: see :func:`load_clock`."""

# ---- vCPUs -------------------------------------------------------------------------------------------------------


def save_vcpu(vcpu: Vcpu) -> State:
    """Return a vCPU's state. Its exit must be finished (``pv_settle``)."""
    events = kvm_vcpu_events()
    vcpu.call(KVM_GET_VCPU_EVENTS, events)
    return {
        "mp_state": vcpu.mp_state.name,
        "events": bytes(events).hex(),
        "registers": {f"{id:#x}": f"{vcpu.get_reg(id):#x}" for id in vcpu.reg_list()},
    }


def load_vcpu(vcpu: Vcpu, saved: State) -> None:
    """Load a vCPU's state, except the clock. Raises HostError if this host's vCPUs cannot hold it."""
    known = set(vcpu.reg_list())
    if (pc := uapi.core_reg("pc")) in known and f"{pc:#x}" not in saved["registers"]:
        raise ValueError("it has no pc")
    if len(saved["events"]) != 2 * sizeof(kvm_vcpu_events):
        raise ValueError("its pending exceptions have another size")
    for name, text in saved["registers"].items():
        id, value = int(name, 16), int(text, 16)
        if id in CLOCKS:
            continue
        if id not in known:
            raise HostError(
                f"{vcpu.label}: the snapshot has register {name}, which this host's vCPUs lack", hint=_OTHER_HOST
            )
        if vcpu.get_reg(id) == value:
            continue
        try:
            vcpu.set_reg(id, value)
        except (KvmError, OverflowError) as error:
            raise HostError(
                f"{vcpu.label}: register {name} cannot be set to {text} on this host: {error}", hint=_OTHER_HOST
            ) from error
    events = kvm_vcpu_events.from_buffer_copy(bytes.fromhex(saved["events"]))
    vcpu.call(KVM_SET_VCPU_EVENTS, events)
    vcpu.mp_state = MpState[saved["mp_state"]]


_OTHER_HOST: Final = "restore it on a host with the same CPU model, and the same or a newer kernel"


def load_clock(vcpu: Vcpu, saved: State) -> None:
    """Set the VM's counters to their ``saved`` values. Call this last, because they run from here on."""
    for id in CLOCKS:
        if text := saved["registers"].get(f"{id:#x}"):
            vcpu.set_reg(id, int(text, 16))


# ---- the interrupt controller ------------------------------------------------------------------------------------

_CTRL: Final = uapi.KVM_DEV_ARM_VGIC_GRP_CTRL
_DIST: Final = uapi.KVM_DEV_ARM_VGIC_GRP_DIST_REGS
_REDIST: Final = uapi.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS
_SYSREGS: Final = uapi.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS
_LEVEL: Final = uapi.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO
_ITS: Final = uapi.KVM_DEV_ARM_VGIC_GRP_ITS_REGS

# Offsets: Arm IHI 0069, 12.8 (GICD_*), 12.10 and 12.11 (GICR_*), 12.18 (GITS_*).
_GICD_CTLR, _GICD_TYPER, _GICD_IIDR = 0x0, 0x4, 0x8
_IGROUPR, _ISENABLER, _ISPENDR, _ISACTIVER, _IPRIORITYR, _ICFGR, _IROUTER = (
    0x80,
    0x100,
    0x200,
    0x300,
    0x400,
    0xC00,
    0x6000,
)
_GICR_CTLR, _GICR_WAKER, _GICR_PROPBASER, _GICR_PENDBASER, _SGI_FRAME = 0x0, 0x14, 0x70, 0x78, 0x1_0000
_GITS_CTLR, _GITS_IIDR, _GITS_CBASER, _GITS_CWRITER, _GITS_CREADR, _GITS_BASER = 0x0, 0x4, 0x80, 0x88, 0x90, 0x100


def _icc(crm: int, op2: int, crn: int = 12) -> int:
    return uapi.ARM64_SYS_REG(3, 0, crn, crm, op2) & uapi.KVM_DEV_ARM_VGIC_SYSREG_INSTR_MASK


_ICC: Final = {
    "SRE": _icc(12, 5), "CTLR": _icc(12, 4), "PMR": _icc(6, 0, crn=4), "BPR0": _icc(8, 3), "BPR1": _icc(12, 3),
    "AP0R0": _icc(8, 4), "AP0R1": _icc(8, 5), "AP0R2": _icc(8, 6), "AP0R3": _icc(8, 7),
    "AP1R0": _icc(9, 0), "AP1R1": _icc(9, 1), "AP1R2": _icc(9, 2), "AP1R3": _icc(9, 3),
    "IGRPEN0": _icc(12, 6), "IGRPEN1": _icc(12, 7),
}  # fmt: skip
_PERHAPS: Final = ("AP0R1", "AP0R2", "AP0R3", "AP1R1", "AP1R2", "AP1R3")
"""Their number depends on the bits of priority."""


def save_gic(gic: KvmDevice, its: KvmDevice | None, cpus: int) -> State:
    """Return a GICv3's state. Before memory is saved: the kernel writes the tables of LPIs and of the ITS to it."""
    gic.set_attr(_CTRL, uapi.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES)
    if its is not None:
        its.set_attr(_CTRL, uapi.KVM_DEV_ARM_ITS_SAVE_TABLES)
    return {
        "registers": [[group, f"{attr:#x}", f"{_get(gic, group, attr):#x}"] for group, attr in _registers(gic, cpus)],
        "its": None
        if its is None
        else {f"{offset:#x}": f"{_get(its, _ITS, offset):#x}" for offset in _its_registers()},
    }


def load_gic(gic: KvmDevice, its: KvmDevice | None, saved: State) -> None:
    """Make a new GICv3 that one; vCPUs have their registers, guest memory its contents."""
    for group, attr, text in saved["registers"]:
        _put(gic, group, int(attr, 16), int(text, 16))
    if (saved["its"] is None) != (its is None):
        raise UsageError("only one of the snapshot and this host has an ITS", hint=_OTHER_HOST)
    if its is None:
        return
    registers = {int(offset, 16): int(text, 16) for offset, text in saved["its"].items()}
    enable = registers.pop(_GITS_CTLR)
    for offset, value in registers.items():
        _put(its, _ITS, offset, value)
    its.set_attr(_CTRL, uapi.KVM_DEV_ARM_ITS_RESTORE_TABLES)
    _put(its, _ITS, _GITS_CTLR, enable)


def _registers(gic: KvmDevice, cpus: int) -> Iterator[tuple[int, int]]:
    """Yield (group, attribute) of all registers to save, in the order of loading."""
    interrupts = 32 * ((_get(gic, _DIST, _GICD_TYPER) & 0x1F) + 1)
    affinities = [layout.mpidr(index) << uapi.KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT for index in range(cpus)]
    # The controller's identification registers, before anything that depends on them.
    yield _DIST, _GICD_IIDR
    yield _DIST, _GICD_CTLR
    for affinity in affinities:
        # The tables' addresses, before CTLR enables LPIs.
        for offset in (_GICR_WAKER, _GICR_PROPBASER, _GICR_PROPBASER + 4, _GICR_PENDBASER, _GICR_PENDBASER + 4):
            yield _REDIST, affinity | offset
        yield _REDIST, affinity | _GICR_CTLR
        for offset in _banks(range(32), first=_SGI_FRAME):
            yield _REDIST, affinity | offset
        yield _LEVEL, affinity | uapi.VGIC_LEVEL_INFO_LINE_LEVEL << uapi.KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT
        for offset in _pending(range(32), first=_SGI_FRAME):
            yield _REDIST, affinity | offset
    for offset in _banks(range(32, interrupts)):
        yield _DIST, offset
    for interrupt in range(32, interrupts):
        yield _DIST, _IROUTER + 8 * interrupt
        yield _DIST, _IROUTER + 8 * interrupt + 4
    for interrupt in range(32, interrupts, 32):
        yield _LEVEL, affinities[0] | interrupt
    for offset in _pending(range(32, interrupts)):
        yield _DIST, offset
    for affinity in affinities:
        for name, instruction in _ICC.items():
            if name not in _PERHAPS or _there(gic, _SYSREGS, affinity | instruction):
                yield _SYSREGS, affinity | instruction


def _banks(interrupts: range, first: int = 0) -> Iterator[int]:
    """Yield the offsets of the registers that configure ``interrupts``: 1, 2 or 8 bits for each."""
    for base, bits in ((_IGROUPR, 1), (_ICFGR, 2), (_IPRIORITYR, 8), (_ISENABLER, 1)):
        for interrupt in interrupts[:: 32 // bits]:
            yield first + base + interrupt * bits // 8


def _pending(interrupts: range, first: int = 0) -> Iterator[int]:
    """Yield the offsets of the pending and active state. Load it after the edge and level configuration."""
    for base in (_ISPENDR, _ISACTIVER):
        for interrupt in interrupts[::32]:
            yield first + base + interrupt // 8


def _its_registers() -> Sequence[int]:
    # CBASER first: writing it resets the other two registers of the command queue.
    return (
        _GITS_IIDR,
        _GITS_CBASER,
        _GITS_CREADR,
        _GITS_CWRITER,
        *(_GITS_BASER + 8 * index for index in range(8)),
        _GITS_CTLR,
    )


def _room(group: int) -> c_uint32 | c_uint64:
    return c_uint64() if group in (_SYSREGS, _ITS) else c_uint32()


def _get(device: KvmDevice, group: int, attr: int) -> int:
    room = _room(group)
    device.get_attr(group, attr, room)
    return room.value


def _there(device: KvmDevice, group: int, attr: int) -> bool:
    try:
        _get(device, group, attr)
    except KvmError as error:
        if error.errno not in (errno.EINVAL, errno.ENXIO):
            raise
        return False
    return True


def _put(device: KvmDevice, group: int, attr: int, value: int, *, always: bool = False) -> None:
    room = _room(group)
    try:
        if value >> 8 * sizeof(room):
            raise UsageError(f"{value:#x} is wider than the register")
        if always or _get(device, group, attr) != value:
            room.value = value
            device.set_attr(group, attr, room)
    except (KvmError, UsageError) as error:
        what = f"{device.label}: group {group}, register {attr:#x} cannot be set to {value:#x} on this host"
        raise HostError(f"{what}: {error}", hint=_OTHER_HOST) from error


# ---- a GICv2 -----------------------------------------------------------------------------------------------------

_CPU: Final = uapi.KVM_DEV_ARM_VGIC_GRP_CPU_REGS
_SGIS: Final = 0xFFFF
"""Bits of interrupts 0 to 15 in a register with a bit for each."""

# Offsets: Arm IHI 0048, 4.1.2 (GICD_*) and 4.1.3 (GICC_*).
_ITARGETSR, _SPENDSGIR = 0x800, 0xF20
_GICC = (0x4, 0x8, 0x1C, 0xD0, 0x0)
"""GICC_PMR, GICC_BPR, GICC_ABPR, GICC_APR0, and last GICC_CTLR, which lets interrupts through."""


def save_gicv2(gic: KvmDevice, cpus: int) -> State:
    """Return a GICv2's state. ``lines`` are the interrupts that a device holds up (the kernel does not tell them)."""
    interrupts = 32 * ((_get(gic, _DIST, _GICD_TYPER) & 0x1F) + 1)
    registers = [
        [group, f"{attr:#x}", f"{_get(gic, group, attr):#x}"] for group, attr in _registers_v2(cpus, interrupts)
    ]
    pending: list[list[Any]] = []
    lines: list[int] = []
    for cpu, number in [*((cpu, 0) for cpu in range(cpus)), *((0, first) for first in range(32, interrupts, 32))]:
        bank = cpu << uapi.KVM_DEV_ARM_VGIC_CPUID_SHIFT
        bits = _get(gic, _DIST, bank | _ISPENDR + number // 8)
        edge = _edges(gic, bank, number)
        # Senders of an SGI are in SPENDSGIR; a level interrupt of a vCPU's own is KVM's, which raises it again.
        pending.append([_DIST, f"{bank | _ISPENDR + number // 8:#x}", f"{bits & edge & ~(0 if number else _SGIS):#x}"])
        if number:
            lines += [number + bit for bit in range(32) if bits & ~edge & 1 << bit]
    return {"version": 2, "registers": registers, "pending": pending, "lines": lines}


def load_gicv2(gic: KvmDevice, saved: State, raise_line: Callable[[int], None]) -> None:
    """Make a new GICv2 that one. ``raise_line`` is called with the number of each interrupt whose line is up."""
    for group, attr, text in [*saved["registers"], *saved["pending"]]:
        # Until IIDR has been written KVM ignores the groups that user space writes (vgic_mmio_uaccess_write_v2_group).
        _put(gic, group, int(attr, 16), int(text, 16), always=int(attr, 16) == _GICD_IIDR)
    for interrupt in saved["lines"]:
        raise_line(interrupt)


def _registers_v2(cpus: int, interrupts: int) -> Iterator[tuple[int, int]]:
    """Yield (group, attribute) of what there is to save but for pending interrupts, in the order of loading."""
    yield _DIST, _GICD_IIDR
    yield _DIST, _GICD_CTLR
    for cpu in range(cpus):
        bank = cpu << uapi.KVM_DEV_ARM_VGIC_CPUID_SHIFT
        for offset in _banks(range(32)):
            yield _DIST, bank | offset
        for offset in range(_SPENDSGIR, _SPENDSGIR + 16, 4):
            yield _DIST, bank | offset
        yield _DIST, bank | _ISACTIVER
    for offset in _banks(range(32, interrupts)):
        yield _DIST, offset
    for interrupt in range(32, interrupts, 4):
        yield _DIST, _ITARGETSR + interrupt
    for interrupt in range(32, interrupts, 32):
        yield _DIST, _ISACTIVER + interrupt // 8
    for cpu in range(cpus):
        for offset in _GICC:
            yield _CPU, cpu << uapi.KVM_DEV_ARM_VGIC_CPUID_SHIFT | offset


def _edges(gic: KvmDevice, bank: int, first: int) -> int:
    """Return a bit for each of 32 interrupts from ``first``: whether it is triggered by an edge."""
    bits = 0
    for half in range(2):
        word = _get(gic, _DIST, bank | _ICFGR + first // 4 + 4 * half)
        bits |= sum(1 << 16 * half + n for n in range(16) if word & 0b10 << 2 * n)
    return bits
