/* SPDX-License-Identifier: Apache-2.0 */
/* What the two directions of virtio-net share: net.c sends and serves, net_rx.c receives. */
#ifndef PYVMM_NET_H
#define PYVMM_NET_H

#include "virtio/virtio.h"

#include <sys/uio.h>

enum {
    HEADER = 12,                         /* struct virtio_net_hdr_v1 (virtio 1.2, 5.1.6) */
    ETHERNET = 14,
    FRAME = 65535 + ETHERNET + 4,        /* the longest: an IP packet, or what segmentation is left to do on, and a tag */
    LENGTH = 4,                          /* of a frame in a stream, before it */
    BATCH = 64,                          /* frames of one direction before the other one, and a stop, have a turn */
    STASH = 64,                          /* buffers for one frame: the longest takes 43 of those that Linux gives */
    VECTORS = 1023,                      /* of readv(), whose 1024th takes what is too long */
    CHAIN_VECTORS = VECTORS / 2
};

/* What became of an attempt to move a frame. */
enum net_moved {
    NET_MOVED,      /* it went, or it was dropped: on to the next */
    NET_IDLE,       /* there is none */
    NET_WAIT,       /* the other side has no room for it */
    NET_BROKEN,     /* a queue is broken */
    NET_GONE        /* the backend has gone: pv_net.error */
};

struct net_work {
    /* The guest's receive buffers that are taken and not used yet, oldest first, and where they are. */
    struct pv_chain stash[2 * STASH];
    uint32_t stash_vectors[2 * STASH];
    uint32_t stash_first, stashed;
    struct iovec vector[2 * VECTORS + 1];
    uint32_t vector_first, vectors;
    uint64_t room;                       /* bytes */
    bool returned;                       /* a buffer has gone back since the last interrupt */

    struct iovec out[VECTORS + 1];

    /* What came from the backend and found no room: of a stream as it came, of a tap one frame with its header. */
    uint32_t in_start, in_end;
    uint8_t in[2 * (LENGTH + HEADER + FRAME)];

    /* The end of a frame of which a stream has taken the beginning. */
    uint32_t rest_start, rest_end;
    uint8_t rest[LENGTH + FRAME];
};

enum net_moved pv_net_receive(struct pv_net *net);
/* Gives the stash back to the queue, as if it had never been taken. */
void pv_net_give_back(struct pv_net *net);

/* Nobody waits for what it has not taken, or will give the end of what it has given. Inlined: both directions end so,
   and net.c, which calls net_rx.c, would be called by it if this were there. */
static inline enum net_moved pv_net_gone(struct pv_net *net, int error)
{
    struct net_work *work = net->work;

    work->in_start = work->in_end = work->rest_start = work->rest_end = 0;
    net->error = error;
    return NET_GONE;
}

#endif
