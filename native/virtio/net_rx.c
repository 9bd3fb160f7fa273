// SPDX-License-Identifier: Apache-2.0
/* virtio-net, to the guest. If there is certainly room, a frame is read straight into the guest's buffers. The kernel's
 * copy stops with EFAULT at a page that is missing or not shared. */
#include "virtio/net.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

enum { NUM_BUFFERS = 10, NUM_BUFFERS_END = 12 }; /* in the header */

enum gathered { ENOUGH, STARVED, FULL, BROKEN };

static struct pv_chain *stash(struct net_work *work) { return work->stash + work->stash_first; }
static struct iovec *vectors(struct net_work *work) { return work->vector + work->vector_first; }

static void forget(struct net_work *work, uint32_t buffers)
{
    for (uint32_t i = 0; i < buffers; i++) {
        uint32_t used = work->stash_vectors[work->stash_first];
        work->room -= stash(work)->out_bytes;
        work->vector_first += used;
        work->vectors -= used;
        work->stash_first++;
        work->stashed--;
    }
}

static void empty(struct net_work *work)
{
    work->stash_first = work->stashed = work->vector_first = work->vectors = 0;
    work->room = 0;
}

/* They are twice the stash's size, so that another stash always fits behind their contents. */
static void compact(struct net_work *work)
{
    if (work->stash_first >= STASH) {
        memmove(work->stash, stash(work), work->stashed * sizeof(work->stash[0]));
        memmove(work->stash_vectors, work->stash_vectors + work->stash_first,
                work->stashed * sizeof(work->stash_vectors[0]));
        work->stash_first = 0;
    }
    if (work->vector_first >= VECTORS) {
        memmove(work->vector, vectors(work), work->vectors * sizeof(work->vector[0]));
        work->vector_first = 0;
    }
}

/* Returns the whole stash unused. 0, or -1: the queue is broken. */
static int return_stash(struct pv_net *net)
{
    struct net_work *work = net->work;
    const uint32_t none[STASH] = {0};
    int pushed = pv_queue_push_all(net->rx, stash(work), none, work->stashed);

    work->returned = true;
    empty(work);
    return pushed;
}

/* Adds the buffer in net->chain to the stash. An empty buffer is returned unused, after all earlier ones: the stash
   must always be the last buffers taken, or it could not be returned. */
static void keep(struct pv_net *net)
{
    struct net_work *work = net->work;
    struct pv_chain *chain = net->chain;
    int used = chain->out_bytes < HEADER
        ? -1
        : pv_chain_iovecs(net->rx, chain, true, 0, chain->out_bytes, vectors(work) + work->vectors, CHAIN_VECTORS);

    if (used < 0) {
        add(&net->received.faults, 1);
        if (!return_stash(net))
            pv_queue_push(net->rx, chain, 0);
        return;
    }
    stash(work)[work->stashed] = *chain;
    work->stash_vectors[work->stash_first + work->stashed] = (uint32_t)used;
    work->vectors += (uint32_t)used;
    work->room += chain->out_bytes;
    work->stashed++;
}

/* Takes buffers until they have room for `need` bytes. STARVED: no more buffers, and the driver will kick when it adds
   some. FULL: more would not help, or too many were bad. */
static enum gathered gather(struct pv_net *net, uint64_t need)
{
    struct net_work *work = net->work;
    uint32_t most = net->mergeable ? STASH : 1;

    compact(work);
    for (uint32_t tries = 0; work->room < need; tries++) {
        if (work->stashed == most || work->vectors + CHAIN_VECTORS > VECTORS || tries == 2 * STASH)
            return FULL;
        int popped = pv_queue_pop(net->rx, net->chain);
        if (popped == 0) {
            int armed = pv_queue_arm(net->rx);
            if (armed > 0)
                return STARVED;
            popped = armed;
        } else if (popped > 0) {
            keep(net);
        }
        if (popped < 0)
            return BROKEN;
    }
    return ENOUGH;
}

static void dropped(struct pv_net *net) { add(&net->received.dropped, 1); }

/* A page of the stash cannot be written: the whole stash is returned unused, and the frame is lost. */
static enum net_moved fault(struct pv_net *net)
{
    const struct net_work *work = net->work;

    add(&net->received.faults, work->stashed);
    dropped(net);
    return return_stash(net) ? NET_BROKEN : NET_MOVED;
}

/* Guarded: n bytes to the stash's [offset, offset + n), which must be in it. */
static bool scatter(struct net_work *work, uint64_t offset, const uint8_t *from, uint64_t n)
{
    for (struct iovec *at = vectors(work); n; at++) {
        if (offset >= at->iov_len) {
            offset -= at->iov_len;
            continue;
        }
        uint64_t part = at->iov_len - offset < n ? at->iov_len - offset : n;
        if (pv_copy((uint8_t *)at->iov_base + offset, from, part) < part)
            return false;
        from += part;
        n -= part;
        offset = 0;
    }
    return true;
}

/* The stash's first n bytes are a frame with its header. The driver gets all its buffers at once: if it saw only the
   first ones, it would take them for a truncated frame. */
static enum net_moved hand_over(struct pv_net *net, uint64_t n)
{
    struct net_work *work = net->work;
    uint32_t written[STASH];
    uint16_t buffers = 0;

