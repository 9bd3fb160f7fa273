/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The contract between the run loop and Python, read by both: the C sources include it, cffi parses it. Only plain
 * declarations here (no preprocessor), fixed-width types, explicit padding.
 *
 * Ownership: Python allocates every structure and keeps it alive while a vCPU may run; C never allocates or frees.
 * Threads: pv_vcpu belongs to the thread inside pv_run(), except `kick`. pv_vm and what it points to are shared by all
 * vCPU threads: tables are immutable and replaced by swapping the pointer, page bytes and counters are atomics.
 * The guest is hostile: every gpa, size and value that came from it is checked here before it is used.
 *
 * In this order:
 *     pages          states of a guest page, and the table of memslots
 *     rings          byte FIFOs, and the trace
 *     MMIO           the bus, and the state of each kind of range
 *     a VM           the state that all its vCPUs share, and replacing its tables
 *     exits          why KVM_RUN returned, how often and for how long
 *     a vCPU         the loop, why it stops, and operations on a vCPU
 *     guarded copies
 *     userfaultfd
 *     the process    signal handlers, and the build's hash
 * virtio/cdef.h continues with queues, disks and network cards.
 */

/* ---- pages --------------------------------------------------------------------------------------------------- */

/* The logarithm of the host's page size in bytes: of slots, shares, holes and ledger entries. Asked from the system when
   the library is loaded; only tests write it. */
extern uint32_t pv_page_shift;

/* One byte per page in a region's ledger. Bit 0x40 is internal to the loop (PV_PAGE_MOVING of loop.h): the guest is
   unsharing the page and its view is not closed yet. It is only set with PV_PAGE_PRIVATE. Readers mask it out. */
enum pv_page {
    PV_PAGE_ABSENT, PV_PAGE_HOST, PV_PAGE_PRIVATE, PV_PAGE_SHARED, PV_PAGE_HOLE, PV_PAGE_POISONED,
    PV_PAGE_STATES,
    PV_PAGE_ASSUMED = 0x80 /* or-ed in: the kernel does not report the state, so it is assumed */
};
enum { PV_LEDGER_STATES = 8 }; /* values of the low bits of a ledger entry: enum pv_page fits */

/* The protection of a VM, set by Python. */
enum pv_protection { PV_NONE, PV_PKVM, PV_EMULATED };

/* The loop's action on a page's contents at a conversion of the emulated protection. */
enum pv_conversion {
    PV_CONVERT_PRESERVE, /* change the host's view, keep the contents */
    PV_CONVERT_ZERO,     /* the VMM zeroes the page before the other side sees it */
    PV_CONVERT_PUNCH,    /* the page is dropped from its file; the other side gets a new, zero one */
    PV_CONVERT_COLD      /* Python does it (copy to another backing, slots moved) */
};

/* A memslot as the loop and the guarded copies see it. */
struct pv_region {
    uint64_t gpa;       /* first byte */
    uint64_t size;      /* bytes, whole pages */
    uint8_t *view;      /* the host's own mapping; in PV_EMULATED with a memfd never the address KVM faults through,
                           because a private page's view is PROT_NONE */
    uint8_t *ledger;    /* size >> pv_page_shift bytes of enum pv_page */
    int32_t fd;         /* backing file, or -1: the view is anonymous memory, and KVM's own mapping */
    uint32_t flags;     /* 0 */
    uint64_t fd_offset; /* of gpa in fd */
};

/* Sorted by gpa, disjoint. Immutable while published in pv_vm.map. */
struct pv_map {
    uint32_t count;
    uint32_t pad;
    struct pv_region *regions;
};

/* ---- rings --------------------------------------------------------------------------------------------------- */

