// SPDX-License-Identifier: Apache-2.0
/*
 * Touches pages of fresh memory and times each access. What abi.h calls TOUCHED (ticks are CNTVCT's) stays of every page
 * in an area shared with the host: its gpa, bytes and count are in NOTE(0..2), pass after pass. Parameters:
 *
 *   order=sequential|random|strided   (sequential)   access=read|write|execute   (read)
 *   pages=N    pages touched a pass   (256)          stride=N   pages from one to the next when strided   (16)
 *   offset=N   pages skipped first    (0)            repeat=N   passes   (2: cold, then mapped: the overhead)
 *   seed=N     of the random order    (1)
 *
 * One line a pass: touch: pass=0 order=… access=… pages=… stride=… min=… median=… max=… total=… hz=…, in ticks.
 */
#include "../lib/lib.h"

/* The smallest value that at least half of them do not exceed; in place nothing moves. */
static u64 median(const struct touched *each, u64 count)
{
    u64 low = 0, high = UINT32_MAX;
    while (low < high) {
        u64 middle = (low + high) / 2, below = 0;
        for (u64 i = 0; i < count; i++)
            below += each[i].ticks <= middle;
        if (2 * below >= count)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static u64 least(const struct touched *each, u64 count)
{
    u32 min = UINT32_MAX;
    for (u64 i = 0; i < count; i++)
        min = each[i].ticks < min ? each[i].ticks : min;
    return min;
}

int main(void)
{
    const char *access = "read", *order = "sequential";
    u64 pages = argument_number("pages", 256), passes = argument_number("repeat", 2), stride = 1, seed = 0;
    u64 code = ACCESS_READ, area, results;
    u64 result_pages = (pages * passes * TOUCHED_SIZE + board.page - 1) / board.page;

    if (argument_is("access", "write"))
        access = "write", code = ACCESS_WRITE;
    else if (argument_is("access", "execute"))
        access = "execute", code = ACCESS_EXECUTE;
    if (argument_is("order", "random"))
        order = "random", seed = argument_number("seed", 1);
    else if (argument_is("order", "strided"))
        order = "strided", stride = argument_number("stride", 16);

    results = page_alloc(result_pages);
    area = pages && passes && results && page_alloc(argument_number("offset", 0) + 1) ? page_alloc(pages * stride) : 0;
    if (!area) {
        print("touch: not enough memory for %lu pages, %lu apart\n", pages, stride);
        return 2;
    }
    for (u64 i = 0; i < result_pages; i++) {
        s64 status = share(results + i * board.page, SHARE_BOTH);
        if (status) {
            print("touch: sharing the results failed: %ld\n", status);
            return 1;
        }
    }
    for (u64 pass = 0; pass < passes; pass++) {
        struct touch t = {
            .gpa = area, .pages = pages, .stride = stride, .access = code, .seed = seed,
            .each = (struct touched *)results + pass * pages,
        };
        touch(&t);
        print("touch: pass=%lu order=%s access=%s pages=%lu stride=%lu min=%lu median=%lu max=%lu total=%lu hz=%lu\n",
              pass, order, access, t.done, stride, least(t.each, pages), median(t.each, pages), t.max, t.total,
              SYSREG(cntfrq_el0));
    }
    note(0, results);
    note(1, result_pages * board.page);
    note(2, pages * passes);
    return 0;
}
