// SPDX-License-Identifier: Apache-2.0
/* virtio-blk (virtio 1.2, 5.2): moves data between the file and guest memory, in a thread that waits for kicks itself.
 * Python decides policy.
 *
 * The kernel copies between the page cache and user addresses of guest memory, and stops with EFAULT at a private page.
 * If the file system might pin pages (pv_blk.bounce), data goes through a buffer and guarded copies: the kernel takes a
 * protected guest's pinned page back by force. */
#include "virtio/virtio.h"

#include <endian.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* 5.2.6. */
enum { BLK_T_IN = 0, BLK_T_OUT = 1, BLK_T_FLUSH = 4 };
enum { BLK_S_OK = 0, BLK_S_IOERR = 1 };
enum { SECTOR = 512, STATUS_BYTES = 1 };

/* Bytes to move between two checks of pv_blk.abandon. */
enum { PIECE = 1 << 20 };

/* Enough for a piece: one for each of PV_BLK_SEGMENTS, and one for each of the smallest pages if pages are in separate
   slots. */
enum { VECTORS = 1024 };
_Static_assert(PV_BLK_SEGMENTS + PIECE / PV_GUEST_PAGE < VECTORS, "pieces of one call");

/* The driver is interrupted after this many bytes, and before the thread sleeps or waits for the medium. Reads of 1 MiB
   should overlap with the driver's work on the last one. Small ones should not cost an interrupt each. */
enum { BATCH = 16, BATCH_BYTES = 128 << 10 };

struct header { uint32_t type, reserved; uint64_t sector; };

static ssize_t denied(void)
{
    errno = EFAULT;
    return -1;
}

static ssize_t bounce_in(const struct pv_blk *blk, uint64_t at, uint64_t offset, size_t n)
{
    ssize_t got = pread(blk->file, blk->bounce, n, (off_t)at);

    if (got <= 0)
        return got;
    got = (ssize_t)pv_chain_write(blk->queue, blk->chain, offset, blk->bounce, (uint64_t)got);
    return got ? got : denied();
}

static ssize_t bounce_out(const struct pv_blk *blk, uint64_t at, uint64_t offset, size_t n, int flags)
{
    struct iovec whole = {blk->bounce, pv_chain_read(blk->queue, blk->chain, offset, blk->bounce, n)};

    return whole.iov_len ? pwritev2(blk->file, &whole, 1, (off_t)at, flags) : denied();
}

/* Moves the chain's data from `done` to or from the file at `at`. Returns bytes: 0 at the file's end, -1 with errno. */
static ssize_t move(const struct pv_blk *blk, uint64_t at, uint64_t done, uint64_t n)
{
    bool in = blk->type == BLK_T_IN;
    uint64_t offset = done + (in ? 0 : sizeof(struct header));
    int flags = blk->flags & PV_BLK_THROUGH ? RWF_DSYNC : 0;
    struct iovec vectors[VECTORS];

    if (blk->bounce) {
        n = n < blk->bounce_size ? n : blk->bounce_size;
        return in ? bounce_in(blk, at, offset, n) : bounce_out(blk, at, offset, n, flags);
    }
    int count = pv_chain_iovecs(blk->queue, blk->chain, in, offset, n, vectors, VECTORS);
    if (count <= 0)
        return denied();
    return in ? preadv(blk->file, vectors, count, (off_t)at) : pwritev2(blk->file, vectors, count, (off_t)at, flags);
}

/* A write beyond the end of a truncated file would extend it again, with zeros instead of the lost data. */
static bool cut_short(const struct pv_blk *blk)
{
    struct stat status;

    return blk->flags & PV_BLK_REGULAR && blk->type == BLK_T_OUT &&
           (fstat(blk->file, &status) || (uint64_t)status.st_size / SECTOR < blk->capacity);
}

/* Returns 0 or an errno: EFAULT is the guest's fault, ENODATA means that the file was truncated. */
static int transfer(struct pv_blk *blk, uint64_t size, uint64_t *done)
{
    if (cut_short(blk))
        return ENODATA;
    while (*done < size) {
        uint64_t left = size - *done;
        if (load(&blk->abandon))
            return ECANCELED;
        ssize_t moved = move(blk, blk->sector * SECTOR + *done, *done, left < PIECE ? left : PIECE);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved < 0)
            return errno;
        if (moved == 0)
            return ENODATA;
        *done += (uint64_t)moved;
    }
    return 0;
}

/* Whether [sector, sector + size / SECTOR) is inside of the disk. The guest chose the values. */
static bool on_disk(const struct pv_blk *blk, uint64_t size)
{
    return size % SECTOR == 0 && size <= blk->most && blk->sector <= blk->capacity &&
           size / SECTOR <= blk->capacity - blk->sector;
}

