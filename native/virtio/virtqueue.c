// SPDX-License-Identifier: Apache-2.0
/* Virtqueues, the device's side: split rings (virtio 1.2, 2.7) and packed ones (2.8) in guest memory, which may
 * disappear or become private at any time. Data from the driver is copied once and then checked, and not read again. A
 * queue is served by one thread at a time. Both sides are little-endian. */
#include "virtio/virtio.h"

#include <unistd.h>

enum { AVAILABLE = 1 << 7, USED = 1 << 15 };        /* a packed descriptor's flags, 2.8.1 */
enum { QUIET = 1 };                                 /* a split ring's flags: do not interrupt, do not kick */
enum { EVENTS_ON, EVENTS_OFF, EVENTS_AT };          /* a packed ring's, 2.8.10 */
enum { FLAGS_AT = 14 };

struct used { uint32_t id, size; };
struct event { uint16_t at, flags; } __attribute__((aligned(4))); /* copied as one word */

/* ---- the rings' memory */

static uint64_t area_gpa(const struct pv_queue *queue, enum pv_queue_area area)
{
    return area == PV_AREA_DESCRIPTORS ? queue->descriptors : area == PV_AREA_DRIVER ? queue->driver : queue->device;
}

static uint32_t area_size(const struct pv_queue *queue, enum pv_queue_area area)
{
    if (area == PV_AREA_DESCRIPTORS)
        return PV_DESCRIPTOR_BYTES * queue->size;
    if (queue->flags & PV_QUEUE_PACKED)
        return sizeof(struct event);
    return area == PV_AREA_DRIVER ? 6 + 2 * queue->size : 6 + 8 * queue->size;
}

/* Finds each ring's view once per published map: a view stays mapped while its backing is open. A ring that crosses
   regions has no view, and is looked up at every access. */
static void look(struct pv_queue *queue)
{
    uint64_t published = load_acquire(&queue->vm->published) + 1;

    if (queue->seen == published)
        return;
    for (int area = 0; area < PV_AREAS; area++) {
        uint64_t gpa = area_gpa(queue, area);
        struct pv_region region;
        uint32_t phase = pv_map_enter(queue->vm);
        bool found = pv_region_at(queue->vm, gpa, &region);
        pv_map_leave(queue->vm, phase);
        queue->views[area] = found && region.view && area_size(queue, area) <= region.size - (gpa - region.gpa)
                                 ? region.view + (gpa - region.gpa) : NULL;
    }
    queue->seen = published;
}

static bool ring_read(struct pv_queue *queue, enum pv_queue_area area, uint32_t offset, void *to, uint32_t n)
{
    uint64_t gpa = area_gpa(queue, area) + offset;
    const uint8_t *view = queue->views[area];

    if (view ? pv_copy(to, view + offset, n) == n : pv_read(queue->vm, gpa, to, n, NULL) == n)
        return true;
    return pv_queue_fail(queue, PV_QUEUE_RING, gpa);
}

static bool ring_write(struct pv_queue *queue, enum pv_queue_area area, uint32_t offset, const void *from, uint32_t n)
{
    uint64_t gpa = area_gpa(queue, area) + offset;
    uint8_t *view = queue->views[area];

    if (view ? pv_copy(view + offset, from, n) == n : pv_write(queue->vm, gpa, from, n, NULL) == n)
        return true;
    return pv_queue_fail(queue, PV_QUEUE_RING, gpa);
}

/* ---- split rings */

static bool split_walk(struct pv_queue *queue, struct pv_chain *chain, uint32_t head)
{
    for (uint32_t index = head, steps = 0;; steps++) {
        uint64_t gpa = queue->descriptors + (uint64_t)index * PV_DESCRIPTOR_BYTES;
        struct pv_descriptor found;

        if (index >= queue->size)
            return pv_queue_fail(queue, PV_QUEUE_DESCRIPTOR, gpa);
        if (steps >= queue->size)
            return pv_queue_fail(queue, PV_QUEUE_LOOP, gpa);
        if (!ring_read(queue, PV_AREA_DESCRIPTORS, index * PV_DESCRIPTOR_BYTES, &found, sizeof(found)))
            return false;
        if (found.split.flags & PV_DESC_INDIRECT) {
            if (found.split.flags & PV_DESC_NEXT)
                return pv_queue_fail(queue, PV_QUEUE_INDIRECTION, gpa);
            return pv_chain_table(queue, chain, found.address, found.size, false);
        }
        if (!pv_chain_take(queue, chain, found.address, found.size, found.split.flags & PV_DESC_WRITE))
            return false;
        if (!(found.split.flags & PV_DESC_NEXT))
            return true;
        index = found.split.next;
    }
}

