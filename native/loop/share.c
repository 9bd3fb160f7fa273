// SPDX-License-Identifier: Apache-2.0
/* Pages that change hands: the ledger, the share doorbell, the hypercalls of the emulated protection. */
#include "loop/loop.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/mman.h>
#include <unistd.h>

#define HVC_FEATURES 0x86000000u
#define HVC_MEMINFO 0xC6000002u
#define HVC_SHARE 0xC6000003u
#define HVC_UNSHARE 0xC6000004u
#define FEATURES 0x1du /* itself, MEMINFO, SHARE, UNSHARE, as EL2 says */

/* arch/arm64/include/uapi/asm/kvm.h, which other hosts' headers lack: x0..x3 are user_pt_regs.regs, in 32-bit units. */
#define CORE_X(n) (0x6030000000100000u + 2 * (n))

static enum pv_page state_of(uint8_t entry)
{
    return entry & 7;
}

/* Whether what the guest says of a page counts: one whose slot is being removed has no future, and one that is being
   taken back has a vCPU that sees to it. */
static bool claimable(uint8_t entry)
{
    return state_of(entry) != PV_PAGE_ABSENT && !(entry & PV_PAGE_MOVING);
}

void pv_subscribe(struct pv_vm *vm, uint32_t count)
{
    store(&vm->subscribers, count);
    fence(); /* pairs with the one in listening(): either we see the page go or it sees us */
}

/* Asked after the ledger has changed. */
static bool listening(const struct pv_vm *vm)
{
    fence(); /* pairs with the one in pv_subscribe() */
    return load(&vm->subscribers) != 0;
}

