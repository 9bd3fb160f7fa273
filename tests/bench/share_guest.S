/* SPDX-License-Identifier: Apache-2.0 */
// Shares one page and takes it back, x20 times, and stores the ticks of the whole to the bench device's registers.
// Flat binary, entered with the MMU off. It uses registers only, so that only the hypercalls cost anything.
#include "../../firmware/lib/abi.h"
        .globl  _start
_start: ldr     x20, =ROUNDS
        ldr     x21, =0x80200000                // the page
        ldr     x22, =0x09300000                // pyvmm,bench: register file
        ldr     x23, =HVC_SHARE
        ldr     x24, =HVC_UNSHARE
        mov     x19, #0                         // calls that were refused
        isb
        mrs     x25, cntvct_el0
1:      mov     x0, x23
        mov     x1, x21
        mov     x2, #0
        mov     x3, #0
        hvc     #0
        orr     x19, x19, x0
        mov     x0, x24
        mov     x1, x21
        mov     x2, #0
        mov     x3, #0
        hvc     #0
        orr     x19, x19, x0
        subs    x20, x20, #1
        b.ne    1b
        isb
        mrs     x26, cntvct_el0
        sub     x26, x26, x25
        str     x19, [x22]
        add     x22, x22, #8
        str     x26, [x22]
        ldr     x0, =0x84000008                 // PSCI SYSTEM_OFF
        hvc     #0
2:      wfi
        b       2b
        .ltorg
