/* SPDX-License-Identifier: Apache-2.0 */
/* The contract between the virtio devices in C and Python, read by both as loop/cdef.h is, and after it.
 *
 * In this order:
 *     queues         chains of descriptors, virtqueues
 *     virtio-blk
 *     virtio-net
 */

/* ---- queues --------------------------------------------------------------------------------------------------- */

struct pv_segment {
    uint64_t gpa;
    uint32_t size;         /* not 0; gpa + size does not overflow. The range may be outside of memory */
    uint32_t writable;
};

/* One request as the driver laid it out: `readable` segments for the device to read, then those it may write. */
struct pv_chain {
    uint32_t room;         /* maximum segments, set by Python; a longer chain breaks the queue */
    uint32_t count, readable;
    uint32_t id;           /* the driver's number for it */
    uint32_t slots;        /* ring entries it takes (packed rings: its descriptors; else 1) */
    uint32_t pad;
    uint64_t in_bytes;     /* sum of the readable segments: from the driver. With the other below 4 GiB */
    uint64_t out_bytes;    /* sum of the writable ones: to the driver */
    struct pv_segment *segments;
};

enum pv_queue_flag { PV_QUEUE_PACKED = 1, PV_QUEUE_EVENT_IDX = 2, PV_QUEUE_INDIRECT = 4 };
enum pv_queue_area { PV_AREA_DESCRIPTORS, PV_AREA_DRIVER, PV_AREA_DEVICE, PV_AREAS };
/* Driver errors that break a queue. */
enum pv_queue_error {
    PV_QUEUE_OK,
    PV_QUEUE_RING,         /* a ring is not accessible: private, gone, or no memory */
    PV_QUEUE_TABLE,        /* an indirect table is not accessible */
    PV_QUEUE_INDEX,        /* more is available than there are descriptors */
    PV_QUEUE_DESCRIPTOR,   /* a descriptor's number beyond the table's end */
    PV_QUEUE_LOOP,         /* more descriptors in a chain than there are */
    PV_QUEUE_SEGMENT,      /* an empty segment, or one beyond 2^64 */
    PV_QUEUE_ORDER,        /* a readable segment after a writable one */
    PV_QUEUE_LENGTH,       /* 4 GiB or more in one chain */
    PV_QUEUE_INDIRECTION,  /* an indirect table that was not negotiated, is empty, odd, in another, or has a next */
    PV_QUEUE_ROOM,         /* more segments than the device takes */
    PV_QUEUE_ERRORS
};

/* A virtqueue, the device's side. One thread at a time uses it, except for `stop` and the counters. */
struct pv_queue {
    struct pv_vm *vm;
    struct pv_interrupt *interrupt;
    struct pv_doorbell_slot *bell;          /* that rings `kick`, or NULL */
    uint32_t size, flags;                   /* entries: 1 to 32768, a power of two unless packed; enum pv_queue_flag */
    uint64_t descriptors, driver, device;   /* gpas of the areas */
    int32_t kick;                           /* eventfd, non-blocking */
    uint32_t stop;         /* atomic; not 0: the serving thread returns to Python after the current request */
    uint32_t error;        /* enum pv_queue_error: not 0: the queue is not served until the device is reset */
    uint32_t pad;
    uint64_t error_gpa;
    uint64_t kicks;                         /* kicks of the driver that were written to `kick` and taken */
    uint64_t chains, bytes;                 /* since it was made; bytes of whole chains */
    /* C's own from here on. Ring positions: free-running modulo 2^16 in a split ring, slots in a packed one. */
    uint32_t next, next_wrap;               /* what is popped next */
    uint32_t used, used_wrap;               /* where the next used entry goes */
    uint32_t available;                     /* the index last seen (split) */
    uint32_t taken;                         /* slots popped and not pushed (packed) */
    uint32_t unsaid;                        /* slots pushed since the last interrupt */
    uint32_t asked;                         /* not 0: the driver was asked to kick */
    uint64_t seen;                          /* pv_vm.published + 1 when views were found */
    uint8_t *views[PV_AREAS];               /* by enum pv_queue_area, or NULL */
};

