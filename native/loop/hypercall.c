// SPDX-License-Identifier: Apache-2.0
/* Hypercalls: for the emulated protection, the loop gives the answers that EL2 gives under pKVM. */
#include "loop/convert.h"
#include "loop/share.h"

#define HVC_FEATURES 0x86000000u
#define HVC_MEMINFO 0xC6000002u
#define HVC_SHARE 0xC6000003u
#define HVC_UNSHARE 0xC6000004u
#define FEATURES 0x1du /* itself, MEMINFO, SHARE, UNSHARE, as EL2 says */

/* arch/arm64/include/uapi/asm/kvm.h, which other hosts' headers lack: x0..x3 are user_pt_regs.regs, in 32-bit units. */
#define CORE_X(n) (0x6030000000100000u + 2 * (n))

static uint32_t give_up(struct pv_vcpu *vcpu)
{
    vcpu->error = errno;
    vcpu->failure = PV_FAIL_OTHER;
    vcpu->fault_gpa = vcpu->fault_size = vcpu->fault_flags = 0;
    return PV_STOP_FAILED;
}

static bool get_x(const struct pv_vcpu *vcpu, uint32_t n, uint64_t *value)
{
    return ioctl(vcpu->fd, KVM_GET_ONE_REG, &(struct kvm_one_reg){CORE_X(n), (uintptr_t)value}) == 0;
}

static bool set_x(const struct pv_vcpu *vcpu, uint32_t n, uint64_t value)
{
    return ioctl(vcpu->fd, KVM_SET_ONE_REG, &(struct kvm_one_reg){CORE_X(n), (uintptr_t)&value}) == 0;
}

static uint32_t answer(struct pv_vcpu *vcpu, uint64_t x0)
{
    return set_x(vcpu, 0, x0) ? PV_STOP_NONE : give_up(vcpu);
}

/* The guest's result is set before a share is announced. Only entering the guest remains. */
static uint32_t finish(struct pv_vcpu *vcpu, int32_t status)
{
    uint32_t stop;

    pv_share_record(vcpu, status);
    stop = answer(vcpu, (uint64_t)(int64_t)status);
    if (stop == PV_STOP_NONE && status == SMCCC_SUCCESS && vcpu->share_op && pv_listening(vcpu->vm))
        stop = PV_STOP_SHARE;
    return stop;
}

static bool sharable(uint8_t entry)
{
    enum pv_page state = pv_page_state(entry);

    return pv_page_claimable(entry) && state != PV_PAGE_SHARED && state != PV_PAGE_POISONED;
}

/* Since the claim, another vCPU may have shared the page, or its slot may be gone. A page that is moving is ours. */
static uint32_t apply(struct pv_vcpu *vcpu, bool converted)
{
    struct pv_vm *vm = vcpu->vm;
    struct pv_region region;
    bool share = vcpu->share_op;
    uint8_t *entry = pv_share_claim(vcpu, vcpu->share_gpa, share, PV_SOURCE_HYPERCALL, &region);
    int32_t status = SMCCC_INVALID_PARAMETER;

    pv_lock(&vm->converting);
    if (entry && (share ? sharable(load(entry)) : load(entry) & PV_PAGE_MOVING))
        status = converted ? vcpu->share_status : pv_convert_page(vm, &region, vcpu->share_gpa - region.gpa, share);
    if (entry && !share)
        pv_ledger_settle(vm, entry, status);
    else if (status == SMCCC_SUCCESS && !pv_ledger_move(vm, entry, true))
        status = SMCCC_INVALID_PARAMETER;
    pv_unlock(&vm->converting);
    return finish(vcpu, status);
}

static uint32_t change(struct pv_vcpu *vcpu)
{
    if (vcpu->vm->conversion != PV_CONVERT_COLD)
        return apply(vcpu, false);
    vcpu->pending = PENDING_CONVERTED;
    return PV_STOP_CONVERT;
}

