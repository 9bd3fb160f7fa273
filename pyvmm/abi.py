# SPDX-License-Identifier: Apache-2.0
"""The interface of payloads and pyvmm: the numbers of firmware/lib/abi.h, which documents them.

Data only. Every module may import it. A test compares it with the header.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


# -- pyvmm,mailbox

MAILBOX_OP: Final = 0x000
MAILBOX_DONE: Final = 0x078
MAILBOX_TRAP_BELL: Final = 0x0C0
MAILBOX_ARGS_SHIFT: Final = 32


def MAILBOX_ARG(n: int) -> int:
    """Offset of argument ``n``, 0..6."""
    return 0x008 + 8 * n


def MAILBOX_RESULT(n: int) -> int:
    """Offset of result ``n``, 0..6."""
    return 0x040 + 8 * n


def MAILBOX_TRAP(n: int) -> int:
    """Offset of trap register ``n``, 0..7: vector, ESR, FAR, ELR, SPSR, SP, LR, vCPU."""
    return 0x080 + 8 * n


def MAILBOX_NOTE(n: int) -> int:
    """Offset of note ``n``, 0..3: results gpa, results bytes, count, exit code."""
    return 0x0C8 + 8 * n


NOTE_EXIT_CODE: Final = 3

STATUS_OK: Final = 0
STATUS_TRAPPED: Final = 1
STATUS_UNKNOWN: Final = 2

# -- orders of the puppet

OP_PING: Final = 1
OP_READ: Final = 2
OP_WRITE: Final = 3
OP_TOUCH: Final = 4
OP_EXECUTE: Final = 5
OP_SHARE: Final = 6
OP_UNSHARE: Final = 7
OP_HVC: Final = 8
OP_FLUSH: Final = 9
OP_CPU_ON: Final = 10
OP_FILL: Final = 11
OP_SUM: Final = 12
OP_HAMMER: Final = 13
OP_OFF: Final = 14
OP_RESET: Final = 15
OP_CPU_OFF: Final = 16
OP_MMIO: Final = 17
OP_WORDS: Final = 18
OP_COUNT: Final = 19
OP_SERIES: Final = 20

TOUCHED_SIZE: Final = 8

SERIES_NOTHING: Final = 0
SERIES_LOAD: Final = 1
SERIES_STORE: Final = 2
SERIES_HVC: Final = 3
SERIES_SHARE: Final = 4
SERIES_UNSHARE: Final = 5

ACCESS_READ: Final = 0
ACCESS_WRITE: Final = 1
ACCESS_EXECUTE: Final = 2

SHARE_HVC: Final = 1
SHARE_BELL: Final = 2

# -- pyvmm,share-doorbell

BELL: Final = 0x000
BELL_SHARE: Final = 1
BELL_UNSHARE: Final = 2

# -- pyvmm,echo

ECHO_PAGE: Final = 0x000
ECHO_REQUEST: Final = 0x008
ECHO_STATUS: Final = 0x010
ECHO_COUNT: Final = 0x018
ECHO_OK: Final = 0
ECHO_NOT_SHARED: Final = 1
ECHO_BAD: Final = 2
ECHO_NO_PAGE: Final = 3

# -- pyvmm,bench

BENCH_REGISTERS: Final = 0x0000
BENCH_COUNTER: Final = 0x1000
BENCH_DOORBELL: Final = 0x2000
BENCH_COLD: Final = 0x3000

# -- SMCCC, Documentation/virt/kvm/arm/hypercalls.rst

HVC_FEATURES: Final = 0x8600_0000
HVC_MEMINFO: Final = 0xC600_0002
HVC_SHARE: Final = 0xC600_0003
HVC_UNSHARE: Final = 0xC600_0004
HVC_FEATURE_MEMINFO_BIT: Final = 2
HVC_FEATURE_SHARE_BIT: Final = 3
HVC_FEATURE_UNSHARE_BIT: Final = 4
