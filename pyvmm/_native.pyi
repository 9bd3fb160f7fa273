# SPDX-License-Identifier: Apache-2.0
"""The native loop as Python sees it: native/*/cdef.h say what every structure, constant and function means.

Structures are cffi's (``ffi.new("struct pv_vm *")``) and not typed here; whoever allocates one keeps it alive.
Every call releases the GIL. One that takes a buffer takes ``bytes`` where C only reads, else cdata.
"""

from typing import Any, Final, TypeAlias, final

from typing_extensions import Buffer

_CData: TypeAlias = Any

@final
class _Buffer(Buffer):
    """Memory behind a cdata, without a copy."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int | slice) -> bytes: ...
    def __setitem__(self, index: int | slice, value: Buffer) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class _Ffi:
    NULL: Final[_CData]
    CData: Final[type]
    def new(self, cdecl: str, init: object = ...) -> _CData: ...
    def cast(self, cdecl: str, value: object) -> _CData: ...
    def string(self, cdata: _CData, maxlen: int = ...) -> bytes: ...
    def buffer(self, cdata: _CData, size: int = ...) -> _Buffer: ...
    def from_buffer(self, cdecl: str, buffer: Buffer, require_writable: bool = ...) -> _CData: ...
    def memmove(self, dest: _CData | Buffer, src: _CData | Buffer, n: int) -> None: ...
    def addressof(self, cdata: _CData, *fields: str | int) -> _CData: ...
    def offsetof(self, cdecl: str, *fields: str | int) -> int: ...
    def sizeof(self, cdecl: str | _CData) -> int: ...
    def typeof(self, cdecl: str | _CData) -> Any: ...

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
    PV_MAILBOX_WORDS: Final[int]
    PV_MAILBOX_NOTES: Final[int]
    PV_POLICY_ROOM: Final[int]
    PV_MAP_PHASES: Final[int]
    PV_HISTOGRAM_STEPS: Final[int]
    PV_HISTOGRAM_BUCKETS: Final[int]
    PV_EVENT_WORDS: Final[int]

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

    PV_MAILBOX_IDLE: Final[int]
    PV_MAILBOX_ORDER: Final[int]
    PV_MAILBOX_BUSY: Final[int]
    PV_MAILBOX_DONE: Final[int]

    PV_INTERRUPT_USED: Final[int]
    PV_INTERRUPT_CONFIG: Final[int]

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

    PV_NET_NONE: Final[int]
    PV_NET_TAP: Final[int]
    PV_NET_STREAM: Final[int]
    PV_NET_STOPPED: Final[int]
    PV_NET_BROKEN: Final[int]
    PV_NET_GONE: Final[int]
    PV_NET_FAILED: Final[int]

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

    PV_BLK_SEGMENTS: Final[int]
    PV_BLK_READ_ONLY: Final[int]
    PV_BLK_REGULAR: Final[int]
    PV_BLK_THROUGH: Final[int]

    PV_BLK_NONE: Final[int]
    PV_BLK_STOPPED: Final[int]
    PV_BLK_REQUEST: Final[int]
    PV_BLK_FAILED: Final[int]
    PV_BLK_BROKEN: Final[int]

    def pv_run(self, vcpu: _CData, /) -> int: ...
    def pv_publish_map(self, vm: _CData, map: _CData, /) -> None: ...
    def pv_publish_bus(self, vm: _CData, bus: _CData, /) -> None: ...
    def pv_subscribe(self, vm: _CData, count: int, /) -> None: ...
    def pv_kick(self, vcpu: _CData, /) -> None: ...
    def pv_unkick(self, vcpu: _CData, /) -> None: ...
    def pv_settle(self, vcpu: _CData, /) -> int: ...
    def pv_mmio_reply(self, vcpu: _CData, value: int, /) -> None: ...
    def pv_mmio_retry(self, vcpu: _CData, /) -> None: ...
    def pv_bucket_floor(self, bucket: int, /) -> int: ...
    def pv_bucket_of(self, ns: int, /) -> int: ...
    def pv_install_signals(self) -> int: ...
    def pv_kick_signal(self) -> int: ...
    def pv_copy(self, to: _CData, source: _CData | bytes, n: int, /) -> int: ...
    def pv_fill(self, to: _CData, byte: int, n: int, /) -> int: ...
    def pv_read(self, vm: _CData, gpa: int, to: _CData, n: int, stopped: _CData, /) -> int: ...
    def pv_write(self, vm: _CData, gpa: int, source: _CData | bytes, n: int, stopped: _CData, /) -> int: ...
    def pv_probe(self, vm: _CData, gpa: int, /) -> int: ...
    def pv_ledger_set(self, vm: _CData, gpa: int, state: int, /) -> int: ...
    def pv_serve_faults(self, server: _CData, /) -> int: ...
    def pv_fifo_read(self, fifo: _CData, to: _CData, n: int, /) -> int: ...
    def pv_fifo_arm(self, fifo: _CData, /) -> int: ...
    def pv_doorbell_take(self, slot: _CData, /) -> None: ...
    def pv_pl011_feed(self, uart: _CData, source: _CData | bytes, n: int, /) -> int: ...
    def pv_ring_read(self, ring: _CData, to: _CData, n: int, /) -> int: ...
    def pv_queue_start(self, queue: _CData, /) -> None: ...
    def pv_queue_pop(self, queue: _CData, chain: _CData, /) -> int: ...
    def pv_queue_push(self, queue: _CData, chain: _CData, written: int, /) -> int: ...
    def pv_queue_push_all(self, queue: _CData, chains: _CData, written: _CData, count: int, /) -> int: ...
    def pv_queue_unpop(self, queue: _CData, newest: _CData, /) -> None: ...
    def pv_queue_interrupt(self, queue: _CData, /) -> None: ...
    def pv_queue_arm(self, queue: _CData, /) -> int: ...
    def pv_queue_take(self, queue: _CData, /) -> None: ...
    def pv_chain_read(self, queue: _CData, chain: _CData, offset: int, to: _CData, n: int, /) -> int: ...
    def pv_chain_write(self, queue: _CData, chain: _CData, offset: int, source: _CData | bytes, n: int, /) -> int: ...
    def pv_blk_serve(self, blk: _CData, /) -> int: ...
    def pv_blk_answer(self, blk: _CData, status: int, /) -> int: ...
    def pv_interrupt(self, interrupt: _CData, bits: int, /) -> None: ...
    def pv_net_room(self) -> int: ...
    def pv_net_serve(self, net: _CData, /) -> int: ...
    def pv_net_settle(self, net: _CData, /) -> None: ...
    def pv_source_hash(self) -> _CData: ...

ffi: Final[_Ffi]
lib: Final[_Lib]
