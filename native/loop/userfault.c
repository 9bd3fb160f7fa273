// SPDX-License-Identifier: Apache-2.0
/* Serves the missing pages of a userfaultfd from a buffer, without Python. */
#include "loop/loop.h"

#include <linux/userfaultfd.h>
#include <poll.h>
#include <unistd.h>

enum { BATCH = 16 };

/* Returns 0, or the errno of a permanent failure. If the page has already arrived, only its waiter is woken. */
static int serve(const struct pv_fault_server *server, uint64_t address, bool *late)
{
    uint64_t page = address & -PV_HOST_PAGE, offset = page - server->hva;
    struct uffdio_copy copy = {.dst = page, .src = (uintptr_t)server->source + offset, .len = PV_HOST_PAGE};
    struct uffdio_range range = {.start = page, .len = PV_HOST_PAGE};

    *late = false;
    if (page < server->hva || offset >= server->size)
        return EINVAL;
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
