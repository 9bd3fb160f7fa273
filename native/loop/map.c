// SPDX-License-Identifier: Apache-2.0
/* The table of memslots: lookup by address, and replacement while other threads read it. */
#include "loop/loop.h"

#include <sched.h>

#define load_ordered(p) __atomic_load_n(p, __ATOMIC_SEQ_CST)
#define store_ordered(p, v) __atomic_store_n(p, v, __ATOMIC_SEQ_CST)
#define add_ordered(p, v) __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST)

bool pv_region_at(const struct pv_vm *vm, uint64_t gpa, struct pv_region *found)
{
    const struct pv_map *map = load_ordered(&vm->map); /* not before pv_map_enter() has counted us */
    uint32_t low = 0, high = map ? map->count : 0;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const struct pv_region *region = &map->regions[middle];
        if (gpa < region->gpa) {
            high = middle;
        } else if (gpa - region->gpa < region->size) {
            *found = *region;
            return true;
        } else {
            low = middle + 1;
        }
    }
    return false;
}

/* A reader of the old table was counted before it looked, in one of the two counters. Wait for each in turn while new
   readers use the other. So no reader is missed, and the wait ends even if new readers keep coming. */
void pv_publish_map(struct pv_vm *vm, struct pv_map *map)
{
    store_ordered(&vm->map, map);
    add_ordered(&vm->published, 1);
    for (int i = 0; i < PV_MAP_PHASES; i++) {
        uint32_t phase = load(&vm->phase);
        store_ordered(&vm->phase, !phase);
        while (load_ordered(&vm->readers[phase]))
            sched_yield();
    }
}