static bool split_look(struct pv_queue *queue)
{
    uint16_t available;

    if (!ring_read(queue, PV_AREA_DRIVER, 2, &available, sizeof(available)))
        return false;
    __atomic_thread_fence(__ATOMIC_ACQUIRE); /* read the entries after the index */
    /* A correct driver never has more pending requests than descriptors. */
    if ((uint16_t)(available - queue->next) > queue->size || (uint16_t)(available - queue->used) > queue->size)
        return pv_queue_fail(queue, PV_QUEUE_INDEX, queue->driver + 2);
    queue->available = available;
    return true;
}

static int split_pop(struct pv_queue *queue, struct pv_chain *chain)
{
    uint16_t head;

    if (queue->available == queue->next && !split_look(queue))
        return -1;
    if (queue->available == queue->next)
        return 0;
    if (!ring_read(queue, PV_AREA_DRIVER, 4 + 2 * (queue->next & (queue->size - 1)), &head, sizeof(head)) ||
        !split_walk(queue, chain, head))
        return -1;
    chain->id = head;
    chain->slots = 1;
    queue->next = (uint16_t)(queue->next + 1);
    return 1;
}

static bool split_push(struct pv_queue *queue, const struct pv_chain *chains, const uint32_t *written, uint32_t count)
{
    uint16_t used = (uint16_t)queue->used;

    for (uint32_t i = 0; i < count; i++, used++) {
        struct used entry = {.id = chains[i].id, .size = written[i]};
        if (!ring_write(queue, PV_AREA_DEVICE, 4 + sizeof(entry) * (used & (queue->size - 1)), &entry, sizeof(entry)))
            return false;
    }
    __atomic_thread_fence(__ATOMIC_RELEASE); /* publish the entries before the index */
    queue->used = used;
    return ring_write(queue, PV_AREA_DEVICE, 2, &used, sizeof(used));
}

/* ---- packed rings */

static void advance(const struct pv_queue *queue, uint32_t *slot, uint32_t *wrap, uint32_t by)
{
    *slot += by;
    if (*slot >= queue->size) {
        *slot -= queue->size;
        *wrap ^= 1;
    }
}

static int packed_available(struct pv_queue *queue, uint16_t *flags)
{
    if (!ring_read(queue, PV_AREA_DESCRIPTORS, queue->next * PV_DESCRIPTOR_BYTES + FLAGS_AT, flags, sizeof(*flags)))
        return -1;
    __atomic_thread_fence(__ATOMIC_ACQUIRE); /* the rest of it, and of its chain */
    return !!(*flags & AVAILABLE) == queue->next_wrap && !!(*flags & USED) != queue->next_wrap;
}

static int packed_pop(struct pv_queue *queue, struct pv_chain *chain)
{
    uint32_t slot = queue->next, wrap = queue->next_wrap, slots = 0;
    uint16_t first;
    int available = packed_available(queue, &first);

    if (available <= 0)
        return available;
    for (bool more = true; more;) {
        uint64_t gpa = queue->descriptors + (uint64_t)slot * PV_DESCRIPTOR_BYTES;
        struct pv_descriptor found;

        if (slots >= queue->size - queue->taken)
            return pv_queue_fail(queue, queue->taken ? PV_QUEUE_INDEX : PV_QUEUE_LOOP, gpa), -1;
        if (!ring_read(queue, PV_AREA_DESCRIPTORS, slot * PV_DESCRIPTOR_BYTES, &found, sizeof(found)))
            return -1;
        uint16_t flags = slots++ ? found.packed.flags : first;
        advance(queue, &slot, &wrap, 1);
        chain->id = found.packed.id;
        more = flags & PV_DESC_NEXT;
        if (flags & PV_DESC_INDIRECT) {
            if (more)
                return pv_queue_fail(queue, PV_QUEUE_INDIRECTION, gpa), -1;
            if (!pv_chain_table(queue, chain, found.address, found.size, true))
                return -1;
        } else if (!pv_chain_take(queue, chain, found.address, found.size, flags & PV_DESC_WRITE)) {
            return -1;
        }
    }
    chain->slots = slots;
    queue->taken += slots;
    queue->next = slot;
    queue->next_wrap = wrap;
    return 1;
}

