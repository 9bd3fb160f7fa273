// SPDX-License-Identifier: Apache-2.0
/* Histograms, the trace ring and byte FIFOs: storage only, without their meaning. */
#include "loop/loop.h"

#include <sched.h>
#include <unistd.h>

/* A value below STEPS has its own bucket. For others, the top bits select the step within their power of two. */
enum { STEPS = PV_HISTOGRAM_STEPS, STEP_BITS = 3, BUCKETS = PV_HISTOGRAM_BUCKETS };
_Static_assert(STEPS == 1 << STEP_BITS && BUCKETS % STEPS == 0, "whole powers of two");

void pv_lock(uint32_t *lock)
{
    while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE))
        sched_yield();
}

void pv_signal(int fd)
{
    if (write(fd, &(uint64_t){1}, sizeof(uint64_t)) < 0)
        return;
}

uint32_t pv_bucket_of(uint64_t ns)
{
    if (ns < STEPS)
        return (uint32_t)ns;
    uint32_t power = 63u - (uint32_t)__builtin_clzll(ns);
    uint32_t bucket = (power - STEP_BITS + 1) * STEPS + ((ns >> (power - STEP_BITS)) & (STEPS - 1));
    return bucket < BUCKETS ? bucket : BUCKETS - 1;
}

uint64_t pv_bucket_floor(uint32_t bucket)
{
    if (bucket > BUCKETS)
        bucket = BUCKETS;
    return bucket < STEPS ? bucket : (uint64_t)(STEPS + bucket % STEPS) << (bucket / STEPS - 1);
}

void pv_record(struct pv_vcpu *vcpu, uint64_t ns, enum pv_record_kind kind, uint8_t code, uint32_t size, uint64_t addr,
               uint64_t value)
{
    struct pv_ring *ring = &vcpu->ring;
    uint64_t head = ring->head;

    if (head - load_acquire(&ring->tail) >= ring->size) {
        add(&ring->dropped, 1);
        return;
    }
    ring->records[head & (ring->size - 1)] = (struct pv_record){
        .ns = ns, .kind = (uint8_t)kind, .lost = ring->dropped != ring->marked, .code = code,
        .vcpu = (uint8_t)vcpu->index, .size = size, .addr = addr, .value = value,
    };
    ring->marked = ring->dropped;
    store_release(&ring->head, head + 1);
}

uint32_t pv_ring_read(struct pv_ring *ring, struct pv_record *to, uint32_t n)
{
    uint64_t tail = ring->tail, ready = load_acquire(&ring->head) - tail;
    uint32_t got = ready < n ? (uint32_t)ready : n;

    for (uint32_t i = 0; i < got; i++)
        to[i] = ring->records[(tail + i) & (ring->size - 1)];
    store_release(&ring->tail, tail + got);
    return got;
}

/* The producer publishes its byte, then checks whether the consumer sleeps. The consumer announces its sleep, then
   checks for bytes (pv_fifo_arm). So the second of them sees the first. */
bool pv_fifo_put(struct pv_fifo *fifo, uint8_t byte)
{
    uint32_t head = fifo->head;

    if (head - load_acquire(&fifo->tail) >= fifo->size)
        return false;
    fifo->data[head & (fifo->size - 1)] = byte;
    store_release(&fifo->head, head + 1);
    fence();
    if (load(&fifo->armed) && __atomic_exchange_n(&fifo->armed, 0, __ATOMIC_RELAXED) && fifo->wake_fd >= 0)
        pv_signal(fifo->wake_fd);
    return true;
}

uint32_t pv_fifo_read(struct pv_fifo *fifo, uint8_t *to, uint32_t n)
{
    uint32_t tail = fifo->tail, used = load_acquire(&fifo->head) - tail;
    uint32_t got = used < n ? used : n;

    for (uint32_t i = 0; i < got; i++)
        to[i] = fifo->data[(tail + i) & (fifo->size - 1)];
    store_release(&fifo->tail, tail + got);
    return got;
}

uint32_t pv_fifo_arm(struct pv_fifo *fifo)
{
    store(&fifo->armed, 1);
    fence();
    if (!pv_fifo_used(fifo))
        return 1;
    store(&fifo->armed, 0);
    return 0;
}

const char *pv_source_hash(void)
{
    return PV_SOURCE_HASH;
}
