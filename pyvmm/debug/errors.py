# SPDX-License-Identifier: Apache-2.0
"""What a debugger is refused."""

from __future__ import annotations

from typing import Final

EFAULT: Final = 14
EINVAL: Final = 22
ENOSPC: Final = 28


class Refused(Exception):
    """A request that fails: ``code`` is what the debugger hears (a Linux errno), ``why`` is for people."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code
        self.why = why
