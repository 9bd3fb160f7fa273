# SPDX-License-Identifier: Apache-2.0
"""Notify devices of shared and unshared pages, from any source, before the guest continues.

Owns the list of subscribers and ``pv_vm.subscribers`` (which makes the native loop stop at a share). Subscribers run in
the thread of the vCPU that shared, one event at a time. A share is announced once devices may use the page. An unshare
is announced after the ledger has changed, while devices may still use the page. When the last subscriber returns, the
page is private. Without subscribers the loop handles conversions in C and only counts them.

Lock order: the relay's lock is taken first, a device's own lock inside it. A subscriber must not wait for a vCPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import IntEnum

from pyvmm._native import lib
from pyvmm.memory.address import Gpa
from pyvmm.memory.ledger import Ledger, PageState
from pyvmm.pages import HOST_PAGE
from pyvmm.typed import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import pv_vm


class ShareSource(IntEnum):
    """The source of an event."""

    DOORBELL = lib.PV_SOURCE_DOORBELL
    """The guest rang the share doorbell (any protection)."""
    HYPERCALL = lib.PV_SOURCE_HYPERCALL
    """KVM_EXIT_HYPERCALL of the emulated protection."""
    ACCESS = lib.PV_SOURCE_ACCESS
    """A guarded access found that the page is accessible, or no longer is."""
    EXIT = lib.PV_SOURCE_EXIT
    """A host kernel that exits on a protected guest's shares (Android's)."""


class ShareEvent(NamedTuple):
    """One conversion of ``npages`` pages of the host from ``gpa``; ``ns`` is CLOCK_MONOTONIC."""

    shared: bool
    gpa: Gpa
    npages: int
    source: ShareSource
    ns: int


Subscriber = Callable[[ShareEvent], None]


class ShareRelay:
    """Announces conversions to its subscribers."""

    def __init__(self, native: pv_vm, ledger: Ledger) -> None:
        self.native = native
        self.ledger = ledger
        self._subscribers: list[Subscriber] = []
        self._lock = threading.RLock()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call ``subscriber`` for every conversion from now on. Returns a function that ends the subscription.

        Check whether a page is shared *after* this call: otherwise its unshare may go unnoticed.
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
        """Whether the page of ``gpa`` was announced as shared and not unshared since."""
        return self.ledger.state(Gpa(gpa)) is PageState.SHARED

    def hold(self) -> threading.RLock:
        """Return the lock that delays announcements. A device may use a shared page while it holds the lock."""
        return self._lock

    def deliver(self, event: ShareEvent) -> None:
        """Notify every subscriber, in the order of subscription. The calling vCPU waits meanwhile."""
        with self._lock:
            for subscriber in tuple(self._subscribers):
                subscriber(event)

    def evidence(self, gpa: Gpa, accessible: bool) -> None:
        """Record the result of a guarded access to a page without an announcement.

        Devices are notified only when a shared page has become inaccessible. An accessible page may become private at
        the next instruction, so it is not recorded as shared.
        """
        page = Gpa(gpa & -HOST_PAGE)
        with self._lock:
            if accessible or not self.is_shared(page):
                return
            self.ledger.set(page, PageState.PRIVATE)
            self.deliver(ShareEvent(False, page, 1, ShareSource.ACCESS, time.monotonic_ns()))
