// SPDX-License-Identifier: Apache-2.0
/* Operations on a page's memory: punch it out of its backing, and convert it under the emulated protection. */
#include "loop/convert.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/mman.h>

#include "loop/ledger.h"

static int punch(const struct pv_region *region, uint64_t offset)
{
    if (region->fd < 0)
        return madvise(region->view + offset, PV_HOST_PAGE, MADV_DONTNEED);
    return fallocate(region->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(region->fd_offset + offset),
                     PV_HOST_PAGE);
}

int pv_punch(struct pv_vm *vm, uint64_t gpa)
{
    uint32_t phase = pv_map_enter(vm);
    struct pv_region region;
    int result = -1;

    /* A protected guest keeps its donated page: host and guest would see different pages from then on. */
    if (vm->protection != PV_PKVM && pv_region_at(vm, gpa, &region) &&
        !punch(&region, (gpa - region.gpa) & -PV_HOST_PAGE)) {
        uint8_t *entry = pv_ledger_entry(&region, gpa), old = load(entry);
        while (pv_page_claimable(old) && !pv_ledger_replace(vm, entry, &old, PV_PAGE_HOLE))
            ;
        result = 0;
    }
    pv_map_leave(vm, phase);
    return result;
}

static int drop(const struct pv_vm *vm, const struct pv_region *region, uint64_t offset)
{
    switch (vm->conversion) {
    case PV_CONVERT_ZERO:
        return pv_fill(region->view + offset, 0, PV_HOST_PAGE) == PV_HOST_PAGE ? 0 : -1;
    case PV_CONVERT_PUNCH:
        return punch(region, offset);
    default:
        return 0;
    }
}

/* The view first: only this step can fail (vm.max_map_count), and it can be undone. If the VMM zeroes a page that
   becomes private, the view stays writable until then. It is already a separate mapping, so closing it cannot fail. */
int32_t pv_convert_page(const struct pv_vm *vm, const struct pv_region *region, uint64_t offset, bool share)
{
    uint8_t *page = region->view + offset;
    int access = share ? PROT_READ | PROT_WRITE : vm->conversion == PV_CONVERT_ZERO ? PROT_WRITE : PROT_NONE;

    if (!region->view || mprotect(page, PV_HOST_PAGE, access))
        return SMCCC_NOT_SUPPORTED;
    if (drop(vm, region, offset)) {
        mprotect(page, PV_HOST_PAGE, share ? PROT_NONE : PROT_READ | PROT_WRITE);
        return SMCCC_NOT_SUPPORTED;
    }
    if (!share && access != PROT_NONE)
        mprotect(page, PV_HOST_PAGE, PROT_NONE);
    return SMCCC_SUCCESS;
}
