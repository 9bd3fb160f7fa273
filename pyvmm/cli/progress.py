# SPDX-License-Identifier: Apache-2.0
"""A progress line at the end of stderr, on a terminal. Owns that line while its context lasts. Used by one thread."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from pyvmm.terminal import clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def terminal_line() -> Iterator[Callable[[str], None] | None]:
    """Yield a function that replaces the line, or None if stderr is not a terminal. The line disappears at the end."""
    if not sys.stderr.isatty():
        yield None
        return

    def show(text: str) -> None:
        sys.stderr.write(f"\r\x1b[K{clean(text)}")
        sys.stderr.flush()

    try:
        yield show
    finally:
        show("")
