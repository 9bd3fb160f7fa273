// SPDX-License-Identifier: Apache-2.0
/* The loop's answers to a vCPU: every kind of register at any offset and width, and hypercalls that share pages. */
#include "fuzz.h"

#include "../../firmware/lib/abi.h"

#include <linux/kvm.h>
#include <sys/eventfd.h>

enum { KINDS = 8, STEP = 0x4000, VCPUS = 2, SLOTS = 3, REGISTERS = 24, QUEUES = 2, TRANSPORT = 512 };
#define MMIO UINT64_C(0x09000000)

static struct kvm_run run[VCPUS];
static struct pv_vcpu vcpus[VCPUS];
static struct pv_range ranges[KINDS];
static struct pv_bus bus = {.count = KINDS, .ranges = ranges};
/* Each is as large as its range, so the sanitizer sees an access beyond it. */
static uint8_t registers[REGISTERS], tx[16], rx[16];
static uint64_t counter;
static struct pv_doorbell_slot slots[SLOTS];
static struct pv_doorbell bell = {.count = SLOTS, .slots = slots};
static struct pv_pl011 uart;
static struct pv_mailbox boxes[VCPUS];
static struct pv_interrupt line;
static struct pv_doorbell_slot kicks[QUEUES];
static struct pv_doorbell kick = {.count = QUEUES, .slots = kicks};
static struct pv_virtio_queue queues[QUEUES];
static struct pv_virtio_mmio transport;
static int rung;

void fuzz_begin(void)
{
    guest_begin();
    rung = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    HOLDS(rung >= 0);
}

static void begin(void)
{
    static const struct { uint64_t size; void *state; } made[KINDS] = {
        [PV_KIND_COLD] = {16, NULL}, [PV_KIND_REGISTERS] = {REGISTERS, registers},
        [PV_KIND_COUNTER] = {sizeof(counter), &counter}, [PV_KIND_DOORBELL] = {8, &bell},
        [PV_KIND_PL011] = {0x1000, &uart}, [PV_KIND_MAILBOX] = {VCPUS * PV_GUEST_PAGE, boxes},
        [PV_KIND_SHARE] = {8, NULL}, [PV_KIND_VIRTIO] = {TRANSPORT, &transport},
    };

    guest_reset();
    guest.vm.bus = &bus;
    guest.vm.fd = -1;
    guest.vm.protection = PV_PKVM;
    for (uint32_t kind = 0; kind < KINDS; kind++)
        ranges[kind] = (struct pv_range){
            .base = MMIO + kind * STEP, .size = made[kind].size, .kind = kind, .state = made[kind].state,
        };
    memset(vcpus, 0, sizeof(vcpus));
    memset(run, 0, sizeof(run));
    for (uint32_t i = 0; i < VCPUS; i++)
        vcpus[i] = (struct pv_vcpu){.fd = -1, .index = i, .vm = &guest.vm, .run = &run[i]};
    for (uint32_t i = 0; i < SLOTS; i++)
        slots[i] = (struct pv_doorbell_slot){
            .value = i, .offset = i & 1, .fd = rung, .match_any = i == 2, .coalesce = i == 1,
        };
    uart = (struct pv_pl011){.vm_fd = -1, .tx = {.size = sizeof(tx), .wake_fd = rung, .data = tx},
                             .rx = {.size = sizeof(rx), .wake_fd = -1, .data = rx}};
    memset(boxes, 0, sizeof(boxes));
    line = (struct pv_interrupt){.fd = -1};
    for (uint32_t i = 0; i < QUEUES; i++) {
        kicks[i] = (struct pv_doorbell_slot){.offset = 0x50, .value = i, .fd = rung, .coalesce = 1};
        queues[i] = (struct pv_virtio_queue){.most = 8, .ready = i};
    }
    transport = (struct pv_virtio_mmio){.interrupt = &line, .bell = &kick, .queues = queues};
}

