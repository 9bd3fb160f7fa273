// SPDX-License-Identifier: Apache-2.0
/* Doorbells: stores that wake whoever waits on an eventfd. */
#include "loop/loop.h"

void pv_doorbell_ring(const struct pv_vcpu *vcpu, struct pv_doorbell *bell)
{
    for (uint32_t i = 0; i < bell->count; i++) {
        struct pv_doorbell_slot *slot = &bell->slots[i];
        if (slot->offset == vcpu->offset && (slot->match_any || slot->value == vcpu->value)) {
            /* A ring that is left out happens before the consumer's take, and so before its look for work. */
            if (!slot->coalesce || !__atomic_exchange_n(&slot->rung, 1, __ATOMIC_ACQ_REL))
                pv_signal(slot->fd);
            return;
        }
    }
    add(&bell->missed, 1);
}

void pv_doorbell_take(struct pv_doorbell_slot *slot)
{
    __atomic_exchange_n(&slot->rung, 0, __ATOMIC_ACQ_REL);
}
