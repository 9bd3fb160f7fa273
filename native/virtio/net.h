/* SPDX-License-Identifier: Apache-2.0 */
/* Shared by the two directions of virtio-net: net.c sends and serves, net_rx.c receives. */
#ifndef PYVMM_NET_H
#define PYVMM_NET_H

#include "virtio/virtio.h"

#include <sys/uio.h>

enum {
    HEADER = 12,                         /* struct virtio_net_hdr_v1 (virtio 1.2, 5.1.6) */
    ETHERNET = 14,
    FRAME = 65535 + ETHERNET + 4,        /* the longest: an IP packet or a segmentation-offload frame, and a tag */
    LENGTH = 4,                          /* of a frame in a stream, before it */
    BATCH = 64,                          /* frames of one direction before the other direction and a stop get a turn */
    STASH = 64,                          /* buffers for one frame: the longest takes 43 of those that Linux gives */
    VECTORS = 1023,                      /* of readv(), whose 1024th takes the excess of a frame that is too long */
    CHAIN_VECTORS = VECTORS / 2
};

/* The result of an attempt to move a frame. */
enum net_moved {
    NET_MOVED,      /* it was moved or dropped: go on with the next */
    NET_IDLE,       /* no frame */
    NET_WAIT,       /* the other side has no room for it */
    NET_BROKEN,     /* a queue is broken */
    NET_GONE        /* the backend has gone: pv_net.error */
};

struct net_work {
    /* The guest's receive buffers that are taken and not used yet, oldest first, with their segments. */
    struct pv_chain stash[2 * STASH];
    uint32_t stash_vectors[2 * STASH];
    uint32_t stash_first, stashed;
    struct iovec vector[2 * VECTORS + 1];
    uint32_t vector_first, vectors;
    uint64_t room;                       /* bytes */
    bool returned;                       /* a buffer has gone back since the last interrupt */

    struct iovec out[VECTORS + 1];

    /* Data from the backend without room in the guest: a stream's bytes, or one frame of a tap with its header. */
    uint32_t in_start, in_end;
    uint8_t in[2 * (LENGTH + HEADER + FRAME)];

    /* The rest of a frame whose beginning a stream has taken. */
    uint32_t rest_start, rest_end;
    uint8_t rest[LENGTH + FRAME];
};

enum net_moved pv_net_receive(struct pv_net *net);
/* Gives the stash back to the queue, as if it had never been taken. */
void pv_net_give_back(struct pv_net *net);

/* The backend is gone: drop unsent and incomplete frames. Inlined here because both directions use it, and net_rx.c
   must not call net.c, which calls it. */
static inline enum net_moved pv_net_gone(struct pv_net *net, int error)
{
    struct net_work *work = net->work;

    work->in_start = work->in_end = work->rest_start = work->rest_end = 0;
    net->error = error;
    return NET_GONE;
}

#endif
