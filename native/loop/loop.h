/* SPDX-License-Identifier: Apache-2.0 */
/* Declarations shared by the files of the run loop. Python sees only cdef.h. */
#ifndef PYVMM_LOOP_H
#define PYVMM_LOOP_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

#include "loop/cdef.h"

/* Missing in the oldest supported headers (Linux 6.1). */
#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif
/* struct kvm_run's memory_fault, laid over its union. */
struct pv_memory_fault { uint64_t flags, gpa, size; };

/* Two pages: the host's, and the one of payloads, in which they have device registers. */
#define PV_HOST_PAGE (UINT64_C(1) << pv_page_shift)
#define PV_GUEST_PAGE 4096u
#define PV_LARGEST_PAGE 65536u

/* Or-ed into a ledger entry while PV_EMULATED unshares a page: from leaving PV_PAGE_SHARED until its view is closed. No
   other vCPU may share it in between. */
#define PV_PAGE_MOVING 0x40

/* SMCCC 1.5, section 7.1; EL2's answers as well (arch/arm64/kvm/hyp/nvhe/pkvm.c). */
enum { SMCCC_SUCCESS = 0, SMCCC_NOT_SUPPORTED = -1, SMCCC_INVALID_PARAMETER = -3 };

/* Values of pv_vcpu.pending: work to finish on re-entry, before the guest runs. */
enum pv_pending {
    PENDING_NONE,
    PENDING_MMIO,      /* carry out the access in kvm_run, which had no room or no order */
    PENDING_TOLD,      /* subscribers have released a moving page: close it */
    PENDING_CONVERTED  /* Python converted a page: share_status is the outcome */
};

#define load(p) __atomic_load_n(p, __ATOMIC_RELAXED)
#define load_acquire(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define store(p, v) __atomic_store_n(p, v, __ATOMIC_RELAXED)
#define store_release(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)
#define add(p, v) __atomic_fetch_add(p, v, __ATOMIC_RELAXED)
#define fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)

/* Held for a few instructions, or one system call on a page. Waiting yields the CPU to a preempted holder. */
void pv_lock(uint32_t *lock);
static inline void pv_unlock(uint32_t *lock) { store_release(lock, 0); }

/* CLOCK_MONOTONIC, the clock of all records. Inlined here because both run.c and share.h need it. */
static inline uint64_t pv_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
/* guard.c: for the calling thread. A vCPU calls it before it enters the guest. */
void pv_unblock_signals(void);

/* mmio.c: both answer enum pv_stop; again: the access was counted when it stopped. */
uint32_t pv_mmio(struct pv_vcpu *vcpu, bool again);
/* transport.c: enum pv_stop, with vcpu->offset, size, is_write, value. Sets vcpu->exit if it differs from the kind's: a
   kick is a doorbell, and an access that Python answers is cold. */
uint32_t pv_virtio_access(struct pv_virtio_mmio *transport, struct pv_vcpu *vcpu);
/* pl011.c, with vcpu->offset, size, is_write, value. False: no room to transmit, nothing happened. */
bool pv_pl011_access(struct pv_pl011 *uart, struct pv_vcpu *vcpu);
/* map.c: a copy of the region that holds gpa. Between pv_map_enter() and pv_map_leave() its ledger stays alive even if
   its slot goes, because pv_publish_map() waits. So do nothing in between that may wait for Python, such as a page
   fault. */
bool pv_region_at(const struct pv_vm *vm, uint64_t gpa, struct pv_region *found);
static inline uint32_t pv_map_enter(struct pv_vm *vm)
{
    uint32_t phase = load(&vm->phase);

    __atomic_fetch_add(&vm->readers[phase], 1, __ATOMIC_SEQ_CST);
    return phase;
}
static inline void pv_map_leave(struct pv_vm *vm, uint32_t phase)
{
    __atomic_fetch_sub(&vm->readers[phase], 1, __ATOMIC_RELEASE);
}
/* hypercall.c: both answer enum pv_stop. The second finishes the first's pending work. */
uint32_t pv_hypercall(struct pv_vcpu *vcpu);
uint32_t pv_share_resume(struct pv_vcpu *vcpu, enum pv_pending pending);
/* stats.c */
void pv_record(struct pv_vcpu *vcpu, uint64_t ns, enum pv_record_kind kind, uint8_t code, uint32_t size, uint64_t addr,
               uint64_t value);
/* Adds 1 to an eventfd. A full one is already readable. */
void pv_signal(int fd);
bool pv_fifo_put(struct pv_fifo *fifo, uint8_t byte);
static inline uint32_t pv_fifo_used(const struct pv_fifo *fifo) { return load(&fifo->head) - load(&fifo->tail); }

#endif
