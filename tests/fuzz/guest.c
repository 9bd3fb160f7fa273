// SPDX-License-Identifier: Apache-2.0
/* A guest for targets: memory that may be closed or gone, rings in it, and a driver that may do anything to them. */
#include "fuzz.h"

#include <sys/mman.h>

enum { HALF = PAGES / 2, TABLE_PAGE = 8, DATA_PAGE = 9 };

struct guest guest;

static uint8_t *memory;
static uint8_t ledger[PAGES + 1];
static struct pv_region regions[3];
static struct pv_map whole = {.count = 3, .regions = regions}, half = {.count = 1, .regions = regions};
static uint32_t closed;

/* For targets in which nothing waits. */
__attribute__((weak)) int fuzz_ppoll(struct pollfd *watched, nfds_t count, const struct timespec *timeout,
                                     const sigset_t *mask)
{
    (void)watched, (void)count, (void)timeout, (void)mask;
    fuzz_fail("nothing waits", __FILE__, __LINE__);
    return -1;
}

void guest_begin(void)
{
    memory = mmap(NULL, PAGES * PV_HOST_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    HOLDS(memory != MAP_FAILED);
    HOLDS(pv_install_signals() == 0);
    regions[0] = (struct pv_region){.gpa = RAM, .size = HALF * PV_HOST_PAGE, .view = memory, .ledger = ledger};
    regions[1] = (struct pv_region){
        .gpa = RAM + HALF * PV_HOST_PAGE, .size = HALF * PV_HOST_PAGE, .view = memory + HALF * PV_HOST_PAGE,
        .ledger = ledger + HALF,
    };
    regions[2] = (struct pv_region){.gpa = RAM + 32 * PV_HOST_PAGE, .size = PV_HOST_PAGE, .ledger = ledger + PAGES};
}

void guest_reset(void)
{
    if (closed)
        mprotect(memory, PAGES * PV_HOST_PAGE, PROT_READ | PROT_WRITE);
    closed = 0;
    memset(memory, 0, PAGES * PV_HOST_PAGE);
    memset(&guest, 0, sizeof(guest));
    guest.interrupt.fd = -1;
    guest.vm.map = &whole;
}

/* Addresses that often find faults. */
static uint64_t place(struct input *input)
{
    const uint64_t places[] = {
        RAM + DATA_PAGE * PV_HOST_PAGE, RAM + TABLE_PAGE * PV_HOST_PAGE, RAM, RAM + HALF * PV_HOST_PAGE - 8,
        RAM + PAGES * PV_HOST_PAGE - 8, RAM + PAGES * PV_HOST_PAGE, RAM + 32 * PV_HOST_PAGE, UINT64_MAX - 7, 0,
    };
    uint8_t which = next8(input);

    if (which >= 0xf0)
        return RAM + next16(input);
    return places[which % (sizeof(places) / sizeof(places[0]))] + (which & 0x80 ? next8(input) : 0);
}

static uint32_t length(struct input *input)
{
    static const uint32_t lengths[] = {
        16, 64, 1, 32, 48, 512, 4096, 8192, 1 << 20, 0, UINT32_MAX, 1u << 31, 528, 12, 1514,
    };
    uint8_t which = next8(input);

    return which >= 0xf0 ? next32(input) : lengths[which % (sizeof(lengths) / sizeof(lengths[0]))];
}

static void guest_write(uint64_t gpa, const void *from, size_t n)
{
    /* The guest's own CPU writes wherever the host may. */
    if (gpa < RAM || gpa - RAM > PAGES * PV_HOST_PAGE - n)
        return;
    for (uint64_t page = (gpa - RAM) / PV_HOST_PAGE; page <= (gpa - RAM + n - 1) / PV_HOST_PAGE; page++)
        if (closed >> page & 1)
            return;
    memcpy(memory + (gpa - RAM), from, n);
}

/* A valid table, for the driver to name or to spoil: two segments to read, two to write. */
static void make_table(const struct pv_queue *queue)
{
    for (uint16_t i = 0; i < 4; i++) {
        uint16_t flags = (uint16_t)((i >= 2 ? PV_DESC_WRITE : 0) | (i < 3 ? PV_DESC_NEXT : 0));
        struct pv_descriptor made = {.address = RAM + DATA_PAGE * PV_HOST_PAGE + 512u * i, .size = i == 3 ? 1 : 512};
        if (queue->flags & PV_QUEUE_PACKED)
            made.packed.flags = flags;
        else
            made.split.flags = flags, made.split.next = (uint16_t)(i + 1);
        memcpy(memory + TABLE_PAGE * PV_HOST_PAGE + i * sizeof(made), &made, sizeof(made));
    }
}

void guest_queue(struct input *input, struct pv_queue *queue)
{
    uint8_t how = next8(input), shape = next8(input);
    uint32_t power = 1u << (shape & 7);

    queue->vm = &guest.vm;
    queue->interrupt = &guest.interrupt;
    queue->flags = how & (PV_QUEUE_PACKED | PV_QUEUE_EVENT_IDX | PV_QUEUE_INDIRECT);
    queue->size = queue->flags & PV_QUEUE_PACKED && shape & 0x10 ? power + 1 : power;
    queue->descriptors = how & 0x10 ? place(input) & ~UINT64_C(15) : RAM;
    queue->driver = how & 0x20 ? place(input) & ~UINT64_C(3) : RAM + 2 * PV_HOST_PAGE;
    queue->device = how & 0x40 ? place(input) & ~UINT64_C(3) : RAM + 4 * PV_HOST_PAGE;
    queue->stop = 0;
    pv_queue_start(queue);
    make_table(queue);
}

static struct pv_descriptor describe(struct input *input, const struct pv_queue *queue)
{
    struct pv_descriptor made = {.address = place(input), .size = length(input)};
    uint16_t flags = next8(input), other = next8(input);

    flags = (uint16_t)((flags & 7) | (flags & 8 ? 0x80 : 0) | (flags & 0x10 ? 0x8000 : 0));
    if (queue->flags & PV_QUEUE_PACKED) {
        made.packed.id = other;
        made.packed.flags = flags;
    } else {
        made.split.flags = flags;
        made.split.next = other;
    }
    return made;
}

void guest_act(struct input *input, struct pv_queue *queue)
{
    uint8_t what = next8(input), where = next8(input);

    switch (what % OPS) {
    case 0: { /* a descriptor, in the ring or in a table */
        struct pv_descriptor made = describe(input, queue);
        uint64_t at = where & 0x80 ? RAM + TABLE_PAGE * PV_HOST_PAGE : queue->descriptors;
        guest_write(at + (uint64_t)(where & 0x7f) * PV_DESCRIPTOR_BYTES, &made, sizeof(made));
        break;
    }
    case 1: { /* make available: the next entries of a split ring name heads from `where` on */
        uint16_t index = (uint16_t)(queue->available + 1 + (next8(input) & 3)), head = where;
        for (uint16_t i = (uint16_t)queue->available; i != index; i++, head++)
            guest_write(queue->driver + 4 + 2 * (i & (queue->size - 1)), &head, sizeof(head));
        guest_write(queue->driver + 2, &index, sizeof(index));
        break;
    }
    case 2: { /* any word of a ring */
        uint16_t word = next16(input);
        uint64_t rings[] = {queue->descriptors, queue->driver, queue->device, RAM + DATA_PAGE * PV_HOST_PAGE};
        guest_write(rings[where & 3] + 2 * (uint64_t)(where >> 2), &word, sizeof(word));
        break;
    }
    case 3: { /* close a page to the host, or open it */
        uint32_t page = where % PAGES;
        closed ^= 1u << page;
        mprotect(memory + page * PV_HOST_PAGE, PV_HOST_PAGE, closed >> page & 1 ? PROT_NONE : PROT_READ | PROT_WRITE);
        break;
    }
    case 4: /* take the second slot away, or give it back */
        pv_publish_map(&guest.vm, where & 1 ? &half : &whole);
        break;
    default: { /* data that begins as requests and frames do */
        uint8_t data[32];
        for (size_t i = 0; i < sizeof(data); i++)
            data[i] = next8(input);
        guest_write(RAM + DATA_PAGE * PV_HOST_PAGE + 8 * (uint64_t)where, data, sizeof(data));
        break;
    }
    }
}

void guest_check(const struct pv_queue *queue, const struct pv_chain *chain)
{
    uint64_t in = 0, out = 0;

    (void)queue;
    HOLDS(chain->count >= 1 && chain->count <= chain->room);
    HOLDS(chain->readable <= chain->count);
    HOLDS(chain->slots >= 1);
    for (uint32_t i = 0; i < chain->count; i++) {
        const struct pv_segment *segment = &chain->segments[i];
        HOLDS(segment->size && segment->gpa <= UINT64_MAX - segment->size);
        HOLDS(!!segment->writable == (i >= chain->readable));
        *(segment->writable ? &out : &in) += segment->size;
    }
    HOLDS(in == chain->in_bytes && out == chain->out_bytes);
    HOLDS(in + out <= UINT32_MAX);
}