/* Resets the queue's positions, after size, flags and areas were set. */
void pv_queue_start(struct pv_queue *queue);
/* Returns 1 with the next request, 0 without one, -1 if the queue is broken (see `error`). */
int pv_queue_pop(struct pv_queue *queue, struct pv_chain *chain);
/* Gives a chain that was popped back as used, `written` bytes of it written; no interrupt yet. 0, or -1. */
int pv_queue_push(struct pv_queue *queue, const struct pv_chain *chain, uint32_t written);
/* The same for several at once: the driver sees none of them, or all. */
int pv_queue_push_all(struct pv_queue *queue, const struct pv_chain *chains, const uint32_t *written, uint32_t count);
/* Undoes the last pop that was not undone yet. Its chain must not have been pushed. */
void pv_queue_unpop(struct pv_queue *queue, const struct pv_chain *newest);
/* After a batch of pushes: interrupts the driver if it requests that. */
void pv_queue_interrupt(struct pv_queue *queue);
/* Requests kicks from now on. 1: no new request, sleep; 0: there is a request to pop; -1: broken. */
int pv_queue_arm(struct pv_queue *queue);
/* Makes `kick` readable, as a kick does, without being counted as one. Any thread. */
void pv_queue_wake(struct pv_queue *queue);
/* When `kick` is readable: clears it, and lets the doorbell ring again. Look at the ring after it, not before. */
void pv_queue_take(struct pv_queue *queue);
/* Guarded copies by offset into the chain's readable (read) or writable (write) bytes. Returns bytes done: fewer if the
   chain ends or a page is not accessible. */
uint64_t pv_chain_read(struct pv_queue *queue, const struct pv_chain *chain, uint64_t offset, void *to, uint64_t n);
uint64_t pv_chain_write(struct pv_queue *queue, const struct pv_chain *chain, uint64_t offset, const void *from,
                        uint64_t n);
/* Sets bits of the status, and signals unless all of them were already pending. Any thread. */
void pv_interrupt(struct pv_interrupt *interrupt, uint32_t bits);

/* ---- limits --------------------------------------------------------------------------------------------------- */

/* A token bucket with room for a second's tokens. A request is served while there is any, and may overdraw it: the next
   one waits until that is paid back. So over time no more than `rate` a second are taken. */
struct pv_bucket {
    uint64_t rate;         /* tokens a second; 0: no limit */
    uint64_t full_at;      /* atomic; ns of CLOCK_MONOTONIC */
};
/* One direction of a device. Any threads. */
struct pv_limit {
    struct pv_bucket bytes, ops;
};
/* Returns the ns until the next request may be served, 0: now. */
uint64_t pv_limit_wait(const struct pv_limit *limit);
/* Takes the tokens of requests, up to 2^32 bytes. */
void pv_limit_take(struct pv_limit *limit, uint64_t bytes, uint64_t ops);

/* ---- virtio-blk ----------------------------------------------------------------------------------------------- */

enum pv_blk_limit { PV_BLK_SEGMENTS = 512 /* the most of a chain, and so the most entries of a queue */ };
enum pv_blk_flag {
    PV_BLK_READ_ONLY = 1,
    PV_BLK_REGULAR = 2,    /* a file, which may be truncated */
    PV_BLK_THROUGH = 4     /* a write reaches the medium before its completion: the driver has no flush */
};
/* Why pv_blk_serve() came back. */
enum pv_blk_stop {
    PV_BLK_NONE,
    PV_BLK_STOPPED,        /* queue->stop */
    PV_BLK_REQUEST,        /* a request for Python: type, sector, and the chain */
    PV_BLK_FAILED,         /* the file failed: type, sector, error; ENODATA: it was truncated */
    PV_BLK_BROKEN          /* queue->error */
};