/* The driver reads the first entry before the others: until its flags are set, it sees none of them. */
static bool packed_push(struct pv_queue *queue, const struct pv_chain *chains, const uint32_t *written, uint32_t count)
{
    uint32_t first = queue->used * PV_DESCRIPTOR_BYTES;
    uint16_t first_flags = 0;

    for (uint32_t i = 0; i < count; i++) {
        uint32_t at = queue->used * PV_DESCRIPTOR_BYTES;
        struct { uint32_t size; uint16_t id; } done = {written[i], (uint16_t)chains[i].id};
        uint16_t flags = (uint16_t)((queue->used_wrap ? AVAILABLE | USED : 0) | (written[i] ? PV_DESC_WRITE : 0));

        if (!ring_write(queue, PV_AREA_DESCRIPTORS, at + 8, &done, 6) ||
            (i && !ring_write(queue, PV_AREA_DESCRIPTORS, at + FLAGS_AT, &flags, sizeof(flags))))
            return false;
        if (!i)
            first_flags = flags;
        advance(queue, &queue->used, &queue->used_wrap, chains[i].slots);
        queue->taken -= chains[i].slots;
    }
    __atomic_thread_fence(__ATOMIC_RELEASE); /* publish the entries before the flags */
    return ring_write(queue, PV_AREA_DESCRIPTORS, first + FLAGS_AT, &first_flags, sizeof(first_flags));
}

/* ---- notifications */

/* Whether a step from `old` to `now` passed `at` (2.7.10). */
static bool passed(uint16_t at, uint16_t now, uint16_t old)
{
    return (uint16_t)(now - at - 1) < (uint16_t)(now - old);
}

static bool wants_interrupt(struct pv_queue *queue)
{
    uint16_t old = (uint16_t)(queue->used - queue->unsaid), at;
    struct event event;

    if (queue->flags & PV_QUEUE_PACKED) {
        if (!ring_read(queue, PV_AREA_DRIVER, 0, &event, sizeof(event)))
            return false;
        if (event.flags != EVENTS_AT || !(queue->flags & PV_QUEUE_EVENT_IDX))
            return event.flags != EVENTS_OFF;
        at = event.at & 0x7fff;
        if (event.at >> 15 != (uint16_t)queue->used_wrap)
            at = (uint16_t)(at - queue->size);
    } else if (queue->flags & PV_QUEUE_EVENT_IDX) {
        if (!ring_read(queue, PV_AREA_DRIVER, 4 + 2 * queue->size, &at, sizeof(at)))
            return false;
    } else {
        return ring_read(queue, PV_AREA_DRIVER, 0, &at, sizeof(at)) && !(at & QUIET);
    }
    return queue->unsaid > UINT16_MAX || passed(at, (uint16_t)queue->used, old);
}

/* Turns the driver's kicks on or off. With an event index they need not be turned off: it kicks once. */
static bool ask(struct pv_queue *queue, bool kick)
{
    bool at = queue->flags & PV_QUEUE_EVENT_IDX;

    queue->asked = kick;
    if (!(queue->flags & PV_QUEUE_PACKED)) {
        uint16_t word = at ? (uint16_t)queue->next : kick ? 0 : QUIET;
        return ring_write(queue, PV_AREA_DEVICE, at ? 4 + 8 * queue->size : 0, &word, sizeof(word));
    }
    if (at) {
        uint16_t where = (uint16_t)(queue->next | queue->next_wrap << 15);
        if (!ring_write(queue, PV_AREA_DEVICE, 0, &where, sizeof(where)))
            return false;
        __atomic_thread_fence(__ATOMIC_RELEASE);
    }
    uint16_t flags = at ? EVENTS_AT : kick ? EVENTS_ON : EVENTS_OFF;
    return ring_write(queue, PV_AREA_DEVICE, 2, &flags, sizeof(flags));
}

