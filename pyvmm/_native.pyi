# SPDX-License-Identifier: Apache-2.0
"""The native loop's interface for Python. native/*/cdef.h document every structure, constant and function.

native/stubs.py writes this file. A class here that is named as a structure is one, and a pointer to one: fields are
reached alike through both. Structures are cffi's (``ffi.new("struct pv_vm *")``); whoever allocates one keeps it alive.
At run time the module has ``ffi`` and ``lib`` alone, so import a structure's name where ``TYPE_CHECKING`` only.

Every call releases the GIL. One that takes a buffer takes ``bytes`` where C only reads, else cdata.
"""

from collections.abc import Iterable, Iterator
from typing import (
    Any,
    Final,
    Generic,
    Literal,
    Self,
    SupportsIndex,
    TypeAlias,
    TypeVar,
    final,
    overload,
    type_check_only,
)

from typing_extensions import Buffer

_T = TypeVar("_T")
_S = TypeVar("_S", bound=CData)

@type_check_only
class CData:
    """A C structure, pointer or array; false for a null pointer."""

    def __bool__(self) -> bool: ...

@type_check_only
class Pointer(CData, Generic[_T]):
    """A pointer to one or more values."""

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> _T: ...
    @overload
    def __getitem__(self, index: slice, /) -> Array[_T]: ...
    @overload
    def __setitem__(self, index: SupportsIndex, value: _T, /) -> None: ...
    @overload
    def __setitem__(self, index: slice, value: Iterable[_T], /) -> None: ...
    def __add__(self, steps: int, /) -> Pointer[_T]: ...

@type_check_only
class Array(Pointer[_T]):
    """An array, which C takes as a pointer."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_T]: ...

@type_check_only
class Struct(CData):
    """A structure, or a pointer to one or to the first of several."""

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Self: ...
    @overload
    def __getitem__(self, index: slice, /) -> Array[Self]: ...
    def __add__(self, steps: int, /) -> Self: ...

_Ref: TypeAlias = _T | Array[_T]

@type_check_only
class _To(Generic[_T]):
    """A field that is a pointer to one or more structures."""

    def __get__(self, of: object, kind: object = ..., /) -> _T: ...
    def __set__(self, of: object, value: _Ref[_T], /) -> None: ...

@type_check_only
class _Items(Generic[_T]):
    """A field that is an array."""

    def __get__(self, of: object, kind: object = ..., /) -> Array[_T]: ...
    def __set__(self, of: object, value: Iterable[_T], /) -> None: ...

@type_check_only
@final
class Number(CData):
    """A pointer as a number."""

    def __int__(self) -> int: ...

@type_check_only
@final
class _Buffer(Buffer):
    """Memory behind a cdata, without a copy."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int | slice) -> bytes: ...
    def __setitem__(self, index: int | slice, value: Buffer) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@type_check_only
@final
class pv_region(Struct):
    gpa: int
    size: int
    view: Pointer[int]
    ledger: Pointer[int]
    fd: int
    flags: int
    fd_offset: int

@type_check_only
@final
class pv_map(Struct):
    count: int
    pad: int
    regions: _To[pv_region]

@type_check_only
@final
class pv_fifo(Struct):
    head: int
    tail: int
    size: int
    wake_fd: int
    armed: int
    pad: int
    dropped: int
    data: Pointer[int]

@type_check_only
@final
class pv_record(Struct):
    ns: int
    kind: int
    lost: int
    code: int
    vcpu: int
    size: int
    addr: int
    value: int

@type_check_only
@final
class pv_ring(Struct):
    head: int
    tail: int
    dropped: int
    marked: int
    size: int
    exits: int
    records: _To[pv_record]

@type_check_only
@final
class pv_range(Struct):
    base: int
    size: int
    kind: int
    index: int
    state: CData
    reads: int
    writes: int

@type_check_only
@final
class pv_bus(Struct):
    count: int
    pad: int
    ranges: _To[pv_range]

@type_check_only
@final
class pv_doorbell_slot(Struct):
    offset: int
    value: int
    fd: int
    match_any: int
    coalesce: int
    rung: int

@type_check_only
@final
class pv_doorbell(Struct):
    count: int
    pad: int
    missed: int
    slots: _To[pv_doorbell_slot]

