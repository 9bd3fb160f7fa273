# SPDX-License-Identifier: Apache-2.0
"""Check whether this process may use a terminal, and make text harmless for one. Owns nothing.

The kernel stops background jobs that use their terminal. A terminal obeys the control characters in what it shows, and
names of files, guests and hosts may have such characters.
"""

from __future__ import annotations

import os
import sys


def clean(text: str) -> str:
    """Return ``text`` with every control character written out, such as ``\\x1b``.

    Line ends and tabs stay. Other control characters, direction marks and lone surrogates are replaced.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_written(each) if _acts(each) else each for each in text)


def say(text: str) -> None:
    """Print a message on stderr, made harmless."""
    print(clean(text), file=sys.stderr, flush=True)


def _acts(char: str) -> bool:
    if char.isprintable() or char in "\n\t":
        return False
    import unicodedata

    return unicodedata.category(char) != "Zs"


def _written(char: str) -> str:
    return char.encode("unicode_escape").decode()


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
