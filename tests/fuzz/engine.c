// SPDX-License-Identifier: Apache-2.0
/* A small coverage-guided fuzzer. It keeps an input that reaches a new edge, or reaches one more often than any other
 * input. It makes new inputs from those it keeps. gcc's -fsanitize-coverage=trace-pc tells the coverage of all other
 * files.
 *
 *   fuzz CORPUS SECONDS SEED CURRENT [FOUND]
 *
 * CORPUS is a file of inputs, each behind its size in two bytes. All are tried first. CURRENT is such a file with the
 * input that is being tried, so that the last one is known after a crash. FOUND is such a file with the inputs kept at
 * the end: the shortest of those that reach the same. The same seed and corpus give the same inputs in one order. */
#include "fuzz.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 1024, POOL = 1 << 14, EDGES = 1 << 13, PATIENCE = 60 };

struct kept { uint8_t *data; size_t size; };

static uint8_t hits[EDGES], known[EDGES];
static uintptr_t last_pc;
static struct kept pool[POOL];
static size_t pool_size;
static uint64_t runs, state;
static bool once; /* ignore how often an edge is reached */
static struct { uint16_t size; uint8_t data[MOST]; } *current;

void __sanitizer_cov_trace_pc(void);
void __sanitizer_cov_trace_pc(void)
{
    uintptr_t pc = (uintptr_t)__builtin_return_address(0) - (uintptr_t)fuzz_one;
    uint8_t *hit = &hits[(pc ^ last_pc * 3) % EDGES];

    *hit += *hit < 255;
    last_pc = pc;
}

void fuzz_fail(const char *what, const char *file, int line)
{
    fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, what);
    abort();
}

uint8_t next8(struct input *input) { return input->at < input->end ? *input->at++ : 0; }
uint16_t next16(struct input *input)
{
    uint16_t low = next8(input);
    return (uint16_t)(low | next8(input) << 8);
}
uint32_t next32(struct input *input)
{
    uint32_t low = next16(input);
    return low | (uint32_t)next16(input) << 16;
}

/* xorshift64* */
static uint32_t any(uint32_t below)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * UINT64_C(0x2545F4914F6CDD1D)) >> 32) % below;
}

/* One bit for each count of visits: 1, 2, 3, 4.., 8.., 16.., 32.., 128.. */
static uint8_t bucket(uint8_t count)
{
    if (count < 4)
        return (uint8_t)(1 << count >> 1);
    return (uint8_t)(8 << (count >= 8) << (count >= 16) << (count >= 32) << (count >= 128));
}

/* Returns whether the input reached anything new. */
static bool run(const uint8_t *data, size_t size)
{
    bool news = false;

    current->size = (uint16_t)size;
    memmove(current->data, data, size);
    memset(hits, 0, sizeof(hits));
    last_pc = 0;
    alarm(PATIENCE);
    fuzz_one(current->data, size);
    runs++;
    for (size_t i = 0; i < EDGES; i++) {
        uint8_t reached = hits[i] ? bucket(once ? 1 : hits[i]) : 0;
        news |= reached & ~known[i];
        known[i] |= reached;
    }
    return news;
}

static void keep(const uint8_t *data, size_t size)
{
    if (pool_size == POOL)
        return;
    pool[pool_size].data = malloc(size ? size : 1);
    memcpy(pool[pool_size].data, data, size);
    pool[pool_size++].size = size;
}

static int by_size(const void *a, const void *b)
{
    const struct kept *left = a, *right = b;
    int order = left->size < right->size ? -1 : left->size > right->size;
    return order ? order : memcmp(left->data, right->data, left->size);
}

static void read_corpus(const char *path)
{
    FILE *file = fopen(path, "r");
    uint8_t data[MOST];
    uint16_t size;

    while (file && fread(&size, sizeof(size), 1, file) == 1) {
        if (size > MOST || fread(data, 1, size, file) != size)
            fuzz_fail("the corpus is whole", path, 0);
        keep(data, size);
    }
    if (file)
        fclose(file);
    /* The short ones come first, and then stand for the others. */
    qsort(pool, pool_size, sizeof(pool[0]), by_size);
}

