// SPDX-License-Identifier: Apache-2.0
/* Handle an exception: report it, then recover or stop the vCPU. Called only by vectors.S. */
#include "lib.h"

_Static_assert(sizeof(struct cpu) == 1 << CPU_SHIFT, "the assembler's idea of struct cpu");
_Static_assert(offsetof(struct cpu, number) == CPU_NUMBER, "the assembler's idea of struct cpu");
_Static_assert(offsetof(struct cpu, recover) == CPU_RECOVER, "the assembler's idea of struct cpu");
_Static_assert(offsetof(struct cpu, executing) == CPU_EXECUTING, "the assembler's idea of struct cpu");
_Static_assert(offsetof(struct cpu, trapping) == CPU_TRAPPING, "the assembler's idea of struct cpu");

u8 stacks[MAX_CPUS][STACK_SIZE] __attribute__((section(".stacks,\"aw\",@nobits//"), aligned(16)));
u8 trap_stacks[MAX_CPUS][TRAP_STACK_SIZE] __attribute__((section(".stacks,\"aw\",@nobits//"), aligned(16)));

u64 trap(u64 vector, u64 esr, u64 far, u64 elr, u64 spsr, u64 sp, u64 lr, struct cpu *cpu);

u64 trap(u64 vector, u64 esr, u64 far, u64 elr, u64 spsr, u64 sp, u64 lr, struct cpu *cpu)
{
    u64 at = mailbox();

    /* A page of zeros was executed: udf #0. */
    if (cpu->executing && elr == cpu->executing && esr >> 26 == 0)
        return TRAP_RETURN;
    cpu->trapping = 1;
    if (at) {
        u64 words[] = {vector, esr, far, elr, spsr, sp, lr, cpu->number};
        for (u64 n = 0; n < 8; n++)
            mmio_write64(at + MAILBOX_TRAP(n), words[n]);
    }
    if (cpu->recover) {
        cpu->trapping = 0;
        return TRAP_RECOVER;
    }
    if (at)
        mmio_write64(at + MAILBOX_TRAP_BELL, 1);
    else
        print("trap: vector %lu esr %lx far %lx elr %lx spsr %lx sp %lx lr %lx vcpu %lu\n", vector, esr, far, elr, spsr,
              sp, lr, cpu->number);
    park();
}
