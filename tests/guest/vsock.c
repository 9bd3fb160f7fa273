// SPDX-License-Identifier: Apache-2.0
/* A guest's end of a vsock, for Linux on arm64, without a C library.
 *
 *     vsock echo PORT      takes one connection to PORT and sends back what it receives, until that ends
 *     vsock call CID PORT  connects, sends its input, says so, and prints what it receives until that ends
 *     vsock refused CID PORT  exits with 0 if the connection is refused
 *
 * Built by tests/guest/build.py.
 */
#include <stdint.h>

enum { READ = 63, WRITE = 64, EXIT = 93, CLONE = 220, SOCKET = 198, BIND = 200, LISTEN = 201, ACCEPT = 202,
       CONNECT = 203, SHUTDOWN = 210 };
enum { AF_VSOCK = 40, SOCK_STREAM = 1, SHUT_WR = 1, SIGCHLD = 17, CID_ANY = -1, ECONNRESET = 104 };

struct address {
    uint16_t family, zero;
    uint32_t port, cid;
    uint8_t rest[4];
};

/* The unit tests look for this to see that the binary was built from this source. */
__attribute__((used)) static const char source[] = "source " SOURCE;

static long call(long number, long a, long b, long c, long d, long e)
{
    register long x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c, x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e, x8 __asm__("x8") = number;
    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x8) : "memory", "cc");
    return x0;
}

static long number(const char *text)
{
    long value = 0;
    while (*text >= '0' && *text <= '9')
        value = 10 * value + *text++ - '0';
    return value;
}

/* Copies until the input ends. Returns 0, or an errno. */
static long copy(long from, long to)
{
    static char buffer[1 << 16];
    for (;;) {
        long n = call(READ, from, (long)buffer, sizeof buffer, 0, 0);
        if (n <= 0)
            return n;
        for (long done = 0; done < n;) {
            long part = call(WRITE, to, (long)buffer + done, n - done, 0, 0);
            if (part <= 0)
                return part;
            done += part;
        }
    }
}

static int echo(struct address *own, long sock)
{
    own->cid = (uint32_t)CID_ANY;
    if (call(BIND, sock, (long)own, sizeof *own, 0, 0) || call(LISTEN, sock, 1, 0, 0, 0))
        return 2;
    long peer = call(ACCEPT, sock, 0, 0, 0, 0);
    return peer < 0 ? 3 : copy(peer, peer) ? 4 : 0;
}

static int talk(struct address *other, long sock)
{
    if (call(CONNECT, sock, (long)other, sizeof *other, 0, 0))
        return 5;
    if (call(CLONE, SIGCHLD, 0, 0, 0, 0) == 0) {
        copy(0, sock);
        call(SHUTDOWN, sock, SHUT_WR, 0, 0, 0);
        return 0;
    }
    return copy(sock, 1) ? 6 : 0;
}

__attribute__((used)) static int run(long count, char **words)
{
    struct address address = {.family = AF_VSOCK};
    if (count < 3)
        return 1;
    address.port = (uint32_t)number(words[count - 1]);
    address.cid = (uint32_t)number(words[count - 2]);
    long sock = call(SOCKET, AF_VSOCK, SOCK_STREAM, 0, 0, 0);
    if (sock < 0)
        return 7;
    if (words[1][0] == 'e')
        return echo(&address, sock);
    if (words[1][0] == 'c')
        return talk(&address, sock);
    return call(CONNECT, sock, (long)&address, sizeof address, 0, 0) == -ECONNRESET ? 0 : 8;
}

__asm__(".globl _start\n"
        "_start:\n"
        "    mov x29, #0\n"
        "    ldr x0, [sp]\n"
        "    add x1, sp, #8\n"
        "    bl run\n"
        "    mov x8, #93\n"
        "    svc #0\n");