@type_check_only
@final
class pv_pl011(Struct):
    tx: pv_fifo
    rx: pv_fifo
    lock: int
    cr: int
    lcr_h: int
    ibrd: int
    fbrd: int
    ifls: int
    imsc: int
    ris: int
    dmacr: int
    ilpr: int
    vm_fd: int
    irq: int
    level: int
    broken: int
    break_at: int
    pad: int

@type_check_only
@final
class pv_mailbox(Struct):
    state: int
    trapped: int
    order: _Items[int]
    result: _Items[int]
    trap: _Items[int]
    note: _Items[int]

@type_check_only
@final
class pv_interrupt(Struct):
    status: int
    fd: int
    sent: int

@type_check_only
@final
class pv_virtio_queue(Struct):
    most: int
    ready: int

@type_check_only
@final
class pv_virtio_mmio(Struct):
    interrupt: _To[pv_interrupt]
    bell: _To[pv_doorbell]
    queues: _To[pv_virtio_queue]
    device_features_sel: int
    driver_features_sel: int
    queue_sel: int
    lock: int
    offered: _Items[int]
    registers: _Items[int]
    config: _Items[int]

@type_check_only
@final
class pv_vm(Struct):
    fd: int
    protection: int
    map: _To[pv_map]
    bus: _To[pv_bus]
    subscribers: int
    conversion: int
    policy: _Items[int]
    retry_limit: int
    converting: int
    readers: _Items[int]
    phase: int
    pad: int
    published: int
    pages: _Items[int]
    shares: int
    unshares: int
    refused: int

@type_check_only
@final
class pv_histogram(Struct):
    bucket: _Items[int]

@type_check_only
@final
class pv_exit_stats(Struct):
    count: int
    guest_ns: int
    vmm_ns: int
    guest: pv_histogram
    vmm: pv_histogram

@type_check_only
@final
class pv_vcpu(Struct):
    fd: int
    index: int
    vm: _To[pv_vm]
    run: CData
    kick: int
    tid: int
    exit_reason: int
    exit: int
    range: _To[pv_range]
    gpa: int
    offset: int
    value: int
    size: int
    is_write: int
    share_gpa: int
    share_op: int
    share_source: int
    share_status: int
    pending: int
    event: int
    event_count: int
    event_data: _Items[int]
    error: int
    failure: int
    fault_gpa: int
    fault_size: int
    fault_flags: int
    retries: int
    timed: int
    left_ns: int
    hit: int
    pad: int
    ring: pv_ring
    stats: _Items[pv_exit_stats]

@type_check_only
@final
class pv_fault_server(Struct):
    fd: int
    stop_fd: int
    hva: int
    size: int
    source: Pointer[int]
    file: int
    pad: int
    at: int
    sums: int
    room: Pointer[int]
    served: int
    late: int
    refused: int

@type_check_only
@final
class pv_segment(Struct):
    gpa: int
    size: int
    writable: int

@type_check_only
@final
class pv_chain(Struct):
    room: int
    count: int
    readable: int
    id: int
    slots: int
    pad: int
    in_bytes: int
    out_bytes: int
    segments: _To[pv_segment]

@type_check_only
@final
class pv_queue(Struct):
    vm: _To[pv_vm]
    interrupt: _To[pv_interrupt]
    bell: _To[pv_doorbell_slot]
    size: int
    flags: int
    descriptors: int
    driver: int
    device: int
    kick: int
    stop: int
    error: int
    pad: int
    error_gpa: int
    kicks: int
    chains: int
    bytes: int
    next: int
    next_wrap: int
    used: int
    used_wrap: int
    available: int
    taken: int
    unsaid: int
    asked: int
    seen: int
    views: _Items[Pointer[int]]

@type_check_only
@final
class pv_bucket(Struct):
    rate: int
    full_at: int

@type_check_only
@final
class pv_limit(Struct):
    bytes: pv_bucket
    ops: pv_bucket

@type_check_only
@final
class pv_blk(Struct):
    queue: _To[pv_queue]
    chain: _To[pv_chain]
    limit: _To[pv_limit]
    bounce: Pointer[int]
    bounce_size: int
    file: int
    stop_fd: int
    flags: int
    abandon: int
    capacity: int
    most: int
    open: int
    type: int
    sector: int
    data: int
    error: int
    untold: int
    untold_bytes: int
    done: int
    failed: int
    denied: int
    bytes_read: int
    bytes_written: int