/* A byte FIFO between C and Python. size is a power of two; head and tail are free-running. Producers write at head. */
struct pv_fifo {
    uint32_t head, tail, size;
    int32_t wake_fd;   /* eventfd, or -1; written once when armed and the FIFO stops being empty */
    uint32_t armed;    /* set by the consumer before it sleeps, cleared by the producer that wakes it */
    uint32_t pad;
    uint64_t dropped;  /* bytes that found no room */
    uint8_t *data;
};
uint32_t pv_fifo_read(struct pv_fifo *fifo, uint8_t *to, uint32_t n);   /* bytes read */
/* The consumer's last call before it sleeps on wake_fd. Arms the FIFO, and checks after a full barrier whether it is
   still empty (1: sleep; 0: disarmed again, there are bytes to read). */
uint32_t pv_fifo_arm(struct pv_fifo *fifo);

enum pv_record_kind { PV_REC_EXIT = 1, PV_REC_SHARE, PV_REC_UNSHARE, PV_REC_FAULT };

/* 32 bytes of trace. */
struct pv_record {
    uint64_t ns;      /* CLOCK_MONOTONIC; of an exit, when KVM_RUN returned */
    uint8_t kind;     /* enum pv_record_kind */
    uint8_t lost;     /* not 0: records were dropped between the last one and this */
    uint8_t code;     /* enum pv_exit of an exit, enum pv_source of a share, errno of a fault */
    uint8_t vcpu;
    uint32_t size;    /* bytes; bit 31: a write */
    uint64_t addr;    /* gpa */
    uint64_t value;   /* nanoseconds in the guest of an exit, status of a share, exit_reason of a fault */
};

/* Single producer (the vCPU's thread), single consumer; drops and counts when full, never blocks. */
struct pv_ring {
    uint64_t head, tail;
    uint64_t dropped;
    uint64_t marked;   /* the part of dropped that a record's lost has reported; the loop's own */
    uint32_t size;     /* records, a power of two */
    uint32_t exits;    /* not 0: record every exit; shares and faults are always recorded */
    struct pv_record *records;
};
uint32_t pv_ring_read(struct pv_ring *ring, struct pv_record *to, uint32_t n);

/* ---- MMIO ---------------------------------------------------------------------------------------------------- */

enum pv_kind {
    PV_KIND_COLD,          /* Python answers */
    PV_KIND_REGISTERS,     /* state: uint8_t[size]; loads and stores, nothing else */
    PV_KIND_COUNTER,       /* state: uint64_t; a store adds its value, a load reads it */
    PV_KIND_DOORBELL,      /* state: pv_doorbell */
    PV_KIND_PL011,         /* state: pv_pl011 */
    PV_KIND_MAILBOX,       /* state: pv_mailbox[], one per vCPU, 4096 bytes of gpa each */
    PV_KIND_SHARE,         /* state: none; the share doorbell */
    PV_KIND_VIRTIO,        /* state: pv_virtio_mmio; a virtio-mmio transport, 512 bytes of gpa */
    PV_KINDS
};

struct pv_range {
    uint64_t base, size;   /* gpa, half-open */
    uint32_t kind;         /* enum pv_kind */
    uint32_t index;        /* Python's own number for it */
    void *state;
    uint64_t reads, writes;
};

/* Sorted by base, disjoint. Immutable once published in pv_vm.bus (the counters apart). */
struct pv_bus {
    uint32_t count;
    uint32_t pad;
    struct pv_range *ranges;
};

/* A store that matches writes 1 to an eventfd. Loads read 0. A slot with match_any set takes any value. With coalesce
   set, rings before the consumer's next pv_doorbell_take merge into one, without a system call. */
struct pv_doorbell_slot {
    uint64_t offset;
    uint64_t value;
    int32_t fd;
    uint32_t match_any;
    uint32_t coalesce, rung;
};
struct pv_doorbell {
    uint32_t count;
    uint32_t pad;
    uint64_t missed;       /* stores that matched no slot */
    struct pv_doorbell_slot *slots;
};
/* Called by the consumer of a coalescing slot, after reading the eventfd and before looking for work. */
void pv_doorbell_take(struct pv_doorbell_slot *slot);

