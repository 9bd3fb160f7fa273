/* SPDX-License-Identifier: Apache-2.0 */
/* The effect of a conversion on a page's memory. */
#ifndef PYVMM_CONVERT_H
#define PYVMM_CONVERT_H

#include "loop/loop.h"

/* Returns the page at gpa to the host. The next access finds zeros. Returns 0, or not 0 without a page, or if the guest
   keeps it. */
int pv_punch(struct pv_vm *vm, uint64_t gpa);
/* Opens the view of a shared page, or closes that of an unshared one, and applies pv_vm.conversion to the contents.
   Returns 0, or an SMCCC error with everything unchanged. */
int32_t pv_convert_page(const struct pv_vm *vm, const struct pv_region *region, uint64_t offset, bool share);

#endif
