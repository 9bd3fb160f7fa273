# SPDX-License-Identifier: Apache-2.0
"""A line of progress at the end of stderr, on a terminal. Owns that line while its context lasts; one thread."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def terminal_line() -> Iterator[Callable[[str], None] | None]:
    """Yield what replaces the line, None where stderr is no terminal. The line is gone when the context ends."""
    if not sys.stderr.isatty():
        yield None
        return

    def show(text: str) -> None:
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()

    try:
        yield show
    finally:
        show("")
