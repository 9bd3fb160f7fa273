// SPDX-License-Identifier: Apache-2.0
/*
 * Brings every vCPU up by PSCI, lets them count with atomics, and takes them down again. Prints in vCPU order, so the
 * output is the same every time. Parameters: rounds=N additions a vCPU (default 1000).
 */
#include "../lib/lib.h"

#define CPU_STATE_OFF 1

static u64 total, reported[MAX_CPUS], rounds;

static void count(void)
{
    for (u64 i = 0; i < rounds; i++)
        __atomic_fetch_add(&total, 1, __ATOMIC_RELAXED);
    __atomic_store_n(&reported[this_cpu()->number], SYSREG(mpidr_el1), __ATOMIC_RELEASE);
}

void secondary(void)
{
    count();
}

int main(void)
{
    s64 failures = 0;

    rounds = argument_number("rounds", 1000);
    for (u64 n = 1; n < board.cpu_count; n++) {
        s64 status = cpu_on(n);
        if (status)
            print("vCPU %lu: CPU_ON said %ld\n", n, status), failures++;
    }
    count();
    for (u64 n = 0; n < board.cpu_count && !failures; n++) {
        u64 mpidr;
        while (!(mpidr = __atomic_load_n(&reported[n], __ATOMIC_ACQUIRE)))
            ;
        print("vCPU %lu: up, MPIDR 0x%lx\n", n, mpidr);
    }
    print("counted %lu of %lu\n", total, rounds * board.cpu_count);
    for (u64 n = 1; n < board.cpu_count && !failures; n++)
        while (cpu_state(n) != CPU_STATE_OFF)
            ;
    print("%lu vCPUs, all but the first are off again\n", board.cpu_count);
    print("CPU_ON of this vCPU says %ld, of one that is not there %ld\n", cpu_on(0), cpu_on(MAX_CPUS));
    return failures ? 1 : 0;
}
