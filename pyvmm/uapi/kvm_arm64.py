# SPDX-License-Identifier: Apache-2.0
"""asm/kvm.h of arm64: registers, vCPU features, the vGIC's and the ITS's attributes."""

from __future__ import annotations

from ctypes import Structure

from pyvmm.uapi.ioctl import IOR, IOW
from pyvmm.uapi.kvm import (
    KVM_REG_ARM64,
    KVM_REG_SIZE_U32,
    KVM_REG_SIZE_U64,
    KVM_REG_SIZE_U128,
    KVM_REG_SIZE_U512,
    KVMIO,
)
from pyvmm.uapi.layout import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import Array, c_uint32

    from pyvmm.uapi.layout import u32

KVM_COALESCED_MMIO_PAGE_OFFSET = 1
KVM_DIRTY_LOG_PAGE_OFFSET = 64

# ---- registers ---------------------------------------------------------------------------------------------------

KVM_NR_SPSR = 5


PSR_MODE_EL0t = 0x0000_0000
PSR_MODE_EL1t = 0x0000_0004
PSR_MODE_EL1h = 0x0000_0005
PSR_MODE_EL2h = 0x0000_0009
PSR_MODE_MASK = 0x0000_000F
PSR_F_BIT = 0x0000_0040
PSR_I_BIT = 0x0000_0080
PSR_A_BIT = 0x0000_0100
PSR_D_BIT = 0x0000_0200

KVM_REG_ARM_COPROC_MASK = 0x0FFF_0000
KVM_REG_ARM_COPROC_SHIFT = 16
KVM_REG_ARM_CORE = 0x0010 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM_DEMUX = 0x0011 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM64_SYSREG = 0x0013 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM_FW = 0x0014 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM64_SVE = 0x0015 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM_FW_FEAT_BMAP = 0x0016 << KVM_REG_ARM_COPROC_SHIFT


# Byte offsets in struct kvm_regs. KVM numbers the core registers by them, and never passes the whole structure.
_PLACES = {
    **{f"x{n}": 8 * n for n in range(31)},
    "sp": 248,
    "pc": 256,
    "pstate": 264,
    "sp_el1": 272,
    "elr_el1": 280,
    "spsr_el1": 288,
    **{f"v{n}": 336 + 16 * n for n in range(32)},
    "fpsr": 848,
    "fpcr": 852,
}


def core_reg(name: str) -> int:
    """Return the ONE_REG id of a core register.

    Names: ``x0`` to ``x30``, ``sp`` (SP_EL0), ``pc``, ``pstate``, ``sp_el1``, ``elr_el1``, ``spsr_el1``, ``v0`` to
    ``v31`` (128 bits), ``fpsr`` and ``fpcr`` (32 bits). KeyError for any other.
    """
    if name not in _PLACES:
        raise KeyError(f"no core register is called {name!r}")
    size = KVM_REG_SIZE_U128 if name[0] == "v" else KVM_REG_SIZE_U32 if name[:2] == "fp" else KVM_REG_SIZE_U64
    return KVM_REG_ARM64 | size | KVM_REG_ARM_CORE | _PLACES[name] // 4


