// SPDX-License-Identifier: Apache-2.0
/* virtio-net: serves a card's two queues and its backend, in one thread that Python provides. */
#include "virtio/net.h"

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>

enum { STOP, SEND, RECEIVE, BACKEND, WATCHED };

uint64_t pv_net_room(void)
{
    return sizeof(struct net_work);
}

static void lost(struct pv_net *net, int error)
{
    add(&net->sent.dropped, 1);
    add(&net->sent.faults, error == EFAULT);
}

static void went(struct pv_net *net, uint64_t n)
{
    add(&net->sent.frames, 1);
    add(&net->sent.bytes, n);
}

/* ---- to a tap: its kernel checks the header, and takes a frame as a whole or not at all */

static enum net_moved send_to_tap(struct pv_net *net)
{
    struct net_work *work = net->work;
    uint64_t n = net->chain->in_bytes;
    int used = pv_chain_iovecs(net->tx, net->chain, false, 0, n, work->out, VECTORS);
    ssize_t sent;

    if (used < 0) {
        lost(net, EFAULT);
        return NET_MOVED;
    }
    while ((sent = writev(net->fd, work->out, used)) < 0 && errno == EINTR)
        ;
    if (sent >= 0)
        went(net, n - HEADER);
    else if (errno == EBADFD || errno == EBADF)
        return pv_net_gone(net, errno);
    else
        lost(net, errno); /* an invalid header, a page that is not shared, an interface that is down */
    return NET_MOVED;
}

/* ---- to a stream: it may take a part of a frame, and must then get the rest first */

/* Keeps the rest of length and frame after `sent` bytes. False: a page of it cannot be read. */
static bool keep_rest(struct pv_net *net, const uint8_t length[LENGTH], uint64_t sent, uint64_t n)
{
    struct net_work *work = net->work;
    uint64_t before = sent < LENGTH ? LENGTH - sent : 0, from = sent + before - LENGTH;

    memcpy(work->rest, length + sent % LENGTH, before);
    uint64_t got = pv_chain_read(net->tx, net->chain, HEADER + from, work->rest + before, n - from);
    memset(work->rest + before + got, 0, n - from - got);
    work->rest_start = 0;
    work->rest_end = (uint32_t)(before + n - from);
    return got == n - from;
}

static enum net_moved send_to_stream(struct pv_net *net)
{
    struct net_work *work = net->work;
    uint64_t n = net->chain->in_bytes - HEADER;
    uint32_t length = htonl((uint32_t)n);
    int used = pv_chain_iovecs(net->tx, net->chain, false, HEADER, n, work->out + 1, VECTORS);
    ssize_t sent;

    if (used < 0) {
        lost(net, EFAULT);
        return NET_MOVED;
    }
    work->out[0] = (struct iovec){.iov_base = &length, .iov_len = LENGTH};
    struct msghdr message = {.msg_iov = work->out, .msg_iovlen = (size_t)used + 1};
    while ((sent = sendmsg(net->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)) < 0 && errno == EINTR)
        ;
    if (sent < 0 && errno == EFAULT) {
        lost(net, EFAULT);
        return NET_MOVED;
    }
    if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != ENOBUFS)
        return pv_net_gone(net, errno);
    if (sent < 0)
        sent = 0;
    if ((uint64_t)sent < LENGTH + n && !keep_rest(net, (uint8_t *)&length, (uint64_t)sent, n)) {
        /* Once the stream has a frame's length, the whole frame must follow. Before that, the frame may be dropped. */
        if (sent == 0)
            work->rest_end = 0;
        lost(net, EFAULT);
        return NET_MOVED;
    }
    went(net, n);
    return NET_MOVED;
}

static bool rest_left(const struct net_work *work) { return work->rest_end != work->rest_start; }

static enum net_moved send_rest(struct pv_net *net)
{
    struct net_work *work = net->work;
    ssize_t sent = send(net->fd, work->rest + work->rest_start, work->rest_end - work->rest_start,
                        MSG_DONTWAIT | MSG_NOSIGNAL);

    if (sent >= 0)
        work->rest_start += (uint32_t)sent;
    else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR && errno != ENOBUFS)
        return pv_net_gone(net, errno);
    return NET_MOVED;
}

/* ---- the loop */

/* Sends the frame of a chain: the driver's header, then the frame itself. */
static enum net_moved send_frame(struct pv_net *net)
{
    bool frame = net->chain->in_bytes >= HEADER + ETHERNET && net->chain->in_bytes <= HEADER + FRAME;

    if (net->send_limit)
        pv_limit_take(net->send_limit, frame ? net->chain->in_bytes - HEADER : 0, 1);
    if (!frame) {
        lost(net, 0);
        return NET_MOVED;
    }
    switch (net->backend) {
    case PV_NET_TAP:
        return send_to_tap(net);
    case PV_NET_STREAM:
        return send_to_stream(net);
    default:
        lost(net, 0);
        return NET_MOVED;
    }
}