static size_t mutate(uint8_t *data)
{
    static const uint8_t telling[] = {0, 1, 2, 3, 4, 7, 8, 15, 16, 0x7f, 0x80, 0xfe, 0xff};
    size_t size = 0;

    if (pool_size) {
        /* The newest are the least explored. */
        size_t newest = pool_size < 16 ? pool_size : 16;
        size_t which = any(2) ? any((uint32_t)pool_size) : pool_size - 1 - any((uint32_t)newest);
        size = pool[which].size;
        memcpy(data, pool[which].data, size);
    }
    for (uint32_t times = 1 + any(1u << any(5)); times; times--) {
        uint32_t at = any((uint32_t)size + 1), left = (uint32_t)size - at, some = 1 + any(16);
        switch (any(7)) {
        case 0:
            if (left)
                data[at] ^= (uint8_t)(1 << any(8));
            break;
        case 1:
            if (left)
                data[at] = telling[any(sizeof(telling))];
            break;
        case 2:
            if (left)
                data[at] = (uint8_t)any(256);
            break;
        case 3: /* remove bytes */
            some = some < left ? some : left;
            memmove(data + at, data + at + some, left - some);
            size -= some;
            break;
        case 4: /* insert bytes */
            some = some < MOST - size ? some : (uint32_t)(MOST - size);
            memmove(data + at + some, data + at, left);
            for (uint32_t i = 0; i < some; i++)
                data[at + i] = (uint8_t)any(256);
            size += some;
            break;
        case 5: /* repeat bytes */
            some = some < left ? some : left;
            some = some < MOST - size ? some : (uint32_t)(MOST - size);
            memmove(data + at + some, data + at, left);
            size += some;
            break;
        default: /* append the end of another input */
            if (pool_size) {
                const struct kept *other = &pool[any((uint32_t)pool_size)];
                uint32_t from = any((uint32_t)other->size + 1), much = (uint32_t)other->size - from;
                much = much < MOST - at ? much : MOST - at;
                memcpy(data + at, other->data + from, much);
                size = at + much;
            }
        }
    }
    return size;
}

static double seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* Of all inputs kept, the shortest ones that together reach every edge. */
static void write_found(const char *path)
{
    FILE *file = fopen(path, "w");
    bool written = file;

    qsort(pool, pool_size, sizeof(pool[0]), by_size);
    memset(known, 0, sizeof(known));
    once = true;
    for (size_t i = 0; i < pool_size && written; i++) {
        uint16_t size = (uint16_t)pool[i].size;
        if (run(pool[i].data, size))
            written = fwrite(&size, sizeof(size), 1, file) == 1 && fwrite(pool[i].data, 1, size, file) == size;
    }
    if (!written || fclose(file))
        fuzz_fail("what was found can be written", path, 0);
}

int main(int argc, char **argv)
{
    if (argc < 5) {
        fprintf(stderr, "usage: %s CORPUS SECONDS SEED CURRENT [FOUND]\n", argv[0]);
        return 2;
    }
    double end = seconds() + atof(argv[2]);
    state = strtoull(argv[3], NULL, 0) * 2 + 1;
    int fd = open(argv[4], O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ftruncate(fd, sizeof(*current)) ||
        (current = mmap(NULL, sizeof(*current), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)) == MAP_FAILED) {
        perror(argv[4]);
        return 2;
    }

    fuzz_begin();
    read_corpus(argv[1]);
    size_t given = pool_size;
    for (size_t i = 0; i < given; i++)
        run(pool[i].data, pool[i].size);
    while (seconds() < end) {
        uint8_t data[MOST];
        size_t size = mutate(data);
        if (run(data, size))
            keep(data, size);
    }
    size_t edges = 0;
    for (size_t i = 0; i < EDGES; i++)
        edges += known[i] != 0;
    printf("{\"runs\": %llu, \"corpus\": %zu, \"found\": %zu, \"edges\": %zu}\n", (unsigned long long)runs, given,
           pool_size - given, edges);
    if (argc > 5)
        write_found(argv[5]);
    return 0;
}
