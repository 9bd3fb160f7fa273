/* SPDX-License-Identifier: Apache-2.0 */
/* What becomes of a page's memory when the page changes hands. */
#ifndef PYVMM_CONVERT_H
#define PYVMM_CONVERT_H

#include "loop/loop.h"

/* Gives the page at gpa back to the host, so that the next to touch it finds zeros. 0, or not where there is none or
   the guest keeps it. */
int pv_punch(struct pv_vm *vm, uint64_t gpa);
/* Opens the view of a page that the guest shares, or closes that of one it takes back, and does with the contents as
   pv_vm.conversion says. 0, or an SMCCC error with everything as it was. */
int32_t pv_convert_page(const struct pv_vm *vm, const struct pv_region *region, uint64_t offset, bool share);

#endif
