# SPDX-License-Identifier: Apache-2.0
"""What runs inside the fake pKVM host: guests as generators, and a CPU for the few instructions of bare programs.

A guest yields what its vCPU does next, and is given the result: of a load its value, of a call x0. Whether that leaves
KVM_RUN, and for whom, is decided by :mod:`tests.fake_pkvm`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import NamedTuple

from pyvmm import abi
from pyvmm.machine import layout
from pyvmm.pages import GUEST_PAGE
from pyvmm.uapi import psci

WORD = (1 << 64) - 1
BOTH = abi.SHARE_HVC | abi.SHARE_BELL


class Load(NamedTuple):
    gpa: int
    size: int = 8


class Store(NamedTuple):
    gpa: int
    value: int
    size: int = 8


class Hvc(NamedTuple):
    function: int
    x1: int = 0
    x2: int = 0
    x3: int = 0


class Spin(NamedTuple):
    """Compute forever."""


class Pair(NamedTuple):
    """Load a pair of registers, which has no valid syndrome."""

    gpa: int


class Poisoned(NamedTuple):
    """Load from a page that the host has taken back by force."""


@dataclass
class Cpu:
    """A vCPU as its guest sees it."""

    index: int
    cpus: int
    pc: int = 0
    x: list[int] = field(default_factory=lambda: [0] * 31)


class ExternalAbort(Exception):
    """Raised in a guest at the access that it aborts. ``gpa`` is its address."""

    def __init__(self, gpa: int) -> None:
        super().__init__(hex(gpa))
        self.gpa = gpa


Step = Load | Store | Hvc | Spin | Pair | Poisoned
Program = Generator[Step, int, None]
Part = Generator[Step, int, int]
Guest = Callable[[Cpu], Program]


# ---- the parts of guests


def say(text: str) -> Program:
    """Write to the UART."""
    for byte in text.encode():
        yield Store(layout.PL011.start, byte, 4)


def share(gpa: int, how: int) -> Part:
    """Share a page, as firmware/lib/hyp.c does."""
    status = (yield Hvc(abi.HVC_SHARE, gpa)) if how & abi.SHARE_HVC else 0
    if not status and how & abi.SHARE_BELL:
        yield Store(layout.SHARE_DOORBELL.start, gpa | abi.BELL_SHARE)
        status = yield Load(layout.SHARE_DOORBELL.start)
    return status


def unshare(gpa: int, how: int) -> Part:
    """Take a page back, as firmware/lib/hyp.c does."""
    status = 0
    if how & abi.SHARE_BELL:
        yield Store(layout.SHARE_DOORBELL.start, gpa | abi.BELL_UNSHARE)
        status = yield Load(layout.SHARE_DOORBELL.start)
    return (yield Hvc(abi.HVC_UNSHARE, gpa)) if not status and how & abi.SHARE_HVC else status


def off(how: int = psci.PSCI_0_2_FN_SYSTEM_OFF) -> Program:
    """End the guest, or this vCPU."""
    yield Hvc(how)
    yield Spin()


# ---- guests


def puppet(cpu: Cpu) -> Program:
    """Obey the orders of the mailbox that the tests give: firmware/payloads/puppet.c."""
    box = layout.MAILBOX.start + GUEST_PAGE * cpu.index
    while True:
        order = yield Load(box + abi.MAILBOX_OP)
        args = [0] * 7
        for number in range(order >> abi.MAILBOX_ARGS_SHIFT):
            args[number] = yield Load(box + abi.MAILBOX_ARG(number))
        status, results = abi.STATUS_OK, [0] * 7
        try:
            yield from _obey(cpu, order & 0xFFFF_FFFF, args, results)
        except ExternalAbort as abort:
            status = abi.STATUS_TRAPPED
            for number, word in enumerate((4, 0x9600_0010, abort.gpa, cpu.pc, 0, 0, 0, cpu.index)):
                yield Store(box + abi.MAILBOX_TRAP(number), word)
        for number, result in enumerate(results):
            if result:
                yield Store(box + abi.MAILBOX_RESULT(number), result & WORD)
        yield Store(box + abi.MAILBOX_DONE, status)


def _obey(cpu: Cpu, order: int, args: list[int], results: list[int]) -> Program:
    match order:
        case abi.OP_PING:
            results[:4] = cpu.index, 1 << 2, 0, 1_000_000
        case abi.OP_READ:
            results[0] = yield Load(args[0], args[1])
        case abi.OP_WRITE:
            yield Store(args[0], args[2], args[1])
        case abi.OP_TOUCH:
            for page in range(args[1]):
                at = args[0] + page * args[2] * GUEST_PAGE
                yield Store(at, 0) if args[3] == abi.ACCESS_WRITE else Load(at)
                results[0] += 1
        case abi.OP_SHARE | abi.OP_UNSHARE:
            one = share if order == abi.OP_SHARE else unshare
            while results[1] < args[1] and not results[0]:
                results[0] = yield from one(args[0] + results[1] * GUEST_PAGE, args[2])
                results[1] += not results[0]
        case abi.OP_HVC:
            results[0] = yield Hvc(*args[:4])
        case abi.OP_FLUSH:
            pass
        case abi.OP_CPU_ON:
            results[0] = yield Hvc(psci.PSCI_0_2_FN64_CPU_ON, args[0], cpu.pc, args[0])
        case abi.OP_WORDS:
            for word in range(args[1]):
                results[word] = yield Load(args[0] + 8 * word)
        case abi.OP_OFF:
            yield from off()
        case abi.OP_RESET:
            yield from off(psci.PSCI_0_2_FN_SYSTEM_RESET)
        case abi.OP_CPU_OFF:
            yield from off(psci.PSCI_0_2_FN_CPU_OFF)
        case _:
            raise NotImplementedError(f"order {order}")


def hello(_cpu: Cpu) -> Program:
    """Say so, and power off."""
    yield from say("hello\n")
    yield from off()


def trap(cpu: Cpu) -> Program:
    """Execute an undefined instruction, and report it: firmware/lib/trap.c."""
    box = layout.MAILBOX.start + GUEST_PAGE * cpu.index
    for number, word in enumerate((4, 0, 0, 0x8008_1234, 0, 0, 0, cpu.index)):
        yield Store(box + abi.MAILBOX_TRAP(number), word)
    yield Store(box + abi.MAILBOX_TRAP_BELL, 1)
    yield Spin()


NOWHERE = 0x0C00_0010


def unclaimed(_cpu: Cpu) -> Program:
    """Load from an address without memory and device. A handler says so and ends the guest."""
    try:
        yield Load(NOWHERE, 4)
    except ExternalAbort as abort:
        yield from say(f"abort at {abort.gpa:#x}\n")
    else:
        yield from say("survived\n")
    yield from off()


def pair(_cpu: Cpu) -> Program:
    """Do the same with a pair load."""
    try:
        yield Pair(NOWHERE)
    except ExternalAbort as abort:
        yield from say(f"abort at {abort.gpa:#x}\n")
    yield from off()


def smp(cpu: Cpu) -> Program:
    """Switch every other vCPU on at once, wait until each has switched itself off, and say what PSCI answered."""
    if cpu.index:
        yield Hvc(psci.PSCI_0_2_FN_CPU_OFF)
        return
    answers = {}
    for index in range(1, cpu.cpus):
        answers[index] = yield Hvc(psci.PSCI_0_2_FN64_CPU_ON, index, cpu.pc, index)
    for index, answer in answers.items():
        while not answer and (yield Hvc(psci.PSCI_0_2_FN64_AFFINITY_INFO, index)) != 1:
            pass
    yield from say(f"CPU_ON answered {list(answers.values())}\n")
    yield from off()


def reset(_cpu: Cpu) -> Program:
    """Ask for a reset, in its first life; each life is told by the host's file that it is given."""
    yield from say("a life\n")
    yield from off(psci.PSCI_0_2_FN_SYSTEM_RESET)


