# SPDX-License-Identifier: Apache-2.0
"""Answer requests through a page that the guest shared: the smallest device that uses a share.

=====================================  ==========================================================================
what a hostile guest may do            what happens
=====================================  ==========================================================================
name a page it did not share           refused (ECHO_NOT_SHARED), nothing is touched
take the page back during a request    the unshare waits for the request; the next one finds no page
announce a share, keep it private      the guarded copy reports it, the page is dropped, ECHO_NOT_SHARED
=====================================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm import abi
from pyvmm.devices.base import Device
from pyvmm.errors import GuestMemoryError
from pyvmm.memory.address import Gpa
from pyvmm.memory.memory import Memory
from pyvmm.memory.relay import ShareEvent, ShareRelay
from pyvmm.pages import HOST_PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ANSWER_OFFSET = 2048
MAX_REQUEST = 2048


class Echo(Device):
    """Converts the page's text to upper case; registers in firmware/lib/abi.h.

    It uses the relay's lock, so an unshare by another vCPU waits until the current request is done. It subscribes only
    while it holds a page, so that otherwise shares stay in the native loop.
    """

    name = "echo"
    compatible = "pyvmm,echo"

    def __init__(self, memory: Memory, relay: ShareRelay) -> None:
        super().__init__()
        self._memory = memory
        self._relay = relay
        self._unsubscribe: Callable[[], None] | None = None
        self.page = 0
        self.status = abi.ECHO_OK
        self.answered = 0

    def _converted(self, event: ShareEvent) -> None:
        if event.shared:
            return
        if event.gpa <= self.page < event.gpa + event.npages * HOST_PAGE:
            self._let_go()

    def read(self, offset: int, size: int, vcpu: int) -> int:  # noqa: ARG002
        """Read PAGE, STATUS or COUNT."""
        match offset:
            case abi.ECHO_PAGE:
                return self.page
            case abi.ECHO_STATUS:
                return self.status
            case abi.ECHO_COUNT:
                return self.answered
            case _:
                return 0

    def write(self, offset: int, size: int, value: int, vcpu: int) -> None:  # noqa: ARG002
        """Name a page, or ask for an answer to the ``value`` bytes at its start."""
        match offset:
            case abi.ECHO_PAGE:
                self.status = self._name(value)
            case abi.ECHO_REQUEST:
                with self._relay.hold():
                    self.status = self._request(value)

    def _name(self, gpa: int) -> int:
        with self._relay.hold():
            self._let_go()
            if gpa == 0:
                return abi.ECHO_OK
            if gpa % HOST_PAGE or not self._memory.contains(Gpa(gpa), HOST_PAGE):
                return abi.ECHO_BAD
            # Subscribe first: otherwise an unshare between the check and the subscription would be missed.
            self._unsubscribe = self._relay.subscribe(self._converted)
            if not self._relay.is_shared(gpa):
                self._let_go()
                return abi.ECHO_NOT_SHARED
            self.page = gpa
            return abi.ECHO_OK

    def _request(self, length: int) -> int:
        if self.page == 0:
            return abi.ECHO_NO_PAGE
        if length > MAX_REQUEST:
            return abi.ECHO_BAD
        try:
            request = self._memory.read(Gpa(self.page), length)
            self._memory.write(Gpa(self.page + ANSWER_OFFSET), request.upper())
        except GuestMemoryError:
            self._let_go()
            return abi.ECHO_NOT_SHARED
        self.answered += 1
        return abi.ECHO_OK

    def _let_go(self) -> None:
        self.page = 0
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None

    def save(self) -> dict[str, Any]:
        """Return the registers."""
        return {"page": self.page, "status": self.status, "answered": self.answered}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the state, and take the page again if it is shared."""
        from pyvmm.schema import NUMBER, check

        check(saved, {"page": NUMBER, "status": NUMBER, "answered": NUMBER}, self.name)
        self._name(saved["page"])
        self.status, self.answered = saved["status"], saved["answered"]

    def close(self) -> None:
        """Stop listening to the relay."""
        self._let_go()