/* A request whose status byte cannot be written is still returned. */
static int answer(struct pv_blk *blk, uint8_t status, uint64_t data)
{
    uint64_t room = blk->chain->out_bytes;
    bool told = room && pv_chain_write(blk->queue, blk->chain, room - STATUS_BYTES, &status, STATUS_BYTES);
    /* The number of bytes written from the start. The status is last, and counts only if all bytes before it were
       written. */
    uint64_t written = data + (told && data + STATUS_BYTES == room);

    add(status == BLK_S_OK ? &blk->done : &blk->failed, 1);
    blk->open = 0;
    blk->untold++;
    return pv_queue_push(blk->queue, blk->chain, (uint32_t)written);
}

static void interrupt(struct pv_blk *blk)
{
    pv_queue_interrupt(blk->queue);
    blk->untold = blk->untold_bytes = 0;
}

/* Completed requests do not wait for a slow medium. */
static void interrupt_before_long(struct pv_blk *blk)
{
    if (blk->untold)
        interrupt(blk);
}

int pv_blk_answer(struct pv_blk *blk, uint32_t status)
{
    int result = blk->open ? answer(blk, (uint8_t)status, blk->data) : -1;

    interrupt(blk);
    return result;
}

static void take(struct pv_blk *blk, uint64_t bytes, uint64_t ops)
{
    if (blk->limit)
        pv_limit_take(blk->limit, bytes, ops);
}

static uint32_t data_request(struct pv_blk *blk)
{
    bool in = blk->type == BLK_T_IN;
    uint64_t size = in ? blk->chain->out_bytes - STATUS_BYTES : blk->chain->in_bytes - sizeof(struct header), done = 0;

    if (!on_disk(blk, size) || (!in && blk->flags & PV_BLK_READ_ONLY)) {
        answer(blk, BLK_S_IOERR, 0);
        return PV_BLK_NONE;
    }
    if (!in && blk->flags & PV_BLK_THROUGH)
        interrupt_before_long(blk);
    take(blk, size, 0);
    blk->error = transfer(blk, size, &done);
    add(in ? &blk->bytes_read : &blk->bytes_written, done);
    blk->untold_bytes += done;
    blk->data = in ? done : 0;
    switch (blk->error) {
    case 0:
        answer(blk, BLK_S_OK, blk->data);
        return PV_BLK_NONE;
    case EFAULT:
        add(&blk->denied, 1);
        answer(blk, BLK_S_IOERR, blk->data);
        return PV_BLK_NONE;
    case ECANCELED:
        return PV_BLK_STOPPED;
    default:
        return PV_BLK_FAILED;
    }
}

/* Carries out the request in blk->chain. */
static uint32_t serve(struct pv_blk *blk)
{
    struct header header;

    blk->open = 1;
    blk->error = 0;
    blk->data = 0;
    take(blk, 0, 1);
    if (!blk->chain->out_bytes ||
        pv_chain_read(blk->queue, blk->chain, 0, &header, sizeof(header)) != sizeof(header)) {
        answer(blk, BLK_S_IOERR, 0);
        return PV_BLK_NONE;
    }
    blk->type = le32toh(header.type);
    blk->sector = le64toh(header.sector);
    switch (blk->type) {
    case BLK_T_IN:
    case BLK_T_OUT:
        return data_request(blk);
    case BLK_T_FLUSH:
        interrupt_before_long(blk);
        if (fdatasync(blk->file)) {
            blk->error = errno;
            return PV_BLK_FAILED;
        }
        answer(blk, BLK_S_OK, 0);
        return PV_BLK_NONE;
    default:
        return PV_BLK_REQUEST;
    }
}

static void sleep_until_kicked(struct pv_blk *blk)
{
    struct pollfd watched[] = {{.fd = blk->queue->kick, .events = POLLIN}, {.fd = blk->stop_fd, .events = POLLIN}};

    ppoll(watched, 2, NULL, NULL);
    if (watched[0].revents)
        pv_queue_take(blk->queue);
}

/* Until the limit allows the next request, or until a stop. */
static void sleep_for(struct pv_blk *blk, uint64_t ns)
{
    struct pollfd watched = {.fd = blk->stop_fd, .events = POLLIN};
    struct timespec time = pv_timespec(ns);

    interrupt_before_long(blk);
    ppoll(&watched, 1, &time, NULL);
}

uint32_t pv_blk_serve(struct pv_blk *blk)
{
    uint32_t stop = PV_BLK_NONE;

    while (stop == PV_BLK_NONE) {
        uint64_t wait;
        int found;
        if (load_acquire(&blk->queue->stop)) {
            stop = PV_BLK_STOPPED;
        } else if (blk->limit && (wait = pv_limit_wait(blk->limit))) {
            sleep_for(blk, wait);
        } else if ((found = pv_queue_pop(blk->queue, blk->chain)) > 0) {
            stop = serve(blk);
            if (blk->untold >= BATCH || blk->untold_bytes >= BATCH_BYTES)
                interrupt(blk);
        } else if (found == 0) {
            interrupt(blk);
            if (pv_queue_arm(blk->queue) > 0)
                sleep_until_kicked(blk);
        }
        if (load(&blk->queue->error))
            stop = PV_BLK_BROKEN;
    }
    interrupt(blk);
    return stop;
}
