/* SPDX-License-Identifier: Apache-2.0 */
/* Doorbells, inlined into the path of a guest's store, to save every kick a call. */
#ifndef PYVMM_DOORBELL_H
#define PYVMM_DOORBELL_H

#include "loop/loop.h"

/* A store, by vcpu->offset and value. */
static inline void pv_doorbell_ring(const struct pv_vcpu *vcpu, struct pv_doorbell *bell)
{
    for (uint32_t i = 0; i < bell->count; i++) {
        struct pv_doorbell_slot *slot = &bell->slots[i];
        if (slot->offset == vcpu->offset && (slot->match_any || slot->value == vcpu->value)) {
            /* A skipped ring happens before the consumer's take, and so before its look for work. */
            if (!slot->coalesce || !__atomic_exchange_n(&slot->rung, 1, __ATOMIC_ACQ_REL))
                pv_signal(slot->fd);
            return;
        }
    }
    add(&bell->missed, 1);
}

#endif
