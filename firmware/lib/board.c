/* What the machine is: the device tree read once, free memory, this vCPU's mailbox. Owns `board`. */
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
    u32 compatible_size, reg_size, address_cells, size_cells;
};

static int is_compatible(const struct node *node, const char *with)
{
    for (u32 at = 0; at < node->compatible_size; at++) {
        if (same(node->compatible + at, with))
            return 1;
        while (node->compatible[at])
            at++;
    }
    return 0;
}

/* A node is complete: take from it what is ours. */
static void take(const struct node *node, const struct node *parent)
{
    if (!node->reg || node->reg_size < 4 * (parent->address_cells + parent->size_cells))
        return;
    u64 base = cells(node->reg, parent->address_cells);
    if (node->type && same(node->type, "memory") && !board.memory_size) {
        board.memory = base;
        board.memory_size = cells(node->reg + 4 * parent->address_cells, parent->size_cells);
    } else if (node->type && same(node->type, "cpu") && board.cpu_count < MAX_CPUS) {
        board.mpidr[board.cpu_count++] = base;
    } else if (is_compatible(node, "arm,pl011")) {
        board.uart = base;
    } else if (is_compatible(node, "pyvmm,mailbox")) {
        board.mailbox = base;
    } else if (is_compatible(node, "pyvmm,share-doorbell")) {
        board.bell = base;
    } else if (is_compatible(node, "pyvmm,echo")) {
        board.echo = base;
    } else if (is_compatible(node, "pyvmm,bench")) {
        board.bench = base;
    }
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
            nodes[depth] = (struct node){.address_cells = 2, .size_cells = 1};
        } else if (token == FDT_END && depth) {
            take(&nodes[depth], &nodes[depth - 1]);
            depth--;
        } else if (token == FDT_PROPERTY) {
            u32 size = be32(at);
            const char *name = strings + be32(at + 4);
            const u8 *value = at + 8;
            struct node *node = &nodes[depth];
            at = value + ((size + 3) & ~3u);
            if (same(name, "reg")) {
                node->reg = value;
                node->reg_size = size;
            } else if (same(name, "compatible")) {
                node->compatible = (const char *)value;
                node->compatible_size = size;
            } else if (same(name, "device_type")) {
                node->type = (const char *)value;
            } else if (same(name, "#address-cells")) {
                node->address_cells = be32(value);
            } else if (same(name, "#size-cells")) {
                node->size_cells = be32(value);
            } else if (same(name, "bootargs")) {
                board.bootargs = (const char *)value;
            }
        } else if (token != FDT_NOP) {
            return;
        }
    }
}

u64 page_alloc(u64 pages)
{
    static u32 guard;
    static u64 next;
    u64 at, bytes = pages * PAGE;

    lock(&guard);
    if (!next)
        next = (u64)image_end;
    at = next;
    if (at < board.fdt + board.fdt_size && board.fdt < at + bytes)
        at = (board.fdt + board.fdt_size + PAGE - 1) & ~(PAGE - 1ul);
    if (pages > board.memory_size / PAGE || at + bytes > board.memory + board.memory_size)
        at = 0;
    else
        next = at + bytes;
    unlock(&guard);
    return at;
}

u64 mailbox(void)
{
    return board.mailbox ? board.mailbox + PAGE * this_cpu()->number : 0;
}

void note(u64 index, u64 value)
{
    if (mailbox())
        mmio_write64(mailbox() + MAILBOX_NOTE(index), value);
}

/* What a payload of one vCPU need not say. */
__attribute__((weak)) void secondary(void)
{
}

/* Called by start.S. */
void start_primary_c(const void *fdt);
void start_secondary_c(void);

static void number_cpus(void)
{
    for (u64 n = 0; n < MAX_CPUS; n++)
        cpus[n].number = n;
}

void start_primary_c(const void *fdt)
{
    number_cpus();
    board_read(fdt);
    features_read();
    int status = main();
    note(3, (u64)(s64)status);
    system_off();
}

void start_secondary_c(void)
{
    secondary();
    cpu_off();
}
