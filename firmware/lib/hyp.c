// SPDX-License-Identifier: Apache-2.0
/* Calls to the hypervisor (SMCCC over HVC): sharing, PSCI. */
#include "lib.h"

#define PSCI_CPU_ON 0xC4000003
#define PSCI_AFFINITY_INFO 0xC4000004
#define NOT_SUPPORTED (-1)

extern u8 start_secondary[];

void hvc(u64 regs[8])
{
    register u64 x0 __asm__("x0") = regs[0], x1 __asm__("x1") = regs[1], x2 __asm__("x2") = regs[2];
    register u64 x3 __asm__("x3") = regs[3], x4 __asm__("x4") = regs[4], x5 __asm__("x5") = regs[5];
    register u64 x6 __asm__("x6") = regs[6], x7 __asm__("x7") = regs[7];
    __asm__ volatile("hvc #0"
                     : "+r"(x0), "+r"(x1), "+r"(x2), "+r"(x3), "+r"(x4), "+r"(x5), "+r"(x6), "+r"(x7)
                     : : "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15", "x16", "x17", "memory");
    regs[0] = x0;
    regs[1] = x1;
    regs[2] = x2;
    regs[3] = x3;
}

static s64 call(u64 function, u64 a, u64 b, u64 c)
{
    u64 regs[8] = {function, a, b, c};
    hvc(regs);
    return (s64)regs[0];
}

s64 hvc1(u64 function, u64 argument)
{
    return call(function, argument, 0, 0);
}

void features_read(void)
{
    s64 features = hvc1(HVC_FEATURES, 0);
    /* NOT_SUPPORTED may come as 32 or as 64 bits of ones. */
    board.features = features > 0 && (u32)features != (u32)NOT_SUPPORTED ? (u64)features : 0;
    if (board.features >> HVC_FEATURE_MEMINFO_BIT & 1)
        board.page = (u64)hvc1(HVC_MEMINFO, 0);
}

static s64 ring(u64 gpa, u64 operation)
{
    barrier();
    mmio_write64(board.bell + BELL, gpa | operation);
    return (s64)mmio_read64(board.bell + BELL);
}

/* Announced when the hypervisor has done it: from then on a device may use the page. */
s64 share(u64 gpa, u64 how)
{
    s64 status = 0;
    if ((how & SHARE_HVC) && (board.features >> HVC_FEATURE_SHARE_BIT & 1))
        status = hvc1(HVC_SHARE, gpa);
    if (!status && (how & SHARE_BELL) && board.bell)
        status = ring(gpa, BELL_SHARE);
    return status;
}

/* Announced first, so that devices have let go when the hypervisor takes the page back. */
s64 unshare(u64 gpa, u64 how)
{
    s64 status = 0;
    if ((how & SHARE_BELL) && board.bell)
        status = ring(gpa, BELL_UNSHARE);
    if (!status && (how & SHARE_HVC) && (board.features >> HVC_FEATURE_UNSHARE_BIT & 1))
        status = hvc1(HVC_UNSHARE, gpa);
    return status;
}

s64 cpu_on(u64 number)
{
    u64 mpidr = number < board.cpu_count ? board.mpidr[number] : ~0ul;
    return (int)call(PSCI_CPU_ON, mpidr, (u64)start_secondary, number);
}

s64 cpu_state(u64 number)
{
    return (int)call(PSCI_AFFINITY_INFO, board.mpidr[number], 0, 0);
}

void leave(u64 how)
{
    hvc1(how, 0);
    park();
}
