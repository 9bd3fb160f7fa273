/* SPDX-License-Identifier: Apache-2.0 */
/* One exit that a fake vCPU makes, and how the loop answered it. cffi reads this too. */
struct fake_exit {
    int32_t error;          /* not 0: KVM_RUN fails with it */
    uint32_t exit_reason;
    uint64_t gpa, data;     /* of an MMIO; of a memory fault: gpa, size; of a hypercall: args[0] */
    uint32_t len, is_write;
    uint64_t nr;            /* of a hypercall; of a system event: its type */
    uint64_t x[4];          /* registers at a hypercall */
    uint64_t answer;        /* out: the answer to an MMIO load */
    uint64_t out[4];        /* out: the registers as the guest found them */
};
struct fake_vcpu {
    uint8_t *run;           /* struct kvm_run */
    struct fake_exit *exits;
    uint32_t count, next;
    uint32_t entered;       /* calls of KVM_RUN */
    uint32_t one_regs;      /* calls of KVM_GET_ONE_REG and KVM_SET_ONE_REG */
    int32_t one_reg_error;
    uint32_t pad;
    uint64_t x[4];
};
/* The last level of an interrupt line, a number below 8. */
struct fake_line { uint32_t raised, lowered, level; };
struct fake_line *fake_line(uint32_t irq);
/* File descriptor n of the fake kernel is its nth vCPU. */
void fake_attach(int fd, struct fake_vcpu *vcpu);
/* From now on this function answers KVM_RUN of any descriptor with 0 or an errno. NULL: the scripts answer again. */
void fake_run_by(int (*run)(int fd));
/* This many next calls of mprotect fail with ENOMEM. */
void fake_protect_fails(uint32_t calls);
uint32_t fake_protects(void);
