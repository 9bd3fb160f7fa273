// SPDX-License-Identifier: Apache-2.0
/* A kernel with a script. The native loop is built against these functions instead of ioctl and mprotect. */
#include "loop/loop.h"

#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "fake_kvm.h"

static struct fake_vcpu *vcpus[8];
static struct fake_line lines[8];
static uint32_t protect_fails, protects;
static int (*run_by)(int fd);

void fake_attach(int fd, struct fake_vcpu *vcpu)
{
    vcpus[fd] = vcpu;
}

void fake_run_by(int (*run)(int fd))
{
    run_by = run;
}

struct fake_line *fake_line(uint32_t irq)
{
    return &lines[irq % 8];
}

static void set_line(const struct kvm_irq_level *told)
{
    struct fake_line *line = fake_line(told->irq);

    (*(told->level ? &line->raised : &line->lowered))++;
    line->level = told->level;
}

void fake_protect_fails(uint32_t calls)
{
    protect_fails = calls;
}

uint32_t fake_protects(void)
{
    return protects;
}

int fake_mprotect(void *address, size_t size, int protection);
int fake_mprotect(void *address, size_t size, int protection)
{
    protects++;
    if (protect_fails) {
        protect_fails--;
        errno = ENOMEM;
        return -1;
    }
    return (int)syscall(SYS_mprotect, address, size, protection);
}

static int enter(struct fake_vcpu *vcpu)
{
    struct kvm_run *run = (void *)vcpu->run;

    vcpu->entered++;
    if (vcpu->next) {
        struct fake_exit *last = &vcpu->exits[vcpu->next - 1];
        last->answer = 0;
        if (!last->error && last->exit_reason == KVM_EXIT_MMIO && !last->is_write)
            memcpy(&last->answer, run->mmio.data, last->len);
        memcpy(last->out, vcpu->x, sizeof(last->out));
    }
    if (run->immediate_exit) {
        errno = EINTR;
        return -1;
    }
    if (vcpu->next == vcpu->count) {
        run->exit_reason = KVM_EXIT_HLT;
        return 0;
    }

    const struct fake_exit *exit = &vcpu->exits[vcpu->next++];
    run->exit_reason = exit->exit_reason;
    switch (exit->exit_reason) {
    case KVM_EXIT_MMIO:
        run->mmio.phys_addr = exit->gpa;
        run->mmio.len = exit->len;
        run->mmio.is_write = (uint8_t)exit->is_write;
        memcpy(run->mmio.data, &exit->data, sizeof(run->mmio.data));
        break;
    case KVM_EXIT_HYPERCALL:
        run->hypercall.nr = exit->nr;
        run->hypercall.args[0] = exit->gpa;
        memcpy(vcpu->x, exit->x, sizeof(vcpu->x));
        break;
    case KVM_EXIT_SYSTEM_EVENT:
        run->system_event.type = (uint32_t)exit->nr;
        run->system_event.ndata = exit->len;
        for (uint32_t i = 0; i < 16; i++)
            run->system_event.data[i] = exit->data + i;
        break;
    case KVM_EXIT_MEMORY_FAULT:
        memcpy(&run->hw, &(struct pv_memory_fault){.gpa = exit->gpa, .size = exit->data}, sizeof(struct pv_memory_fault));
        break;
    default:
        break;
    }
    errno = exit->error;
    return exit->error ? -1 : 0;
}

int fake_ioctl(int fd, unsigned long request, ...);
int fake_ioctl(int fd, unsigned long request, ...)
{
    struct fake_vcpu *vcpu;
    va_list arguments;

    if (run_by) {
        errno = request == KVM_RUN ? run_by(fd) : request == KVM_IRQ_LINE ? 0 : ENOTTY;
        return errno ? -1 : 0;
    }
    vcpu = vcpus[fd];
    if (request == KVM_RUN)
        return enter(vcpu);
    va_start(arguments, request);
    const void *argument = va_arg(arguments, const void *);
    const struct kvm_one_reg *reg = argument;
    va_end(arguments);
    if (request == KVM_IRQ_LINE) {
        set_line(argument);
        return 0;
    }
    vcpu->one_regs++;
    if (vcpu->one_reg_error) {
        errno = vcpu->one_reg_error;
        return -1;
    }
    /* KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE, then 32-bit units */
    uint64_t *x = &vcpu->x[(reg->id - 0x6030000000100000u) / 2], *value = (uint64_t *)(uintptr_t)reg->addr;
    if (request == KVM_GET_ONE_REG)
        *value = *x;
    else
        *x = *value;
    return 0;
}