/* ---- what devices call */

void pv_queue_start(struct pv_queue *queue)
{
    queue->error = PV_QUEUE_OK;
    queue->error_gpa = queue->seen = 0;
    queue->next = queue->used = queue->available = queue->taken = queue->unsaid = 0;
    queue->next_wrap = queue->used_wrap = queue->asked = 1;
}

int pv_queue_pop(struct pv_queue *queue, struct pv_chain *chain)
{
    if (queue->error)
        return -1;
    look(queue);
    chain->count = chain->readable = 0;
    chain->in_bytes = chain->out_bytes = 0;
    int found = queue->flags & PV_QUEUE_PACKED ? packed_pop(queue, chain) : split_pop(queue, chain);
    if (found <= 0)
        return found;
    add(&queue->chains, 1);
    add(&queue->bytes, chain->in_bytes + chain->out_bytes);
    if (queue->asked && !(queue->flags & PV_QUEUE_EVENT_IDX) && !ask(queue, false))
        return -1;
    return 1;
}

void pv_queue_unpop(struct pv_queue *queue, const struct pv_chain *newest)
{
    queue->chains--;
    queue->bytes -= newest->in_bytes + newest->out_bytes;
    if (!(queue->flags & PV_QUEUE_PACKED)) {
        queue->next = (uint16_t)(queue->next - 1);
        return;
    }
    queue->taken -= newest->slots;
    if (queue->next < newest->slots) {
        queue->next += queue->size;
        queue->next_wrap ^= 1;
    }
    queue->next -= newest->slots;
}

int pv_queue_push_all(struct pv_queue *queue, const struct pv_chain *chains, const uint32_t *written, uint32_t count)
{
    if (queue->error)
        return -1;
    if (!count)
        return 0;
    look(queue);
    bool packed = queue->flags & PV_QUEUE_PACKED;
    if (!(packed ? packed_push(queue, chains, written, count) : split_push(queue, chains, written, count)))
        return -1;
    for (uint32_t i = 0; i < count; i++)
        queue->unsaid += chains[i].slots;
    return 0;
}

int pv_queue_push(struct pv_queue *queue, const struct pv_chain *chain, uint32_t written)
{
    return pv_queue_push_all(queue, chain, &written, 1);
}

void pv_queue_interrupt(struct pv_queue *queue)
{
    if (queue->error || !queue->unsaid)
        return;
    look(queue);
    fence(); /* publish the used entries before reading the driver's request */
    bool wanted = wants_interrupt(queue);
    queue->unsaid = 0;
    if (wanted)
        pv_interrupt(queue->interrupt, PV_INTERRUPT_USED);
}

int pv_queue_arm(struct pv_queue *queue)
{
    if (queue->error)
        return -1;
    look(queue);
    if (!ask(queue, true))
        return -1;
    fence(); /* publish the request before the last check of the ring */
    if (queue->flags & PV_QUEUE_PACKED) {
        uint16_t flags;
        int available = packed_available(queue, &flags);
        return available < 0 ? -1 : !available;
    }
    if (!split_look(queue))
        return -1;
    return queue->available == queue->next;
}

/* Each kick adds 1 to the eventfd, so these wake-ups use only its upper half. */
void pv_queue_wake(struct pv_queue *queue)
{
    if (write(queue->kick, &(uint64_t){1ull << 32}, sizeof(uint64_t)) < 0)
        return; /* it is already readable */
}

void pv_queue_take(struct pv_queue *queue)
{
    uint64_t value;

    if (read(queue->kick, &value, sizeof(value)) == sizeof(value))
        add(&queue->kicks, (uint32_t)value);
    if (queue->bell)
        pv_doorbell_take(queue->bell);
}

void pv_interrupt(struct pv_interrupt *interrupt, uint32_t bits)
{
    uint32_t before = __atomic_fetch_or(&interrupt->status, bits, __ATOMIC_SEQ_CST);

    /* A driver acknowledges first and then checks its rings, so pending bits need no new edge. */
    if ((before & bits) == bits || interrupt->fd < 0)
        return;
    add(&interrupt->sent, 1);
    pv_signal(interrupt->fd);
}
