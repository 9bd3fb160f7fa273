// SPDX-License-Identifier: Apache-2.0
/* Chains of descriptors: the segments of a request, in a ring or in an indirect table, and copies to and from them. */
#include "virtio/virtio.h"

enum { WINDOW = 32 };

/* ---- segments */

bool pv_chain_take(struct pv_queue *queue, struct pv_chain *chain, uint64_t gpa, uint32_t size, bool writable)
{
    if (!size || gpa > UINT64_MAX - size)
        return pv_queue_fail(queue, PV_QUEUE_SEGMENT, gpa);
    if (!writable && chain->count > chain->readable)
        return pv_queue_fail(queue, PV_QUEUE_ORDER, gpa);
    if (chain->in_bytes + chain->out_bytes + size > UINT32_MAX)
        return pv_queue_fail(queue, PV_QUEUE_LENGTH, gpa);
    if (chain->count >= chain->room)
        return pv_queue_fail(queue, PV_QUEUE_ROOM, gpa);
    chain->segments[chain->count++] = (struct pv_segment){.gpa = gpa, .size = size, .writable = writable};
    *(writable ? &chain->out_bytes : &chain->in_bytes) += size;
    chain->readable += !writable;
    return true;
}

/* An indirect table (2.7.5.3, 2.8.7), read in parts: it may have any length, and a split ring's chain may jump within
   it. The chain's room bounds the work, because every step uses some. */
bool pv_chain_table(struct pv_queue *queue, struct pv_chain *chain, uint64_t gpa, uint32_t size, bool packed)
{
    struct pv_descriptor window[WINDOW];
    uint32_t count = size / PV_DESCRIPTOR_BYTES, from = 0, held = 0;

    if (!(queue->flags & PV_QUEUE_INDIRECT) || !count || size % PV_DESCRIPTOR_BYTES || gpa > UINT64_MAX - size)
        return pv_queue_fail(queue, PV_QUEUE_INDIRECTION, gpa);
    for (uint32_t i = 0, steps = 1;; steps++) {
        if (i - from >= held) {
            from = i;
            held = count - i < WINDOW ? count - i : WINDOW;
            uint64_t stopped = 0, bytes = (uint64_t)held * PV_DESCRIPTOR_BYTES;
            if (pv_read(queue->vm, gpa + (uint64_t)i * PV_DESCRIPTOR_BYTES, window, bytes, &stopped) < bytes)
                return pv_queue_fail(queue, PV_QUEUE_TABLE, stopped);
        }
        struct pv_descriptor *found = &window[i - from];
        uint16_t flags = packed ? found->packed.flags : found->split.flags;
        if (flags & PV_DESC_INDIRECT)
            return pv_queue_fail(queue, PV_QUEUE_INDIRECTION, gpa + (uint64_t)i * PV_DESCRIPTOR_BYTES);
        if (!pv_chain_take(queue, chain, found->address, found->size, flags & PV_DESC_WRITE))
            return false;
        /* A packed ring's table has no chain: all of it is the request. */
        if (packed ? i + 1 == count : !(flags & PV_DESC_NEXT))
            return true;
        i = packed ? i + 1 : found->split.next;
        if (i >= count)
            return pv_queue_fail(queue, PV_QUEUE_DESCRIPTOR, gpa);
        if (steps >= count)
            return pv_queue_fail(queue, PV_QUEUE_LOOP, gpa);
    }
}

/* ---- a chain's bytes */

/* The part of [offset, offset + n) of the readable or writable bytes that lies in segment *at or, failing that, in the
   next one that has some; 0 at the chain's end. *at starts as 0, and is where to continue; *before is the number of
   bytes in the segments before it. */
struct cursor { uint32_t at; uint64_t before; };

static uint64_t part(const struct pv_chain *chain, bool writable, struct cursor *cursor, uint64_t offset, uint64_t n,
                     uint64_t *gpa)
{
    uint32_t first = writable ? chain->readable : 0, end = writable ? chain->count : chain->readable;

    for (; first + cursor->at < end; cursor->before += chain->segments[first + cursor->at++].size) {
        const struct pv_segment *segment = &chain->segments[first + cursor->at];
        if (offset - cursor->before < segment->size) {
            uint64_t skip = offset - cursor->before, left = segment->size - skip;
            *gpa = segment->gpa + skip;
            return left < n ? left : n;
        }
    }
    return 0;
}

static uint64_t transfer(struct pv_queue *queue, const struct pv_chain *chain, uint64_t offset, uint8_t *host,
                         uint64_t n, bool writable)
{
    struct cursor cursor = {0};
    uint64_t done = 0, gpa, size;

    while (done < n && (size = part(chain, writable, &cursor, offset + done, n - done, &gpa))) {
        uint64_t copied = writable ? pv_write(queue->vm, gpa, host + done, size, NULL)
                                   : pv_read(queue->vm, gpa, host + done, size, NULL);
        done += copied;
        if (copied < size)
            break;
    }
    return done;
}

uint64_t pv_chain_read(struct pv_queue *queue, const struct pv_chain *chain, uint64_t offset, void *to, uint64_t n)
{
    return transfer(queue, chain, offset, to, n, false);
}

uint64_t pv_chain_write(struct pv_queue *queue, const struct pv_chain *chain, uint64_t offset, const void *from,
                        uint64_t n)
{
    return transfer(queue, chain, offset, (uint8_t *)(uintptr_t)from, n, true);
}

int pv_chain_iovecs(struct pv_queue *queue, const struct pv_chain *chain, bool writable, uint64_t offset, uint64_t n,
                    struct iovec *to, int most)
{
    struct cursor cursor = {0};
    struct pv_region region = {0};
    uint64_t done = 0, gpa, size;
    int count = 0;

    while (done < n && (size = part(chain, writable, &cursor, offset + done, n - done, &gpa))) {
        if (!region.size || gpa - region.gpa >= region.size) {
            uint32_t phase = pv_map_enter(queue->vm);
            bool found = pv_region_at(queue->vm, gpa, &region);
            pv_map_leave(queue->vm, phase);
            if (!found || !region.view)
                return -1;
        }
        uint64_t inside = gpa - region.gpa;
        if (size > region.size - inside)
            size = region.size - inside;
        uint8_t *view = region.view + inside;
        if (count && (uint8_t *)to[count - 1].iov_base + to[count - 1].iov_len == view) {
            to[count - 1].iov_len += size;
        } else if (count < most) {
            to[count++] = (struct iovec){.iov_base = view, .iov_len = size};
        } else {
            return -1;
        }
        done += size;
    }
    return count;
}
