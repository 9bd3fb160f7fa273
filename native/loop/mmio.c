// SPDX-License-Identifier: Apache-2.0
/* MMIO exits: find the range, and carry out the access if the loop handles its kind. */
#include "loop/doorbell.h"
#include "loop/share.h"

#define aligned(address, size) ((uintptr_t)(address) % (size) == 0)

static struct pv_range *find(struct pv_vcpu *vcpu, uint64_t gpa)
{
    struct pv_bus *bus = load_acquire(&vcpu->vm->bus);
    uint32_t low = 0, high = bus ? bus->count : 0;

    /* Cache only an index: the bus may have been replaced. */
    if (vcpu->hit < high && gpa - bus->ranges[vcpu->hit].base < bus->ranges[vcpu->hit].size)
        return &bus->ranges[vcpu->hit];
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        struct pv_range *range = &bus->ranges[middle];
        if (gpa < range->base) {
            high = middle;
        } else if (gpa - range->base < range->size) {
            vcpu->hit = middle;
            return range;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}

void pv_publish_bus(struct pv_vm *vm, struct pv_bus *bus)
{
    store_release(&vm->bus, bus);
}

/* Plain memory: tear-free when aligned. Other vCPUs and Python may access it too. */
static void registers(struct pv_vcpu *vcpu, uint8_t *at)
{
    uint64_t value = vcpu->value;

    if (vcpu->size == 8 && aligned(at, 8)) {
        uint64_t *word = (void *)at;
        if (vcpu->is_write)
            store(word, value);
        else
            vcpu->value = load(word);
    } else if (vcpu->size == 4 && aligned(at, 4)) {
        uint32_t *word = (void *)at;
        if (vcpu->is_write)
            store(word, (uint32_t)value);
        else
            vcpu->value = load(word);
    } else if (vcpu->size == 2 && aligned(at, 2)) {
        uint16_t *word = (void *)at;
        if (vcpu->is_write)
            store(word, (uint16_t)value);
        else
            vcpu->value = load(word);
    } else {
        for (uint32_t i = 0; i < vcpu->size; i++) {
            if (vcpu->is_write)
                store(&at[i], (uint8_t)(value >> (8 * i)));
            else
                value |= (uint64_t)load(&at[i]) << (8 * i);
        }
        vcpu->value = value;
    }
}

/* firmware/lib/abi.h, in 64-bit registers. */
enum {
    BOX_OP = 0, BOX_ARG = 1, BOX_RESULT = 8, BOX_DONE = 15, BOX_TRAP = 16, BOX_TRAP_BELL = 24, BOX_NOTE = 25,
    BOX_END = 29
};
_Static_assert(BOX_RESULT - BOX_OP == PV_MAILBOX_WORDS && BOX_DONE - BOX_RESULT + 1 == PV_MAILBOX_WORDS &&
                   BOX_TRAP_BELL - BOX_TRAP == PV_MAILBOX_WORDS && BOX_END - BOX_NOTE == PV_MAILBOX_NOTES,
               "a mailbox's registers and struct pv_mailbox");

static uint32_t mailbox_load(struct pv_vcpu *vcpu, struct pv_mailbox *box, uint64_t number)
{
    if (number == BOX_OP) {
        uint32_t expected = PV_MAILBOX_ORDER;
        if (!__atomic_compare_exchange_n(&box->state, &expected, PV_MAILBOX_BUSY, false, __ATOMIC_ACQUIRE,
                                         __ATOMIC_RELAXED)) {
            vcpu->pending = PENDING_MMIO;
            return PV_STOP_MAILBOX;
        }
    }
    if (number < BOX_RESULT)
        vcpu->value = load(&box->order[number]);
    return PV_STOP_NONE;
}

static uint32_t mailbox_store(const struct pv_vcpu *vcpu, struct pv_mailbox *box, uint64_t number)
{
    uint64_t value = vcpu->value;

    if (number >= BOX_RESULT && number < BOX_DONE) {
        store(&box->result[number - BOX_RESULT + 1], value);
    } else if (number == BOX_DONE && load(&box->state) == PV_MAILBOX_BUSY) {
        store(&box->result[0], value);
        store_release(&box->state, PV_MAILBOX_DONE);
    } else if (number >= BOX_TRAP && number < BOX_TRAP_BELL) {
        store(&box->trap[number - BOX_TRAP], value);
    } else if (number == BOX_TRAP_BELL) {
        store_release(&box->trapped, 1);
        return PV_STOP_MAILBOX;
    } else if (number >= BOX_NOTE && number < BOX_END) {
        store(&box->note[number - BOX_NOTE], value);
    }
    return PV_STOP_NONE;
}

/* A vCPU can access only its own page. */
static uint32_t mailbox(struct pv_vcpu *vcpu, struct pv_mailbox *boxes)
{
    uint64_t number = vcpu->offset % PV_GUEST_PAGE / 8;

    if (vcpu->offset / PV_GUEST_PAGE != vcpu->index || vcpu->size != 8 || vcpu->offset % 8)
        return PV_STOP_NONE;
    return vcpu->is_write ? mailbox_store(vcpu, &boxes[vcpu->index], number)
                          : mailbox_load(vcpu, &boxes[vcpu->index], number);
}

static uint32_t carry_out(struct pv_vcpu *vcpu, struct pv_range *range)
{
    uint64_t *counter = range->state;

    switch (range->kind) {
    case PV_KIND_REGISTERS:
        registers(vcpu, (uint8_t *)range->state + vcpu->offset);
        return PV_STOP_NONE;
    case PV_KIND_COUNTER:
        if (vcpu->is_write)
            add(counter, vcpu->value);
        else
            vcpu->value = load(counter);
        return PV_STOP_NONE;
    case PV_KIND_DOORBELL:
        if (vcpu->is_write)
            pv_doorbell_ring(vcpu, range->state);
        return PV_STOP_NONE;
    case PV_KIND_PL011:
        if (pv_pl011_access(range->state, vcpu))
            return PV_STOP_NONE;
        vcpu->pending = PENDING_MMIO;
        return PV_STOP_FIFO;
    case PV_KIND_MAILBOX:
        return mailbox(vcpu, range->state);
    case PV_KIND_SHARE:
        if (vcpu->is_write)
            return pv_share_bell(vcpu, vcpu->value);
        vcpu->value = (uint64_t)(int64_t)vcpu->share_status;
        return PV_STOP_NONE;
    case PV_KIND_VIRTIO:
        return pv_virtio_access(range->state, vcpu);
    default:
        return PV_STOP_MMIO;
    }
}

/* The exit class of an access to a range of this kind. Unknown kinds count as cold, as they are handled. */
static enum pv_exit exit_of(uint32_t kind)
{
    return kind < PV_KINDS ? PV_EXIT_MMIO_COLD + kind : PV_EXIT_MMIO_COLD;
}
#define COUNTED_AS_IT_IS(kind) \
    _Static_assert(PV_EXIT_MMIO_##kind == PV_EXIT_MMIO_COLD + PV_KIND_##kind, "the exits are in the kinds' order")
COUNTED_AS_IT_IS(COLD);
COUNTED_AS_IT_IS(REGISTERS);
COUNTED_AS_IT_IS(COUNTER);
COUNTED_AS_IT_IS(DOORBELL);
COUNTED_AS_IT_IS(PL011);
COUNTED_AS_IT_IS(MAILBOX);
COUNTED_AS_IT_IS(SHARE);
COUNTED_AS_IT_IS(VIRTIO);
_Static_assert(PV_EXIT_MMIO_UNCLAIMED == PV_EXIT_MMIO_COLD + PV_KINDS, "no exit of a kind is missing");

static uint64_t low_bytes(const uint8_t *data, uint32_t size)
{
    uint64_t value;

    memcpy(&value, data, sizeof(value));
    return size < sizeof(value) ? value & ((UINT64_C(1) << 8 * size) - 1) : value;
}

uint32_t pv_mmio(struct pv_vcpu *vcpu, bool again)
{
    struct kvm_run *run = vcpu->run;
    uint64_t gpa = run->mmio.phys_addr;
    uint32_t size = run->mmio.len <= sizeof(run->mmio.data) ? run->mmio.len : sizeof(run->mmio.data);
    struct pv_range *range = find(vcpu, gpa);

    vcpu->gpa = vcpu->offset = gpa;
    vcpu->size = size;
    vcpu->is_write = run->mmio.is_write;
    vcpu->value = vcpu->is_write ? low_bytes(run->mmio.data, size) : 0;
    if (range && size > range->size - (gpa - range->base))
        range = NULL;
    vcpu->range = range;
    if (!range) {
        vcpu->exit = PV_EXIT_MMIO_UNCLAIMED;
        return PV_STOP_UNCLAIMED;
    }
    vcpu->offset = gpa - range->base;
    vcpu->exit = exit_of(range->kind);
    if (!again)
        add(vcpu->is_write ? &range->writes : &range->reads, 1);

    uint32_t stop = carry_out(vcpu, range);
    pv_mmio_reply(vcpu, vcpu->value);
    return stop;
}

void pv_mmio_reply(struct pv_vcpu *vcpu, uint64_t value)
{
    struct kvm_run *run = vcpu->run;

    if (!vcpu->is_write)
        memcpy(run->mmio.data, &value, sizeof(value)); /* KVM takes as many bytes as it asked for */
}

/* If KVM finds KVM_EXIT_MMIO on entry, it takes the answer and advances the pc (kvm_handle_mmio_return in
   arch/arm64/kvm/mmio.c). Otherwise registers and pc are still those of the access. */
void pv_mmio_retry(struct pv_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;

    run->exit_reason = KVM_EXIT_UNKNOWN;
}
