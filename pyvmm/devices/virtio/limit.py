# SPDX-License-Identifier: Apache-2.0
"""How much a device may move for its guest in a second: token buckets in C (native/virtio/limit.c).

A bucket holds the tokens of one second, and is full at first: that is the burst. A request is served while there are
any tokens and may overdraw them; then the next request waits. So a request of any size is served, and over time no more
than the rate is taken.
"""

from __future__ import annotations

from pyvmm._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import pv_limit


class Limit:
    """A limit of ``bytes`` and ``ops`` (requests, or frames) a second, shared by all who use :attr:`native`; 0: none.

    ``native`` is a ``struct pv_limit *``, or NULL where nothing is limited.
    """

    def __init__(self, bytes: int = 0, ops: int = 0) -> None:
        self.native: pv_limit = ffi.NULL
        if bytes or ops:
            self.native = ffi.new("struct pv_limit *", {"bytes": {"rate": bytes}, "ops": {"rate": ops}})

    def take(self, bytes: int) -> None:
        """Take the tokens of bytes that are moved without C."""
        if self.native:
            lib.pv_limit_take(self.native, bytes, 0)
