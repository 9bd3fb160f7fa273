// SPDX-License-Identifier: Apache-2.0
/* Limits of what a device moves for its guest: token buckets, without locks. */
#include "virtio/virtio.h"

enum { NS = 1000000000 };

/* A bucket holds a second's tokens. It is empty from a second before it is full again. */
static uint64_t wait_for(const struct pv_bucket *bucket, uint64_t at)
{
    uint64_t full_at = load(&bucket->full_at);

    return full_at < at + NS ? 0 : full_at - at - NS + 1;
}

/* The number of tokens is at most 2^32, so that the product fits. */
static void take(struct pv_bucket *bucket, uint64_t tokens, uint64_t at)
{
    if (!bucket->rate || !tokens)
        return;
    uint64_t full_at = load(&bucket->full_at), time = (tokens * NS + bucket->rate - 1) / bucket->rate, then;
    do
        then = (full_at > at ? full_at : at) + time;
    while (!__atomic_compare_exchange_n(&bucket->full_at, &full_at, then, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

uint64_t pv_limit_wait(const struct pv_limit *limit)
{
    uint64_t at = pv_now(), bytes = wait_for(&limit->bytes, at), ops = wait_for(&limit->ops, at);

    return bytes > ops ? bytes : ops;
}

void pv_limit_take(struct pv_limit *limit, uint64_t bytes, uint64_t ops)
{
    uint64_t at = pv_now();

    take(&limit->bytes, bytes, at);
    take(&limit->ops, ops, at);
}
