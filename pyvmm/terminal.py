# SPDX-License-Identifier: Apache-2.0
"""Check whether this process may use a terminal. The kernel stops background jobs that use it. Owns nothing."""

from __future__ import annotations

import os


def in_background(terminal: int) -> bool:
    """Whether this is a background job of ``terminal``, and must not read or set it."""
    try:
        return os.tcgetpgrp(terminal) != os.getpgrp()
    except OSError:  # not a terminal, or not our controlling one
        return False


def in_foreground(terminal: int) -> bool:
    """Whether this process may read and set ``terminal`` now."""
    try:
        return os.isatty(terminal) and os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