uint32_t pv_share_resume(struct pv_vcpu *vcpu, enum pv_pending pending)
{
    uint32_t phase = pv_map_enter(vcpu->vm), stop = pending == PENDING_TOLD ? change(vcpu) : apply(vcpu, true);

    pv_map_leave(vcpu->vm, phase);
    return stop;
}

/* x1 = page, x2 = x3 = 0, one page at a time: Documentation/virt/kvm/arm/hypercalls.rst. x2 and x3 are read, at an
   ioctl each, to refuse what EL2 refuses. A share converts the page, updates the ledger and notifies. An unshare
   updates the ledger, notifies and converts. So a subscriber that reads the ledger after subscribing sees the change or
   is notified. */
static uint32_t share_call(struct pv_vcpu *vcpu, bool share)
{
    uint64_t x1, x2, x3;
    struct pv_region region;

    if (!get_x(vcpu, 1, &x1) || !get_x(vcpu, 2, &x2) || !get_x(vcpu, 3, &x3))
        return give_up(vcpu);
    uint8_t *entry = pv_share_claim(vcpu, x1, share, PV_SOURCE_HYPERCALL, &region);
    if (x2 || x3 || !entry || !(share ? sharable(load(entry)) : pv_ledger_move(vcpu->vm, entry, false)))
        return finish(vcpu, SMCCC_INVALID_PARAMETER);
    if (!share && pv_listening(vcpu->vm)) {
        vcpu->share_status = SMCCC_SUCCESS;
        vcpu->pending = PENDING_TOLD;
        return PV_STOP_SHARE;
    }
    return change(vcpu);
}

/* A kernel with Android's patches exits once the hypervisor has moved a page and answered the guest. No kernel
   available to the project does this; only the tests' fake kernel does. */
static uint32_t share_exit(struct pv_vcpu *vcpu, bool share)
{
    const struct kvm_run *run = vcpu->run;
    struct pv_region region;
    uint8_t *entry = pv_share_claim(vcpu, run->hypercall.args[0], share, PV_SOURCE_EXIT, &region);

    if (entry && pv_page_claimable(load(entry)))
        return pv_share_announce(vcpu, entry, share);
    pv_share_record(vcpu, SMCCC_INVALID_PARAMETER);
    return PV_STOP_NONE;
}

static uint32_t hypercall(struct pv_vcpu *vcpu)
{
    const struct kvm_run *run = vcpu->run;
    uint64_t x1, x2, x3;

    vcpu->value = run->hypercall.nr;
    if (vcpu->vm->protection == PV_PKVM && (vcpu->value == HVC_SHARE || vcpu->value == HVC_UNSHARE))
        return share_exit(vcpu, vcpu->value == HVC_SHARE);
    if (vcpu->vm->protection != PV_EMULATED)
        return PV_STOP_HYPERCALL;
    switch (vcpu->value) {
    case HVC_SHARE:
        return share_call(vcpu, true);
    case HVC_UNSHARE:
        return share_call(vcpu, false);
    case HVC_MEMINFO:
        if (!get_x(vcpu, 1, &x1) || !get_x(vcpu, 2, &x2) || !get_x(vcpu, 3, &x3))
            return give_up(vcpu);
        return answer(vcpu, x1 | x2 | x3 ? (uint64_t)(int64_t)SMCCC_INVALID_PARAMETER : PV_HOST_PAGE);
    case HVC_FEATURES:
        for (uint32_t n = 1; n <= 3; n++)
            if (!set_x(vcpu, n, 0))
                return give_up(vcpu);
        return answer(vcpu, FEATURES);
    default:
        return PV_STOP_HYPERCALL;
    }
}

uint32_t pv_hypercall(struct pv_vcpu *vcpu)
{
    uint32_t phase = pv_map_enter(vcpu->vm), stop = hypercall(vcpu);

    pv_map_leave(vcpu->vm, phase);
    return stop;
}
