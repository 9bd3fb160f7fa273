// SPDX-License-Identifier: Apache-2.0
/*
 * Takes orders through the mailbox, on any vCPU, until one of them powers it off. Orders and their arguments are in
 * abi.h; pyvmm/guest/puppet.py is the other end. An order that traps is answered with DONE = 1 and the trap registers.
 */
#include "../lib/lib.h"

#define ARGS 7

/* An order and its answer, on its vCPU's stack. */
struct order {
    u64 op, arg[ARGS], result[ARGS], status;
};

static u64 load(u64 gpa, u64 size)
{
    switch (size) {
    case 1: return mmio_read8(gpa);
    case 2: return mmio_read16(gpa);
    case 4: return mmio_read32(gpa);
    default: return mmio_read64(gpa);
    }
}

static void store(u64 gpa, u64 size, u64 value)
{
    switch (size) {
    case 1: mmio_write8(gpa, (u8)value); break;
    case 2: mmio_write16(gpa, (uint16_t)value); break;
    case 4: mmio_write32(gpa, (u32)value); break;
    default: mmio_write64(gpa, value);
    }
    barrier();
}

static void convert(struct order *o, s64 (*one)(u64, u64))
{
    s64 status = 0;
    u64 start = ticks(), done = 0;
    while (done < o->arg[1] && !(status = one(o->arg[0] + done * board.page, o->arg[2])))
        done++;
    o->result[0] = (u64)status;
    o->result[1] = done;
    o->result[2] = ticks() - start;
}

static void order_touch(struct order *o)
{
    struct touch t = {
        .gpa = o->arg[0], .pages = o->arg[1], .stride = o->arg[2], .access = o->arg[3], .seed = o->arg[4],
        .each = (struct touched *)o->arg[5],
    };
    touch(&t);
    o->result[0] = t.done;
    o->result[1] = t.total;
    o->result[2] = t.max;
}

static void hammer(struct order *o)
{
    u64 gpa = o->arg[0], end = gpa + o->arg[1], access = o->arg[3];
    for (u64 round = 0; round < o->arg[2]; round++) {
        for (u64 at = gpa; at < end; at += 8) {
            if (access == ACCESS_READ)
                mmio_read64(at);
            else if (access == ACCESS_WRITE)
                mmio_write64(at, round);
            else
                ((void (*)(void))at)();
        }
        o->result[0] = round + 1;
    }
}

static u64 accesses(u64 gpa, u64 size, u64 count, s64 value)
{
    u64 start = ticks();
    for (u64 i = 0; i < count; i++) {
        if (value == -1)
            load(gpa, size);
        else
            store(gpa, size, (u64)value);
    }
    return ticks() - start;
}

static s64 series_one(u64 what, u64 gpa, u64 value)
{
    switch (what) {
    case SERIES_LOAD: mmio_read64(gpa); barrier(); return 0;
    case SERIES_STORE: mmio_write64(gpa, value); barrier(); return 0;
    case SERIES_HVC: hvc1(value, 0); return 0;
    case SERIES_SHARE: return share(gpa, SHARE_HVC);
    case SERIES_UNSHARE: return unshare(gpa, SHARE_HVC);
    default: return 0;
    }
}

static void series(struct order *o)
{
    u32 *each = (u32 *)o->arg[5];
    for (u64 i = 0; i < o->arg[2] && each; i++)
        each[i] = 0; /* faults of this array come before the measurement */
    for (u64 i = 0; i < o->arg[2] && !o->result[0]; i++) {
        u64 start = ticks(), spent;
        o->result[0] = (u64)series_one(o->arg[0], o->arg[1] + i * o->arg[3], o->arg[4]);
        spent = ticks() - start;
        if (each)
            each[i] = spent > UINT32_MAX ? UINT32_MAX : (u32)spent;
        o->result[1] += !o->result[0];
        o->result[2] += spent;
    }
}

static void increment(u64 gpa)
{
    u64 value;
    u32 failed;
    __asm__ volatile("1: ldxr %0, [%2]\nadd %0, %0, #1\nstxr %w1, %0, [%2]\ncbnz %w1, 1b"
                     : "=&r"(value), "=&r"(failed) : "r"(gpa) : "memory");
}

