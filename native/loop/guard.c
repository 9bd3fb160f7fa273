// SPDX-License-Identifier: Apache-2.0
/* Copies that survive pages the host may not access, and the signal handlers they need. They load and store in user
 * mode only: if the kernel faults on a donated page in its own mapping, it takes the page back from the guest and the
 * contents are lost (arch/arm64/mm/fault.c; the atlas's claim fatal/a-reclaimed-page-is-efault). */
#include "loop/loop.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { BULK = 512 };

struct guard {
    sigjmp_buf out;
    uintptr_t to, from;
    size_t n;
    volatile size_t done;
};

/* initial-exec: a handler may not allocate a thread's TLS block. */
static __thread struct guard *volatile current __attribute__((tls_model("initial-exec")));

static struct sigaction before_segv, before_bus;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int install_error;

static bool within(uintptr_t page, uintptr_t start, size_t n)
{
    return start < page + PV_HOST_PAGE && page < start + n;
}

/* A foreign fault, or a sent signal: do what would have happened without our handler. */
static void chain(int signal, siginfo_t *info, void *context, const struct sigaction *before)
{
    bool sent = info->si_code <= 0;

    if (!(before->sa_flags & SA_SIGINFO) && (before->sa_handler == SIG_DFL || before->sa_handler == SIG_IGN)) {
        if (sent && before->sa_handler == SIG_IGN)
            return;
        /* The faulting instruction runs again and kills the process, so the core shows the right place. */
        struct sigaction fatal = {.sa_handler = SIG_DFL};
        sigaction(signal, &fatal, NULL);
        if (sent)
            raise(signal);
        return;
    }

    sigset_t mask = before->sa_mask, old;
    if (!(before->sa_flags & SA_NODEFER))
        sigaddset(&mask, signal);
    pthread_sigmask(SIG_BLOCK, &mask, &old);
    if (before->sa_flags & SA_SIGINFO)
        before->sa_sigaction(signal, info, context);
    else
        before->sa_handler(signal);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

static void on_fault(int signal, siginfo_t *info, void *context)
{
    struct guard *guard = current;
    /* A machine check reports only the page. */
    uintptr_t page = (uintptr_t)info->si_addr & (uintptr_t)-PV_HOST_PAGE;

    if (guard && info->si_code > 0 && (within(page, guard->to, guard->n) || within(page, guard->from, guard->n)))
        siglongjmp(guard->out, 1);
    chain(signal, info, context, signal == SIGSEGV ? &before_segv : &before_bus);
}

static void on_kick(int signal)
{
    (void)signal; /* its arrival ends KVM_RUN */
}

static void install(void)
{
    struct sigaction fault = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    struct sigaction kick = {.sa_handler = on_kick};

    if (sigaction(SIGSEGV, &fault, &before_segv) || sigaction(SIGBUS, &fault, &before_bus) ||
        sigaction(pv_kick_signal(), &kick, NULL))
        install_error = -errno;
}

int pv_install_signals(void)
{
    pthread_once(&once, install);
    return install_error;
}

int pv_kick_signal(void)
{
    return SIGRTMIN + 5;
}

/* A blocked fault signal kills the thread, and a blocked kick never ends KVM_RUN. Our parent process may block any
   signal, and each thread has its own mask. */
void pv_unblock_signals(void)
{
    sigset_t ours;

    sigemptyset(&ours);
    sigaddset(&ours, SIGSEGV);
    sigaddset(&ours, SIGBUS);
    sigaddset(&ours, pv_kick_signal());
    pthread_sigmask(SIG_UNBLOCK, &ours, NULL);
}

static __thread bool unblocked __attribute__((tls_model("initial-exec")));

static inline void unblock_once(void)
{
    if (__builtin_expect(!unblocked, false)) {
        unblocked = true;
        pv_unblock_signals();
    }
}

/* The widest access for which both addresses are aligned. It cannot cross a page, so after a fault none of it is done,
   and an aligned ring index is never torn. */
static size_t step_at(uintptr_t address, size_t left)
{
    size_t step = (address | 8) & -(address | 8);

    while (step > left)
        step /= 2;
    return step;
}

#define COPY(type) (*(volatile type *)(g.to + i) = *(const volatile type *)(g.from + i))

static size_t copy_words(uintptr_t to, uintptr_t from, size_t n)
{
    struct guard g = {.to = to, .from = from, .n = n};

    if (sigsetjmp(g.out, 0) == 0) {
        current = &g;
        for (size_t i = 0, step; i < n; i += step, g.done = i) {
            step = step_at((g.to + i) | (g.from + i), n - i);
            switch (step) {
            case 8: COPY(uint64_t); break;
            case 4: COPY(uint32_t); break;
            case 2: COPY(uint16_t); break;
            default: COPY(uint8_t); break;
            }
        }
    }
    current = NULL;
    return g.done;
}

static size_t fill_words(uintptr_t to, uint8_t byte, size_t n)
{
    struct guard g = {.to = to, .from = to, .n = n};
    uint64_t word = 0x0101010101010101u * byte;

    if (sigsetjmp(g.out, 0) == 0) {
        current = &g;
        for (size_t i = 0, step; i < n; i += step, g.done = i) {
            step = step_at(g.to + i, n - i);
            switch (step) {
            case 8: *(volatile uint64_t *)(g.to + i) = word; break;
            default: step = 1; *(volatile uint8_t *)(g.to + i) = byte; break;
            }
        }
    }
    current = NULL;
    return g.done;
}

/* Copies or fills whole pieces at the C library's speed, in any byte order. The word loop does the rest, and finds the
   exact byte of a fault. */
static size_t bulk(uintptr_t to, uintptr_t from, bool fill, uint8_t byte, size_t n)
{
    struct guard g = {.to = to, .from = fill ? to : from, .n = n};

    if (sigsetjmp(g.out, 0) == 0) {
        current = &g;
        for (size_t i = 0; g.n - i >= BULK; i += BULK, g.done = i) {
            __asm__ volatile("" ::: "memory"); /* a piece is begun under the guard, and done when counted */
            if (fill)
                memset((void *)(g.to + i), byte, BULK);
            else
                memcpy((void *)(g.to + i), (const void *)(g.from + i), BULK);
            __asm__ volatile("" ::: "memory");
        }
    }
    current = NULL;
    return g.done;
}

size_t pv_copy(void *to, const void *from, size_t n)
{
    uintptr_t t = (uintptr_t)to, f = (uintptr_t)from;
    size_t done;

    unblock_once();
    done = n >= BULK ? bulk(t, f, false, 0, n) : 0;

    return done + copy_words(t + done, f + done, n - done);
}

size_t pv_fill(void *to, int byte, size_t n)
{
    uintptr_t t = (uintptr_t)to;
    size_t done;

    unblock_once();
    done = n >= BULK ? bulk(t, t, true, (uint8_t)byte, n) : 0;

    return done + fill_words(t + done, (uint8_t)byte, n - done);
}

/* Only the view is used, which stays mapped with its backing: a copy may wait for a page from userfaultfd. */
static bool region_at(struct pv_vm *vm, uint64_t gpa, struct pv_region *region)
{
    uint32_t phase = pv_map_enter(vm);
    bool found = pv_region_at(vm, gpa, region);

    pv_map_leave(vm, phase);
    return found;
}

/* One direction or the other: guest is the region's side. */
static uint64_t transfer(struct pv_vm *vm, uint64_t gpa, uint8_t *host, uint64_t n, uint64_t *stopped, bool out)
{
    uint64_t done = 0;

    while (done < n) {
        struct pv_region region;
        if (!region_at(vm, gpa + done, &region) || !region.view)
            break;
        uint64_t offset = gpa + done - region.gpa, part = region.size - offset;
        if (part > n - done)
            part = n - done;
        uint8_t *guest = region.view + offset;
        size_t copied = out ? pv_copy(guest, host + done, part) : pv_copy(host + done, guest, part);
        done += copied;
        if (copied < part)
            break;
    }
    if (done < n && stopped)
        *stopped = gpa + done;
    return done;
}

uint64_t pv_read(struct pv_vm *vm, uint64_t gpa, void *to, uint64_t n, uint64_t *stopped)
{
    return transfer(vm, gpa, to, n, stopped, false);
}

uint64_t pv_write(struct pv_vm *vm, uint64_t gpa, const void *from, uint64_t n, uint64_t *stopped)
{
    return transfer(vm, gpa, (uint8_t *)(uintptr_t)from, n, stopped, true);
}

int pv_probe(struct pv_vm *vm, uint64_t gpa)
{
    struct pv_region region;
    uint8_t byte;

    if (!region_at(vm, gpa, &region))
        return -1;
    return region.view && pv_copy(&byte, region.view + (gpa - region.gpa), sizeof(byte)) == sizeof(byte);
}