def ARM64_SYS_REG(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """Return the ONE_REG id of a system register."""
    encoding = (op0 & 3) << 14 | (op1 & 7) << 11 | (crn & 15) << 7 | (crm & 15) << 3 | op2 & 7
    return KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG | encoding


def KVM_REG_ARM_FW_REG(r: int) -> int:
    """Return the id of a firmware pseudo-register."""
    return KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_FW | r & 0xFFFF


def KVM_REG_ARM_FW_FEAT_BMAP_REG(r: int) -> int:
    """Return the id of a bitmap of firmware features."""
    return KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_FW_FEAT_BMAP | r & 0xFFFF


KVM_REG_ARM_PTIMER_CTL = ARM64_SYS_REG(3, 3, 14, 2, 1)
KVM_REG_ARM_PTIMER_CVAL = ARM64_SYS_REG(3, 3, 14, 2, 2)
KVM_REG_ARM_PTIMER_CNT = ARM64_SYS_REG(3, 3, 14, 0, 1)
# CVAL and CNT were swapped by accident in the first version of the interface.
KVM_REG_ARM_TIMER_CTL = ARM64_SYS_REG(3, 3, 14, 3, 1)
KVM_REG_ARM_TIMER_CVAL = ARM64_SYS_REG(3, 3, 14, 0, 2)
KVM_REG_ARM_TIMER_CNT = ARM64_SYS_REG(3, 3, 14, 3, 2)

KVM_REG_ARM_PSCI_VERSION = KVM_REG_ARM_FW_REG(0)
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1 = KVM_REG_ARM_FW_REG(1)
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2 = KVM_REG_ARM_FW_REG(2)
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_3 = KVM_REG_ARM_FW_REG(3)

KVM_REG_ARM_STD_BMAP = KVM_REG_ARM_FW_FEAT_BMAP_REG(0)
KVM_REG_ARM_STD_HYP_BMAP = KVM_REG_ARM_FW_FEAT_BMAP_REG(1)
KVM_REG_ARM_VENDOR_HYP_BMAP = KVM_REG_ARM_FW_FEAT_BMAP_REG(2)
KVM_REG_ARM_VENDOR_HYP_BMAP_2 = KVM_REG_ARM_FW_FEAT_BMAP_REG(3)
KVM_REG_ARM_STD_BIT_TRNG_V1_0 = 0
KVM_REG_ARM_STD_HYP_BIT_PV_TIME = 0
KVM_REG_ARM_VENDOR_HYP_BIT_FUNC_FEAT = 0
KVM_REG_ARM_VENDOR_HYP_BIT_PTP = 1

KVM_REG_ARM64_SVE_VLS = KVM_REG_ARM64 | KVM_REG_ARM64_SVE | KVM_REG_SIZE_U512 | 0xFFFF

# ---- vCPUs -------------------------------------------------------------------------------------------------------

KVM_ARM_TARGET_GENERIC_V8 = 5

KVM_ARM_VCPU_POWER_OFF = 0
KVM_ARM_VCPU_EL1_32BIT = 1
KVM_ARM_VCPU_PSCI_0_2 = 2
KVM_ARM_VCPU_PMU_V3 = 3
KVM_ARM_VCPU_SVE = 4
KVM_ARM_VCPU_PTRAUTH_ADDRESS = 5
KVM_ARM_VCPU_PTRAUTH_GENERIC = 6
KVM_ARM_VCPU_HAS_EL2 = 7
KVM_ARM_VCPU_HAS_EL2_E2H0 = 8
KVM_ARM_VCPU_PMU_V3_STRICT = 9


@layout(features=7)
class kvm_vcpu_init(Structure):
    """``features`` is a bitmap of KVM_ARM_VCPU_*."""

    target: u32
    features: Array[c_uint32]


KVM_GUESTDBG_USE_SW_BP = 1 << 16
KVM_GUESTDBG_USE_HW = 1 << 17
KVM_DEBUG_ARCH_HSR_HIGH_VALID = 1 << 0


KVM_ARM_DEV_EL1_VTIMER = 1 << 0
KVM_ARM_DEV_EL1_PTIMER = 1 << 1
KVM_ARM_DEV_PMU = 1 << 2


KVM_ARM_FEATURE_ID_RANGE = 0
KVM_ARM_FEATURE_ID_RANGE_SIZE = 3 * 8 * 8

KVM_ARM_VCPU_PMU_V3_CTRL = 0
KVM_ARM_VCPU_PMU_V3_IRQ = 0
KVM_ARM_VCPU_PMU_V3_INIT = 1
KVM_ARM_VCPU_PMU_V3_FILTER = 2
KVM_ARM_VCPU_PMU_V3_SET_PMU = 3
KVM_ARM_VCPU_TIMER_CTRL = 1
KVM_ARM_VCPU_TIMER_IRQ_VTIMER = 0
KVM_ARM_VCPU_TIMER_IRQ_PTIMER = 1
KVM_ARM_VCPU_PVTIME_CTRL = 2
KVM_ARM_VCPU_PVTIME_IPA = 0

# ---- the interrupt controller ------------------------------------------------------------------------------------

KVM_VGIC_V2_ADDR_TYPE_DIST = 0
KVM_VGIC_V2_ADDR_TYPE_CPU = 1
KVM_VGIC_V2_DIST_SIZE = 0x1000
KVM_VGIC_V2_CPU_SIZE = 0x2000
KVM_VGIC_V3_ADDR_TYPE_DIST = 2
KVM_VGIC_V3_ADDR_TYPE_REDIST = 3
KVM_VGIC_ITS_ADDR_TYPE = 4
KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION = 5
KVM_VGIC_V3_DIST_SIZE = 0x1_0000
KVM_VGIC_V3_REDIST_SIZE = 0x2_0000
KVM_VGIC_V3_ITS_SIZE = 0x2_0000

KVM_DEV_ARM_VGIC_GRP_ADDR = 0
KVM_DEV_ARM_VGIC_GRP_DIST_REGS = 1
KVM_DEV_ARM_VGIC_GRP_CPU_REGS = 2
KVM_DEV_ARM_VGIC_GRP_NR_IRQS = 3
KVM_DEV_ARM_VGIC_GRP_CTRL = 4
KVM_DEV_ARM_VGIC_GRP_REDIST_REGS = 5
KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS = 6
KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO = 7
KVM_DEV_ARM_VGIC_GRP_ITS_REGS = 8
KVM_DEV_ARM_VGIC_GRP_MAINT_IRQ = 9
KVM_DEV_ARM_VGIC_CPUID_SHIFT = 32
KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT = 32
KVM_DEV_ARM_VGIC_V3_MPIDR_MASK = 0xFFFF_FFFF << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT
KVM_DEV_ARM_VGIC_OFFSET_MASK = 0xFFFF_FFFF
KVM_DEV_ARM_VGIC_SYSREG_INSTR_MASK = 0xFFFF
KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT = 10
KVM_DEV_ARM_VGIC_LINE_LEVEL_INTID_MASK = 0x3FF
VGIC_LEVEL_INFO_LINE_LEVEL = 0

KVM_DEV_ARM_VGIC_CTRL_INIT = 0
KVM_DEV_ARM_ITS_SAVE_TABLES = 1
KVM_DEV_ARM_ITS_RESTORE_TABLES = 2
KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES = 3
KVM_DEV_ARM_ITS_CTRL_RESET = 4

KVM_ARM_IRQ_VCPU2_SHIFT = 28
KVM_ARM_IRQ_TYPE_SHIFT = 24
KVM_ARM_IRQ_VCPU_SHIFT = 16
KVM_ARM_IRQ_NUM_SHIFT = 0
KVM_ARM_IRQ_TYPE_CPU = 0
KVM_ARM_IRQ_TYPE_SPI = 1
KVM_ARM_IRQ_TYPE_PPI = 2

# ---- the VM ------------------------------------------------------------------------------------------------------

KVM_ARM_VM_SMCCC_CTRL = 0
KVM_ARM_VM_SMCCC_FILTER = 0
KVM_HYPERCALL_EXIT_SMC = 1 << 0
KVM_HYPERCALL_EXIT_16BIT = 1 << 1
KVM_SYSTEM_EVENT_RESET_FLAG_PSCI_RESET2 = 1 << 0
KVM_SYSTEM_EVENT_SHUTDOWN_FLAG_PSCI_OFF2 = 1 << 0
KVM_EXIT_FAIL_ENTRY_CPU_UNSUPPORTED = 1 << 0


# ---- requests whose structure is arm64's -------------------------------------------------------------------------

KVM_ARM_VCPU_INIT = IOW("KVM_ARM_VCPU_INIT", KVMIO, 0xAE, kvm_vcpu_init)
KVM_ARM_PREFERRED_TARGET = IOR("KVM_ARM_PREFERRED_TARGET", KVMIO, 0xAF, kvm_vcpu_init)
