// SPDX-License-Identifier: Apache-2.0
/* The machine: the device tree, read once, free memory, this vCPU's mailbox. Owns `board`. */
#include "lib.h"

#define FDT_BEGIN 1
#define FDT_END 2
#define FDT_PROPERTY 3
#define FDT_NOP 4
#define DEPTH 8

struct board board;
struct cpu cpus[MAX_CPUS];

extern u8 image_head[], image_end[];

static u32 be32(const void *at)
{
    const u8 *b = at;
    return (u32)b[0] << 24 | (u32)b[1] << 16 | (u32)b[2] << 8 | b[3];
}
static u64 cells(const u8 *at, u32 count)
{
    return count == 2 ? (u64)be32(at) << 32 | be32(at + 4) : be32(at);
}

struct node {
    const char *type, *compatible;
    const u8 *reg;
    u32 reg_size, address_cells, size_cells;
};

/* A node is complete: take its known properties. Of a compatible list, the first and most specific string counts. */
static void take(const struct node *node, const struct node *parent)
{
    if (!node->reg || node->reg_size < 4 * (parent->address_cells + parent->size_cells))
        return;
    u64 base = cells(node->reg, parent->address_cells);
    if (same(node->type, "memory") && !board.memory_size) {
        board.memory = base;
        board.memory_size = cells(node->reg + 4 * parent->address_cells, parent->size_cells);
    } else if (same(node->type, "cpu") && board.cpu_count < MAX_CPUS)
        board.mpidr[board.cpu_count++] = base;
    else if (same(node->compatible, "arm,pl011"))
        board.uart = base;
    else if (same(node->compatible, "pyvmm,mailbox"))
        board.mailbox = base;
    else if (same(node->compatible, "pyvmm,share-doorbell"))
        board.bell = base;
    else if (same(node->compatible, "pyvmm,echo"))
        board.echo = base;
}

static void property(struct node *node, const char *name, const u8 *value, u32 size)
{
    if (same(name, "reg")) {
        node->reg = value;
        node->reg_size = size;
    } else if (same(name, "pyvmm,page-size"))
        board.page = be32(value);
    else if (same(name, "compatible"))
        node->compatible = (const char *)value;
    else if (same(name, "device_type"))
        node->type = (const char *)value;
    else if (same(name, "#address-cells"))
        node->address_cells = be32(value);
    else if (same(name, "#size-cells"))
        node->size_cells = be32(value);
    else if (same(name, "bootargs"))
        board.bootargs = (const char *)value;
}

void board_read(const void *fdt)
{
    const u8 *head = fdt, *at = head + be32(head + 8);
    const char *strings = (const char *)head + be32(head + 12);
    struct node nodes[DEPTH];
    u32 depth = 0; /* nodes[depth - 1] is open; nodes[0] stands for the root's parent */

    board.fdt = (u64)fdt;
    board.fdt_size = be32(head + 4);
    board.bootargs = "";
    board.page = TABLE_PAGE;
    memset(nodes, 0, sizeof nodes);
    for (;;) {
        u32 token = be32(at);
        at += 4;
        if (token == FDT_BEGIN) {
            while (*at++)
                ;
            at = (const u8 *)(((u64)at + 3) & ~3ul);
            if (++depth >= DEPTH)
                return;
            nodes[depth] = (struct node){.type = "", .compatible = "", .address_cells = 2, .size_cells = 1};
        } else if (token == FDT_END && depth) {
            take(&nodes[depth], &nodes[depth - 1]);
            depth--;
        } else if (token == FDT_PROPERTY) {
            property(&nodes[depth], strings + be32(at + 4), at + 8, be32(at));
            at += 8 + ((be32(at) + 3) & ~3u);
        } else if (token != FDT_NOP) {
            return;
        }
    }
}

u64 page_alloc(u64 pages)
{
    static u32 guard;
    static u64 next;
    u64 at, page = board.page, bytes = pages * page;

    lock(&guard);
    if (!next)
        next = ((u64)image_end + page - 1) & -page;
    at = next;
    if (at < board.fdt + board.fdt_size && board.fdt < at + bytes)
        at = (board.fdt + board.fdt_size + page - 1) & -page;
    if (pages > board.memory_size / page || at + bytes > board.memory + board.memory_size)
        at = 0;
    else
        next = at + bytes;
    unlock(&guard);
    return at;
}

u64 mailbox(void)
{
    return board.mailbox ? board.mailbox + TABLE_PAGE * this_cpu()->number : 0;
}

void note(u64 index, u64 value)
{
    if (mailbox())
        mmio_write64(mailbox() + MAILBOX_NOTE(index), value);
}

/* The default for payloads with one vCPU. */
__attribute__((weak)) void secondary(void)
{
}

/* Called by start.S. */
void start_primary_c(const void *fdt);
void start_secondary_c(void);

void start_primary_c(const void *fdt)
{
    for (u64 n = 0; n < MAX_CPUS; n++)
        cpus[n].number = n;
    board_read(fdt);
    features_read();
    int status = main();
    note(NOTE_EXIT_CODE, (u64)(s64)status);
    leave(PSCI_SYSTEM_OFF);
}

void start_secondary_c(void)
{
    struct cpu *cpu = this_cpu();
    cpu->recover = cpu->executing = cpu->trapping = 0; /* it may have gone off in the middle of an order */
    secondary();
    leave(PSCI_CPU_OFF);
}
