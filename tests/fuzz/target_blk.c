// SPDX-License-Identifier: Apache-2.0
/* virtio-blk's loop over a file, with the requests that the driver makes. Built with ppoll() replaced. */
#include "fuzz.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SECTORS = 32, SECTOR = 512, SERVES = 16, BOUNCE = 4 * SECTOR };

static struct pv_queue queue;
static struct pv_segment segments[PV_BLK_SEGMENTS];
static struct pv_chain chain = {.room = PV_BLK_SEGMENTS, .segments = segments};
static uint8_t bounce[BOUNCE];
static int file;

/* Nobody kicks while the loop sleeps, so tell it to leave. */
int fuzz_ppoll(struct pollfd *watched, nfds_t count, const struct timespec *timeout, const sigset_t *mask)
{
    (void)watched, (void)count, (void)timeout, (void)mask;
    queue.stop = 1;
    return 0;
}

void fuzz_begin(void)
{
    guest_begin();
    file = memfd_create("disk", MFD_CLOEXEC);
    HOLDS(file >= 0);
}

static void serve(struct pv_blk *blk, struct input *input)
{
    queue.stop = 0;
    /* A guest may have its disk write into its own packed ring, which may then never end. That harms only the guest. */
    for (int i = 0; i < SERVES && !queue.stop; i++) {
        uint32_t stop = pv_blk_serve(blk);
        HOLDS(stop == PV_BLK_STOPPED || stop == PV_BLK_REQUEST || stop == PV_BLK_FAILED || stop == PV_BLK_BROKEN);
        HOLDS((stop == PV_BLK_BROKEN) == (queue.error != 0));
        if (stop == PV_BLK_BROKEN || stop == PV_BLK_STOPPED)
            break;
        HOLDS(blk->open);
        guest_check(&queue, &chain);
        HOLDS(blk->data <= chain.out_bytes);
        HOLDS(stop != PV_BLK_FAILED || blk->error);
        pv_blk_answer(blk, next8(input));
        HOLDS(!blk->open);
    }
}

void fuzz_one(const uint8_t *data, size_t size)
{
    struct input input = {data, data + size};
    struct stat status;

    guest_reset();
    memset(&queue, 0, sizeof(queue));
    queue.kick = -1;
    guest_queue(&input, &queue);
    uint8_t how = next8(&input);
    struct pv_blk blk = {
        .queue = &queue, .chain = &chain, .file = file, .stop_fd = -1, .flags = how & 7, .capacity = SECTORS,
        .most = 1 << 20, .bounce = how & 8 ? bounce : NULL, .bounce_size = how & 8 ? sizeof(bounce) : 0,
    };
    off_t length = (off_t)(how & 0x10 ? SECTORS / 2 : SECTORS) * SECTOR;
    HOLDS(ftruncate(file, length) == 0);
    while (input.at < input.end) {
        if (next8(&input) & 3)
            guest_act(&input, &queue);
        else
            serve(&blk, &input);
    }
    serve(&blk, &input);
    HOLDS(fstat(file, &status) == 0 && status.st_size >= length && status.st_size <= SECTORS * SECTOR);
    HOLDS(status.st_size == length || !(blk.flags & PV_BLK_REGULAR));
    HOLDS(!(blk.flags & PV_BLK_READ_ONLY) || !blk.bytes_written);
}
