// SPDX-License-Identifier: Apache-2.0
/* The run loop: enter the guest, handle its exit, and enter again unless Python is needed. */
#include "loop/convert.h"

#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- kicks ------------------------------------------------------------------------------------------------- */

/* Three steps, so that none is missed: a loop outside the kernel sees kick, KVM_RUN on its way in sees immediate_exit,
   and inside it the signal ends it. */
void pv_kick(struct pv_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;

    store(&vcpu->kick, 1);
    store(&run->immediate_exit, 1);
    fence(); /* pairs with the one in pv_run: either we see its tid or it sees our kick */
    int32_t tid = load(&vcpu->tid);
    if (tid)
        syscall(SYS_tgkill, getpid(), tid, pv_kick_signal());
}

void pv_unkick(struct pv_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;

    store(&vcpu->kick, 0);
    fence(); /* in the other order, a concurrent pv_kick() could lose only its immediate_exit */
    store(&run->immediate_exit, 0);
    fence();
}

/* ---- failures of KVM_RUN ----------------------------------------------------------------------------------- */

/* A kick during pv_unkick() may have left immediate_exit set without kick: clear it, to avoid spinning. */
static uint32_t interrupted(struct pv_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;

    vcpu->exit = PV_EXIT_INTR;
    store(&run->immediate_exit, 0);
    fence(); /* before kick is looked at */
    return PV_STOP_NONE;
}

_Static_assert((int)PV_FAILURES <= (int)PV_POLICY_ROOM, "a policy for every way to fail");

static enum pv_failure failure_of(int error, bool told)
{
    switch (error) {
    case EAGAIN: return PV_FAIL_EAGAIN;
    case ENOMEM: return PV_FAIL_ENOMEM;
    case EFAULT: return told ? PV_FAIL_MEMORY : PV_FAIL_EFAULT;
    case EHWPOISON: return PV_FAIL_EHWPOISON;
    default: return PV_FAIL_OTHER;
    }
}

static uint32_t failed(struct pv_vcpu *vcpu, int error)
{
    struct kvm_run *run = vcpu->run;
    const struct pv_memory_fault *fault = (const void *)&run->hw;
    /* The only exit_reason that is valid together with an errno. It is cleared at once: otherwise it would be stale
       when the next KVM_RUN fails early. Other reasons stay, because KVM reads KVM_EXIT_MMIO back. */
    bool told = run->exit_reason == KVM_EXIT_MEMORY_FAULT;
    uint8_t action;

    vcpu->exit = PV_EXIT_FAILED;
    vcpu->error = error;
    vcpu->failure = failure_of(error, told);
    vcpu->fault_gpa = told ? fault->gpa : 0;
    vcpu->fault_size = told ? fault->size : 0;
    vcpu->fault_flags = told ? fault->flags : 0;
    if (told)
        run->exit_reason = KVM_EXIT_UNKNOWN;
    pv_record(vcpu, pv_now(), PV_REC_FAULT, (uint8_t)error, (uint32_t)vcpu->fault_size, vcpu->fault_gpa,
              vcpu->exit_reason);

    action = load(&vcpu->vm->policy[vcpu->failure]);
    if (action == PV_ACT_STOP || vcpu->retries >= load(&vcpu->vm->retry_limit))
        return PV_STOP_FAILED;
    if (action == PV_ACT_PUNCH && (!told || pv_punch(vcpu->vm, vcpu->fault_gpa)))
        return PV_STOP_FAILED;
    vcpu->retries++;
    return PV_STOP_NONE;
}

/* ---- exits ------------------------------------------------------------------------------------------------- */

static uint32_t system_event(struct pv_vcpu *vcpu)
{
    const struct kvm_run *run = vcpu->run;
    vcpu->exit = PV_EXIT_SYSTEM;
    vcpu->event = run->system_event.type;
    vcpu->event_count = run->system_event.ndata < PV_EVENT_WORDS ? run->system_event.ndata : PV_EVENT_WORDS;
    for (uint32_t i = 0; i < vcpu->event_count; i++)
        vcpu->event_data[i] = run->system_event.data[i];
    return PV_STOP_SYSTEM;
}

