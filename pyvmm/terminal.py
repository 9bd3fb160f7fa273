# SPDX-License-Identifier: Apache-2.0
"""Whose a terminal is: who reads it or sets its mode from the background is stopped for that. Owns nothing."""

from __future__ import annotations

import os


def in_background(terminal: int) -> bool:
    """Whether this is a background job of ``terminal``, which is then for another to read and set."""
    try:
        return os.tcgetpgrp(terminal) != os.getpgrp()
    except OSError:  # no terminal, or none that stops anybody here
        return False


def in_foreground(terminal: int) -> bool:
    """Whether ``terminal`` is this process's own, and its to read and set now."""
    try:
        return os.isatty(terminal) and os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