/* Arm PrimeCell UART (PL011), DDI 0183. */
struct pv_pl011 {
    struct pv_fifo tx;     /* guest to host; producer C */
    struct pv_fifo rx;     /* host to guest; producer Python through pv_pl011_feed() */
    uint32_t lock;         /* several vCPUs may print */
    uint32_t cr, lcr_h, ibrd, fbrd, ifls, imsc, ris, dmacr, ilpr;
    int32_t vm_fd;         /* the VM, for KVM_IRQ_LINE, or -1 */
    uint32_t irq;          /* the line's number for KVM_IRQ_LINE */
    uint32_t level;        /* the line's last level: (ris & imsc) != 0 */
    uint32_t broken;       /* a BREAK waits in rx, as the byte at break_at */
    uint32_t break_at;
    uint32_t pad;
};
uint32_t pv_pl011_feed(struct pv_pl011 *uart, const uint8_t *from, uint32_t n); /* bytes taken */
uint32_t pv_pl011_break(struct pv_pl011 *uart); /* 0: rx is full, or has one already */

/* One vCPU's mailbox; offsets in firmware/lib/abi.h. */
enum { PV_MAILBOX_WORDS = 8, PV_MAILBOX_NOTES = 4 };
enum pv_mailbox_state { PV_MAILBOX_IDLE, PV_MAILBOX_ORDER, PV_MAILBOX_BUSY, PV_MAILBOX_DONE };
struct pv_mailbox {
    uint32_t state;
    uint32_t trapped;      /* not 0: the guest's vectors reported a trap; trap[] is valid */
    uint64_t order[PV_MAILBOX_WORDS];     /* op, then arguments */
    uint64_t result[PV_MAILBOX_WORDS];    /* status, then values */
    uint64_t trap[PV_MAILBOX_WORDS];      /* vector, ESR, FAR, ELR, SPSR, SP, LR, vCPU */
    uint64_t note[PV_MAILBOX_NOTES];      /* words that a payload stores for its runner (results gpa, size, ...) */
};

/* A device's interrupt: InterruptStatus of virtio-mmio, and the eventfd of an irqfd (edge). */
enum pv_interrupt_bit { PV_INTERRUPT_USED = 1, PV_INTERRUPT_CONFIG = 2 };
struct pv_interrupt {
    uint32_t status;       /* atomic; or of enum pv_interrupt_bit, until the driver acknowledges them */
    int32_t fd;            /* or -1 */
    uint64_t sent;         /* edges */
};

enum pv_virtio_size {
    PV_VIRTIO_REGISTERS = 64,      /* 32 bits each, before the configuration space */
    PV_VIRTIO_CONFIG = 256,        /* bytes of that, at most */
    PV_VIRTIO_FEATURE_WORDS = 4    /* 32 feature bits each */
};
struct pv_virtio_queue { uint32_t most, ready; };   /* QueueSizeMax and QueueReady of one queue */

/* The registers of virtio over MMIO (virtio 1.2, 4.2.2). C answers every read, and writes of selectors, QueueNotify and
   InterruptACK. Other writes are cold, and Python publishes their results here. */
struct pv_virtio_mmio {
    struct pv_interrupt *interrupt;
    struct pv_doorbell *bell;                  /* QueueNotify: a slot for each queue, at the register's offset */
    struct pv_virtio_queue *queues;            /* as many as the bell has slots */
    uint32_t device_features_sel, driver_features_sel, queue_sel;   /* atomics: any vCPU may set any value */
    uint32_t lock;                             /* of config; C's own */
    uint32_t offered[PV_VIRTIO_FEATURE_WORDS]; /* DeviceFeatures, by DeviceFeaturesSel */
    uint32_t registers[PV_VIRTIO_REGISTERS];   /* values of the other registers; 0 for write-only ones */
    uint8_t config[PV_VIRTIO_CONFIG];          /* padded with zeros; pv_virtio_configure() writes it */
};
/* Replaces the configuration space by size bytes, with a new generation. Any thread, one at a time. */
void pv_virtio_configure(struct pv_virtio_mmio *transport, const uint8_t *config, uint32_t size, uint32_t generation);

