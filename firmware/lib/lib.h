/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The library of all payloads. Everything here may be called on any vCPU; print() and page_alloc() lock. No floating
 * point, no libc, no recursion: a stack is STACK_SIZE.
 */
#ifndef PYVMM_LIB_H
#define PYVMM_LIB_H

#include "abi.h"

#define MAX_CPUS 16
#define STACK_SIZE 8192
#define TRAP_STACK_SIZE 1024
#define TABLE_PAGE 4096 /* of the translation table, and of each mailbox */

/* struct cpu, for the assembler */
#define CPU_SHIFT 6
#define CPU_NUMBER 0
#define CPU_RECOVER 8
#define CPU_EXECUTING 16
#define CPU_TRAPPING 24

/* Results of trap(). */
#define TRAP_RETURN 0  /* as if the called code had returned */
#define TRAP_RECOVER 1 /* end guarded()'s function */

#ifndef __ASSEMBLER__
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t s64;

/* One vCPU's own; TPIDR_EL1 points to it. */
struct cpu {
    u64 number;
    u64 recover;   /* guarded()'s stack pointer, or 0 */
    u64 executing; /* an undefined instruction at this address is a return: see touch_one() */
    u64 trapping;
    u64 pad[4];
};
extern struct cpu cpus[MAX_CPUS];
static inline struct cpu *this_cpu(void)
{
    struct cpu *cpu;
    __asm__("mrs %0, tpidr_el1" : "=r"(cpu));
    return cpu;
}

/* The contents of the device tree; 0 for a missing device. */
struct board {
    u64 fdt, fdt_size;
    u64 memory, memory_size;
    u64 uart, mailbox, bell, echo;
    const char *bootargs; /* never NULL */
    u64 cpu_count;
    u64 mpidr[MAX_CPUS];
    u64 features; /* of the hypervisor: bits of HVC_FEATURES, 0 without features */
    u64 page;     /* bytes the host shares, faults in and counts at a time: its page */
};
extern struct board board;
void board_read(const void *fdt); /* board.c */

/* The payload. main's result is left in NOTE(3), then the machine is powered off. */
int main(void);
void secondary(void); /* a vCPU started by cpu_on(); powers itself off on return */

/* MMIO: single loads and stores without writeback, the only kind a protected guest may use. */
#define MMIO(bits, type, reg, suffix)                                                                                  \
    static inline type mmio_read##bits(u64 at)                                                                         \
    {                                                                                                                  \
        type value;                                                                                                    \
        __asm__ volatile("ldr" suffix " %" reg "0, [%1]" : "=r"(value) : "r"(at) : "memory");                          \
        return value;                                                                                                  \
    }                                                                                                                  \
    static inline void mmio_write##bits(u64 at, type value)                                                            \
    {                                                                                                                  \
        __asm__ volatile("str" suffix " %" reg "0, [%1]" : : "r"(value), "r"(at) : "memory");                          \
    }
MMIO(8, u8, "w", "b")
MMIO(16, uint16_t, "w", "h")
MMIO(32, u32, "w", "")
MMIO(64, u64, "x", "")

static inline void barrier(void) /* memory writes complete before the following device access */
{
    __asm__ volatile("dsb sy" : : : "memory");
}
static inline u64 ticks(void)
{
    u64 now;
    __asm__ volatile("isb; mrs %0, cntvct_el0" : "=r"(now) : : "memory");
    return now;
}
#define SYSREG(name)                                                                                                   \
    ({                                                                                                                 \
        u64 value_;                                                                                                    \
        __asm__ volatile("mrs %0, " #name : "=r"(value_));                                                             \
        value_;                                                                                                        \
    })

/* Spinlock; needs the MMU on. */
static inline void lock(u32 *word)
{
    u32 seen, failed;
    __asm__ volatile("sevl\n1: wfe\n2: ldaxr %w0, %2\ncbnz %w0, 1b\nstxr %w1, %w3, %2\ncbnz %w1, 2b"
                     : "=&r"(seen), "=&r"(failed), "+Q"(*word) : "r"(1) : "memory");
}
static inline void unlock(u32 *word)
{
    __asm__ volatile("stlr wzr, %0" : "=Q"(*word) : : "memory");
}

/* print.c: the UART; does nothing without a UART. %s %c %lu %ld %lx %%; a line is never mixed with another's. */
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));
void put(char c);
/* key=value in the boot arguments: the value's length (0: empty or no such key), *value its start. */
size_t argument(const char *key, const char **value);
int argument_is(const char *key, const char *value);
u64 argument_number(const char *key, u64 otherwise); /* decimal, or hexadecimal after 0x */

/* hyp.c: hypervisor calls. */
void hvc(u64 regs[8]); /* x0..x7 in, x0..x3 out */
s64 hvc1(u64 function, u64 argument);
void features_read(void);
s64 share(u64 gpa, u64 how);   /* SHARE_*; 0, or an SMCCC error */
s64 unshare(u64 gpa, u64 how);
#define SHARE_BOTH (SHARE_HVC | SHARE_BELL)
s64 cpu_on(u64 number); /* PSCI status */
s64 cpu_state(u64 number); /* AFFINITY_INFO: 0 on, 1 off, 2 on its way */
void leave(u64 how) __attribute__((noreturn)); /* by one of these: */
#define PSCI_CPU_OFF 0x84000002
#define PSCI_SYSTEM_OFF 0x84000008
#define PSCI_SYSTEM_RESET 0x84000009
void park(void) __attribute__((noreturn)); /* start.S: wait for interrupts for ever */

/* board.c: the host's pages of free memory, contiguous, untouched; 0 if they do not fit. */
u64 page_alloc(u64 pages);
/* The page of registers of this vCPU's mailbox, or 0. */
u64 mailbox(void);
void note(u64 index, u64 value);
void cache_flush(u64 gpa, u64 bytes); /* to the point of coherency, instruction caches too */

/* vectors.S */
u64 guarded(void (*function)(void *), void *argument);

/* touch.c */
struct touched {
    u32 ticks, nth; /* nth: how many pages were touched before it */
};
struct touch {
    u64 gpa, pages, stride, access, seed;
    struct touched *each; /* one a page, by page number, or NULL */
    u64 done, total, max;
};
void touch(struct touch *t);

void *memset(void *to, int byte, size_t n);
void *memcpy(void *to, const void *from, size_t n);
int same(const char *a, const char *b);
#endif
#endif
