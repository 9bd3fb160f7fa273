// SPDX-License-Identifier: Apache-2.0
/* Shares and unshares: a guest's claim, the notification of Python, and the share doorbell. */
#include "loop/share.h"

void pv_subscribe(struct pv_vm *vm, uint32_t count)
{
    store(&vm->subscribers, count);
    fence(); /* pairs with the one in pv_listening(): either we see the page go or it sees us */
}

/* ---- the share doorbell ------------------------------------------------------------------------------------ */

enum { BELL_SHARE = 1, BELL_UNSHARE = 2 };

/* In PV_EMULATED the hypercall moves pages and notifies subscribers. A ring must only agree with it. */
static uint32_t bell(struct pv_vcpu *vcpu, uint64_t gpa, uint64_t op, bool readable)
{
    struct pv_vm *vm = vcpu->vm;
    bool share = op == BELL_SHARE;
    struct pv_region region;
    uint8_t *entry = pv_share_claim(vcpu, gpa, share, PV_SOURCE_DOORBELL, &region);
    int32_t status = SMCCC_SUCCESS;

    if (vcpu->size != 8 || vcpu->offset != 0 || (!share && op != BELL_UNSHARE) || !entry ||
        !pv_page_claimable(load(entry)))
        status = SMCCC_INVALID_PARAMETER;
    else if (vm->protection == PV_EMULATED)
        status = pv_page_state(load(entry)) == PV_PAGE_SHARED ? SMCCC_SUCCESS : SMCCC_NOT_SUPPORTED;
    else if (vm->protection == PV_PKVM && share && !readable)
        status = SMCCC_NOT_SUPPORTED;

    if (status) {
        pv_share_record(vcpu, status);
        return PV_STOP_NONE;
    }
    vcpu->share_status = status;
    return vm->protection == PV_EMULATED ? PV_STOP_NONE : pv_share_announce(vcpu, entry, share);
}

uint32_t pv_share_bell(struct pv_vcpu *vcpu, uint64_t value)
{
    struct pv_vm *vm = vcpu->vm;
    uint64_t op = value % PV_GUEST_PAGE, gpa = value - op;
    bool readable = vm->protection == PV_PKVM && op == BELL_SHARE && pv_probe(vm, gpa) == 1;
    uint32_t phase = pv_map_enter(vm), stop = bell(vcpu, gpa, op, readable);

    pv_map_leave(vm, phase);
    return stop;
}
