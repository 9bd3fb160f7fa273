# SPDX-License-Identifier: Apache-2.0
"""The loop and its pure-Python twin decide alike, whatever a guest and a kernel do."""

from __future__ import annotations

import errno
import os
from collections import Counter as Bag
from random import Random
from typing import Any

import pytest

from pyvmm import abi
from pyvmm._native import lib
from pyvmm.uapi.errno import EHWPOISON
from tests import twin
from tests.fake_kvm import EXIT_DEBUG, EXIT_HLT, EXIT_MEMORY_FAULT, EXIT_MMIO, EXIT_SYSTEM, Rig, failure, hypercall

PAGES = 4
REGISTERS, COUNTER, DOORBELL, UART, MAILBOX, SHARE, COLD, VIRTIO = (0x0930_0000 + 0x10000 * n for n in range(8))
SIZES = {
    "REGISTERS": 24,
    "COUNTER": 8,
    "DOORBELL": 32,
    "PL011": 4096,
    "MAILBOX": 8192,
    "SHARE": 4096,
    "COLD": 64,
    "VIRTIO": 512,
}
BASES = dict(zip(SIZES, (REGISTERS, COUNTER, DOORBELL, UART, MAILBOX, SHARE, COLD, VIRTIO), strict=True))
INTERRUPTS = 0x53
SLOTS = ((0, 1, 0), (0, 2, 1), (8, None, 2))
KICKS = ((0x50, 0, 0), (0x50, 1, 1))
OFFERED = [0x11, 0x22, 0x33, 0x44]
QUEUES = [(8, 1), (4, 0)]
SHOWN = {0x00: 0x7472_6976, 0x08: 42, 0x70: 15, 0xB0: 0xFFFF_FFFF, 0xFC: 9}
CONFIG = bytes(range(1, 41))
IRQ = 3
BOX_OFFSETS = [*range(0, 0xF0, 8), 4, 0x1000, 0x1078]
VIRTIO_OFFSETS = [*range(0, 0x100, 4), *[0x10, 0x14, 0x24, 0x30, 0x34, 0x44, 0x50, 0x60, 0x64] * 6]
VIRTIO_OFFSETS += [*range(0xFC, 0x130), 0x1F8, 0x1FC, 1, 0x32, 0x4C, 0x54, -4, 0x200]
UART_OFFSETS = [0, 0, 0, *range(4, 0x50, 4), 0xFE0, 0xFFC, 1]

STATES = ["ABSENT", "HOST", "PRIVATE", "PRIVATE", "SHARED", "SHARED", "HOLE", "POISONED", "MOVING"]