/* ---- a VM ---------------------------------------------------------------------------------------------------- */

enum pv_source {
    PV_SOURCE_DOORBELL = 1,
    PV_SOURCE_HYPERCALL,   /* PV_EMULATED: the loop converts the page and answers */
    PV_SOURCE_ACCESS,
    PV_SOURCE_EXIT         /* PV_PKVM: the hypervisor has done it, and the kernel reports it */
};

/* Ways KVM_RUN fails, the index of pv_vm.policy. */
enum pv_failure {
    PV_FAIL_EAGAIN, PV_FAIL_ENOMEM,
    PV_FAIL_EFAULT,        /* exit_reason 0: no details */
    PV_FAIL_MEMORY,        /* EFAULT with KVM_EXIT_MEMORY_FAULT: gpa and size are known */
    PV_FAIL_EHWPOISON, PV_FAIL_OTHER, PV_FAILURES
};
enum pv_action { PV_ACT_STOP, PV_ACT_RETRY, PV_ACT_PUNCH };

enum {
    PV_POLICY_ROOM = 8,      /* for enum pv_failure, and the padding behind it */
    PV_MAP_PHASES = 2
};

struct pv_vm {
    int32_t fd;
    uint32_t protection;     /* enum pv_protection */
    struct pv_map *map;
    struct pv_bus *bus;
    uint32_t subscribers;    /* not 0: a share or unshare stops the loop so that Python can tell them; written by
                                pv_subscribe() */
    uint32_t conversion;     /* enum pv_conversion */
    uint8_t policy[PV_POLICY_ROOM]; /* enum pv_action by enum pv_failure */
    uint32_t retry_limit;    /* consecutive failures retried before stopping */
    uint32_t converting;     /* lock: one conversion of a page at a time; the loop's own */
    uint32_t readers[PV_MAP_PHASES]; /* threads that use the map now, counted in the phase in which they began */
    uint32_t phase, pad;
    uint64_t published;      /* number of maps so far: a cached lookup is stale if it changed */
    uint64_t pages[PV_LEDGER_STATES]; /* pages by enum pv_page, including PV_PAGE_ASSUMED ones */
    uint64_t shares, unshares, refused;
};

/* Replaces the table, while vCPUs run and other threads copy. Returns when no thread uses the old table, or a ledger
   that only it had: they may be freed. One caller at a time. */
void pv_publish_map(struct pv_vm *vm, struct pv_map *map);
/* The same for the bus, but the old one must stay alive until every vCPU has left pv_run(). */
void pv_publish_bus(struct pv_vm *vm, struct pv_bus *bus);
/* Sets vm->subscribers with a full barrier: a page that the ledger shows as shared afterwards is not unshared without a
   PV_STOP_SHARE. */
void pv_subscribe(struct pv_vm *vm, uint32_t count);
/* Sets the ledger's entry of a page and keeps pv_vm.pages right. Returns the old entry, or -1 outside every region.
   A page that is moving can only become PV_PAGE_ABSENT: the loop decides its final state. */
int pv_ledger_set(struct pv_vm *vm, uint64_t gpa, uint8_t state);

/* ---- exits --------------------------------------------------------------------------------------------------- */

/* Classes of exits, which are counted and timed separately. The MMIO kinds come first, in enum pv_kind's order. */
enum pv_exit {
    PV_EXIT_MMIO_COLD, PV_EXIT_MMIO_REGISTERS, PV_EXIT_MMIO_COUNTER, PV_EXIT_MMIO_DOORBELL, PV_EXIT_MMIO_PL011,
    PV_EXIT_MMIO_MAILBOX, PV_EXIT_MMIO_SHARE, PV_EXIT_MMIO_VIRTIO,
    PV_EXIT_MMIO_UNCLAIMED, PV_EXIT_HYPERCALL, PV_EXIT_SYSTEM, PV_EXIT_DEBUG, PV_EXIT_INTR, PV_EXIT_FAILED,
    PV_EXIT_OTHER, PV_EXITS
};