static uint64_t wait_for(const struct pv_limit *limit) { return limit ? pv_limit_wait(limit) : 0; }

/* NET_IDLE: the guest has nothing more to send, and will kick when it has. */
static enum net_moved send_batch(struct pv_net *net)
{
    enum net_moved moved = NET_MOVED;
    bool pushed = false;

    for (uint32_t i = 0; i < BATCH && moved == NET_MOVED && !rest_left(net->work) && !wait_for(net->send_limit); i++) {
        int popped = pv_queue_pop(net->tx, net->chain);
        if (popped > 0) {
            moved = send_frame(net);
            pushed = true;
            if (pv_queue_push(net->tx, net->chain, 0))
                moved = NET_BROKEN;
        } else if (popped == 0) {
            popped = pv_queue_arm(net->tx);
            if (popped > 0)
                moved = NET_IDLE;
        }
        if (popped < 0)
            moved = NET_BROKEN;
    }
    if (pushed)
        pv_queue_interrupt(net->tx);
    return net->tx->error ? NET_BROKEN : moved;
}

static enum net_moved receive_batch(struct pv_net *net)
{
    struct net_work *work = net->work;
    enum net_moved moved = NET_MOVED;

    for (uint32_t i = 0; i < BATCH && moved == NET_MOVED && !wait_for(net->receive_limit); i++)
        moved = pv_net_receive(net);
    if (work->returned) {
        work->returned = false;
        pv_queue_interrupt(net->rx);
    }
    return net->rx->error ? NET_BROKEN : moved;
}

static bool kicked(const struct pollfd *watched, struct pv_queue *queue)
{
    if (!watched->revents)
        return false;
    pv_queue_take(queue);
    return true;
}

int pv_net_serve(struct pv_net *net)
{
    struct net_work *work = net->work;
    /* Look for earlier work first: it will not be signalled again. */
    bool sending = net->tx, receiving = net->rx, starved = !net->rx;

    for (;;) {
        uint64_t send_wait = sending ? wait_for(net->send_limit) : 0;
        uint64_t receive_wait = starved ? 0 : wait_for(net->receive_limit);
        bool asks = !starved && !receiving && !receive_wait;
        short events = (short)((asks ? POLLIN : 0) | (rest_left(work) ? POLLOUT : 0));
        struct pollfd watched[WATCHED] = {
            [STOP] = {.fd = net->stop_fd, .events = POLLIN},
            [SEND] = {.fd = net->tx ? net->tx->kick : -1, .events = POLLIN},
            [RECEIVE] = {.fd = net->rx ? net->rx->kick : -1, .events = POLLIN},
            /* A backend that hung up would end each wait at once, so it is not looked at in the wait of a limit. */
            [BACKEND] = {.fd = receive_wait && !events ? -1 : net->fd, .events = events},
        };
        bool busy = (receiving && !receive_wait) || (sending && !rest_left(work) && !send_wait);
        uint64_t wait = send_wait && (!receive_wait || send_wait < receive_wait) ? send_wait : receive_wait;
        struct timespec time = pv_timespec(busy ? 0 : wait);
        if (ppoll(watched, WATCHED, busy || wait ? &time : NULL, NULL) < 0 && errno != EINTR) {
            net->error = errno;
            return PV_NET_FAILED;
        }
        if (watched[STOP].revents)
            return PV_NET_STOPPED;
        if (kicked(&watched[SEND], net->tx))
            sending = true;
        if (kicked(&watched[RECEIVE], net->rx) && starved) {
            starved = false;
            receiving = true;
        }

        short ready = watched[BACKEND].revents;
        enum net_moved sent = NET_MOVED, received = NET_MOVED;
        /* A backend that hung up may have more frames, but stays readable forever. Do not wait for buffers to take
           them. */
        if (ready & (POLLERR | POLLNVAL) || (ready & POLLHUP && starved))
            sent = pv_net_gone(net, ready & POLLNVAL ? EBADF : net->backend == PV_NET_TAP ? ENODEV : ECONNRESET);
        else if (ready && rest_left(work))
            sent = send_rest(net);
        if (sent == NET_MOVED && sending && !rest_left(work)) {
            sent = send_batch(net);
            sending = sent != NET_IDLE;
        }
        if ((receiving && !receive_wait) || (ready && events & POLLIN)) {
            received = receive_batch(net);
            receiving = received == NET_MOVED;
            starved = received == NET_WAIT;
        }
        if (sent == NET_BROKEN || received == NET_BROKEN)
            return PV_NET_BROKEN;
        if (sent == NET_GONE || received == NET_GONE)
            return PV_NET_GONE;
    }
}

void pv_net_settle(struct pv_net *net)
{
    struct net_work *work = net->work;

    if (net->rx)
        pv_net_give_back(net);
    /* A pending frame of a tap matches the features of this driver, so drop it. A stream must continue where it was. */
    if (net->backend == PV_NET_TAP)
        work->in_start = work->in_end = 0;
}