def poisoned(_cpu: Cpu) -> Program:
    """Load from a page that is gone."""
    yield Poisoned()


def loop(_cpu: Cpu) -> Program:
    """Compute forever."""
    yield Spin()


GUESTS: dict[str, Guest] = {
    each.__name__: each for each in (puppet, hello, trap, unclaimed, pair, smp, reset, poisoned, loop)
}


# ---- a CPU for bare programs


def execute(cpu: Cpu) -> Program:
    """Execute instructions from ``cpu.pc``: the few that the programs of pyvmm.experiment.host.bare have."""
    equal = False
    x = cpu.x
    while True:
        word = yield Load(cpu.pc, 4)
        rd, rn, immediate = word & 31, word >> 5 & 31, word >> 10 & 0xFFF
        wide, shift = word >> 5 & 0xFFFF, 16 * (word >> 21 & 3)
        after = cpu.pc + 4
        if word >> 23 == 0x1A5:  # movz
            x[rd] = wide << shift
        elif word >> 23 == 0x1E5:  # movk
            x[rd] = x[rd] & ~(0xFFFF << shift) | wide << shift
        elif word >> 22 in (0x244, 0x245):  # add, immediate
            x[rd] = x[rn] + (immediate << 12 * (word >> 22 & 1)) & WORD
        elif word >> 22 == 0x3C4:  # subs, immediate
            x[rd] = x[rn] - immediate & WORD
            equal = not x[rd]
        elif word >> 24 == 0x54 and word & 31 == 1:  # b.ne
            after = after if equal else cpu.pc + 4 * _signed(word >> 5 & 0x7FFFF, 19)
        elif word >> 26 == 0b000101:  # b
            after = cpu.pc + 4 * _signed(word & 0x3FF_FFFF, 26)
        elif word >> 22 == 0x3E4:  # str, 64 bits
            yield Store(x[rn] + 8 * immediate, x[rd])
        elif word == 0xD400_0002:  # hvc #0
            cpu.pc = after
            x[0] = (yield Hvc(*x[:4])) & WORD
        else:
            raise NotImplementedError(f"instruction {word:#010x} at {cpu.pc:#x}")
        if after == cpu.pc and word >> 26 == 0b000101:
            yield Spin()
        cpu.pc = after


def _signed(number: int, bits: int) -> int:
    return number - (1 << bits) if number >> bits - 1 else number