/* Log-linear: 8 buckets for each power of two of nanoseconds, up to 2^42. pv_bucket_floor() says where one starts. */
enum { PV_HISTOGRAM_STEPS = 8, PV_HISTOGRAM_BUCKETS = 320 };
struct pv_histogram { uint32_t bucket[PV_HISTOGRAM_BUCKETS]; };
struct pv_exit_stats {
    uint64_t count;
    uint64_t guest_ns, vmm_ns;
    struct pv_histogram guest;   /* from entering KVM_RUN to its return */
    struct pv_histogram vmm;     /* from its return to the next entry */
};
/* The smallest value of a bucket in nanoseconds, for Python. For bucket PV_HISTOGRAM_BUCKETS: the end of the last. */
uint64_t pv_bucket_floor(uint32_t bucket);
uint32_t pv_bucket_of(uint64_t ns);

/* ---- a vCPU -------------------------------------------------------------------------------------------------- */

/* Why pv_run() returned. */
enum pv_stop {
    PV_STOP_NONE,
    PV_STOP_KICK,      /* kick was set; Python clears it before it checks the reason */
    PV_STOP_MMIO,      /* cold: range, offset, size, is_write, value; answer a load with pv_mmio_reply() */
    PV_STOP_UNCLAIMED, /* no slot and no range at gpa: as PV_STOP_MMIO, range NULL */
    PV_STOP_MAILBOX,   /* the guest waits for an order, or has trapped */
    PV_STOP_FIFO,      /* the UART's transmit FIFO is full: drain it and come back */
    PV_STOP_SHARE,     /* notify subscribers: share_gpa, share_op, share_source; come back. The ledger is updated */
    PV_STOP_CONVERT,   /* PV_CONVERT_COLD: do the conversion, set share_status, come back */
    PV_STOP_HYPERCALL, /* an unknown one: run->hypercall.nr */
    PV_STOP_SYSTEM,    /* KVM_EXIT_SYSTEM_EVENT: event, event_data */
    PV_STOP_DEBUG,
    PV_STOP_FAILED,    /* KVM_RUN failed: error (errno), failure, fault_gpa, fault_size, fault_flags */
    PV_STOP_OTHER,     /* exit_reason says */
    PV_STOPS
};

enum { PV_EVENT_WORDS = 4 };

struct pv_vcpu {
    int32_t fd;
    uint32_t index;
    struct pv_vm *vm;
    void *run;               /* struct kvm_run, mapped by Python */
    uint32_t kick;           /* atomic; set by pv_kick() */
    int32_t tid;             /* of the thread inside pv_run(), for pv_kick()'s signal; 0 outside */
    uint32_t exit_reason;    /* as KVM left it */
    uint32_t exit;           /* enum pv_exit of the last exit */
    struct pv_range *range;
    uint64_t gpa, offset, value;
    uint32_t size, is_write;
    uint64_t share_gpa;
    uint32_t share_op;       /* 1 share, 0 unshare */
    uint32_t share_source;   /* enum pv_source */
    int32_t share_status;    /* the guest's result: 0, or an SMCCC error */
    uint32_t pending;        /* work to finish when the loop is entered again; the loop's own */
    uint32_t event, event_count;
    uint64_t event_data[PV_EVENT_WORDS];
    int32_t error;
    uint32_t failure;        /* enum pv_failure */
    uint64_t fault_gpa, fault_size, fault_flags;
    uint32_t retries, timed; /* timed: not 0 keeps the histograms (counts are always kept) */
    uint64_t left_ns;        /* when KVM_RUN last returned; the loop's own */
    uint32_t hit, pad;       /* index in the bus of the last MMIO; the loop's own */
    struct pv_ring ring;
    struct pv_exit_stats stats[PV_EXITS];
};

