// SPDX-License-Identifier: Apache-2.0
/* Readers race with a writer that frees each table, and the ledgers only it had, as soon as it has been replaced.
   For test_memory_publish.py, which builds it with a sanitizer, and all sources with memory_publish.h before them. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "loop/loop.h"

enum { PAGES = 32, KEPT = 8, READERS = 3 };

static struct pv_vm vm;
static uint8_t *memory;
static uint32_t stop;
static uint64_t wrong;

static uint32_t next(uint32_t *seed)
{
    *seed = *seed * 1664525u + 1013904223u;
    return *seed >> 16;
}

/* Pages below KEPT are always there, the others come and go. */
static void *reader(void *number)
{
    uint32_t seed = (uint32_t)(uintptr_t)number;
    uint8_t bytes[2];

    while (!load(&stop)) {
        uint64_t page = next(&seed) % PAGES, gpa = page * PV_HOST_PAGE, stopped;
        uint64_t done = pv_read(&vm, gpa + PV_HOST_PAGE - 1, bytes, 2, &stopped);
        if ((page < KEPT && !done) || (done && bytes[0] != page) || (done == 2 && bytes[1] != page + 1))
            add(&wrong, 1);
        if (pv_ledger_set(&vm, gpa, PV_PAGE_HOST) < 0 && page < KEPT)
            add(&wrong, 1);
        if (pv_probe(&vm, gpa) != 1 && page < KEPT)
            add(&wrong, 1);
        pv_write(&vm, gpa + 8 * (uintptr_t)number, bytes, 1, NULL);
    }
    return NULL;
}

static void publish(uint32_t *seed)
{
    static struct pv_region old[PAGES];
    static struct pv_map *last;
    struct pv_region new[PAGES], *table;
    struct pv_map *map = malloc(sizeof(*map));

    *map = (struct pv_map){0};
    map->regions = table = malloc(PAGES * sizeof(*table));
    for (int page = 0; page < PAGES; page++) {
        new[page] = old[page];
        if (page >= KEPT && next(seed) % 4 == 0)
            new[page].ledger = old[page].ledger ? NULL : calloc(1, 1);
        if (page < KEPT && !old[page].ledger)
            new[page].ledger = calloc(1, 1);
        new[page].gpa = (uint64_t)page * PV_HOST_PAGE;
        new[page].size = PV_HOST_PAGE;
        new[page].view = memory + page * PV_HOST_PAGE;
        if (new[page].ledger)
            table[map->count++] = new[page];
    }
    pv_publish_map(&vm, map);
    for (int page = 0; page < PAGES; page++)
        if (old[page].ledger && !new[page].ledger)
            free(old[page].ledger);
    if (last)
        free(last->regions);
    free(last);
    last = map;
    memcpy(old, new, sizeof(old));
}

int main(int argc, char **argv)
{
    pthread_t threads[READERS];
    uint32_t seed = 1;

    memory = mmap(NULL, PAGES * PV_HOST_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int page = 0; page < PAGES; page++)
        memset(memory + page * PV_HOST_PAGE, page, PV_HOST_PAGE);
    if (pv_install_signals())
        return 1;
    publish(&seed);
    for (uintptr_t i = 0; i < READERS; i++)
        pthread_create(&threads[i], NULL, reader, (void *)(i + 1));
    for (long left = argc > 1 ? atol(argv[1]) : 1000; left > 0; left--)
        publish(&seed);
    store(&stop, 1);
    for (int i = 0; i < READERS; i++)
        pthread_join(threads[i], NULL);
    printf("%llu wrong\n", (unsigned long long)wrong);
    return wrong != 0;
}
