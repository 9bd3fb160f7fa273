// SPDX-License-Identifier: Apache-2.0
/* The least a VMM must do for an MMIO exit: KVM_RUN again. What the product's loop is measured against; loaded into the
 * measuring process so that both enter the same vCPU. */
#include <errno.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <time.h>

static uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Runs until an exit that is not MMIO. Returns nanoseconds; *exits counts. */
uint64_t bare_loop(int fd, const struct kvm_run *run, uint64_t *exits)
{
    uint64_t start = now(), n = 0;

    for (;;) {
        if (ioctl(fd, KVM_RUN, 0)) {
            if (errno == EINTR)
                continue;
            break;
        }
        if (run->exit_reason != KVM_EXIT_MMIO)
            break;
        n++;
    }
    *exits = n;
    return now() - start;
}
