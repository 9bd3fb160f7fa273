/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a payload starts. Flat binary, entered at its first byte at EL1 with the MMU off, x0 = device tree; secondary
 * vCPUs enter at start_secondary by PSCI CPU_ON. Both turn the MMU and caches on before any C runs: exclusives need
 * Normal cacheable memory, and KVM hands over an image that is clean to the point of coherency.
 *
 * With the MMU off only the translation table is written and no memory is read but the instructions, so nothing has
 * to be cleaned for a secondary. Position independent: build.py links twice, at two addresses, and compares.
 */
#include "lib/lib.h"

    .section .head, "ax"
    .global image_head
image_head:
    b       start
    .word   0x4d565950              // "PYVM"
    .quad   image_end - image_head  // memory the payload occupies: file, bss, table and stacks

    .text
start:
    mov     x20, x0
    bl      this_cpu_setup

    // Identity map of 512 blocks of 1 GiB: device below the GiB that the image is in (RAM starts there or after),
    // Normal and executable from it on.
    adrp    x1, translation_table
    adr     x2, image_head
    lsr     x2, x2, #30
    mov     x3, #0x0401             // block, AttrIndx 0, AF
    movk    x3, #0x0060, lsl #48    // UXN, PXN
    mov     x4, #0x0705             // block, AttrIndx 1, inner shareable, AF
    movk    x4, #0x0040, lsl #48    // UXN
    mov     x5, #0
1:  cmp     x5, x2
    csel    x6, x3, x4, lo
    orr     x6, x6, x5, lsl #30
    str     x6, [x1, x5, lsl #3]
    add     x5, x5, #1
    cmp     x5, #512
    b.lo    1b
    dsb     sy
    // Stale clean lines may sit over what was just written past the caches.
    mrs     x6, ctr_el0
    ubfx    x6, x6, #16, #4
    mov     x7, #4
    lsl     x6, x7, x6
    add     x7, x1, #TABLE_PAGE
1:  dc      ivac, x1
    add     x1, x1, x6
    cmp     x1, x7
    b.lo    1b
    dsb     sy
    bl      mmu_on

    adrp    x1, bss_start
    add     x1, x1, :lo12:bss_start
    adrp    x2, bss_end
    add     x2, x2, :lo12:bss_end
1:  cmp     x1, x2
    b.hs    2f
    stp     xzr, xzr, [x1], #16
    b       1b
2:  msr     daifclr, #4             // report SErrors, too
    mov     x0, x20
    bl      start_primary_c
    b       park

    .global start_secondary
start_secondary:
    bl      this_cpu_setup
    bl      mmu_on
    msr     daifclr, #4
    bl      start_secondary_c
    b       park

// Vectors, this vCPU's struct and its stack, by MPIDR; a vCPU too many parks.
this_cpu_setup:
    msr     daifset, #0xf
    mov     x29, xzr
    mrs     x1, mpidr_el1
    and     x2, x1, #0xf            // KVM and QEMU put 16 vCPUs in Aff0, the next ones in Aff1
    ubfx    x1, x1, #8, #8
    orr     x1, x2, x1, lsl #4
    cmp     x1, #MAX_CPUS
    b.hs    park
    adrp    x2, cpus
    add     x2, x2, :lo12:cpus
    add     x2, x2, x1, lsl #CPU_SHIFT
    msr     tpidr_el1, x2
    adrp    x2, stacks
    add     x2, x2, :lo12:stacks
    add     x1, x1, #1
    mov     x3, #STACK_SIZE
    madd    x1, x1, x3, x2
    mov     sp, x1
    adrp    x1, vectors
    add     x1, x1, :lo12:vectors
    msr     vbar_el1, x1
    isb
    ret

mmu_on:
    mov     x1, #0xff04             // MAIR: 0 Device-nGnRE, 1 Normal write-back
    msr     mair_el1, x1
    mov     x1, #0x3519             // TCR: T0SZ 25 (39 bits), walks write-back and inner shareable, 4 KiB
    movk    x1, #0x0080, lsl #16    // EPD1
    mrs     x2, id_aa64mmfr0_el1
    and     x2, x2, #0xf            // PARange: IPS takes the same codes up to 48 bits
    cmp     x2, #5
    mov     x3, #5
    csel    x2, x2, x3, lo
    orr     x1, x1, x2, lsl #32
    msr     tcr_el1, x1
    adrp    x1, translation_table
    msr     ttbr0_el1, x1
    isb
    tlbi    vmalle1
    ic      iallu
    dsb     nsh
    isb
    mov     x1, #0x1805             // SCTLR: M, C, I, and the RES1 bits of Armv8.0
    movk    x1, #0x30d0, lsl #16
    msr     sctlr_el1, x1
    isb
    ret

    .global park
park:
    wfi
    b       park
