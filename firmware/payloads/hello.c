// SPDX-License-Identifier: Apache-2.0
/* The shortest payload: says what it is and powers off. No parameters. */
#include "../lib/lib.h"

int main(void)
{
    int shares = board.features >> HVC_FEATURE_SHARE_BIT & 1;

    print("hello from a %s guest\n", shares ? "protected" : "plain");
    print("  at EL%lu, %lu vCPU%s, %lu MiB of memory, counter at %lu Hz\n", SYSREG(CurrentEL) >> 2, board.cpu_count,
          board.cpu_count == 1 ? "" : "s", board.memory_size >> 20, SYSREG(cntfrq_el0));
    print("  hypervisor services: 0x%lx%s\n", board.features, shares ? " (shares memory page by page)" : "");
    return 0;
}
