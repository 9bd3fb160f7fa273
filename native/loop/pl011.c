// SPDX-License-Identifier: Apache-2.0
/* Arm PrimeCell UART (PL011), DDI 0183. The wire is infinitely fast: the transmitter is always empty, and an access
 * waits only when the host's own FIFO is full. Several vCPUs may print, and Python feeds input. The interrupt is a
 * level, changed under the lock so that KVM sees the changes in order. */
#include "loop/loop.h"

enum {
    DR = 0x00, FR = 0x18, ILPR = 0x20, IBRD = 0x24, FBRD = 0x28, LCR_H = 0x2c, CR = 0x30, IFLS = 0x34,
    IMSC = 0x38, RIS = 0x3c, MIS = 0x40, ICR = 0x44, DMACR = 0x48, IDS = 0xfe0,
    DR_BE = 1 << 10,
    FR_RXFE = 1 << 4, FR_RXFF = 1 << 6, FR_TXFE = 1 << 7,
    LCR_H_FEN = 1 << 4,
    INT_RX = 1 << 4, INT_TX = 1 << 5, INT_ALL = 0x7ff
};

/* The receive interrupt is set while there is input. Only reading all input clears it. */
static void update(struct pv_pl011 *uart)
{
    uart->ris = pv_fifo_used(&uart->rx) ? uart->ris | INT_RX : uart->ris & ~(uint32_t)INT_RX;
    struct kvm_irq_level line = {.irq = uart->irq, .level = (uart->ris & uart->imsc) != 0};
    if (line.level == uart->level)
        return;
    uart->level = line.level;
    /* It fails if the VM is gone or has no controller. Then the line has no receiver. */
    if (uart->vm_fd >= 0)
        ioctl(uart->vm_fd, KVM_IRQ_LINE, &line);
}

static uint32_t take(struct pv_pl011 *uart)
{
    uint8_t byte = 0;
    bool broken = uart->broken && uart->rx.tail == uart->break_at;

    pv_fifo_read(&uart->rx, &byte, 1);
    if (!broken)
        return byte;
    uart->broken = 0;
    return DR_BE | byte;
}

static uint32_t flags(const struct pv_pl011 *uart)
{
    uint32_t used = pv_fifo_used(&uart->rx), depth = uart->lcr_h & LCR_H_FEN ? 16 : 1;

    return FR_TXFE | (used ? 0 : FR_RXFE) | (used >= depth ? FR_RXFF : 0);
}

static uint32_t read_register(struct pv_pl011 *uart, uint64_t offset)
{
    static const uint8_t ids[] = {0x11, 0x10, 0x14, 0x00, 0x0d, 0xf0, 0x05, 0xb1};

    switch (offset) {
    case DR: return take(uart);
    case FR: return flags(uart);
    case ILPR: return uart->ilpr;
    case IBRD: return uart->ibrd;
    case FBRD: return uart->fbrd;
    case LCR_H: return uart->lcr_h;
    case CR: return uart->cr;
    case IFLS: return uart->ifls;
    case IMSC: return uart->imsc;
    case RIS: return uart->ris;
    case MIS: return uart->ris & uart->imsc;
    case DMACR: return uart->dmacr;
    default: return offset >= IDS && offset < IDS + 4 * sizeof(ids) ? ids[(offset - IDS) / 4] : 0;
    }
}

static bool write_register(struct pv_pl011 *uart, uint64_t offset, uint32_t value)
{
    switch (offset) {
    case DR:
        if (!pv_fifo_put(&uart->tx, (uint8_t)value))
            return false;
        uart->ris |= INT_TX;
        break;
    case ILPR: uart->ilpr = value & 0xff; break;
    case IBRD: uart->ibrd = value & 0xffff; break;
    case FBRD: uart->fbrd = value & 0x3f; break;
    case LCR_H: uart->lcr_h = value & 0xff; break;
    case CR: uart->cr = value & 0xffff; break;
    case IFLS: uart->ifls = value & 0x3f; break;
    case IMSC: uart->imsc = value & INT_ALL; break;
    case ICR: uart->ris &= ~value; break;
    case DMACR: uart->dmacr = value & 7; break;
    default: break;
    }
    return true;
}

bool pv_pl011_access(struct pv_pl011 *uart, struct pv_vcpu *vcpu)
{
    bool done = true;

    if (!vcpu->is_write)
        vcpu->value = 0;
    if (vcpu->offset % 4 || vcpu->size > 4)
        return true;
    pv_lock(&uart->lock);
    if (vcpu->is_write)
        done = write_register(uart, vcpu->offset, (uint32_t)vcpu->value);
    else
        vcpu->value = read_register(uart, vcpu->offset);
    update(uart);
    pv_unlock(&uart->lock);
    return done;
}

uint32_t pv_pl011_feed(struct pv_pl011 *uart, const uint8_t *from, uint32_t n)
{
    uint32_t taken = 0;

    pv_lock(&uart->lock);
    while (taken < n && pv_fifo_put(&uart->rx, from[taken]))
        taken++;
    update(uart);
    pv_unlock(&uart->lock);
    return taken;
}

uint32_t pv_pl011_break(struct pv_pl011 *uart)
{
    bool done = false;

    pv_lock(&uart->lock);
    if (!uart->broken) {
        uart->break_at = uart->rx.head;
        done = pv_fifo_put(&uart->rx, 0);
        uart->broken = done;
        update(uart);
    }
    pv_unlock(&uart->lock);
    return done;
}
