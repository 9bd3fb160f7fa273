// SPDX-License-Identifier: Apache-2.0
/*
 * Makes exits and times them: the same accesses on any VMM with a PL011 in its device tree. Parameters:
 *
 *   count=N    exits a round   (1000)          rounds=N   rounds of each   (5)
 *
 * One line a round: exits: what=store|load|hvc round=0 count=… ticks=… hz=…. A store goes to a register without side
 * effects (UARTILPR). A load reads the flags (UARTFR). An hvc asks for PSCI's version, which a kernel answers itself.
 */
#include "../lib/lib.h"

#define UART_FLAGS 0x18
#define UART_KEPT 0x20
#define PSCI_VERSION 0x84000000

static u64 stores(u64 count)
{
    u64 start = ticks();
    while (count--)
        mmio_write32(board.uart + UART_KEPT, 7);
    return ticks() - start;
}

static u64 loads(u64 count)
{
    u64 start = ticks();
    while (count--)
        mmio_read32(board.uart + UART_FLAGS);
    return ticks() - start;
}

static u64 hvcs(u64 count)
{
    u64 start = ticks();
    while (count--)
        hvc1(PSCI_VERSION, 0);
    return ticks() - start;
}

static void report(const char *what, u64 round, u64 count, u64 spent)
{
    print("exits: what=%s round=%lu count=%lu ticks=%lu hz=%lu\n", what, round, count, spent, SYSREG(cntfrq_el0));
}

int main(void)
{
    u64 count = argument_number("count", 1000), rounds = argument_number("rounds", 5);

    for (u64 round = 0; board.uart && round < rounds; round++) {
        report("store", round, count, stores(count));
        report("load", round, count, loads(count));
        report("hvc", round, count, hvcs(count));
    }
    return 0;
}