/* Runs the vCPU until something needs Python. Returns enum pv_stop. Call from one thread at a time. */
uint32_t pv_run(struct pv_vcpu *vcpu);
/* Makes a running or about-to-run pv_run() return PV_STOP_KICK soon. Any thread. */
void pv_kick(struct pv_vcpu *vcpu);
/* Clears a kick, in the vCPU's own thread, before it checks the reason. */
void pv_unkick(struct pv_vcpu *vcpu);
/* Has KVM finish the current exit, so that the registers are at an instruction boundary. Does nothing if the loop will
   carry out the access on re-entry: that instruction has not begun. For a paused vCPU, any thread. Returns 0, or the
   errno of a failed KVM_RUN other than EINTR. */
int pv_settle(struct pv_vcpu *vcpu);
/* Answers the load that stopped the loop; value is taken in the guest's byte order, vcpu->size bytes of it. */
void pv_mmio_reply(struct pv_vcpu *vcpu, uint64_t value);
/* Gives no answer: the guest repeats the access that stopped the loop, because its address is memory by now. Only this
   is right for every access: KVM does not report accesses across pages. arm64 only. */
void pv_mmio_retry(struct pv_vcpu *vcpu);

/* ---- guarded copies ------------------------------------------------------------------------------------------ */

/* They never die, and never go through the kernel.

   Bytes copied before the first fault (n when none). Both sides may be anything; only one may fault. */
size_t pv_copy(void *to, const void *from, size_t n);
size_t pv_fill(void *to, int byte, size_t n);
/* By guest address, through pv_vm.map, across adjacent regions. Bytes done; on a short count *stopped is the gpa of
   the first byte not done (outside any region, or not accessible). In PV_PKVM they do not update the ledger with a
   page's accessibility: Python does, with source PV_SOURCE_ACCESS. */
uint64_t pv_read(struct pv_vm *vm, uint64_t gpa, void *to, uint64_t n, uint64_t *stopped);
uint64_t pv_write(struct pv_vm *vm, uint64_t gpa, const void *from, uint64_t n, uint64_t *stopped);
/* Whether one byte at gpa can be read: 1, 0, or -1 outside every region. */
int pv_probe(struct pv_vm *vm, uint64_t gpa);

/* ---- userfaultfd --------------------------------------------------------------------------------------------- */

/* Missing pages of [hva, hva + size) come from the same offset of source. Without source they come from file, at byte at
   and following, and must match the checksums that are there at byte sums. room is the caller's, for one host page, and
   only needed for a file. served and late may be read meanwhile. */
struct pv_fault_server {
    int32_t fd, stop_fd;     /* the userfaultfd, non-blocking; an eventfd */
    uint64_t hva, size;      /* whole pages */
    const uint8_t *source;
    int32_t file;
    uint32_t pad;
    uint64_t at, sums;
    uint8_t *room;
    uint64_t served, late;   /* late: served faults whose page had already arrived */
    uint64_t refused;        /* set to the offset of a page that cannot be read or does not match */
};
/* Serves until stop_fd is readable. Returns 0, or -errno of a permanent failure: -EINVAL for a fault outside the range,
   -ENODATA for a file that is too short, -EBADMSG for a page that does not match its checksum. Threads with unanswered
   faults keep waiting. Runs in its own thread. */
int pv_serve_faults(struct pv_fault_server *server);

/* ---- checksums ----------------------------------------------------------------------------------------------- */

/* Of each 4096 bytes a CRC-32 as in zlib, but from 0 and without the final inversion, so that of zeros it is 0. */
void pv_checksums(const uint8_t *pages, uint64_t count, uint32_t *sums);
/* The number of the first page that does not match its checksum, or count. */
uint64_t pv_first_damaged(const uint8_t *pages, uint64_t count, const uint32_t *sums);

/* ---- the process --------------------------------------------------------------------------------------------- */

/* Once per process, idempotent: the kick signal's handler and those of SIGSEGV and SIGBUS that guarded copies need.
   Faults outside a guarded copy go to the previous handler. 0 or -errno. */
int pv_install_signals(void);
int pv_kick_signal(void);

/* Hash of the sources this was built from, so that a stale build is noticed. */
const char *pv_source_hash(void);
