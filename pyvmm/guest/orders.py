# SPDX-License-Identifier: Apache-2.0
"""Orders for a vCPU of the payload ``puppet``: waiting for one, its results, and its errors.

:class:`pyvmm.guest.puppet.Puppet` sends them. Any thread may wait.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from pyvmm import abi
from pyvmm.errors import PyvmmError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from pyvmm.devices.trap import MailboxAnswer, Trap

T = TypeVar("T")
Results = tuple[int, ...]


class Access(IntEnum):
    """The kind of access to a page."""

    READ = abi.ACCESS_READ
    WRITE = abi.ACCESS_WRITE
    EXECUTE = abi.ACCESS_EXECUTE


class Mailboxes(Protocol):
    """The machine's interface for a handle: pyvmm.devices.mailbox.Mailboxes."""

    def submit(self, vcpu: int, op: int, args: Sequence[int] = ()) -> Future[MailboxAnswer]:
        """Queue an order and return its pending answer."""
        ...


class Pong(NamedTuple):
    """A vCPU's description of itself."""

    mpidr: int
    el: int
    sctlr: int
    hz: int
    table: int = 0
    """TTBR0_EL1: the gpa of its own translation table."""


class Timed(NamedTuple):
    """A value and its cost in ticks."""

    value: int
    ticks: int


class Touch(NamedTuple):
    """Pages accessed; if requested, each page's ticks by page number, and the page numbers in order."""

    pages: int
    ticks: int
    max: int
    per_page: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    def with_each(self, data: bytes) -> Touch:
        """Return a copy with the guest's record of every page, 8 bytes each (TOUCHED in abi.h)."""
        words = struct.unpack_from(f"<{2 * self.pages}I", data)
        order = sorted(range(self.pages), key=words[1::2].__getitem__)
        return self._replace(per_page=words[::2], order=tuple(order))


class What(IntEnum):
    """An operation to repeat and time one by one."""

    NOTHING = abi.SERIES_NOTHING
    """Read the clock twice: the cost of timing."""
    LOAD = abi.SERIES_LOAD
    STORE = abi.SERIES_STORE
    HVC = abi.SERIES_HVC
    SHARE = abi.SERIES_SHARE
    UNSHARE = abi.SERIES_UNSHARE


class Series(NamedTuple):
    """The result of a series: status (0, or the SMCCC error that ended it), repetitions, total ticks."""

    status: int
    done: int
    ticks: int


class ShareResult(NamedTuple):
    """The result of a share or unshare: status (0, or the first SMCCC error), pages done, total ticks."""

    status: int
    pages: int
    ticks: int


class Hvc(NamedTuple):
    """x0..x3 after a hypervisor call, and the ticks it took."""

    regs: tuple[int, int, int, int]
    ticks: int

    @property
    def status(self) -> int:
        """x0 as a signed number."""
        return signed(self.regs[0])


class GuestFault(PyvmmError):
    """An order trapped. ``trap`` has the registers. The vCPU has recovered and takes orders."""

    exit_status = 3

    def __init__(self, order: str, trap: Trap | None) -> None:
        super().__init__(f"{order} trapped: {trap.describe() if trap else 'the guest reported no details'}")
        self.trap = trap


class GuestRefused(PyvmmError):
    """The hypervisor or pyvmm refused the order's call. ``status`` is their answer."""

    def __init__(self, order: str, status: int, why: str) -> None:
        super().__init__(f"{order} was refused: {status} ({why})")
        self.status = status


class GuestSilent(PyvmmError):
    """The guest did not answer in time."""


def signed(word: int) -> int:
    """Read a 64-bit word as a two's complement number."""
    return word - (1 << 64) if word >> 63 else word


class Order(Generic[T]):
    """An order on its way."""

    def __init__(
        self, what: str, future: Future[MailboxAnswer], decode: Callable[[Results], T], timeout: float
    ) -> None:
        self._what = what
        self._future = future
        self._decode = decode
        self._timeout = timeout

    def done(self) -> bool:
        """Whether the answer has arrived."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> T:
        """Wait for the answer, at most ``timeout`` seconds (default: the handle's).

        Raises GuestFault if the order trapped, GuestSilent if the time is over, and the machine's error if it ended
        first.
        """
        limit = self._timeout if timeout is None else timeout
        try:
            answer = self._future.result(limit)
        except TimeoutError:
            raise GuestSilent(
                f"{self._what} was not answered within {limit:g} s",
                hint="is the machine started? Does another order keep this vCPU busy?",
            ) from None
        if answer.status == abi.STATUS_TRAPPED:
            raise GuestFault(self._what, answer.trap)
        if answer.status != abi.STATUS_OK:
            raise PyvmmError(f"{self._what}: the puppet does not know this order", hint="rebuild firmware and package")
        return self._decode(answer.results)
