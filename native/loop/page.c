// SPDX-License-Identifier: Apache-2.0
/* The size of the host's page. */
#include "loop/loop.h"

#include <unistd.h>

uint32_t pv_page_shift;

__attribute__((constructor)) static void ask(void)
{
    pv_page_shift = (uint32_t)__builtin_ctzl((unsigned long)sysconf(_SC_PAGESIZE));
}