/* Do what Python does when the loop returns, until nothing is left to do. */
static void proceed(struct pv_vcpu *vcpu, uint32_t stop, struct input *input)
{
    uint8_t bytes[sizeof(tx)];

    for (int i = 0; i < 4 && vcpu->pending != PENDING_NONE; i++) {
        enum pv_pending pending = vcpu->pending;
        if (stop == PV_STOP_FIFO)
            HOLDS(pv_fifo_read(&uart.tx, bytes, sizeof(bytes)) > 0);
        if (stop == PV_STOP_MAILBOX && !(next8(input) & 1))
            boxes[vcpu->index].state = PV_MAILBOX_ORDER;
        vcpu->pending = PENDING_NONE;
        stop = pending == PENDING_MMIO ? pv_mmio(vcpu, true) : pv_share_resume(vcpu, pending);
    }
    vcpu->pending = PENDING_NONE;
    HOLDS(stop < PV_STOPS);
}

static void access(struct input *input, struct pv_vcpu *vcpu)
{
    static const uint64_t values[] = {0, 1, 2, RAM, RAM + 4096, RAM + 1, RAM + 32 * 4096, UINT64_MAX, 0x301, 0xFFFF};
    struct kvm_run *exit = vcpu->run;
    struct pv_mailbox other = boxes[!vcpu->index];
    uint8_t how = next8(input), which = next8(input);
    uint64_t value = values[which % (sizeof(values) / sizeof(values[0]))] | (which & 0x80 ? next32(input) : 0);

    exit->exit_reason = KVM_EXIT_MMIO;
    exit->mmio.phys_addr = MMIO + (how & 7) * STEP + next16(input) - (how & 0x40 ? 8 : 0);
    exit->mmio.len = which & 0x40 ? next8(input) : 1u << (how >> 3 & 3);
    exit->mmio.is_write = how >> 7;
    memcpy(exit->mmio.data, &value, sizeof(value));
    uint32_t stop = pv_mmio(vcpu, false);
    HOLDS((stop == PV_STOP_UNCLAIMED) == !vcpu->range);
    HOLDS(vcpu->size <= 8);
    HOLDS(!vcpu->range || vcpu->offset + vcpu->size <= vcpu->range->size);
    proceed(vcpu, stop, input);
    HOLDS(memcmp(&other, &boxes[!vcpu->index], sizeof(other)) == 0);
}

static void call(struct input *input, struct pv_vcpu *vcpu)
{
    struct kvm_run *exit = vcpu->run;
    uint8_t how = next8(input);

    exit->exit_reason = KVM_EXIT_HYPERCALL;
    exit->hypercall.nr = how & 0x80 ? next32(input) : HVC_SHARE + (how & 1);
    exit->hypercall.args[0] = how & 2 ? next32(input) : RAM + (how >> 2 & 31) * (uint64_t)PV_HOST_PAGE;
    proceed(vcpu, pv_hypercall(vcpu), input);
}

void fuzz_one(const uint8_t *data, size_t size)
{
    struct input input = {data, data + size};
    struct pv_queue none = {.descriptors = RAM, .driver = RAM, .device = RAM, .size = 1};
    uint8_t bytes[sizeof(tx)] = {0};

    begin();
    while (input.at < input.end) {
        uint8_t what = next8(&input);
        struct pv_vcpu *vcpu = &vcpus[what >> 7];
        switch (what & 7) {
        case 0: call(&input, vcpu); break;
        case 1: pv_pl011_feed(&uart, bytes, what >> 3 & 15); break;
        case 2: pv_fifo_read(&uart.tx, bytes, what >> 3 & 15); break;
        case 3: pv_subscribe(&guest.vm, what >> 3 & 1); break;
        case 4: guest_act(&input, &none); break;
        case 5: pv_virtio_configure(&transport, &what, what >> 3 & 1, next8(&input)); break;
        default: access(&input, vcpu); break;
        }
        HOLDS(pv_fifo_used(&uart.tx) <= sizeof(tx) && pv_fifo_used(&uart.rx) <= sizeof(rx));
        HOLDS(uart.lock == 0 && transport.lock == 0 && guest.vm.converting == 0 && !guest.vm.readers[0] && !guest.vm.readers[1]);
    }
}
