// SPDX-License-Identifier: Apache-2.0
/* Serves the missing pages of a userfaultfd from a buffer or a file, without Python. */
#include "loop/loop.h"

#include <linux/userfaultfd.h>
#include <poll.h>
#include <unistd.h>

enum { BATCH = 16 };

/* Returns 0, or the errno. */
static int read_at(int fd, void *into, size_t size, uint64_t offset)
{
    for (size_t done = 0; done < size;) {
        ssize_t got = pread(fd, (uint8_t *)into + done, size - done, (off_t)(offset + done));
        if (got < 0 && errno != EINTR)
            return errno;
        if (!got)
            return ENODATA;
        if (got > 0)
            done += (size_t)got;
    }
    return 0;
}

/* Reads the page at offset into the room, and checks it there: the file may change after the check. */
static int read_page(const struct pv_fault_server *server, uint64_t offset)
{
    uint32_t sums[PV_LARGEST_PAGE / PV_GUEST_PAGE], count = (uint32_t)(PV_HOST_PAGE / PV_GUEST_PAGE);
    uint64_t first = offset / PV_GUEST_PAGE;
    int error = read_at(server->file, server->room, PV_HOST_PAGE, server->at + offset);

    if (!error)
        error = read_at(server->file, sums, count * sizeof(*sums), server->sums + first * sizeof(*sums));
    if (!error && pv_first_damaged(server->room, count, sums) != count)
        error = EBADMSG;
    return error;
}

/* Returns 0, or the errno of a permanent failure. If the page has already arrived, only its waiter is woken. */
static int serve(struct pv_fault_server *server, uint64_t address, bool *late)
{
    uint64_t page = address & -PV_HOST_PAGE, offset = page - server->hva;
    struct uffdio_copy copy = {.dst = page, .src = (uintptr_t)server->source + offset, .len = PV_HOST_PAGE};
    struct uffdio_range range = {.start = page, .len = PV_HOST_PAGE};
    int error;

    *late = false;
    if (page < server->hva || offset >= server->size)
        return EINVAL;
    if (!server->source) {
        if ((error = read_page(server, offset))) {
            server->refused = offset;
            return error;
        }
        copy.src = (uintptr_t)server->room;
    }
    while (ioctl(server->fd, UFFDIO_COPY, &copy)) {
        if (errno == EEXIST) {
            *late = true;
            return ioctl(server->fd, UFFDIO_WAKE, &range) ? errno : 0;
        }
        if (errno != EAGAIN && errno != EINTR)
            return errno;
    }
    return 0;
}

int pv_serve_faults(struct pv_fault_server *server)
{
    struct pollfd watched[] = {{.fd = server->fd, .events = POLLIN}, {.fd = server->stop_fd, .events = POLLIN}};
    struct uffd_msg messages[BATCH];

    for (;;) {
        if (poll(watched, 2, -1) < 0 && errno != EINTR)
            return -errno;
        if (watched[1].revents)
            return 0;
        ssize_t got = read(server->fd, messages, sizeof(messages));
        if (got < 0 && errno != EAGAIN && errno != EINTR)
            return -errno;
        for (ssize_t i = 0; i < got / (ssize_t)sizeof(messages[0]); i++) {
            bool late;
            int error;
            if (messages[i].event != UFFD_EVENT_PAGEFAULT)
                continue;
            if ((error = serve(server, messages[i].arg.pagefault.address, &late)))
                return -error;
            add(&server->served, 1);
            add(&server->late, late);
        }
    }
}