static void count(struct order *o)
{
    u64 stop = o->arg[2];
    while (o->result[0] < o->arg[1] && !(stop && mmio_read64(stop))) {
        increment(o->arg[0]);
        o->result[0]++;
    }
    barrier();
}

static void hvc_order(struct order *o)
{
    u64 regs[8] = {0}, start;
    for (int i = 0; i < ARGS; i++)
        regs[i] = o->arg[i];
    start = ticks();
    hvc(regs);
    o->result[4] = ticks() - start;
    for (int i = 0; i < 4; i++)
        o->result[i] = regs[i];
}

static void obey(void *order)
{
    struct order *o = order;
    u64 *arg = o->arg, *result = o->result, start;

    switch (o->op) {
    case OP_PING:
        result[0] = SYSREG(mpidr_el1);
        result[1] = SYSREG(CurrentEL);
        result[2] = SYSREG(sctlr_el1);
        result[3] = SYSREG(cntfrq_el0);
        result[4] = SYSREG(ttbr0_el1);
        break;
    case OP_READ:
        start = ticks();
        result[0] = load(arg[0], arg[1]);
        barrier();
        result[1] = ticks() - start;
        break;
    case OP_WRITE:
        start = ticks();
        store(arg[0], arg[1], arg[2]);
        result[0] = ticks() - start;
        break;
    case OP_TOUCH:
        order_touch(o);
        break;
    case OP_EXECUTE:
        start = ticks();
        result[0] = ((u64(*)(u64))arg[0])(arg[1]);
        result[1] = ticks() - start;
        break;
    case OP_SHARE:
        convert(o, share);
        break;
    case OP_UNSHARE:
        convert(o, unshare);
        break;
    case OP_HVC:
        hvc_order(o);
        break;
    case OP_FLUSH:
        cache_flush(arg[0], arg[1]);
        break;
    case OP_CPU_ON:
        result[0] = (u64)cpu_on(arg[0]);
        break;
    case OP_FILL:
        for (u64 at = arg[0]; at < arg[0] + arg[1]; at += 8)
            mmio_write64(at, arg[2]);
        barrier();
        break;
    case OP_SUM:
        for (u64 at = arg[0]; at < arg[0] + arg[1]; at += 8)
            result[0] += mmio_read64(at);
        break;
    case OP_HAMMER:
        hammer(o);
        break;
    case OP_OFF:
        leave(PSCI_SYSTEM_OFF);
    case OP_RESET:
        leave(PSCI_SYSTEM_RESET);
    case OP_CPU_OFF:
        leave(PSCI_CPU_OFF);
    case OP_MMIO:
        result[0] = accesses(arg[0], arg[1], arg[2], (s64)arg[3]);
        break;
    case OP_WORDS:
        for (u64 i = 0; i < arg[1] && i < ARGS; i++)
            result[i] = mmio_read64(arg[0] + 8 * i);
        break;
    case OP_COUNT:
        count(o);
        break;
    case OP_SERIES:
        series(o);
        break;
    default:
        o->status = STATUS_UNKNOWN;
    }
}

void secondary(void)
{
    u64 box = mailbox();
    struct order o;

    for (;;) {
        /* Each register access is an exit: access only those with a value. */
        u64 order = mmio_read64(box + MAILBOX_OP);
        memset(&o, 0, sizeof o);
        o.op = (u32)order;
        for (u64 i = 0; i < ARGS && i < order >> MAILBOX_ARGS_SHIFT; i++)
            o.arg[i] = mmio_read64(box + MAILBOX_ARG(i));
        if (guarded(obey, &o))
            o.status = STATUS_TRAPPED;
        for (u64 i = 0; i < ARGS; i++) {
            if (o.result[i])
                mmio_write64(box + MAILBOX_RESULT(i), o.result[i]);
        }
        mmio_write64(box + MAILBOX_DONE, o.status);
    }
}

int main(void)
{
    if (!board.mailbox) {
        print("puppet: this machine has no mailbox\n");
        return 1;
    }
    secondary();
    return 0;
}
