// SPDX-License-Identifier: Apache-2.0
/* The consumer's side of doorbells. */
#include "loop/doorbell.h"

void pv_doorbell_take(struct pv_doorbell_slot *slot)
{
    __atomic_exchange_n(&slot->rung, 0, __ATOMIC_ACQ_REL);
}