/* False with what is there now in *old if it has changed. */
static bool replace(struct pv_vm *vm, uint8_t *entry, uint8_t *old, uint8_t new)
{
    if (!__atomic_compare_exchange_n(entry, old, new, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        return false;
    if (state_of(*old) != state_of(new)) {
        add(&vm->pages[state_of(*old)], -1);
        add(&vm->pages[state_of(new)], 1);
    }
    return true;
}

static uint8_t *entry_of(const struct pv_region *region, uint64_t gpa)
{
    return &region->ledger[(gpa - region->gpa) / PV_PAGE_SIZE];
}

int pv_ledger_set(struct pv_vm *vm, uint64_t gpa, uint8_t state)
{
    uint32_t phase = pv_map_enter(vm);
    struct pv_region region;
    int before = -1;

    if ((state & ~PV_PAGE_ASSUMED) < PV_PAGE_STATES && pv_region_at(vm, gpa, &region)) {
        uint8_t *entry = entry_of(&region, gpa), old = load(entry);
        while ((state_of(state) == PV_PAGE_ABSENT || !(old & PV_PAGE_MOVING)) && !replace(vm, entry, &old, state))
            ;
        before = old & ~PV_PAGE_MOVING;
    }
    pv_map_leave(vm, phase);
    return before;
}

/* Moves a page to or from SHARED if it is not there yet. Of several vCPUs that say the same at once, one moves it. In
   PV_EMULATED a page that leaves SHARED is moving until settle(). */
static bool ledger_move(struct pv_vm *vm, uint8_t *entry, bool share)
{
    uint8_t old = load(entry), new = PV_PAGE_SHARED;

    if (!share)
        new = vm->protection == PV_NONE ? PV_PAGE_HOST
            : PV_PAGE_PRIVATE | (vm->protection == PV_PKVM ? PV_PAGE_ASSUMED : PV_PAGE_MOVING);
    do {
        if (!claimable(old) || (state_of(old) == PV_PAGE_SHARED) == share)
            return false;
    } while (!replace(vm, entry, &old, new));
    return true;
}

/* Ends a move: the page is the guest's, or could not be closed. Its slot may have gone meanwhile. */
static void settle(struct pv_vm *vm, uint8_t *entry, int32_t status)
{
    uint8_t old = load(entry);

    while (old & PV_PAGE_MOVING && !replace(vm, entry, &old, status ? PV_PAGE_SHARED : PV_PAGE_PRIVATE))
        ;
}

static void record(struct pv_vcpu *vcpu, int32_t status)
{
    struct pv_vm *vm = vcpu->vm;

    vcpu->share_status = status;
    if (status)
        add(&vm->refused, 1);
    else
        add(vcpu->share_op ? &vm->shares : &vm->unshares, 1);
    pv_record(vcpu, pv_now(), vcpu->share_op ? PV_REC_SHARE : PV_REC_UNSHARE, (uint8_t)vcpu->share_source,
              PV_PAGE_SIZE, vcpu->share_gpa, (uint64_t)(int64_t)status);
}

/* What the guest says of a page, before anything is believed of it: its ledger entry, or NULL if there is none. Whether
   it is claimable() the caller asks. */
static uint8_t *claim(struct pv_vcpu *vcpu, uint64_t gpa, bool share, enum pv_source source, struct pv_region *region)
{
    vcpu->share_gpa = gpa;
    vcpu->share_op = share;
    vcpu->share_source = source;
    if (!vcpu->left_ns) /* not timed: subscribers still want to know when */
        vcpu->left_ns = pv_now();
    return gpa % PV_PAGE_SIZE == 0 && pv_region_at(vcpu->vm, gpa, region) ? entry_of(region, gpa) : NULL;
}

/* Enters what has happened, and says whether Python must tell of it before the guest goes on. */
static uint32_t announce(struct pv_vcpu *vcpu, uint8_t *entry, bool share)
{
    if (!ledger_move(vcpu->vm, entry, share))
        return PV_STOP_NONE;
    record(vcpu, SMCCC_SUCCESS);
    return listening(vcpu->vm) ? PV_STOP_SHARE : PV_STOP_NONE;
}

/* ---- the share doorbell ------------------------------------------------------------------------------------ */

enum { BELL_SHARE = 1, BELL_UNSHARE = 2 };

/* In PV_EMULATED the hypercall is what moves pages and tells subscribers; a ring must only agree with it. */
static uint32_t bell(struct pv_vcpu *vcpu, uint64_t gpa, uint64_t op, bool readable)
{
    struct pv_vm *vm = vcpu->vm;
    bool share = op == BELL_SHARE;
    struct pv_region region;
    uint8_t *entry = claim(vcpu, gpa, share, PV_SOURCE_DOORBELL, &region);
    int32_t status = SMCCC_SUCCESS;

    if (vcpu->size != 8 || vcpu->offset != 0 || (!share && op != BELL_UNSHARE) || !entry || !claimable(load(entry)))
        status = SMCCC_INVALID_PARAMETER;
    else if (vm->protection == PV_EMULATED)
        status = state_of(load(entry)) == PV_PAGE_SHARED ? SMCCC_SUCCESS : SMCCC_NOT_SUPPORTED;
    else if (vm->protection == PV_PKVM && share && !readable)
        status = SMCCC_NOT_SUPPORTED;

    if (status) {
        record(vcpu, status);
        return PV_STOP_NONE;
    }
    vcpu->share_status = status;
    return vm->protection == PV_EMULATED ? PV_STOP_NONE : announce(vcpu, entry, share);
}

uint32_t pv_share_bell(struct pv_vcpu *vcpu, uint64_t value)
{
    struct pv_vm *vm = vcpu->vm;
    uint64_t op = value % PV_PAGE_SIZE, gpa = value - op;
    bool readable = vm->protection == PV_PKVM && op == BELL_SHARE && pv_probe(vm, gpa) == 1;
    uint32_t phase = pv_map_enter(vm), stop = bell(vcpu, gpa, op, readable);

    pv_map_leave(vm, phase);
    return stop;
}

/* ---- conversions of PV_EMULATED ---------------------------------------------------------------------------- */

static int punch(const struct pv_region *region, uint64_t offset)
{
    if (region->fd < 0)
        return madvise(region->view + offset, PV_PAGE_SIZE, MADV_DONTNEED);
    return fallocate(region->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(region->fd_offset + offset),
                     PV_PAGE_SIZE);
}

int pv_punch(struct pv_vm *vm, uint64_t gpa)
{
    uint32_t phase = pv_map_enter(vm);
    struct pv_region region;
    int result = -1;

    /* A protected guest keeps the page it was given: host and guest would see two different ones from then on. */
    if (vm->protection != PV_PKVM && pv_region_at(vm, gpa, &region) &&
        !punch(&region, (gpa - region.gpa) & ~(uint64_t)(PV_PAGE_SIZE - 1))) {
        uint8_t *entry = entry_of(&region, gpa), old = load(entry);
        while (claimable(old) && !replace(vm, entry, &old, PV_PAGE_HOLE))
            ;
        result = 0;
    }
    pv_map_leave(vm, phase);
    return result;
}

static int drop(const struct pv_vm *vm, const struct pv_region *region, uint64_t offset)
{
    switch (vm->conversion) {
    case PV_CONVERT_ZERO:
        return pv_fill(region->view + offset, 0, PV_PAGE_SIZE) == PV_PAGE_SIZE ? 0 : -1;
    case PV_CONVERT_PUNCH:
        return punch(region, offset);
    default:
        return 0;
    }
}

/* The view first: it is what fails (vm.max_map_count), and what can be put back. Where the VMM zeroes a page that goes
   private, the view stays writable until it has: still a mapping of its own, so that closing it cannot fail. */
static int32_t convert(const struct pv_vm *vm, const struct pv_region *region, uint64_t offset, bool share)
{
    uint8_t *page = region->view + offset;
    int access = share ? PROT_READ | PROT_WRITE : vm->conversion == PV_CONVERT_ZERO ? PROT_WRITE : PROT_NONE;

    if (!region->view || mprotect(page, PV_PAGE_SIZE, access))
        return SMCCC_NOT_SUPPORTED;
    if (drop(vm, region, offset)) {
        mprotect(page, PV_PAGE_SIZE, share ? PROT_NONE : PROT_READ | PROT_WRITE);
        return SMCCC_NOT_SUPPORTED;
    }
    if (!share && access != PROT_NONE)
        mprotect(page, PV_PAGE_SIZE, PROT_NONE);
    return SMCCC_SUCCESS;
}

/* ---- hypercalls -------------------------------------------------------------------------------------------- */

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

/* The guest's answer is in place before a share is announced: what is left is to enter the guest. */
static uint32_t finish(struct pv_vcpu *vcpu, int32_t status)
{
    uint32_t stop;

    record(vcpu, status);
    stop = answer(vcpu, (uint64_t)(int64_t)status);
    if (stop == PV_STOP_NONE && status == SMCCC_SUCCESS && vcpu->share_op && listening(vcpu->vm))
        stop = PV_STOP_SHARE;
    return stop;
}

static bool sharable(uint8_t entry)
{
    return claimable(entry) && state_of(entry) != PV_PAGE_SHARED && state_of(entry) != PV_PAGE_POISONED;
}

/* Other vCPUs may have shared the page since it was claimed, and its slot may have gone; one that is moving is ours. */
static uint32_t apply(struct pv_vcpu *vcpu, bool converted)
{
    struct pv_vm *vm = vcpu->vm;
    struct pv_region region;
    bool share = vcpu->share_op;
    uint8_t *entry = claim(vcpu, vcpu->share_gpa, share, PV_SOURCE_HYPERCALL, &region);
    int32_t status = SMCCC_INVALID_PARAMETER;

    pv_lock(&vm->converting);
    if (entry && (share ? sharable(load(entry)) : load(entry) & PV_PAGE_MOVING))
        status = converted ? vcpu->share_status : convert(vm, &region, vcpu->share_gpa - region.gpa, share);
    if (entry && !share)
        settle(vm, entry, status);
    else if (status == SMCCC_SUCCESS && !ledger_move(vm, entry, true))
        status = SMCCC_INVALID_PARAMETER;
    pv_unlock(&vm->converting);
    return finish(vcpu, status);
}

static uint32_t change(struct pv_vcpu *vcpu)
{
    if (vcpu->vm->conversion != PV_CONVERT_COLD)
        return apply(vcpu, false);
    vcpu->share_pending = PENDING_CONVERTED;
    return PV_STOP_CONVERT;
}

uint32_t pv_share_resume(struct pv_vcpu *vcpu, enum pv_pending pending)
{
    uint32_t phase = pv_map_enter(vcpu->vm), stop = pending == PENDING_TOLD ? change(vcpu) : apply(vcpu, true);

    pv_map_leave(vcpu->vm, phase);
    return stop;
}

/* x1 = page, x2 = x3 = 0, one page at a time: Documentation/virt/kvm/arm/hypercalls.rst. Refusing what EL2 refuses is
   why x2 and x3 are read, at an ioctl each. A page shared is converted, entered and told of; one taken back is entered,
   told of and converted: who looks at the ledger after subscribing sees that it goes, or hears of it. */
static uint32_t share_call(struct pv_vcpu *vcpu, bool share)
{
    uint64_t x1, x2, x3;
    struct pv_region region;

    if (!get_x(vcpu, 1, &x1) || !get_x(vcpu, 2, &x2) || !get_x(vcpu, 3, &x3))
        return give_up(vcpu);
    uint8_t *entry = claim(vcpu, x1, share, PV_SOURCE_HYPERCALL, &region);
    if (x2 || x3 || !entry || !(share ? sharable(load(entry)) : ledger_move(vcpu->vm, entry, false)))
        return finish(vcpu, SMCCC_INVALID_PARAMETER);
    if (!share && listening(vcpu->vm)) {
        vcpu->share_status = SMCCC_SUCCESS;
        vcpu->share_pending = PENDING_TOLD;
        return PV_STOP_SHARE;
    }
    return change(vcpu);
}

/* A kernel with Android's patches exits once the hypervisor has moved a page and answered the guest. No kernel we could
   run does this: only the tests' fake one has. */
static uint32_t share_exit(struct pv_vcpu *vcpu, bool share)
{
    const struct kvm_run *run = vcpu->run;
    struct pv_region region;
    uint8_t *entry = claim(vcpu, run->hypercall.args[0], share, PV_SOURCE_EXIT, &region);

    if (entry && claimable(load(entry)))
        return announce(vcpu, entry, share);
    record(vcpu, SMCCC_INVALID_PARAMETER);
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
        return answer(vcpu, x1 | x2 | x3 ? (uint64_t)(int64_t)SMCCC_INVALID_PARAMETER : PV_PAGE_SIZE);
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