class Guest:
    """The actions of a guest and its kernel, drawn uniformly: Hypothesis prefers short lists and zeros."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.any = random.choice

    def machine(self) -> dict[str, Any]:
        return {
            "protection": self.any(["NONE", "PKVM", "EMULATED", "EMULATED"]),
            "conversion": self.any(["PRESERVE", "ZERO", "PUNCH", "COLD"]),
            "subscribers": self.any([False, True]),
            "states": [self.any(STATES) for _ in range(PAGES)],
            "policy": [self.any([0, 1, 2]) for _ in range(6)],
            "retry_limit": self.any([0, 1, 2, 3]),
            "closed": {page for page in range(PAGES) if self.any([False, True])},
            "protect_fails": self.any([0, 0, 1, 2]),
        }

    def script(self) -> list[dict[str, Any]]:
        steps = self.any(
            [
                [self.mmio, self.mmio, self.hypercall, self.failure, self.other],
                [self.hypercall, self.hypercall, self.hypercall, self.bell, self.failure],
                [lambda: self.mmio("PL011")],
                [lambda: self.mmio("MAILBOX")],
                [lambda: self.mmio("VIRTIO")],
                [self.bell, self.bell, self.failure],
            ]
        )
        return [self.any(steps)() for _ in range(self.random.randrange(60))]

    def replies(self) -> list[int]:
        return [self.value() for _ in range(5)]

    def value(self) -> int:
        return self.any([0, 1, 2, 3, 0x50, 0x7FF, 2**32 - 1, self.random.getrandbits(64)])

    def page(self) -> int:
        return Rig.RAM + 4096 * self.random.randrange(-1, PAGES + 1)

    def mmio(self, kind: str | None = None) -> dict[str, Any]:
        kind = kind or self.any(list(SIZES))
        if kind == "SHARE":
            return self.bell()
        offsets = {"PL011": UART_OFFSETS, "MAILBOX": BOX_OFFSETS, "DOORBELL": [0, 8, 16]}
        offsets["VIRTIO"] = VIRTIO_OFFSETS
        offset = self.any(offsets.get(kind, range(-1, SIZES[kind] + 1)))
        return self.access(
            BASES[kind] + offset, self.any([4, 4, 4, 1, 2, 8] if kind == "VIRTIO" else [1, 2, 4, 8, 8]), self.value()
        )

    def bell(self) -> dict[str, Any]:
        value = self.page() | self.any([1, 1, 1, 2, 2, 2, 0, 3, 0x11])
        return self.access(SHARE + self.any([0, 0, 0, 0, 8]), self.any([8, 8, 8, 8, 4]), value)

    def access(self, gpa: int, size: int, value: int) -> dict[str, Any]:
        return {"exit_reason": EXIT_MMIO, "gpa": gpa, "data": value, "len": size, "is_write": self.any([0, 1])}

    def hypercall(self) -> dict[str, Any]:
        number = self.any([*[abi.HVC_SHARE, abi.HVC_UNSHARE] * 4, abi.HVC_MEMINFO, abi.HVC_FEATURES, 0x8400_0000])
        x1 = self.any([self.page(), self.page(), self.page(), 0, Rig.RAM + 8])
        told = self.any([self.page(), self.page(), self.page(), Rig.RAM + 8])
        return hypercall(number, x1, self.any([0, 0, 0, 0, 1]), self.any([0, 0, 0, 0, 2**63]), told=told)

    def failure(self) -> dict[str, Any]:
        untold = [errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.EFAULT, errno.EIO]
        told = [errno.EFAULT, errno.EFAULT, EHWPOISON, errno.ENOMEM]
        return self.any([failure(self.any(untold)), failure(self.any(told), gpa=self.page())])

    def other(self) -> dict[str, Any]:
        event = {"exit_reason": EXIT_SYSTEM, "nr": 1, "len": self.random.randrange(17), "data": 9}
        return self.any([event, {"exit_reason": EXIT_DEBUG}, {"exit_reason": 17}])


class FakeKernel:
    """The fake kernel of fake_kvm.c in Python, and the host's side of a page."""

    def __init__(self, run: memoryview, script: list[dict[str, Any]], machine: dict[str, Any]) -> None:
        self.run, self.script, self.next = run, script, 0
        self.x = [0] * 4
        self.answers: list[int] = []
        self.outs: list[list[int]] = []
        self.rung: Bag[int] = Bag()
        self.moves: list[bool] = []
        self.open = [n not in machine["closed"] for n in range(PAGES)]
        self.dropped: set[int] = set()
        self.protect_fails = machine["protect_fails"]

    def enter(self) -> int:
        if self.next:
            last = self.script[self.next - 1]
            is_load = not last.get("error") and last["exit_reason"] == EXIT_MMIO and not last["is_write"]
            size = last.get("len", 0)
            self.answers.append(int.from_bytes(self.run[40 : 40 + size], "little") if is_load else 0)
            self.outs.append(list(self.x))
        if self.next == len(self.script):
            self.run[8:12] = EXIT_HLT.to_bytes(4, "little")
            return 0
        step = self.script[self.next]
        self.next += 1
        reason = step.get("exit_reason", 0)
        self.run[8:12] = reason.to_bytes(4, "little")
        put = {
            EXIT_MMIO: lambda: [
                (32, 8, step["gpa"]),
                (40, 8, step["data"]),
                (48, 4, step["len"]),
                (52, 1, step["is_write"]),
            ],
            3: lambda: [(32, 8, step["nr"]), (40, 8, step["gpa"])],
            EXIT_SYSTEM: lambda: (
                [(32, 4, step["nr"]), (36, 4, step["len"])] + [(40 + 8 * n, 8, step["data"] + n) for n in range(16)]
            ),
            EXIT_MEMORY_FAULT: lambda: [(32, 8, 0), (40, 8, step["gpa"]), (48, 8, step["data"])],
        }
        for at, size, value in put.get(reason, list)():
            self.run[at : at + size] = value.to_bytes(size, "little")
        self.x = list(step.get("x", self.x))
        return int(step.get("error", 0))

    def get_x(self, n: int) -> int:
        return self.x[n]

    def set_x(self, n: int, value: int) -> None:
        self.x[n] = value

    def signal(self, fd: int) -> None:
        self.rung[fd] += 1

    def irq_line(self, irq: int, level: bool) -> None:
        assert irq == IRQ
        self.moves.append(level)

    def protect(self, gpa: int, open_: bool) -> bool:
        if self.protect_fails:
            self.protect_fails -= 1
            return False
        self.open[(gpa - Rig.RAM) // 4096] = open_
        return True

    def drop(self, gpa: int, conversion: int) -> bool:
        if conversion in (1, 2):
            self.dropped.add((gpa - Rig.RAM) // 4096)
        return True

    def probe(self, gpa: int) -> bool:
        return self.open[(gpa - Rig.RAM) // 4096]


class Native:
    """The rig with every kind of range on its bus."""

    def __init__(self, script: list[dict[str, Any]], machine: dict[str, Any]) -> None:
        rig = self.rig = Rig(protection=machine["protection"], pages=PAGES)
        rig.memory[:] = b"\x5a" * len(rig.memory)
        vm = rig.vm
        vm.conversion = getattr(rig.lib, "PV_CONVERT_" + machine["conversion"])
        vm.subscribers, vm.retry_limit = machine["subscribers"], machine["retry_limit"]
        vm.policy = [*machine["policy"], *[0] * (rig.lib.PV_POLICY_ROOM - rig.lib.PV_FAILURES)]
        for page, state in enumerate(machine["states"]):
            if state == "MOVING":
                rig.move(page)
            else:
                rig.state(page, state)
        for page in machine["closed"]:
            rig.close_view(page)
        rig.lib.fake_protect_fails(machine["protect_fails"])
        self.fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        slots = rig.new("struct pv_doorbell_slot[]", [(o, v or 0, self.fds[fd], v is None) for o, v, fd in SLOTS])
        self.bell = rig.new("struct pv_doorbell *", {"count": len(SLOTS), "slots": slots})
        self.uart = rig.pl011(tx=4, rx=4)
        self.uart.vm_fd, self.uart.irq, self.line = 0, IRQ, rig.line(IRQ)
        self.boxes = rig.new("struct pv_mailbox[]", 2)
        self.registers, self.counter = rig.new("uint8_t[]", 24), rig.new("uint64_t *")
        self.interrupt = rig.new("struct pv_interrupt *", {"status": INTERRUPTS, "fd": -1})
        kicks = rig.new("struct pv_doorbell_slot[]", [(o, v, self.fds[fd]) for o, v, fd in KICKS])
        self.kicks = rig.new("struct pv_doorbell *", {"count": len(KICKS), "slots": kicks})
        made = {"interrupt": self.interrupt, "bell": self.kicks, "queues": rig.new("struct pv_virtio_queue[]", QUEUES)}
        self.virtio = rig.new("struct pv_virtio_mmio *", {**made, "offered": OFFERED})
        for offset, value in SHOWN.items():
            self.virtio.registers[offset // 4] = value
        rig.lib.pv_virtio_configure(self.virtio, CONFIG, len(CONFIG), SHOWN[0xFC])
        states = [self.registers, self.counter, self.bell, self.uart, self.boxes, None, None, self.virtio]
        rig.bus(*[(BASES[kind], SIZES[kind], kind, state) for kind, state in zip(SIZES, states, strict=True)])
        self.exits = rig.script(*script)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.rig.lib.fake_protect_fails(0)
        self.rig.close()


def make_twin(script: list[dict[str, Any]], machine: dict[str, Any]) -> twin.Vcpu:
    run = memoryview(bytearray(4096))
    states = [
        bytearray(24),
        twin.Counter(),
        twin.Doorbell(list(SLOTS)),
        twin.Pl011(4, 4, IRQ),
        [twin.Mailbox(), twin.Mailbox()],
        None,
        None,
        twin.Virtio(twin.Doorbell(list(KICKS)), OFFERED, QUEUES, SHOWN, CONFIG.ljust(256, b"\0"), INTERRUPTS),
    ]
    moving = lib.PV_PAGE_PRIVATE | twin.MOVING
    ledger = bytearray(getattr(lib, "PV_PAGE_" + state, moving) for state in machine["states"])
    vm = twin.Vm(
        protection=getattr(lib, "PV_" + machine["protection"]),
        regions=[twin.Region(Rig.RAM, PAGES * 4096, ledger)],
        ranges=[
            twin.Range(BASES[kind], SIZES[kind], getattr(lib, "PV_KIND_" + kind), state)
            for kind, state in zip(SIZES, states, strict=True)
        ],
        subscribers=machine["subscribers"],
        conversion=getattr(lib, "PV_CONVERT_" + machine["conversion"]),
        policy=dict(enumerate(machine["policy"])),
        retry_limit=machine["retry_limit"],
    )
    return twin.Vcpu(vm, 0, run, FakeKernel(run, script, machine))


def settle(stop: str, reply: int, native: Native, other: twin.Vcpu) -> None:
    """Do what Python does at a stop, the same on both sides."""
    rig, vcpu = native.rig, native.rig.vcpus[0].native
    lib = rig.lib
    uart: twin.Pl011 = other.vm.ranges[3].state
    box: twin.Mailbox = other.vm.ranges[4].state[0]
    match stop:
        case "MMIO" | "UNCLAIMED":
            lib.pv_mmio_reply(vcpu, reply)
            other.reply(reply)
        case "MAILBOX":
            box.order[:] = [(reply + n) % 2**64 for n in range(8)]
            native.boxes[0].order = box.order
            native.boxes[0].state = box.state = lib.PV_MAILBOX_ORDER
        case "FIFO":
            n = reply % 4 + 1
            out = rig.new("uint8_t[]", 4)
            assert lib.pv_fifo_read(rig.ffi.addressof(native.uart, "tx"), out, n) == n
            assert bytes(out)[:n] == bytes(uart.tx.popleft() for _ in range(n))
        case "CONVERT":
            vcpu.share_status = other.share_status = -(reply % 2)
        case _:
            fed = bytes([reply % 256]) * (reply % 3)
            taken = lib.pv_pl011_feed(native.uart, fed, len(fed))
            assert taken == min(len(fed), 4 - len(uart.rx))
            uart.rx.extend(fed[:taken])
            uart.update(other.kernel)


def seen(vcpu: Any, stop: str) -> dict[str, Any]:
    """Return the fields that are valid at a stop."""
    fields = {
        "MMIO": ["gpa", "offset", "size", "is_write", "value"],
        "SHARE": ["share_gpa", "share_op", "share_source", "share_status"],
        "CONVERT": ["share_gpa", "share_op", "share_source"],
        "SYSTEM": ["event"],
        "FAILED": ["error", "failure", "fault_gpa", "fault_size"],
    }
    names = fields.get("MMIO" if stop == "UNCLAIMED" else stop, [])
    return {name: getattr(vcpu, name) for name in ["exit", "exit_reason", "retries", *names]}


def rung(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def differ(machine: dict[str, Any], script: list[dict[str, Any]], replies: list[int]) -> str | None:
    native, other = Native(script, machine), make_twin(script, machine)
    try:
        compare(native, other, replies)
    except AssertionError as difference:
        return str(difference)
    finally:
        native.close()
    return None


@pytest.mark.parametrize("seed", range(20))
def test_loop_and_twin_decide_alike(seed: int) -> None:
    for round_ in range(40):
        guest = Guest(Random(f"{seed} {round_}"))
        machine, script, replies = guest.machine(), guest.script(), guest.replies()
        if differ(machine, script, replies) is None:
            continue
        step = 0
        while step < len(script):  # the shortest failing example
            shorter = script[:step] + script[step + 1 :]
            script, step = (shorter, step) if differ(machine, shorter, replies) else (script, step + 1)
        pytest.fail(f"{differ(machine, script, replies)}\n{machine}\n{script}\n{replies}")


def compare(native: Native, other: twin.Vcpu, replies: list[int]) -> None:
    rig, vcpu, vm = native.rig, native.rig.vcpus[0].native, other.vm
    kernel = other.kernel
    assert isinstance(kernel, FakeKernel)
    for turn in range(1000):
        stop = rig.run()
        assert (turn, stop) == (turn, rig.stop_name(other.run()))
        assert seen(vcpu, stop) == seen(other, stop)
        if stop == "OTHER" and vcpu.exit_reason == EXIT_HLT:
            break
        if stop == "SYSTEM":
            assert list(vcpu.event_data)[: vcpu.event_count] == other.event_data
        settle(stop, replies[turn % len(replies)], native, other)
    else:
        raise AssertionError("neither ends")

    assert [e.answer for e in native.exits] == kernel.answers
    assert [list(e.out) for e in native.exits] == kernel.outs
    assert [vcpu.stats[n].count for n in range(rig.lib.PV_EXITS)] == other.counts
    assert [(r.reads, r.writes) for r in rig.ranges] == [(r.reads, r.writes) for r in vm.ranges]
    assert bytes(rig.ledger) == bytes(vm.regions[0].ledger)
    assert list(rig.vm.pages) == vm.pages()
    assert (rig.vm.shares, rig.vm.unshares, rig.vm.refused) == (vm.shares, vm.unshares, vm.refused)
    assert [rung(fd) for fd in native.fds] == [kernel.rung[n] for n in range(3)]
    assert kernel.moves == [n % 2 == 0 for n in range(len(kernel.moves))]
    assert (native.line.raised + native.line.lowered, native.line.level) == (len(kernel.moves), len(kernel.moves) % 2)
    assert [rig.lib.pv_probe(rig.vm, rig.RAM + 4096 * n) for n in range(PAGES)] == kernel.open
    rig.open_view(0, PAGES)
    assert [rig.memory[4096 * n] for n in range(PAGES)] == [0 if n in kernel.dropped else 0x5A for n in range(PAGES)]
    states = [r.state for r in vm.ranges]
    assert bytes(native.registers) == bytes(states[0])
    assert (native.counter[0], native.bell.missed) == (states[1].value, states[2].missed)
    assert (native.interrupt.status, native.kicks.missed) == (states[7].interrupts, states[7].bell.missed)
    selected = (native.virtio.device_features_sel, native.virtio.driver_features_sel, native.virtio.queue_sel)
    assert selected == tuple(states[7].selected.values())
    for box, twin_box in zip(native.boxes, states[4], strict=True):
        assert (box.state, box.trapped) == (twin_box.state, twin_box.trapped)
        for name in ("order", "result", "trap", "note"):
            assert list(getattr(box, name)) == getattr(twin_box, name)
