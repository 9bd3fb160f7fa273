// SPDX-License-Identifier: Apache-2.0
/* Touching pages, each access timed: the orders of the puppet and the payload `touch` share it. */
#include "lib.h"

void cache_flush(u64 gpa, u64 bytes)
{
    u64 line = 4ul << (SYSREG(ctr_el0) >> 16 & 15);
    for (u64 at = gpa & ~(line - 1); at < gpa + bytes; at += line)
        __asm__ volatile("dc civac, %0" : : "r"(at) : "memory");
    __asm__ volatile("dsb sy; ic iallu; dsb sy; isb" : : : "memory");
}

/* Ticks of one access. A page is executed by calling it: it returns, or is zero and the vectors return for it. */
static u64 touch_one(u64 gpa, u64 access)
{
    struct cpu *cpu = this_cpu();
    u64 before, value;

    cpu->executing = access == ACCESS_EXECUTE ? gpa : 0;
    before = ticks();
    if (access == ACCESS_READ)
        __asm__ volatile("ldr %0, [%1]; dsb sy" : "=r"(value) : "r"(gpa) : "memory");
    else if (access == ACCESS_WRITE)
        __asm__ volatile("str xzr, [%0]; dsb sy" : : "r"(gpa) : "memory");
    else
        ((void (*)(void))gpa)();
    value = ticks() - before;
    cpu->executing = 0;
    return value;
}

/* A permutation of 0..2^bits-1: xor-shifts and odd multiplications are bijections modulo a power of two. */
static u64 permute(u64 x, u64 bits, u64 seed)
{
    u64 mask = (1ul << bits) - 1, shift = bits / 2 + 1;
    for (int round = 0; round < 3; round++) {
        x = (x + seed) & mask;
        x ^= x >> shift;
        x = x * 0x9e3779b97f4a7c15 & mask;
        seed = seed * 0xd1342543de82ef95 + 1;
    }
    return x ^ x >> shift;
}

void touch(struct touch *t)
{
    static u64 own_page;
    u64 bits = 0;

    t->done = t->total = t->max = 0;
    touch_one((u64)&own_page, t->access); /* this code, the stacks and the vectors are there before the first tick */
    while (t->pages > 1ul << bits)
        bits++;
    for (u64 i = 0; i < t->pages && t->each; i++)
        t->each[i].ticks = 0; /* faults of this array come before the measured ones */
    for (u64 i = 0; i < 1ul << bits; i++) {
        u64 n = t->seed ? permute(i, bits, t->seed) : i;
        if (n >= t->pages)
            continue;
        u64 spent = touch_one(t->gpa + n * t->stride * board.page, t->access);
        if (t->each)
            t->each[n] = (struct touched){spent > UINT32_MAX ? UINT32_MAX : (u32)spent, (u32)t->done};
        t->total += spent;
        if (spent > t->max)
            t->max = spent;
        t->done++;
    }
}
