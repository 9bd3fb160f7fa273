/* SPDX-License-Identifier: Apache-2.0 */
/* The state of each guest page: entries of a region's ledger, and their transitions. Change an entry only between
   pv_map_enter() and pv_map_leave(), because its region may go. */
#ifndef PYVMM_LEDGER_H
#define PYVMM_LEDGER_H

#include "loop/loop.h"

static inline enum pv_page pv_page_state(uint8_t entry)
{
    return entry & (PV_LEDGER_STATES - 1);
}
_Static_assert((int)PV_PAGE_STATES <= (int)PV_LEDGER_STATES, "a state fits into its bits");
_Static_assert(PV_PAGE_MOVING % PV_LEDGER_STATES == 0 && PV_PAGE_ASSUMED % PV_LEDGER_STATES == 0, "and shares none");

/* Whether a guest may claim this page. A page whose slot is being removed cannot change, and a page that is being
   unshared belongs to its vCPU. */
static inline bool pv_page_claimable(uint8_t entry)
{
    return pv_page_state(entry) != PV_PAGE_ABSENT && !(entry & PV_PAGE_MOVING);
}

static inline uint8_t *pv_ledger_entry(const struct pv_region *region, uint64_t gpa)
{
    return &region->ledger[(gpa - region->gpa) >> pv_page_shift];
}

/* Changes an entry from *old to new. If it is not *old, returns false and stores the entry in *old. */
static inline bool pv_ledger_replace(struct pv_vm *vm, uint8_t *entry, uint8_t *old, uint8_t new)
{
    if (!__atomic_compare_exchange_n(entry, old, new, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        return false;
    if (pv_page_state(*old) != pv_page_state(new)) {
        add(&vm->pages[pv_page_state(*old)], -1);
        add(&vm->pages[pv_page_state(new)], 1);
    }
    return true;
}

/* Moves a page to or from SHARED, unless it is already there. If several vCPUs try at once, one succeeds. In
   PV_EMULATED a page that leaves SHARED is moving until pv_ledger_settle(). */
static inline bool pv_ledger_move(struct pv_vm *vm, uint8_t *entry, bool share)
{
    uint8_t old = load(entry), new = PV_PAGE_SHARED;

    if (!share)
        new = vm->protection == PV_NONE ? PV_PAGE_HOST
            : PV_PAGE_PRIVATE | (vm->protection == PV_PKVM ? PV_PAGE_ASSUMED : PV_PAGE_MOVING);
    do {
        if (!pv_page_claimable(old) || (pv_page_state(old) == PV_PAGE_SHARED) == share)
            return false;
    } while (!pv_ledger_replace(vm, entry, &old, new));
    return true;
}

/* Ends a move: the page is private, or could not be closed. Its slot may be gone by now. */
static inline void pv_ledger_settle(struct pv_vm *vm, uint8_t *entry, int32_t status)
{
    uint8_t old = load(entry);

    while (old & PV_PAGE_MOVING && !pv_ledger_replace(vm, entry, &old, status ? PV_PAGE_SHARED : PV_PAGE_PRIVATE))
        ;
}

#endif
