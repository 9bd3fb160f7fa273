# SPDX-License-Identifier: Apache-2.0
"""Tells devices what the guest shares and takes back, whatever the source, before the guest goes on.

Owns the list of subscribers and ``pv_vm.subscribers`` (which makes the native loop stop at a share). Subscribers run in
the thread of the vCPU that shared, one event at a time: a share is announced once the page may be used, an unshare
when the ledger no longer says so but holders still may, and when the last subscriber returns the page is the guest's
alone. With no subscriber the loop handles conversions in C and only counts them.

Lock order: the relay's lock is taken first, a device's own lock inside it. A subscriber must not wait for a vCPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import IntEnum

from pyvmm._native import lib
from pyvmm.memory.address import PAGE_SIZE, Gpa
from pyvmm.memory.ledger import Ledger, PageState
from pyvmm.typed import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import pv_vm


class ShareSource(IntEnum):
    """Who said so."""

    DOORBELL = lib.PV_SOURCE_DOORBELL
    """The guest rang the share doorbell (any protection)."""
    HYPERCALL = lib.PV_SOURCE_HYPERCALL
    """KVM_EXIT_HYPERCALL of the emulated protection."""
    ACCESS = lib.PV_SOURCE_ACCESS
    """A guarded access found the page open, or no longer so."""
    EXIT = lib.PV_SOURCE_EXIT
    """A kernel that exits on a protected guest's shares (Android's)."""


class ShareEvent(NamedTuple):
    """One conversion of ``npages`` 4 KiB pages from ``gpa``; ``ns`` is CLOCK_MONOTONIC."""

    shared: bool
    gpa: Gpa
    npages: int
    source: ShareSource
    ns: int


Subscriber = Callable[[ShareEvent], None]


class ShareRelay:
    """The one place where conversions are announced."""

    def __init__(self, native: pv_vm, ledger: Ledger) -> None:
        self.native = native
        self.ledger = ledger
        self._subscribers: list[Subscriber] = []
        self._lock = threading.RLock()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call ``subscriber`` for every conversion from now on; returns what ends that.

        A page that is shared when looked at *after* this is not taken back unheard; one looked at before may be.
        """
        with self._lock:
            self._subscribers.append(subscriber)
            lib.pv_subscribe(self.native, len(self._subscribers))

        def unsubscribe() -> None:
            with self._lock:
                if subscriber in self._subscribers:
                    self._subscribers.remove(subscriber)
                    lib.pv_subscribe(self.native, len(self._subscribers))

        return unsubscribe

    def is_shared(self, gpa: int) -> bool:
        """Whether the page of ``gpa`` was announced as shared and not taken back."""
        return self.ledger.state(Gpa(gpa)) is PageState.SHARED

    def hold(self) -> threading.RLock:
        """Return the lock under which no conversion is announced: a device may use a shared page while it has it."""
        return self._lock

    def deliver(self, event: ShareEvent) -> None:
        """Tell every subscriber, in the order they came; the caller is the vCPU that waits for it."""
        with self._lock:
            for subscriber in tuple(self._subscribers):
                subscriber(event)

    def evidence(self, gpa: Gpa, accessible: bool) -> None:
        """Enter what a guarded access learnt about a page that no guest has announced.

        Only the loss of a shared page is news that devices must hear: a page found open may be the guest's by the
        next instruction, so it is never entered as shared on that ground alone.
        """
        page = Gpa(gpa & -PAGE_SIZE)
        with self._lock:
            if accessible or not self.is_shared(page):
                return
            self.ledger.set(page, PageState.PRIVATE)
            self.deliver(ShareEvent(False, page, 1, ShareSource.ACCESS, time.monotonic_ns()))