static uint32_t dispatch(struct pv_vcpu *vcpu)
{
    vcpu->retries = 0;
    switch (vcpu->exit_reason) {
    case KVM_EXIT_MMIO:
        return pv_mmio(vcpu, false);
    case KVM_EXIT_HYPERCALL:
        vcpu->exit = PV_EXIT_HYPERCALL;
        return pv_hypercall(vcpu);
    case KVM_EXIT_SYSTEM_EVENT:
        return system_event(vcpu);
    case KVM_EXIT_DEBUG:
        vcpu->exit = PV_EXIT_DEBUG;
        return PV_STOP_DEBUG;
    default:
        vcpu->exit = PV_EXIT_OTHER;
        return PV_STOP_OTHER;
    }
}

static void account(struct pv_histogram *histogram, uint64_t *total, uint64_t ns)
{
    *total += ns;
    histogram->bucket[pv_bucket_of(ns)]++;
}

/* Enters the guest once and handles the exit. */
static uint32_t enter(struct pv_vcpu *vcpu)
{
    const struct kvm_run *run = vcpu->run;
    bool timed = vcpu->timed, clocked = timed || vcpu->ring.exits;
    uint64_t entered = 0, guest_ns = 0;
    struct pv_exit_stats *stats;
    uint32_t stop;
    int error;

    if (clocked) {
        entered = pv_now();
        if (timed && vcpu->left_ns) {
            stats = &vcpu->stats[vcpu->exit];
            account(&stats->vmm, &stats->vmm_ns, entered - vcpu->left_ns);
        }
    }
    error = ioctl(vcpu->fd, KVM_RUN, 0) ? errno : 0;
    if (clocked)
        guest_ns = (vcpu->left_ns = pv_now()) - entered;
    else
        vcpu->left_ns = 0;

    vcpu->exit_reason = run->exit_reason;
    stop = !error ? dispatch(vcpu) : error == EINTR ? interrupted(vcpu) : failed(vcpu, error);
    stats = &vcpu->stats[vcpu->exit];
    stats->count++;
    if (timed)
        account(&stats->guest, &stats->guest_ns, guest_ns);
    if (vcpu->ring.exits && vcpu->exit <= PV_EXIT_MMIO_UNCLAIMED)
        pv_record(vcpu, vcpu->left_ns, PV_REC_EXIT, (uint8_t)vcpu->exit, vcpu->size | vcpu->is_write << 31, vcpu->gpa,
                  guest_ns);
    else if (vcpu->ring.exits)
        pv_record(vcpu, vcpu->left_ns, PV_REC_EXIT, (uint8_t)vcpu->exit, 0, 0, guest_ns);
    return stop;
}

static uint32_t resume(struct pv_vcpu *vcpu)
{
    enum pv_pending pending = vcpu->pending;

    vcpu->pending = PENDING_NONE;
    return pending == PENDING_MMIO ? pv_mmio(vcpu, true) : pv_share_resume(vcpu, pending);
}

uint32_t pv_run(struct pv_vcpu *vcpu)
{
    static __thread int32_t self;
    uint32_t stop;

    if (!self) {
        self = (int32_t)syscall(SYS_gettid);
        pv_unblock_signals();
    }
    store(&vcpu->tid, self);
    fence(); /* pairs with the one in pv_kick */
    do {
        if (load(&vcpu->kick))
            stop = PV_STOP_KICK;
        else
            stop = vcpu->pending == PENDING_NONE ? enter(vcpu) : resume(vcpu);
    } while (stop == PV_STOP_NONE);
    store(&vcpu->tid, 0);
    return stop;
}

int pv_settle(struct pv_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    int error;

    if (vcpu->pending != PENDING_NONE)
        return 0;
    store(&run->immediate_exit, 1);
    fence();
    error = ioctl(vcpu->fd, KVM_RUN, 0) ? errno : 0;
    /* The loop sees a kick from here on before the next KVM_RUN. */
    store(&run->immediate_exit, 0);
    fence();
    return error == EINTR ? 0 : error;
}
