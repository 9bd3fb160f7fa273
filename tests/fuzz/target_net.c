// SPDX-License-Identifier: Apache-2.0
/* virtio-net's loop between two queues and a peer that may send anything. Built with ppoll() replaced. */
#include "virtio/net.h"
#include "fuzz.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ROUNDS = 6, MOST_SEGMENTS = 64, TX = 1 };

static struct pv_queue queues[2];
static struct pv_segment segments[MOST_SEGMENTS];
static struct pv_chain chain = {.room = MOST_SEGMENTS, .segments = segments};
static struct net_work work;
static uint32_t rounds;

/* Says which descriptors are ready. After a few calls, or when the loop would sleep, the first says: leave. */
int fuzz_ppoll(struct pollfd *watched, nfds_t count, const struct timespec *timeout, const sigset_t *mask)
{
    int ready = poll(watched, count, 0);

    (void)mask;
    if (++rounds > ROUNDS || (ready <= 0 && !(timeout && !timeout->tv_sec && !timeout->tv_nsec))) {
        watched[0].revents = POLLIN;
        return 1;
    }
    return ready;
}

void fuzz_begin(void) { guest_begin(); }

static void serve(struct pv_net *net)
{
    rounds = 0;
    int end = pv_net_serve(net);

    HOLDS(end == PV_NET_STOPPED || end == PV_NET_BROKEN || end == PV_NET_GONE);
    HOLDS(end != PV_NET_BROKEN || queues[0].error || queues[TX].error);
    if (end == PV_NET_GONE)
        net->backend = PV_NET_NONE;
    HOLDS(work.stashed <= STASH && work.vectors <= VECTORS);
    HOLDS(work.in_start <= work.in_end && work.in_end <= sizeof(work.in));
    HOLDS(work.rest_start <= work.rest_end && work.rest_end <= sizeof(work.rest));
}

/* The peer sends any bytes, or a valid frame. */
static void arrive(struct input *input, int peer, bool stream)
{
    static uint8_t data[4 + 12 + 2048];
    uint8_t how = next8(input);
    uint32_t n = how & 1 ? next16(input) % 2048u : next8(input);

    memset(data, how, sizeof(data));
    for (uint32_t i = 0; i < (n < 24 ? n : 24); i++)
        data[4 + i] = next8(input);
    data[0] = data[1] = 0, data[2] = (uint8_t)(n >> 8), data[3] = (uint8_t)n;
    bool framed = stream && how & 2;
    if (send(peer, framed ? data : data + 4, framed ? n + 4 : n, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        return;
}

static void drain(int peer)
{
    static uint8_t data[1 << 17];

    while (recv(peer, data, sizeof(data), MSG_DONTWAIT) > 0)
        ;
}

void fuzz_one(const uint8_t *data, size_t size)
{
    struct input input = {data, data + size};
    int ends[2];

    guest_reset();
    memset(queues, 0, sizeof(queues));
    queues[0].kick = queues[TX].kick = -1;
    guest_queue(&input, &queues[0]);
    guest_queue(&input, &queues[TX]);
    uint8_t how = next8(&input);
    bool stream = how & 1;
    HOLDS(socketpair(AF_UNIX, (stream ? SOCK_STREAM : SOCK_DGRAM) | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0);
    work.stash_first = work.stashed = work.vector_first = work.vectors = 0;
    work.room = work.in_start = work.in_end = work.rest_start = work.rest_end = 0;
    work.returned = false;
    struct pv_net net = {
        .rx = how & 8 ? NULL : &queues[0], .tx = &queues[TX], .fd = ends[0], .stop_fd = -1,
        .backend = how & 2 ? PV_NET_NONE : stream ? PV_NET_STREAM : PV_NET_TAP, .mergeable = !!(how & 4),
        .longest = how & 0x10 ? 1526 : 12 + 65535 + 14, .chain = &chain, .work = &work,
    };
    while (input.at < input.end) {
        uint8_t what = next8(&input);
        switch (what & 3) {
        case 0: serve(&net); break;
        case 1: arrive(&input, ends[1], stream); break;
        case 2: guest_act(&input, &queues[what >> 7]); break;
        default:
            if (what & 0x40)
                drain(ends[1]);
            else if (what & 0x20)
                pv_net_settle(&net);
            else if (what & 0x10)
                shutdown(ends[1], SHUT_RDWR);
            else
                guest_act(&input, &queues[what >> 7]);
        }
    }
    serve(&net);
    pv_net_settle(&net);
    HOLDS(work.stashed == 0);
    close(ends[0]);
    close(ends[1]);
}
