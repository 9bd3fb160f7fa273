// SPDX-License-Identifier: Apache-2.0
/*
 * The story of a share, on every vCPU. The device refuses a private page. The vCPU shares one, and is answered through
 * it. Then it takes the page back, and checks that the device released it. One vCPU at a time has the device. All print
 * what they saw at the end in vCPU order, so the output depends only on the number of vCPUs.
 * Parameters: rounds=N requests (default 3).
 */
#include "../lib/lib.h"

#define ANSWER 2048
#define ANSWERS 3 /* kept and printed */
#define LENGTH 32

static const char words[ANSWERS][LENGTH] = {"hello, host", "is this page ours?", "goodbye"};

static struct story {
    u64 page, private_status, share, answered, wrong, unshare, after, left, done;
    char answer[ANSWERS][LENGTH];
} stories[MAX_CPUS];
static u32 device;
static u64 rounds;

static u64 tell(u64 offset, u64 value)
{
    barrier();
    mmio_write64(board.echo + offset, value);
    return mmio_read64(board.echo + ECHO_STATUS);
}

static int request(struct story *s, const char *word)
{
    char *page = (char *)s->page, *answer = page + ANSWER;
    u64 n = 0;

    for (; word[n]; n++) {
        page[n] = word[n];
        answer[n] = 0;
    }
    if (tell(ECHO_REQUEST, n))
        return 0;
    for (u64 i = 0; i < n; i++)
        if (answer[i] != (word[i] >= 'a' && word[i] <= 'z' ? word[i] - 32 : word[i]))
            return 0;
    return 1;
}

static void live(struct story *s)
{
    /* Mine before any other vCPU's: what a shared page is changed to must not disturb a neighbour. */
    memset((void *)s->page, 0, board.page);
    lock(&device);
    s->private_status = tell(ECHO_PAGE, s->page);
    s->share = (u64)share(s->page, SHARE_BOTH);
    if (!tell(ECHO_PAGE, s->page)) {
        for (u64 i = 0; i < rounds; i++) {
            if (request(s, words[i % ANSWERS]))
                s->answered++;
            else
                s->wrong++;
            if (i < ANSWERS)
                memcpy(s->answer[i], (char *)s->page + ANSWER, LENGTH - 1);
            memset((char *)s->page + ANSWER, 0, LENGTH);
        }
    }
    s->unshare = (u64)unshare(s->page, SHARE_BOTH);
    s->after = tell(ECHO_REQUEST, 1);
    s->left = mmio_read64(board.echo + ECHO_PAGE);
    unlock(&device);
    __atomic_store_n(&s->done, 1, __ATOMIC_RELEASE);
}

void secondary(void)
{
    live(&stories[this_cpu()->number]);
}

static const char *status(u64 code)
{
    return code == ECHO_OK ? "ok" : code == ECHO_NOT_SHARED ? "not shared" : code == ECHO_BAD ? "bad" : "no page";
}

int main(void)
{
    u64 failures = 0;

    rounds = argument_number("rounds", ANSWERS);
    if (!board.echo || !board.bell) {
        print("echo: this machine has no echo device\n");
        return 1;
    }
    for (u64 n = 0; n < board.cpu_count; n++)
        stories[n].page = page_alloc(1);
    for (u64 n = 1; n < board.cpu_count; n++)
        if (cpu_on(n))
            print("vCPU %lu does not start\n", n), stories[n].done = 1;
    live(&stories[0]);
    for (u64 n = 0; n < board.cpu_count; n++) {
        struct story *s = &stories[n];
        while (!__atomic_load_n(&s->done, __ATOMIC_ACQUIRE))
            ;
        print("vCPU %lu\n  a page not shared: %s\n  shared: %ld\n", n, status(s->private_status), (s64)s->share);
        for (u64 i = 0; i < ANSWERS && i < rounds; i++)
            print("  %s -> %s\n", words[i], s->answer[i]);
        print("  answered %lu, wrong %lu\n  taken back: %ld, then: %s\n", s->answered, s->wrong, (s64)s->unshare,
              status(s->after));
        failures += s->private_status != ECHO_NOT_SHARED || s->share || s->wrong || s->answered != rounds ||
                    s->unshare || s->after != ECHO_NO_PAGE || s->left;
    }
    print("%lu requests answered, %lu vCPUs failed\n", mmio_read64(board.echo + ECHO_COUNT), failures);
    return failures ? 1 : 0;
}
