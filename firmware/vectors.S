/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Exception vectors. Each of the 16 ends in trap() (lib/trap.c), which decides how the vCPU continues; it runs on a
 * separate stack, so that a bad stack pointer is reported as well. Nothing of the interrupted code is kept: it either
 * stops here, or goes on at guarded()'s return, or (TRAP_RETURN) as if the code it had called had returned.
 */
#include "lib/lib.h"

    .macro  VECTOR number
    .balign 128
    mov     x0, #\number
    b       trap_entry
    .endm

    .text
    .balign 2048
    .global vectors
vectors:
    .irp    number, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    VECTOR  \number
    .endr

trap_entry:
    mrs     x1, esr_el1
    mrs     x2, far_el1
    mrs     x3, elr_el1
    mrs     x4, spsr_el1
    mov     x5, sp
    mov     x6, x30
    mrs     x7, tpidr_el1
    ldr     x9, [x7, #CPU_TRAPPING]
    cbnz    x9, park                // a trap while reporting one: nothing more can be said
    ldr     x9, [x7, #CPU_NUMBER]
    adrp    x10, trap_stacks
    add     x10, x10, :lo12:trap_stacks
    mov     x11, #TRAP_STACK_SIZE
    add     x9, x9, #1
    madd    x9, x9, x11, x10
    mov     sp, x9
    stp     x5, x30, [sp, #-16]!
    bl      trap
    ldp     x5, x30, [sp], #16
    mrs     x2, tpidr_el1
    cbz     x0, 1f
    ldr     x3, [x2, #CPU_RECOVER]
    mov     sp, x3
    msr     daifclr, #4
    mov     x0, #1
    b       guarded_return
1:  mov     sp, x5                  // TRAP_RETURN
    msr     elr_el1, x30
    eret

// uint64_t guarded(void (*function)(void *), void *argument): 0, or 1 when a trap ended the function.
    .global guarded
guarded:
    stp     x29, x30, [sp, #-96]!
    mov     x29, sp
    stp     x19, x20, [sp, #16]
    stp     x21, x22, [sp, #32]
    stp     x23, x24, [sp, #48]
    stp     x25, x26, [sp, #64]
    stp     x27, x28, [sp, #80]
    mrs     x2, tpidr_el1
    mov     x3, sp
    str     x3, [x2, #CPU_RECOVER]
    mov     x9, x0
    mov     x0, x1
    blr     x9
    mov     x0, #0
guarded_return:
    mrs     x2, tpidr_el1
    str     xzr, [x2, #CPU_RECOVER]
    str     xzr, [x2, #CPU_EXECUTING]
    ldp     x27, x28, [sp, #80]
    ldp     x25, x26, [sp, #64]
    ldp     x23, x24, [sp, #48]
    ldp     x21, x22, [sp, #32]
    ldp     x19, x20, [sp, #16]
    ldp     x29, x30, [sp], #96
    ret