/* The server of one queue of a disk. Positions are in sectors of 512 bytes. */
struct pv_blk {
    struct pv_queue *queue;
    struct pv_chain *chain;  /* the current request; room for at most PV_BLK_SEGMENTS */
    struct pv_limit *limit;  /* of all queues of the disk, or NULL */
    uint8_t *bounce;         /* not NULL: data goes through here, as the file's I/O might pin pages */
    uint64_t bounce_size;    /* bytes, whole sectors */
    int32_t file;
    int32_t stop_fd;         /* eventfd: readable when queue->stop has been set */
    uint32_t flags;          /* enum pv_blk_flag */
    uint32_t abandon;        /* atomic; not 0: the current request may stay incomplete, its answer is not awaited */
    uint64_t capacity;       /* sectors */
    uint64_t most;           /* bytes of data in one request */
    uint32_t open;           /* not 0: the chain has not been answered */
    uint32_t type;           /* of the current request */
    uint64_t sector;
    uint64_t data;           /* bytes from the chain's first writable one that have been written */
    int32_t error;           /* errno */
    uint32_t untold;         /* requests answered since the last interrupt */
    uint64_t untold_bytes;
    uint64_t done, failed;   /* requests answered: with OK, and with anything else */
    uint64_t denied;         /* failed requests whose memory the host may not access */
    uint64_t bytes_read, bytes_written;
};
/* Serves reads, writes and flushes until Python is needed. Runs in its own thread. Returns enum pv_blk_stop. */
uint32_t pv_blk_serve(struct pv_blk *blk);
/* Completes a request that was returned to Python: its status byte after blk->data bytes. 0, or -1: the queue is
   broken. */
int pv_blk_answer(struct pv_blk *blk, uint32_t status);

/* ---- virtio-net ----------------------------------------------------------------------------------------------- */

enum pv_net_backend {
    PV_NET_NONE,           /* no backend: the guest's frames are dropped */
    PV_NET_TAP,            /* frames behind the guest's own header: IFF_VNET_HDR, 12 bytes, non-blocking */
    PV_NET_STREAM          /* a socket: frames behind their length, 4 bytes, big-endian */
};
/* Why pv_net_serve() returned. */
enum pv_net_end {
    PV_NET_STOPPED,        /* stop_fd is readable */
    PV_NET_BROKEN,         /* a queue is: its error says how */
    PV_NET_GONE,           /* the backend is gone: error is an errno, or 0 if it hung up */
    PV_NET_FAILED          /* poll(2): error */
};

/* Frames moved, and their bytes without headers. Any thread may read them. */
struct pv_net_traffic {
    uint64_t frames, bytes;
    uint64_t dropped;      /* frames: too short, too long, with no room for them, or refused by the backend */
    uint64_t faults;       /* buffers with a page that cannot be touched */
};

struct pv_net {
    struct pv_queue *rx, *tx;      /* NULL: the driver has made none */
    int32_t fd, stop_fd;           /* of the backend; an eventfd */
    uint32_t backend;              /* enum pv_net_backend */
    uint32_t mergeable;            /* VIRTIO_NET_F_MRG_RXBUF was negotiated: a frame may lie in several buffers */
    uint32_t longest;              /* bytes of a tap's longest frame, header included */
    int32_t error;
    struct pv_chain *chain;        /* with room for what either queue may hold */
    struct pv_limit *send_limit, *receive_limit;   /* or NULL */
    void *work;                    /* pv_net_room() bytes, zeros at first; C's own, and kept from call to call */
    struct pv_net_traffic sent, received;   /* by the guest */
};

uint64_t pv_net_room(void);
/* Moves frames until Python is needed. Runs in its own thread. Returns enum pv_net_end. */
int pv_net_serve(struct pv_net *net);
/* Call after pv_net_serve(), before others use the queues: returns the taken rx buffers to their queue. */
void pv_net_settle(struct pv_net *net);
