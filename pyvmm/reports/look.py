# SPDX-License-Identifier: Apache-2.0
"""A terminal's abilities: its width, its colours, and whether its encoding is UTF-8.

Pure, except for :meth:`Look.of`, which examines a stream.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from dataclasses import dataclass
from typing import TextIO

_ASCII = str.maketrans({"✓": "+", "✗": "x", "·": ".", "…": "~", "→": "->", "×": "x"})  # noqa: RUF001


@dataclass(frozen=True, slots=True)
class Look:
    """The abilities of a terminal."""

    width: int = 80
    colours: bool = False
    ascii: bool = False
    """Its encoding is not UTF-8: nothing but ASCII is written."""

    @classmethod
    def of(cls, stream: TextIO) -> Look:
        """Examine a stream. A stream that is not a terminal gets 100 columns."""
        utf8 = (stream.encoding or "").lower().replace("-", "").replace("_", "") in ("utf8", "cp65001")
        tty = stream.isatty()
        width = max(shutil.get_terminal_size((100, 24)).columns, 40) if tty else 100
        return cls(width, tty and not os.environ.get("NO_COLOR"), not utf8)

    def paint(self, text: str, code: str) -> str:
        """Colour ``text`` if there are colours."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours and text else text

    def finish(self, text: str) -> str:
        """Return ``text`` in characters that this terminal can show."""
        return text.translate(_ASCII).encode("ascii", "backslashreplace").decode() if self.ascii else text

    def wrap(self, text: str, indent: int, first: str = "") -> list[str]:
        """Fill lines with ``text``, all indented, the first one after ``first``."""
        filled = textwrap.wrap(
            text,
            max(self.width, indent + 20),
            initial_indent=first.ljust(indent),
            subsequent_indent=" " * indent,
            break_long_words=True,
            break_on_hyphens=False,
        )
        return filled or [first.rstrip()]


PLAIN = Look()