    for (uint64_t left = n; left; buffers++) {
        uint64_t room = stash(work)[buffers].out_bytes;
        written[buffers] = (uint32_t)(left < room ? left : room);
        left -= written[buffers];
    }
    if (!scatter(work, NUM_BUFFERS, (uint8_t *)&buffers, NUM_BUFFERS_END - NUM_BUFFERS))
        return fault(net);
    if (pv_queue_push_all(net->rx, stash(work), written, buffers))
        return NET_BROKEN;
    work->returned = true;
    forget(work, buffers);
    add(&net->received.frames, 1);
    add(&net->received.bytes, n - HEADER);
    return NET_MOVED;
}

/* A frame of n bytes left the backend. Its limit counts it even if the guest does not get it. */
static void arrived(struct pv_net *net, uint64_t n)
{
    if (net->receive_limit)
        pv_limit_take(net->receive_limit, n, 1);
}

static void arrived_from_tap(struct pv_net *net, ssize_t n) { arrived(net, n > HEADER ? (uint64_t)n - HEADER : 0); }

static enum net_moved failed_read(struct pv_net *net)
{
    if (errno == EAGAIN || errno == EWOULDBLOCK)
        return NET_IDLE;
    return errno == EINTR ? NET_MOVED : pv_net_gone(net, errno);
}

/* The stash has room for the longest frame. The excess of a longer one reaches the last vector. */
static enum net_moved read_to_guest(struct pv_net *net)
{
    struct net_work *work = net->work;
    uint8_t beyond;

    vectors(work)[work->vectors] = (struct iovec){.iov_base = &beyond, .iov_len = sizeof(beyond)};
    ssize_t n = readv(net->fd, vectors(work), (int)work->vectors + 1);
    if (n < 0 && errno != EFAULT)
        return failed_read(net);
    arrived_from_tap(net, n);
    if (n < 0)
        return fault(net);
    if ((uint64_t)n > work->room || n < HEADER + ETHERNET) {
        dropped(net);
        return NET_MOVED;
    }
    return hand_over(net, (uint64_t)n);
}

/* Copies a frame from our buffer to the guest. n includes the header; without one, a zero header is used. NET_WAIT:
   keep it. */
static enum net_moved deliver(struct pv_net *net, const uint8_t *frame, uint64_t n, uint32_t header)
{
    static const uint8_t zero[HEADER];
    struct net_work *work = net->work;
    enum gathered got = gather(net, HEADER - header + n);

    if (got == STARVED || got == BROKEN)
        return got == STARVED ? NET_WAIT : NET_BROKEN;
    if (got == FULL || HEADER - header + n < HEADER + ETHERNET) {
        dropped(net);
        return NET_MOVED;
    }
    if (!scatter(work, 0, zero, HEADER - header) || !scatter(work, HEADER - header, frame, n))
        return fault(net);
    return hand_over(net, HEADER - header + n);
}

/* If there may be too little room, a frame is first read into our buffer, to learn its length. */
static enum net_moved receive_from_tap(struct pv_net *net)
{
    struct net_work *work = net->work;

    if (work->in_end == 0) {
        enum gathered got = gather(net, net->longest);
        if (got == ENOUGH)
            return read_to_guest(net);
        if (got == BROKEN)
            return NET_BROKEN;
        if (work->stashed == 0)
            return got == STARVED ? NET_WAIT : NET_MOVED;
        ssize_t n = read(net->fd, work->in, sizeof(work->in));
        if (n <= 0)
            return n ? failed_read(net) : pv_net_gone(net, 0);
        arrived_from_tap(net, n);
        work->in_end = (uint32_t)n;
    }
    enum net_moved moved = deliver(net, work->in, work->in_end, HEADER);
    if (moved != NET_WAIT)
        work->in_end = 0;
    return moved;
}

static enum net_moved fill(struct pv_net *net)
{
    struct net_work *work = net->work;

    if (work->in_start) {
        memmove(work->in, work->in + work->in_start, work->in_end - work->in_start);
        work->in_end -= work->in_start;
        work->in_start = 0;
    }
    ssize_t n = recv(net->fd, work->in + work->in_end, sizeof(work->in) - work->in_end, MSG_DONTWAIT);
    if (n <= 0)
        return n ? failed_read(net) : pv_net_gone(net, 0);
    work->in_end += (uint32_t)n;
    return NET_MOVED;
}

static enum net_moved receive_from_stream(struct pv_net *net)
{
    struct net_work *work = net->work;
    uint32_t have = work->in_end - work->in_start, length;

    if (have < LENGTH)
        return fill(net);
    memcpy(&length, work->in + work->in_start, LENGTH);
    length = ntohl(length);
    if (length > FRAME)
        return pv_net_gone(net, EPROTO);
    if (have - LENGTH < length)
        return fill(net);
    enum net_moved moved = deliver(net, work->in + work->in_start + LENGTH, length, 0);
    if (moved != NET_WAIT) {
        arrived(net, length);
        work->in_start += LENGTH + length;
    }
    return moved;
}

enum net_moved pv_net_receive(struct pv_net *net)
{
    switch (net->backend) {
    case PV_NET_TAP:
        return receive_from_tap(net);
    case PV_NET_STREAM:
        return receive_from_stream(net);
    default:
        return NET_WAIT;
    }
}

void pv_net_give_back(struct pv_net *net)
{
    struct net_work *work = net->work;

    while (work->stashed)
        pv_queue_unpop(net->rx, &stash(work)[--work->stashed]);
    empty(work);
}