@type_check_only
@final
class pv_net_traffic(Struct):
    frames: int
    bytes: int
    dropped: int
    faults: int

@type_check_only
@final
class pv_net(Struct):
    rx: _To[pv_queue]
    tx: _To[pv_queue]
    fd: int
    stop_fd: int
    backend: int
    mergeable: int
    longest: int
    error: int
    chain: _To[pv_chain]
    send_limit: _To[pv_limit]
    receive_limit: _To[pv_limit]
    work: CData
    sent: pv_net_traffic
    received: pv_net_traffic

@type_check_only
@final
class _Ffi:
    NULL: Final[Any]
    @overload
    def new(self, cdecl: Literal["struct pv_region *"], init: object = ...) -> pv_region: ...
    @overload
    def new(self, cdecl: Literal["struct pv_region[]"], init: object = ...) -> Array[pv_region]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_map *"], init: object = ...) -> pv_map: ...
    @overload
    def new(self, cdecl: Literal["struct pv_map[]"], init: object = ...) -> Array[pv_map]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_fifo *"], init: object = ...) -> pv_fifo: ...
    @overload
    def new(self, cdecl: Literal["struct pv_fifo[]"], init: object = ...) -> Array[pv_fifo]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_record *"], init: object = ...) -> pv_record: ...
    @overload
    def new(self, cdecl: Literal["struct pv_record[]"], init: object = ...) -> Array[pv_record]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_ring *"], init: object = ...) -> pv_ring: ...
    @overload
    def new(self, cdecl: Literal["struct pv_ring[]"], init: object = ...) -> Array[pv_ring]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_range *"], init: object = ...) -> pv_range: ...
    @overload
    def new(self, cdecl: Literal["struct pv_range[]"], init: object = ...) -> Array[pv_range]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_bus *"], init: object = ...) -> pv_bus: ...
    @overload
    def new(self, cdecl: Literal["struct pv_bus[]"], init: object = ...) -> Array[pv_bus]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_doorbell_slot *"], init: object = ...) -> pv_doorbell_slot: ...
    @overload
    def new(self, cdecl: Literal["struct pv_doorbell_slot[]"], init: object = ...) -> Array[pv_doorbell_slot]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_doorbell *"], init: object = ...) -> pv_doorbell: ...
    @overload
    def new(self, cdecl: Literal["struct pv_doorbell[]"], init: object = ...) -> Array[pv_doorbell]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_pl011 *"], init: object = ...) -> pv_pl011: ...
    @overload
    def new(self, cdecl: Literal["struct pv_pl011[]"], init: object = ...) -> Array[pv_pl011]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_mailbox *"], init: object = ...) -> pv_mailbox: ...
    @overload
    def new(self, cdecl: Literal["struct pv_mailbox[]"], init: object = ...) -> Array[pv_mailbox]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_interrupt *"], init: object = ...) -> pv_interrupt: ...
    @overload
    def new(self, cdecl: Literal["struct pv_interrupt[]"], init: object = ...) -> Array[pv_interrupt]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_virtio_queue *"], init: object = ...) -> pv_virtio_queue: ...
    @overload
    def new(self, cdecl: Literal["struct pv_virtio_queue[]"], init: object = ...) -> Array[pv_virtio_queue]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_virtio_mmio *"], init: object = ...) -> pv_virtio_mmio: ...
    @overload
    def new(self, cdecl: Literal["struct pv_virtio_mmio[]"], init: object = ...) -> Array[pv_virtio_mmio]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_vm *"], init: object = ...) -> pv_vm: ...
    @overload
    def new(self, cdecl: Literal["struct pv_vm[]"], init: object = ...) -> Array[pv_vm]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_histogram *"], init: object = ...) -> pv_histogram: ...
    @overload
    def new(self, cdecl: Literal["struct pv_histogram[]"], init: object = ...) -> Array[pv_histogram]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_exit_stats *"], init: object = ...) -> pv_exit_stats: ...
    @overload
    def new(self, cdecl: Literal["struct pv_exit_stats[]"], init: object = ...) -> Array[pv_exit_stats]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_vcpu *"], init: object = ...) -> pv_vcpu: ...
    @overload
    def new(self, cdecl: Literal["struct pv_vcpu[]"], init: object = ...) -> Array[pv_vcpu]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_fault_server *"], init: object = ...) -> pv_fault_server: ...
    @overload
    def new(self, cdecl: Literal["struct pv_fault_server[]"], init: object = ...) -> Array[pv_fault_server]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_segment *"], init: object = ...) -> pv_segment: ...
    @overload
    def new(self, cdecl: Literal["struct pv_segment[]"], init: object = ...) -> Array[pv_segment]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_chain *"], init: object = ...) -> pv_chain: ...
    @overload
    def new(self, cdecl: Literal["struct pv_chain[]"], init: object = ...) -> Array[pv_chain]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_queue *"], init: object = ...) -> pv_queue: ...
    @overload
    def new(self, cdecl: Literal["struct pv_queue[]"], init: object = ...) -> Array[pv_queue]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_bucket *"], init: object = ...) -> pv_bucket: ...
    @overload
    def new(self, cdecl: Literal["struct pv_bucket[]"], init: object = ...) -> Array[pv_bucket]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_limit *"], init: object = ...) -> pv_limit: ...
    @overload
    def new(self, cdecl: Literal["struct pv_limit[]"], init: object = ...) -> Array[pv_limit]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_blk *"], init: object = ...) -> pv_blk: ...
    @overload
    def new(self, cdecl: Literal["struct pv_blk[]"], init: object = ...) -> Array[pv_blk]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_net_traffic *"], init: object = ...) -> pv_net_traffic: ...
    @overload
    def new(self, cdecl: Literal["struct pv_net_traffic[]"], init: object = ...) -> Array[pv_net_traffic]: ...
    @overload
    def new(self, cdecl: Literal["struct pv_net *"], init: object = ...) -> pv_net: ...
    @overload
    def new(self, cdecl: Literal["struct pv_net[]"], init: object = ...) -> Array[pv_net]: ...
    @overload
    def new(self, cdecl: Literal["uint8_t *"], init: object = ...) -> Pointer[int]: ...
    @overload
    def new(self, cdecl: Literal["uint8_t[]"], init: object = ...) -> Array[int]: ...
    @overload
    def new(self, cdecl: Literal["uint32_t *"], init: object = ...) -> Pointer[int]: ...
    @overload
    def new(self, cdecl: Literal["uint32_t[]"], init: object = ...) -> Array[int]: ...
    @overload
    def new(self, cdecl: Literal["uint64_t *"], init: object = ...) -> Pointer[int]: ...
    @overload
    def new(self, cdecl: Literal["uint64_t[]"], init: object = ...) -> Array[int]: ...
    @overload
    def new(self, cdecl: str, init: object = ...) -> Any: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_region *"], value: object) -> pv_region: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_map *"], value: object) -> pv_map: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_fifo *"], value: object) -> pv_fifo: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_record *"], value: object) -> pv_record: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_ring *"], value: object) -> pv_ring: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_range *"], value: object) -> pv_range: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_bus *"], value: object) -> pv_bus: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_doorbell_slot *"], value: object) -> pv_doorbell_slot: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_doorbell *"], value: object) -> pv_doorbell: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_pl011 *"], value: object) -> pv_pl011: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_mailbox *"], value: object) -> pv_mailbox: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_interrupt *"], value: object) -> pv_interrupt: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_virtio_queue *"], value: object) -> pv_virtio_queue: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_virtio_mmio *"], value: object) -> pv_virtio_mmio: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_vm *"], value: object) -> pv_vm: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_histogram *"], value: object) -> pv_histogram: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_exit_stats *"], value: object) -> pv_exit_stats: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_vcpu *"], value: object) -> pv_vcpu: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_fault_server *"], value: object) -> pv_fault_server: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_segment *"], value: object) -> pv_segment: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_chain *"], value: object) -> pv_chain: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_queue *"], value: object) -> pv_queue: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_bucket *"], value: object) -> pv_bucket: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_limit *"], value: object) -> pv_limit: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_blk *"], value: object) -> pv_blk: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_net_traffic *"], value: object) -> pv_net_traffic: ...
    @overload
    def cast(self, cdecl: Literal["struct pv_net *"], value: object) -> pv_net: ...
    @overload
    def cast(self, cdecl: Literal["uint8_t *"], value: object) -> Pointer[int]: ...
    @overload
    def cast(self, cdecl: Literal["uint32_t *"], value: object) -> Pointer[int]: ...
    @overload
    def cast(self, cdecl: Literal["uint64_t *"], value: object) -> Pointer[int]: ...
    @overload
    def cast(self, cdecl: Literal["uintptr_t"], value: object) -> Number: ...
    @overload
    def cast(self, cdecl: Literal["void *"], value: object) -> CData: ...
    @overload
    def cast(self, cdecl: str, value: object) -> Any: ...
    def string(self, cdata: CData, maxlen: int = ...) -> bytes: ...
    def buffer(self, cdata: CData, size: int = ...) -> _Buffer: ...
    @overload
    def from_buffer(self, cdecl: Literal["uint8_t[]"], buffer: Buffer, require_writable: bool = ...) -> Array[int]: ...
    @overload
    def from_buffer(self, cdecl: str, buffer: Buffer, require_writable: bool = ...) -> Any: ...
    def release(self, cdata: CData) -> None: ...
    def memmove(self, dest: CData | Buffer, src: CData | Buffer, n: int) -> None: ...
    @overload
    def addressof(self, cdata: _S, /) -> _S: ...
    @overload
    def addressof(self, cdata: CData, *fields: str | int) -> Any: ...
    def offsetof(self, cdecl: str, *fields: str | int) -> int: ...
    def sizeof(self, cdecl: str | CData) -> int: ...
    def typeof(self, cdecl: str | CData) -> Any: ...
    def list_types(self) -> tuple[list[str], list[str], list[str]]: ...

