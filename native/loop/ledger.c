// SPDX-License-Identifier: Apache-2.0
/* The ledger's functions for Python. */
#include "loop/ledger.h"

int pv_ledger_set(struct pv_vm *vm, uint64_t gpa, uint8_t state)
{
    uint32_t phase = pv_map_enter(vm);
    struct pv_region region;
    int before = -1;

    if ((state & ~PV_PAGE_ASSUMED) < PV_PAGE_STATES && pv_region_at(vm, gpa, &region)) {
        uint8_t *entry = pv_ledger_entry(&region, gpa), old = load(entry);
        while ((pv_page_state(state) == PV_PAGE_ABSENT || !(old & PV_PAGE_MOVING)) &&
               !pv_ledger_replace(vm, entry, &old, state))
            ;
        before = old & ~PV_PAGE_MOVING;
    }
    pv_map_leave(vm, phase);
    return before;
}
