/* SPDX-License-Identifier: Apache-2.0 */
/* The common part of all ways to share a page: the claim, its record, and the notification. */
#ifndef PYVMM_SHARE_H
#define PYVMM_SHARE_H

#include "loop/ledger.h"

/* Whether Python subscribes to shares. Called after the ledger has changed. */
static inline bool pv_listening(const struct pv_vm *vm)
{
    fence(); /* pairs with the one in pv_subscribe() */
    return load(&vm->subscribers) != 0;
}

/* Records the guest's claim to a page, still unverified. Returns its ledger entry, or NULL without one. The caller
   checks pv_page_claimable(). */
static inline uint8_t *pv_share_claim(struct pv_vcpu *vcpu, uint64_t gpa, bool share, enum pv_source source,
                                      struct pv_region *region)
{
    vcpu->share_gpa = gpa;
    vcpu->share_op = share;
    vcpu->share_source = source;
    if (!vcpu->left_ns) /* not timed: subscribers still need the time */
        vcpu->left_ns = pv_now();
    return !(gpa & (PV_HOST_PAGE - 1)) && pv_region_at(vcpu->vm, gpa, region) ? pv_ledger_entry(region, gpa) : NULL;
}

/* Counts and traces the outcome of the claim: 0, or an SMCCC error. */
static inline void pv_share_record(struct pv_vcpu *vcpu, int32_t status)
{
    struct pv_vm *vm = vcpu->vm;

    vcpu->share_status = status;
    if (status)
        add(&vm->refused, 1);
    else
        add(vcpu->share_op ? &vm->shares : &vm->unshares, 1);
    pv_record(vcpu, pv_now(), vcpu->share_op ? PV_REC_SHARE : PV_REC_UNSHARE, (uint8_t)vcpu->share_source,
              PV_HOST_PAGE, vcpu->share_gpa, (uint64_t)(int64_t)status);
}

/* Records the change. Returns enum pv_stop: whether Python must notify subscribers before the guest continues. */
static inline uint32_t pv_share_announce(struct pv_vcpu *vcpu, uint8_t *entry, bool share)
{
    if (!pv_ledger_move(vcpu->vm, entry, share))
        return PV_STOP_NONE;
    pv_share_record(vcpu, SMCCC_SUCCESS);
    return pv_listening(vcpu->vm) ? PV_STOP_SHARE : PV_STOP_NONE;
}

/* A ring of the share doorbell with this value: enum pv_stop. */
uint32_t pv_share_bell(struct pv_vcpu *vcpu, uint64_t value);

#endif
