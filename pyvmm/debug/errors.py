# SPDX-License-Identifier: Apache-2.0
"""The error for refused requests of a debugger."""

from __future__ import annotations

from typing import Final

EFAULT: Final = 14
EINVAL: Final = 22
ENOSPC: Final = 28


class Refused(Exception):
    """A request failed. ``code`` is the debugger's answer (a Linux errno), ``why`` the text for users."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code
        self.why = why
