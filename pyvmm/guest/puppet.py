# SPDX-License-Identifier: Apache-2.0
"""Control a guest from Python: a handle of one vCPU of the payload ``puppet``.

    with Machine(MachineConfig("payload:puppet", Protection.PKVM)) as machine:
        machine.start()
        guest = Puppet(machine.mailboxes)
        guest.write64(0x8100_0000, 42)
        guest.share(0x8100_0000)

Each method is one order and returns when the guest has carried it out. Those named ``start_`` return at once with an
:class:`~pyvmm.guest.orders.Order`. A vCPU takes one order after another. Use the handles of other vCPUs meanwhile.
Times are ticks of the guest's CNTVCT, including exits. Owns nothing. Any thread may use a handle.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from pyvmm import abi
from pyvmm.errors import UsageError, hex_
from pyvmm.guest.orders import (
    Access,
    GuestRefused,
    Hvc,
    Mailboxes,
    Order,
    Pong,
    Results,
    Series,
    ShareResult,
    T,
    Timed,
    Touch,
    What,
    signed,
)
from pyvmm.pages import HOST_PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TIMEOUT: Final = 10.0
_MASK: Final = (1 << 64) - 1
_OPS: Final = {value: name for name, value in vars(abi).items() if name.startswith("OP_")}
_PSCI: Final = {-1: "NOT_SUPPORTED", -2: "INVALID_PARAMETERS", -3: "DENIED", -4: "ALREADY_ON", -9: "INVALID_ADDRESS"}


class Puppet:
    """One vCPU that takes orders. ``timeout`` is in seconds, for each order."""

    def __init__(self, mailboxes: Mailboxes, vcpu: int = 0, *, timeout: float = TIMEOUT) -> None:
        self._mailboxes = mailboxes
        self.vcpu = vcpu
        self.timeout = timeout

    def __repr__(self) -> str:
        return f"Puppet(vcpu={self.vcpu})"

    def start(self, op: int, *args: int) -> Order[Results]:
        """Send the order ``op`` of abi.h with up to six ``args``. Its result is the seven raw result words."""
        return self._start(op, args, lambda results: results)

    def _start(self, op: int, args: Sequence[int], decode: Callable[[Results], T]) -> Order[T]:
        what = f"{_OPS.get(op, f'order {op}')}({', '.join(hex_(arg & _MASK) for arg in args)}) on vCPU {self.vcpu}"
        words = [arg & _MASK for arg in args]
        return Order(what, self._mailboxes.submit(self.vcpu, op, words), decode, self.timeout)

    def ping(self) -> Pong:
        """Ask for MPIDR_EL1, the exception level, SCTLR_EL1, the counter's frequency in Hz and TTBR0_EL1."""
        mpidr, el, sctlr, hz, table = self.start(abi.OP_PING).result()[:5]
        return Pong(mpidr, el >> 2 & 3, sctlr, hz, table)

    # -- memory

    def start_read64(self, gpa: int) -> Order[int]:
        """Start a 64-bit load."""
        return self._start(abi.OP_READ, (gpa, 8), _first)

    def start_write64(self, gpa: int, value: int) -> Order[int]:
        """Start a 64-bit store; the answer is its ticks."""
        return self._start(abi.OP_WRITE, (gpa, 8, value), _first)

    def read8(self, gpa: int) -> int:
        """Load a byte."""
        return self.timed_read(gpa, 1).value

    def read16(self, gpa: int) -> int:
        """Load 16 bits from an aligned gpa."""
        return self.timed_read(gpa, 2).value

    def read32(self, gpa: int) -> int:
        """Load 32 bits."""
        return self.timed_read(gpa, 4).value

    def read64(self, gpa: int) -> int:
        """Load 64 bits."""
        return self.timed_read(gpa, 8).value

    def timed_read(self, gpa: int, size: int = 8) -> Timed:
        """Load 1, 2, 4 or 8 bytes and time it. Raises UsageError for another ``size``."""
        return Timed(*self.start(abi.OP_READ, gpa, _access_size(size)).result()[:2])

    def write8(self, gpa: int, value: int) -> int:
        """Store a byte; returns ticks."""
        return self.write(gpa, value, 1)

    def write16(self, gpa: int, value: int) -> int:
        """Store 16 bits; returns ticks."""
        return self.write(gpa, value, 2)

    def write32(self, gpa: int, value: int) -> int:
        """Store 32 bits; returns ticks."""
        return self.write(gpa, value, 4)

    def write64(self, gpa: int, value: int) -> int:
        """Store 64 bits; returns ticks."""
        return self.write(gpa, value, 8)

    def write(self, gpa: int, value: int, size: int = 8) -> int:
        """Store 1, 2, 4 or 8 bytes; returns ticks. Raises UsageError for another ``size``."""
        return self.start(abi.OP_WRITE, gpa, _access_size(size), value).result()[0]

    def words(self, gpa: int, count: int) -> tuple[int, ...]:
        """Load ``count`` 64-bit words, seven per order."""
        words: list[int] = []
        while left := count - len(words):
            some = min(left, 7)
            words += self.start(abi.OP_WORDS, gpa + 8 * len(words), some).result()[:some]
        return tuple(words)

    def fill(self, gpa: int, size: int, pattern: int = 0) -> None:
        """Fill ``size`` bytes with a 64-bit ``pattern``. Raises UsageError for a ``size`` that is not whole words."""
        self.start(abi.OP_FILL, gpa, _words_size(size), pattern).result()

    def sum(self, gpa: int, size: int) -> int:
        """Add the 64-bit words of ``size`` bytes, modulo 2^64. Raises UsageError as :meth:`fill`."""
        return self.start(abi.OP_SUM, gpa, _words_size(size)).result()[0]

    def flush(self, gpa: int, size: int) -> None:
        """Clean and invalidate data caches to the point of coherency, and instruction caches."""
        self.start(abi.OP_FLUSH, gpa, size).result()

    # -- touching

    def start_touch(
        self, gpa: int, pages: int, *, stride: int = 1, access: Access = Access.READ, seed: int = 0, ticks_at: int = 0
    ) -> Order[Touch]:
        """Start :meth:`touch`. The record for :meth:`Touch.with_each` stays at ``ticks_at``."""
        order = (gpa, pages, stride, access, seed, ticks_at)
        return self._start(abi.OP_TOUCH, order, lambda r: Touch(r[0], r[1], r[2]))

    def touch(
        self, gpa: int, pages: int, *, stride: int = 1, access: Access = Access.READ, seed: int = 0, ticks_at: int = 0
    ) -> Touch:
        """Access ``pages`` pages, every ``stride``-th, once each, and return the ticks.

        ``seed`` other than 0 gives a random order. ``ticks_at`` is the gpa of other memory, 8 bytes per page. The guest
        records each page's ticks there. They are read back through the guest, because that memory may be private.
        Executing a page calls it. It must hold code that returns, or zeros.
        """
        order = self.start_touch(gpa, pages, stride=stride, access=access, seed=seed, ticks_at=ticks_at)
        done = order.result()
        if not ticks_at:
            return done
        return done.with_each(struct.pack(f"<{pages}Q", *self.words(ticks_at, pages)))

    def start_series(
        self, what: What, gpa: int = 0, count: int = 1, *, stride: int = 0, value: int = 0, ticks_at: int = 0
    ) -> Order[Series]:
        """Start ``what`` ``count`` times, at addresses ``stride`` bytes apart, and time each.

        ``value`` is the value of a STORE, or the function of an HVC. The ticks stay at ``ticks_at``, 4 bytes each.
        SHARE and UNSHARE end at the first refusal.
        """
        order = (what, gpa, count, stride, value, ticks_at)
        return self._start(abi.OP_SERIES, order, lambda r: Series(signed(r[0]), r[1], r[2]))

    def series(
        self, what: What, gpa: int = 0, count: int = 1, *, stride: int = 0, value: int = 0, ticks_at: int = 0
    ) -> Series:
        """Run :meth:`start_series` and wait for its result."""
        return self.start_series(what, gpa, count, stride=stride, value=value, ticks_at=ticks_at).result()

    def start_execute(self, gpa: int, argument: int = 0) -> Order[Timed]:
        """Start calling the code at ``gpa`` with x0 = ``argument``."""
        return self._start(abi.OP_EXECUTE, (gpa, argument), lambda r: Timed(r[0], r[1]))

    def execute(self, gpa: int, argument: int = 0) -> Timed:
        """Call the code at ``gpa`` with x0 = ``argument``; returns its x0. Call :meth:`flush` first for new code."""
        return self.start_execute(gpa, argument).result()

    def start_hammer(self, gpa: int, size: int, rounds: int, access: Access = Access.READ) -> Order[int]:
        """Start accessing every word of ``size`` bytes, ``rounds`` times. The answer is the rounds done.

        Raises UsageError unless ``size`` is a multiple of 8 above 0.
        """
        return self._start(abi.OP_HAMMER, (gpa, _words_size(size), rounds, access), _first)

    def hammer(self, gpa: int, size: int, rounds: int, access: Access = Access.READ) -> int:
        """Access every word of ``size`` bytes, ``rounds`` times. Returns the rounds done."""
        return self.start_hammer(gpa, size, rounds, access).result()

    def start_count(self, gpa: int, count: int, *, until: int = 0) -> Order[int]:
        """Start adding 1 to a 64-bit word ``count`` times, atomically. The answer is the number of additions.

        It ends early when the word at gpa ``until`` is not 0. Another vCPU or the host may set it.
        """
        return self._start(abi.OP_COUNT, (gpa, count, until), _first)

    def mmio(self, gpa: int, count: int = 1, *, value: int | None = None, size: int = 8) -> int:
        """Store ``value`` (load, if None) ``count`` times. Returns the total ticks.

        Raises UsageError for the ``value`` 2^64 - 1, and for a ``size`` other than 1, 2, 4 or 8.
        """
        word = -1 if value is None else value
        if value is not None and value & _MASK == _MASK:
            raise UsageError(f"value {hex_(_MASK)} means a load in this order: use another value")
        return self.start(abi.OP_MMIO, gpa, _access_size(size), count, word).result()[0]

    # -- the hypervisor

    def start_share(self, gpa: int, pages: int = 1, how: int = abi.SHARE_HVC | abi.SHARE_BELL) -> Order[ShareResult]:
        """Start sharing, as :meth:`share`. The answer's status is not checked."""
        return self._start(abi.OP_SHARE, (gpa, pages, how), _share_result)

    def start_unshare(self, gpa: int, pages: int = 1, how: int = abi.SHARE_HVC | abi.SHARE_BELL) -> Order[ShareResult]:
        """Start unsharing; ``how`` as in :meth:`share`, in the other order. The answer's status is not checked."""
        return self._start(abi.OP_UNSHARE, (gpa, pages, how), _share_result)

    def share(
        self, gpa: int, pages: int = 1, *, how: int = abi.SHARE_HVC | abi.SHARE_BELL, check: bool = True
    ) -> ShareResult:
        """Share pages with the host. ``how``: by the hypervisor's call if it has one, then by the doorbell.

        Raises GuestRefused at the first page that is refused, unless ``check`` is false.
        """
        return _checked("share", gpa, self.start_share(gpa, pages, how).result(), check)

    def unshare(
        self, gpa: int, pages: int = 1, *, how: int = abi.SHARE_HVC | abi.SHARE_BELL, check: bool = True
    ) -> ShareResult:
        """Unshare pages: by the doorbell, then by the hypervisor's call. Otherwise as :meth:`share`."""
        return _checked("unshare", gpa, self.start_unshare(gpa, pages, how).result(), check)

    def start_hvc(self, *regs: int) -> Order[Hvc]:
        """Start a hypervisor call; ``regs`` are x0 to x6, as far as given."""
        return self._start(abi.OP_HVC, regs, lambda r: Hvc((r[0], r[1], r[2], r[3]), r[4]))

    def hvc(self, *regs: int) -> Hvc:
        """Call the hypervisor and time it; ``regs`` are x0 to x6, as far as given."""
        return self.start_hvc(*regs).result()

    # -- power

    def cpu_on(self, vcpu: int) -> Puppet:
        """Start another vCPU and return its handle. Raises GuestRefused with PSCI's status."""
        status = signed(self.start(abi.OP_CPU_ON, vcpu).result()[0])
        if status:
            raise GuestRefused(f"PSCI CPU_ON of vCPU {vcpu}", status, _PSCI.get(status, "unknown to PSCI"))
        return Puppet(self._mailboxes, vcpu, timeout=self.timeout)

    def cpu_off(self) -> None:
        """Tell this vCPU to power itself off. No answer follows."""
        self.start(abi.OP_CPU_OFF)

    def off(self) -> None:
        """Tell the guest to power off. No answer follows."""
        self.start(abi.OP_OFF)

    def reset(self) -> None:
        """Tell the guest to request a reset. No answer follows."""
        self.start(abi.OP_RESET)


def _first(results: Results) -> int:
    return results[0]


def _share_result(results: Results) -> ShareResult:
    return ShareResult(signed(results[0]), results[1], results[2])


def _checked(what: str, gpa: int, done: ShareResult, check: bool) -> ShareResult:
    if check and done.status:
        raise GuestRefused(f"{what} of gpa {hex_(gpa + done.pages * HOST_PAGE)}", done.status, "an SMCCC error")
    return done


def _access_size(size: int) -> int:
    if size not in (1, 2, 4, 8):
        raise UsageError(f"an access has 1, 2, 4 or 8 bytes, not {size}")
    return size


def _words_size(size: int) -> int:
    if size % 8 or size <= 0:
        raise UsageError(f"{size} bytes are not a whole number of 64-bit words")
    return size
