// SPDX-License-Identifier: Apache-2.0
/* Virtqueues alone: pops, pushes in any order, several at once, pops that are undone, and copies at any offset. */
#include "fuzz.h"

enum { HELD = 16, MOST_SEGMENTS = 64, VECTORS = 8, BYTES = 8192 };

static struct pv_queue queue;
static struct pv_segment segments[HELD][MOST_SEGMENTS];
static struct pv_chain held[HELD]; /* popped and not pushed, in that order */
static uint32_t count;

void fuzz_begin(void) { guest_begin(); }

static void pop(uint32_t room)
{
    if (count == HELD)
        return;
    held[count].room = room;
    int found = pv_queue_pop(&queue, &held[count]);
    HOLDS(found == -1 ? queue.error != 0 : queue.error == 0);
    if (found == 1)
        guest_check(&queue, &held[count++]);
}

static void forget(uint32_t from, uint32_t n)
{
    struct pv_chain gone[HELD];

    memcpy(gone, held + from, n * sizeof(gone[0]));
    memmove(held + from, held + from + n, (count - from - n) * sizeof(held[0]));
    count -= n;
    memcpy(held + count, gone, n * sizeof(gone[0])); /* their segments are still in use */
}

static void push(struct input *input)
{
    uint8_t where = next8(input);
    uint32_t from = count ? where % count : 0, n = count ? 1 + (where >> 4) % (count - from) : 0, written[HELD];

    for (uint32_t i = 0; i < n; i++)
        written[i] = held[from + i].out_bytes ? 1 : 0;
    HOLDS(pv_queue_push_all(&queue, held + from, written, n) == 0 || queue.error);
    if (n)
        forget(from, n);
}

static void move(struct input *input)
{
    static uint8_t bytes[BYTES];
    uint8_t how = next8(input);
    uint64_t offset = how & 1 ? next32(input) : next8(input), n = next16(input) % BYTES;

    if (!count)
        return;
    const struct pv_chain *chain = &held[how >> 4 < count ? how >> 4 : 0];
    bool writable = how & 2;
    uint64_t all = writable ? chain->out_bytes : chain->in_bytes, there = offset < all ? all - offset : 0;
    uint64_t done = writable ? pv_chain_write(&queue, chain, offset, bytes, n)
                             : pv_chain_read(&queue, chain, offset, bytes, n);
    HOLDS(done <= n && done <= there);

    struct iovec vectors[VECTORS];
    int used = pv_chain_iovecs(&queue, chain, writable, offset, n, vectors, VECTORS);
    uint64_t sum = 0;
    HOLDS(used >= -1 && used <= VECTORS);
    for (int i = 0; i < used; i++)
        sum += vectors[i].iov_len;
    HOLDS(used < 0 || sum == (n < there ? n : there));
}

void fuzz_one(const uint8_t *data, size_t size)
{
    struct input input = {data, data + size};

    guest_reset();
    memset(&queue, 0, sizeof(queue));
    queue.kick = -1;
    count = 0;
    for (uint32_t i = 0; i < HELD; i++)
        held[i] = (struct pv_chain){.segments = segments[i]};
    guest_queue(&input, &queue);
    uint32_t room = 1 + next8(&input) % MOST_SEGMENTS;
    while (input.at < input.end) {
        uint32_t error = queue.error;
        switch (next8(&input) & 7) {
        case 0:
        case 1: pop(room); break;
        case 2: push(&input); break;
        case 3:
            if (count && !queue.error)
                pv_queue_unpop(&queue, &held[--count]);
            break;
        case 4: pv_queue_interrupt(&queue); break;
        case 5: {
            int armed = pv_queue_arm(&queue);
            HOLDS(armed == -1 ? queue.error != 0 : queue.error == 0);
            break;
        }
        case 6: move(&input); break;
        default: guest_act(&input, &queue); break;
        }
        HOLDS(queue.error < PV_QUEUE_ERRORS && (!error || queue.error == error));
        HOLDS(queue.flags & PV_QUEUE_PACKED ? queue.next < queue.size && queue.used < queue.size
                                            : queue.next <= UINT16_MAX && queue.used <= UINT16_MAX);
    }
}
