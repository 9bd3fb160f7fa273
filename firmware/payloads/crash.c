// SPDX-License-Identifier: Apache-2.0
/*
 * Misbehaves, one way at a time: way=WAY in the boot arguments. `ways` below is the list; the ones that end in a
 * trap report it through the vectors, the others show how the VMM handles them and power off.
 *
 *   undefined       executes an undefined instruction (the default)
 *   unmapped        loads from an address that no translation maps
 *   jump            branches to such an address
 *   loop            computes forever, without an exit
 *   wait            waits for an interrupt that never comes
 *   noslot          loads from the first byte after memory, where no memslot is
 *   sea             the same with a pair load, which KVM cannot decode: a protected guest gets an external abort
 *   share-twice     shares one page twice            share-outside    shares a page outside memory
 *   bell-private    announces a page never shared    bell-misaligned  announces an unaligned address
 *   bell-huge       announces an address beyond every address space
 *   flood           writes bytes=N to the UART (default 64 KiB) and never checks for room
 *   reset           PSCI SYSTEM_RESET                status           ends with exit code code=N (default 1)
 */
#include "../lib/lib.h"

#define NOWHERE 0x0000dead00000000ul

static s64 ring(u64 value)
{
    if (!board.bell)
        return -1;
    mmio_write64(board.bell + BELL, value);
    return (s64)mmio_read64(board.bell + BELL);
}

static void flood(void)
{
    u64 bytes = argument_number("bytes", 1 << 16);
    for (u64 i = 0; i < bytes && board.uart; i++)
        mmio_write32(board.uart, i % 64 == 63 ? '\n' : '0' + i % 64);
}

int main(void)
{
    const char *way;
    u64 after = board.memory + board.memory_size, page = page_alloc(1), a, b;
    size_t n = argument("way", &way);

    mmio_write64(page, 0); /* now private: a protected guest owns the pages it touched */
    print("crash: %s\n", n ? board.bootargs : "way=undefined");
    if (!n || argument_is("way", "undefined"))
        __asm__ volatile("udf #1");
    else if (argument_is("way", "unmapped"))
        mmio_read64(NOWHERE);
    else if (argument_is("way", "jump"))
        ((void (*)(void))NOWHERE)();
    else if (argument_is("way", "loop"))
        for (;;)
            __asm__ volatile("");
    else if (argument_is("way", "wait"))
        park();
    else if (argument_is("way", "noslot"))
        mmio_read64(after);
    else if (argument_is("way", "sea"))
        __asm__ volatile("ldp %0, %1, [%2]" : "=&r"(a), "=&r"(b) : "r"(after));
    else if (argument_is("way", "share-twice"))
        print("statuses %ld %ld\n", share(page, SHARE_BOTH), share(page, SHARE_BOTH));
    else if (argument_is("way", "share-outside"))
        print("status %ld\n", share(after, SHARE_BOTH));
    else if (argument_is("way", "bell-private"))
        print("status %ld\n", ring(page | BELL_SHARE));
    else if (argument_is("way", "bell-misaligned"))
        print("status %ld\n", ring(page + 0x800 + BELL_SHARE));
    else if (argument_is("way", "bell-huge"))
        print("status %ld\n", ring(0xfffffffffffff000 | BELL_SHARE));
    else if (argument_is("way", "flood"))
        flood();
    else if (argument_is("way", "reset"))
        leave(PSCI_SYSTEM_RESET);
    else if (argument_is("way", "status"))
        return (int)argument_number("code", 1);
    else
        return print("crash: no such way\n"), 2;
    print("crash: survived\n");
    return 0;
}
