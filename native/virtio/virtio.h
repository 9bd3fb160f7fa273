/* SPDX-License-Identifier: Apache-2.0 */
/* Declarations shared by the virtio devices and their queues. Python sees only cdef.h. */
#ifndef PYVMM_VIRTIO_H
#define PYVMM_VIRTIO_H

#include "loop/loop.h"

#include <sys/uio.h>
#include <time.h>

#include "virtio/cdef.h"

/* For ppoll(). */
static inline struct timespec pv_timespec(uint64_t ns)
{
    return (struct timespec){.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
}

/* virtqueue.c, chain.c. A descriptor as a driver lays it out, virtio 1.2, 2.7.5 and 2.8.13. */
enum { PV_DESCRIPTOR_BYTES = 16, PV_DESC_NEXT = 1, PV_DESC_WRITE = 2, PV_DESC_INDIRECT = 4 };
struct pv_descriptor {
    uint64_t address;
    uint32_t size;
    union {
        struct { uint16_t flags, next; } split;
        struct { uint16_t id, flags; } packed;
    };
};
_Static_assert(sizeof(struct pv_descriptor) == PV_DESCRIPTOR_BYTES, "as the driver lays it out");
/* Breaks the queue and returns false. Defined here because both virtqueue.c and chain.c detect errors. */
static inline bool pv_queue_fail(struct pv_queue *queue, enum pv_queue_error error, uint64_t gpa)
{
    queue->error_gpa = gpa;
    store_release(&queue->error, error);
    return false;
}
/* Adds a segment to a chain, or all of an indirect table. False: the queue is broken. */
bool pv_chain_take(struct pv_queue *queue, struct pv_chain *chain, uint64_t gpa, uint32_t size, bool writable);
bool pv_chain_table(struct pv_queue *queue, struct pv_chain *chain, uint64_t gpa, uint32_t size, bool packed);
/* Stores bytes [offset, offset + n) of a chain's readable or writable part as iovecs over the views, for readv() and
   similar calls. The kernel's copies fail with EFAULT at a page that the host may not access, and do not take it from
   the guest. Never use them for O_DIRECT, fixed buffers of io_uring, vmsplice or MSG_ZEROCOPY, which pin pages. Returns
   the number of iovecs, with fewer bytes if the chain ends; -1 outside of memory, or if more than `most` are needed. */
int pv_chain_iovecs(struct pv_queue *queue, const struct pv_chain *chain, bool writable, uint64_t offset, uint64_t n,
                    struct iovec *to, int most);

#endif