@type_check_only
@final
class _Lib:
    PV_PAGE_ABSENT: Final[int]
    PV_PAGE_HOST: Final[int]
    PV_PAGE_PRIVATE: Final[int]
    PV_PAGE_SHARED: Final[int]
    PV_PAGE_HOLE: Final[int]
    PV_PAGE_POISONED: Final[int]
    PV_PAGE_STATES: Final[int]
    PV_PAGE_ASSUMED: Final[int]

    PV_LEDGER_STATES: Final[int]

    PV_NONE: Final[int]
    PV_PKVM: Final[int]
    PV_EMULATED: Final[int]

    PV_CONVERT_PRESERVE: Final[int]
    PV_CONVERT_ZERO: Final[int]
    PV_CONVERT_PUNCH: Final[int]
    PV_CONVERT_COLD: Final[int]

    PV_REC_EXIT: Final[int]
    PV_REC_SHARE: Final[int]
    PV_REC_UNSHARE: Final[int]
    PV_REC_FAULT: Final[int]

    PV_KIND_COLD: Final[int]
    PV_KIND_REGISTERS: Final[int]
    PV_KIND_COUNTER: Final[int]
    PV_KIND_DOORBELL: Final[int]
    PV_KIND_PL011: Final[int]
    PV_KIND_MAILBOX: Final[int]
    PV_KIND_SHARE: Final[int]
    PV_KIND_VIRTIO: Final[int]
    PV_KINDS: Final[int]

    PV_MAILBOX_WORDS: Final[int]
    PV_MAILBOX_NOTES: Final[int]

    PV_MAILBOX_IDLE: Final[int]
    PV_MAILBOX_ORDER: Final[int]
    PV_MAILBOX_BUSY: Final[int]
    PV_MAILBOX_DONE: Final[int]

    PV_INTERRUPT_USED: Final[int]
    PV_INTERRUPT_CONFIG: Final[int]

    PV_VIRTIO_REGISTERS: Final[int]
    PV_VIRTIO_CONFIG: Final[int]
    PV_VIRTIO_FEATURE_WORDS: Final[int]

    PV_SOURCE_DOORBELL: Final[int]
    PV_SOURCE_HYPERCALL: Final[int]
    PV_SOURCE_ACCESS: Final[int]
    PV_SOURCE_EXIT: Final[int]

    PV_FAIL_EAGAIN: Final[int]
    PV_FAIL_ENOMEM: Final[int]
    PV_FAIL_EFAULT: Final[int]
    PV_FAIL_MEMORY: Final[int]
    PV_FAIL_EHWPOISON: Final[int]
    PV_FAIL_OTHER: Final[int]
    PV_FAILURES: Final[int]

    PV_ACT_STOP: Final[int]
    PV_ACT_RETRY: Final[int]
    PV_ACT_PUNCH: Final[int]

    PV_POLICY_ROOM: Final[int]
    PV_MAP_PHASES: Final[int]

    PV_EXIT_MMIO_COLD: Final[int]
    PV_EXIT_MMIO_REGISTERS: Final[int]
    PV_EXIT_MMIO_COUNTER: Final[int]
    PV_EXIT_MMIO_DOORBELL: Final[int]
    PV_EXIT_MMIO_PL011: Final[int]
    PV_EXIT_MMIO_MAILBOX: Final[int]
    PV_EXIT_MMIO_SHARE: Final[int]
    PV_EXIT_MMIO_VIRTIO: Final[int]
    PV_EXIT_MMIO_UNCLAIMED: Final[int]
    PV_EXIT_HYPERCALL: Final[int]
    PV_EXIT_SYSTEM: Final[int]
    PV_EXIT_DEBUG: Final[int]
    PV_EXIT_INTR: Final[int]
    PV_EXIT_FAILED: Final[int]
    PV_EXIT_OTHER: Final[int]
    PV_EXITS: Final[int]

    PV_HISTOGRAM_STEPS: Final[int]
    PV_HISTOGRAM_BUCKETS: Final[int]

    PV_STOP_NONE: Final[int]
    PV_STOP_KICK: Final[int]
    PV_STOP_MMIO: Final[int]
    PV_STOP_UNCLAIMED: Final[int]
    PV_STOP_MAILBOX: Final[int]
    PV_STOP_FIFO: Final[int]
    PV_STOP_SHARE: Final[int]
    PV_STOP_CONVERT: Final[int]
    PV_STOP_HYPERCALL: Final[int]
    PV_STOP_SYSTEM: Final[int]
    PV_STOP_DEBUG: Final[int]
    PV_STOP_FAILED: Final[int]
    PV_STOP_OTHER: Final[int]
    PV_STOPS: Final[int]

    PV_EVENT_WORDS: Final[int]

    PV_QUEUE_PACKED: Final[int]
    PV_QUEUE_EVENT_IDX: Final[int]
    PV_QUEUE_INDIRECT: Final[int]

    PV_AREA_DESCRIPTORS: Final[int]
    PV_AREA_DRIVER: Final[int]
    PV_AREA_DEVICE: Final[int]
    PV_AREAS: Final[int]

    PV_QUEUE_OK: Final[int]
    PV_QUEUE_RING: Final[int]
    PV_QUEUE_TABLE: Final[int]
    PV_QUEUE_INDEX: Final[int]
    PV_QUEUE_DESCRIPTOR: Final[int]
    PV_QUEUE_LOOP: Final[int]
    PV_QUEUE_SEGMENT: Final[int]
    PV_QUEUE_ORDER: Final[int]
    PV_QUEUE_LENGTH: Final[int]
    PV_QUEUE_INDIRECTION: Final[int]
    PV_QUEUE_ROOM: Final[int]
    PV_QUEUE_ERRORS: Final[int]

    PV_BLK_SEGMENTS: Final[int]

    PV_BLK_READ_ONLY: Final[int]
    PV_BLK_REGULAR: Final[int]
    PV_BLK_THROUGH: Final[int]

    PV_BLK_NONE: Final[int]
    PV_BLK_STOPPED: Final[int]
    PV_BLK_REQUEST: Final[int]
    PV_BLK_FAILED: Final[int]
    PV_BLK_BROKEN: Final[int]

    PV_NET_NONE: Final[int]
    PV_NET_TAP: Final[int]
    PV_NET_STREAM: Final[int]

    PV_NET_STOPPED: Final[int]
    PV_NET_BROKEN: Final[int]
    PV_NET_GONE: Final[int]
    PV_NET_FAILED: Final[int]

    pv_page_shift: int
    def pv_fifo_read(self, fifo: _Ref[pv_fifo], to: Pointer[int], n: int, /) -> int: ...
    def pv_fifo_arm(self, fifo: _Ref[pv_fifo], /) -> int: ...
    def pv_ring_read(self, ring: _Ref[pv_ring], to: _Ref[pv_record], n: int, /) -> int: ...
    def pv_doorbell_take(self, slot: _Ref[pv_doorbell_slot], /) -> None: ...
    def pv_pl011_feed(self, uart: _Ref[pv_pl011], source: bytes | Pointer[int], n: int, /) -> int: ...
    def pv_pl011_break(self, uart: _Ref[pv_pl011], /) -> int: ...
    def pv_virtio_configure(
        self, transport: _Ref[pv_virtio_mmio], config: bytes | Pointer[int], size: int, generation: int, /
    ) -> None: ...
    def pv_publish_map(self, vm: _Ref[pv_vm], table: _Ref[pv_map], /) -> None: ...
    def pv_publish_bus(self, vm: _Ref[pv_vm], bus: _Ref[pv_bus], /) -> None: ...
    def pv_subscribe(self, vm: _Ref[pv_vm], count: int, /) -> None: ...
    def pv_ledger_set(self, vm: _Ref[pv_vm], gpa: int, state: int, /) -> int: ...
    def pv_bucket_floor(self, bucket: int, /) -> int: ...
    def pv_bucket_of(self, ns: int, /) -> int: ...
    def pv_run(self, vcpu: _Ref[pv_vcpu], /) -> int: ...
    def pv_kick(self, vcpu: _Ref[pv_vcpu], /) -> None: ...
    def pv_unkick(self, vcpu: _Ref[pv_vcpu], /) -> None: ...
    def pv_settle(self, vcpu: _Ref[pv_vcpu], /) -> int: ...
    def pv_mmio_reply(self, vcpu: _Ref[pv_vcpu], value: int, /) -> None: ...
    def pv_mmio_retry(self, vcpu: _Ref[pv_vcpu], /) -> None: ...
    def pv_copy(self, to: CData, source: bytes | CData, n: int, /) -> int: ...
    def pv_fill(self, to: CData, byte: int, n: int, /) -> int: ...
    def pv_read(self, vm: _Ref[pv_vm], gpa: int, to: CData, n: int, stopped: Pointer[int], /) -> int: ...
    def pv_write(self, vm: _Ref[pv_vm], gpa: int, source: bytes | CData, n: int, stopped: Pointer[int], /) -> int: ...
    def pv_probe(self, vm: _Ref[pv_vm], gpa: int, /) -> int: ...
    def pv_serve_faults(self, server: _Ref[pv_fault_server], /) -> int: ...
    def pv_checksums(self, pages: bytes | Pointer[int], count: int, sums: Pointer[int], /) -> None: ...
    def pv_first_damaged(self, pages: bytes | Pointer[int], count: int, sums: Pointer[int], /) -> int: ...
    def pv_install_signals(self) -> int: ...
    def pv_kick_signal(self) -> int: ...
    def pv_source_hash(self) -> CData: ...
    def pv_queue_start(self, queue: _Ref[pv_queue], /) -> None: ...
    def pv_queue_pop(self, queue: _Ref[pv_queue], chain: _Ref[pv_chain], /) -> int: ...
    def pv_queue_push(self, queue: _Ref[pv_queue], chain: _Ref[pv_chain], written: int, /) -> int: ...
    def pv_queue_push_all(
        self, queue: _Ref[pv_queue], chains: _Ref[pv_chain], written: Pointer[int], count: int, /
    ) -> int: ...
    def pv_queue_unpop(self, queue: _Ref[pv_queue], newest: _Ref[pv_chain], /) -> None: ...
    def pv_queue_interrupt(self, queue: _Ref[pv_queue], /) -> None: ...
    def pv_queue_arm(self, queue: _Ref[pv_queue], /) -> int: ...
    def pv_queue_wake(self, queue: _Ref[pv_queue], /) -> None: ...
    def pv_queue_take(self, queue: _Ref[pv_queue], /) -> None: ...
    def pv_chain_read(self, queue: _Ref[pv_queue], chain: _Ref[pv_chain], offset: int, to: CData, n: int, /) -> int: ...
    def pv_chain_write(
        self, queue: _Ref[pv_queue], chain: _Ref[pv_chain], offset: int, source: bytes | CData, n: int, /
    ) -> int: ...
    def pv_interrupt(self, interrupt: _Ref[pv_interrupt], bits: int, /) -> None: ...
    def pv_limit_wait(self, limit: _Ref[pv_limit], /) -> int: ...
    def pv_limit_take(self, limit: _Ref[pv_limit], bytes: int, ops: int, /) -> None: ...
    def pv_blk_serve(self, blk: _Ref[pv_blk], /) -> int: ...
    def pv_blk_answer(self, blk: _Ref[pv_blk], status: int, /) -> int: ...
    def pv_net_room(self) -> int: ...
    def pv_net_serve(self, net: _Ref[pv_net], /) -> int: ...
    def pv_net_settle(self, net: _Ref[pv_net], /) -> None: ...

ffi: Final[_Ffi]
lib: Final[_Lib]
