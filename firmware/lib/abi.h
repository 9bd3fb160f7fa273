/* SPDX-License-Identifier: Apache-2.0 */
/* The interface of payloads and pyvmm. Bases come from the device tree; only offsets are fixed here.
 * Assembler includes this too: plain #defines only. Python reads these lines as they are (pyvmm/abi.py has the
 * same numbers and a test compares). */
#ifndef PYVMM_ABI_H
#define PYVMM_ABI_H

/* pyvmm,mailbox: reg covers one page per vCPU; a vCPU uses page number MPIDR.Aff0. Registers are 64 bits wide. */
#define MAILBOX_OP          0x000 /* RO: bits 31:0 the next order, 63:32 how many arguments; the load waits for one */
#define MAILBOX_ARG(n)      (0x008 + 8 * (n)) /* RO: n = 0..6; those beyond the number are 0, and need not be loaded */
#define MAILBOX_RESULT(n)   (0x040 + 8 * (n)) /* WO: n = 0..6; 0 until stored, anew for each order */
#define MAILBOX_DONE        0x078 /* WO: status of the order: STATUS_* */
#define MAILBOX_TRAP(n)     (0x080 + 8 * (n)) /* WO: 0 vector, 1 ESR, 2 FAR, 3 ELR, 4 SPSR, 5 SP, 6 LR, 7 vCPU */
#define MAILBOX_TRAP_BELL   0x0c0 /* WO: the trap registers are complete; the vCPU stops */
#define MAILBOX_NOTE(n)     (0x0c8 + 8 * (n)) /* WO: n = 0..3; 0 results gpa, 1 results bytes, 2 count, 3 exit code */
#define MAILBOX_ARGS_SHIFT  32
#define NOTE_EXIT_CODE      3

/* How an order ended. */
#define STATUS_OK       0
#define STATUS_TRAPPED  1 /* the TRAP registers describe the trap; results say how far the order got */
#define STATUS_UNKNOWN  2 /* no such order */

/* Orders of the puppet. Arguments in ARG, answers in RESULT. */
#define OP_PING        1 /* -> MPIDR, CurrentEL, SCTLR, CNTFRQ, TTBR0 */
#define OP_READ        2 /* gpa, size (1 2 4 8) -> value, ticks */
#define OP_WRITE       3 /* gpa, size, value -> ticks */
#define OP_TOUCH       4 /* gpa, pages, stride (pages), access (ACCESS_*), seed or 0, gpa of as many TOUCHED or 0 -> pages, total ticks, max */
#define OP_EXECUTE     5 /* gpa -> x0 the code returned (it is called with x0 = ARG1), ticks */
#define OP_SHARE       6 /* gpa, pages, SHARE_* how -> last status, pages done, ticks */
#define OP_UNSHARE     7 /* gpa, pages, SHARE_* how -> last status, pages done, ticks */
#define OP_HVC         8 /* x0..x6 -> x0..x3, ticks in RESULT(4) */
#define OP_FLUSH       9 /* gpa, bytes: DC CIVAC, then DSB, IC IALLU, ISB */
#define OP_CPU_ON     10 /* vCPU number -> PSCI status; the new vCPU takes orders from its own mailbox */
#define OP_FILL       11 /* gpa, bytes, 64-bit pattern */
#define OP_SUM        12 /* gpa, bytes -> 64-bit sum of words */
#define OP_HAMMER     13 /* gpa, bytes, rounds, ACCESS_*: -> rounds done */
#define OP_OFF        14 /* PSCI SYSTEM_OFF */
#define OP_RESET      15 /* PSCI SYSTEM_RESET */
#define OP_CPU_OFF    16 /* PSCI CPU_OFF of this vCPU */
#define OP_MMIO       17 /* gpa, size, count, value or -1 for loads -> ticks: count accesses in a loop */
#define OP_WORDS      18 /* gpa, count (1..7) -> as many 64-bit words */
#define OP_COUNT      19 /* gpa, count, gpa of a word or 0 -> n: adds 1 to a word count times, atomically, or until the other is not 0 */

#define OP_SERIES     20 /* SERIES_* what, gpa, count, stride (bytes), value, gpa of a u32 each or 0 -> last status, done, total ticks */

/* The record of each touched page, by page number: two u32, its ticks and how many were touched before it. */
#define TOUCHED_SIZE    8

/* Repeated operations, each timed separately; a hypervisor call or a share that fails is the last. */
#define SERIES_NOTHING  0 /* the clock read twice: the cost of timing */
#define SERIES_LOAD     1 /* of 64 bits */
#define SERIES_STORE    2 /* of 64 bits: value */
#define SERIES_HVC      3 /* x0 = value; its status is ignored */
#define SERIES_SHARE    4 /* of a page, by the hypervisor's call alone */
#define SERIES_UNSHARE  5

#define ACCESS_READ     0
#define ACCESS_WRITE    1
#define ACCESS_EXECUTE  2

/* How a share is made: bits. */
#define SHARE_HVC       1 /* call the hypervisor where it offers the call */
#define SHARE_BELL      2 /* ring the share doorbell */

/* pyvmm,share-doorbell: one 64-bit register. A store takes gpa | op; a load gives the status of this vCPU's last ring
 * (0, or an SMCCC error sign-extended). A share is announced after the hypervisor call, an unshare before it. */
#define BELL            0x000
#define BELL_SHARE      1
#define BELL_UNSHARE    2

/* pyvmm,echo: answers requests through one page the guest shared. Registers are 64 bits wide. */
#define ECHO_PAGE       0x000 /* RW: gpa of the page; 0 = none. Refused (STATUS) unless shared and aligned */
#define ECHO_REQUEST    0x008 /* WO: bytes at offset 0 of the page; the answer is at offset 2048, upper-cased */
#define ECHO_STATUS     0x010 /* RO: of the last store to PAGE or REQUEST */
#define ECHO_COUNT      0x018 /* RO: requests answered */
#define ECHO_OK         0
#define ECHO_NOT_SHARED 1
#define ECHO_BAD        2 /* misaligned, outside memory, too long */
#define ECHO_NO_PAGE    3

/* pyvmm,bench: the kinds of the native loop side by side, for measuring an exit. 4096 bytes each. */
#define BENCH_REGISTERS 0x0000
#define BENCH_COUNTER   0x1000
#define BENCH_DOORBELL  0x2000
#define BENCH_COLD      0x3000

/* SMCCC function ids, Documentation/virt/kvm/arm/hypercalls.rst */
#define HVC_FEATURES    0x86000000
#define HVC_MEMINFO     0xC6000002
#define HVC_SHARE       0xC6000003
#define HVC_UNSHARE     0xC6000004
#define HVC_FEATURE_MEMINFO_BIT 2
#define HVC_FEATURE_SHARE_BIT   3
#define HVC_FEATURE_UNSHARE_BIT 4

#endif
