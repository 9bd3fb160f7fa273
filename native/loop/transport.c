// SPDX-License-Identifier: Apache-2.0
/* The registers of virtio over MMIO (virtio 1.2, 4.2.2): answers every read, and handles writes of selectors,
 * acknowledgements, and kicks that the kernel has not taken. Python handles writes to other registers. Any vCPU may
 * access any register at any time, while Python and the device's threads publish. */
#include "loop/doorbell.h"

enum {
    DEVICE_FEATURES = 0x010, DEVICE_FEATURES_SEL = 0x014, DRIVER_FEATURES_SEL = 0x024, QUEUE_SEL = 0x030,
    QUEUE_SIZE_MAX = 0x034, QUEUE_READY = 0x044, QUEUE_NOTIFY = 0x050, INTERRUPT_STATUS = 0x060, INTERRUPT_ACK = 0x064,
    CONFIG_GENERATION = 0x0fc, CONFIG = 0x100,
    NOTIFY_BYTES = 8 /* QueueNotify, and the reserved word behind it: an access to it reaches no queue */
};
_Static_assert(PV_VIRTIO_REGISTERS * sizeof(uint32_t) == CONFIG, "a word for each register");

/* A selector is read once: another vCPU may store to it between a check and its use. */
static uint32_t features(const struct pv_virtio_mmio *transport)
{
    uint32_t word = load(&transport->device_features_sel);

    return word < PV_VIRTIO_FEATURE_WORDS ? transport->offered[word] : 0;
}

static uint32_t queue_register(const struct pv_virtio_mmio *transport, uint64_t offset)
{
    uint32_t selected = load(&transport->queue_sel);

    if (selected >= transport->bell->count)
        return 0;
    return offset == QUEUE_READY ? load(&transport->queues[selected].ready) : transport->queues[selected].most;
}

static uint32_t read_register(const struct pv_virtio_mmio *transport, uint64_t offset)
{
    switch (offset) {
    case DEVICE_FEATURES: return features(transport);
    case QUEUE_SIZE_MAX:
    case QUEUE_READY: return queue_register(transport, offset);
    case INTERRUPT_STATUS: return __atomic_load_n(&transport->interrupt->status, __ATOMIC_SEQ_CST);
    default: return load(&transport->registers[offset / sizeof(uint32_t)]);
    }
}

/* False if Python must handle it. */
static bool write_register(struct pv_virtio_mmio *transport, uint64_t offset, uint32_t value)
{
    switch (offset) {
    case DEVICE_FEATURES_SEL: store(&transport->device_features_sel, value); return true;
    case DRIVER_FEATURES_SEL: store(&transport->driver_features_sel, value); return true;
    case QUEUE_SEL: store(&transport->queue_sel, value); return true;
    case INTERRUPT_ACK: __atomic_fetch_and(&transport->interrupt->status, ~value, __ATOMIC_SEQ_CST); return true;
    default: return false;
    }
}

/* A single access is never torn. A driver that needs several reads ConfigGeneration before and after them. */
static uint64_t read_config(struct pv_virtio_mmio *transport, uint64_t at, uint32_t size)
{
    uint64_t value = 0;

    pv_lock(&transport->lock);
    memcpy(&value, &transport->config[at], size);
    pv_unlock(&transport->lock);
    return value;
}

void pv_virtio_configure(struct pv_virtio_mmio *transport, const uint8_t *config, uint32_t size, uint32_t generation)
{
    pv_lock(&transport->lock);
    memcpy(transport->config, config, size);
    memset(transport->config + size, 0, sizeof(transport->config) - size);
    store(&transport->registers[CONFIG_GENERATION / sizeof(uint32_t)], generation);
    pv_unlock(&transport->lock);
}

uint32_t pv_virtio_access(struct pv_virtio_mmio *transport, struct pv_vcpu *vcpu)
{
    uint64_t offset = vcpu->offset;

    if (offset >= CONFIG && !vcpu->is_write) {
        vcpu->value = read_config(transport, offset - CONFIG, vcpu->size);
    } else if (offset >= QUEUE_NOTIFY && offset < QUEUE_NOTIFY + NOTIFY_BYTES) {
        vcpu->exit = PV_EXIT_MMIO_DOORBELL;
        if (vcpu->is_write)
            pv_doorbell_ring(vcpu, transport->bell);
    } else if (offset < CONFIG && (vcpu->size != sizeof(uint32_t) || offset % sizeof(uint32_t))) {
        /* 4.2.2.2: registers are accessed whole. Reads 0, writes nothing. */
    } else if (!vcpu->is_write) {
        vcpu->value = read_register(transport, offset);
    } else if (offset >= CONFIG || !write_register(transport, offset, (uint32_t)vcpu->value)) {
        vcpu->exit = PV_EXIT_MMIO_COLD;
        return PV_STOP_MMIO;
    }
    return PV_STOP_NONE;
}
