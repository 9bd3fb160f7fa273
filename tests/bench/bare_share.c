// SPDX-License-Identifier: Apache-2.0
/* The least that a VMM must do for a forwarded share: KVM_RUN, read the three arguments (two of them must be zero, and
 * EL2 refuses the call otherwise), change the host's view, answer. It leaves out the ledger, checks, subscribers and
 * statistics. The product's loop is compared with it.
 * usage: bare_share GUEST.bin; prints "refused ticks". */
#define _GNU_SOURCE
#include "../../firmware/lib/abi.h"

#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RAM_SIZE = 16 << 20 };
static const uint64_t RAM = 0x80000000, ENTRY = 0x80080000, BENCH = 0x09300000;

static int must(int result, const char *what)
{
    if (result < 0)
        err(1, "%s", what);
    return result;
}

/* x0..x30, sp, pc: user_pt_regs, counted in words of 32 bits. */
static uint64_t core(unsigned n) { return 0x6030000000100000 + 2 * n; }

static void one_reg(int vcpu, unsigned long request, uint64_t id, uint64_t *value)
{
    struct kvm_one_reg reg = {id, (uintptr_t)value};
    must(ioctl(vcpu, request, &reg), "ONE_REG");
}

int main(int argc, char **argv)
{
    if (argc != 2)
        errx(2, "usage: bare_share GUEST.bin");
    int kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm"), vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    int ram = must(memfd_create("ram", 0), "memfd_create"), guest = must(open(argv[1], O_RDONLY), argv[1]);
    must(ftruncate(ram, RAM_SIZE), "ftruncate");
    uint8_t *hva = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, ram, 0);
    uint8_t *view = mmap(NULL, RAM_SIZE, PROT_NONE, MAP_SHARED, ram, 0);
    must((int)read(guest, hva + (ENTRY - RAM), 4096), argv[1]);
    struct kvm_userspace_memory_region slot = {0, 0, RAM, RAM_SIZE, (uintptr_t)hva};
    must(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");

    struct { uint32_t base, count; uint8_t action, pad[15]; } filter = {HVC_SHARE, 2, 2, {0}};
    struct kvm_device_attr attr = {0, 0, 0, (uintptr_t)&filter};
    must(ioctl(vm, KVM_SET_DEVICE_ATTR, &attr), "KVM_ARM_VM_SMCCC_FILTER");

    int vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    struct kvm_vcpu_init init;
    must(ioctl(vm, KVM_ARM_PREFERRED_TARGET, &init), "KVM_ARM_PREFERRED_TARGET");
    init.features[0] |= 1 << 2; /* PSCI_0_2 */
    must(ioctl(vcpu, KVM_ARM_VCPU_INIT, &init), "KVM_ARM_VCPU_INIT");
    one_reg(vcpu, KVM_SET_ONE_REG, core(32), &(uint64_t){ENTRY});
    struct kvm_run *run =
        mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);

    uint64_t told[2] = {0}, page, must_be_zero[2], answer;
    for (;;) {
        must(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
        if (run->exit_reason == KVM_EXIT_HYPERCALL) {
            one_reg(vcpu, KVM_GET_ONE_REG, core(1), &page);
            one_reg(vcpu, KVM_GET_ONE_REG, core(2), &must_be_zero[0]);
            one_reg(vcpu, KVM_GET_ONE_REG, core(3), &must_be_zero[1]);
            must(mprotect(view + (page - RAM), 4096, run->hypercall.nr == HVC_SHARE ? PROT_READ | PROT_WRITE : PROT_NONE),
                 "mprotect");
            answer = must_be_zero[0] | must_be_zero[1] ? (uint64_t)-3 : 0;
            one_reg(vcpu, KVM_SET_ONE_REG, core(0), &answer);
        } else if (run->exit_reason == KVM_EXIT_MMIO && run->mmio.phys_addr - BENCH < 16) {
            memcpy(&told[(run->mmio.phys_addr - BENCH) / 8], run->mmio.data, 8);
        } else {
            break;
        }
    }
    printf("%llu %llu\n", (unsigned long long)told[0], (unsigned long long)told[1]);
    return run->exit_reason != KVM_EXIT_SYSTEM_EVENT;
}
