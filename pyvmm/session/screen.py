# SPDX-License-Identifier: Apache-2.0
"""Redraw a page map, or other lines, at the bottom of a terminal, below the guest's output.

A :class:`Screen` owns the terminal from its first line to the cursor. It also owns a pipe for output that would
otherwise go to the same terminal. One thread at a time uses it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Self

from pyvmm import log
from pyvmm.observe.mapterm import render

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from pyvmm.observe.pagemap import PageMap

STDOUT, STDERR = 1, 2
MOST_LINES = 40
LINES_ABOVE = 3
"""Minimum terminal lines kept for output."""
_CHUNK = 1 << 16
_MOST_PENDING = 1 << 18


class Screen:
    """Draws on the descriptor ``terminal``; a context manager.

    With ``shared``, other output goes to the same terminal. Write that output to :attr:`console`, and call :meth:`take`
    when :attr:`source` is readable.
    """

    def __init__(self, terminal: int, *, colour: bool, shared: bool) -> None:
        self._terminal, self._colour, self._shared = terminal, colour, shared
        self.source: int | None = None
        self.console: int | None = None
        self._pending = b""
        self._partial = b""
        self._drawn: list[str] = []

    def __enter__(self) -> Self:
        if self._shared:
            self.source, self.console = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self.source, False)
        return self

    def __exit__(self, *_: object) -> None:
        self.drain()
        # Output that came after the last drawing. An error in writing it cannot be reported.
        with contextlib.suppress(OSError):
            self._write(self._pending)
        for fd in (self.source, self.console):
            if fd is not None:
                os.close(fd)

    def take(self) -> bool:
        """Read pending output. Returns False when it should be shown before reading more."""
        try:
            self._pending += os.read(self.source, _CHUNK) if self.source is not None else b""
        except BlockingIOError:
            return False
        return len(self._pending) < _MOST_PENDING

    def show(self, page_map: PageMap) -> None:
        """Write pending output, and the map below it."""
        self.draw(lambda width, height: render(page_map, width=width, height=height, colour=self._colour))

    def draw(self, lines: Callable[[int, int], list[str]]) -> None:
        """Write pending output, and below it the result of ``lines(width, height)``."""
        columns, rows = os.get_terminal_size(self._terminal)
        if not columns or not rows:  # the terminal does not report its size
            columns, rows = 80, 24
        # After a line of full width, terminals differ in the cursor's position.
        height = min(rows - 1 - LINES_ABOVE, MOST_LINES)
        self._write(self.frame(lines(columns - 1, height), columns - 1).encode(errors="surrogateescape"))

    def finish(self, page_map: PageMap) -> None:
        """Draw the last map below all output."""
        self.drain()
        self.show(page_map)

    def drain(self) -> None:
        """Read all pending output."""
        with contextlib.suppress(BlockingIOError):
            while self.source is not None:
                self._pending += os.read(self.source, _CHUNK)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._terminal, data) :]

    def frame(self, lines: list[str], width: int) -> str:
        """Return the bytes that draw ``lines`` below all output; empty if nothing changed."""
        text = (self._partial + self._pending).decode(errors="surrogateescape")
        self._pending = b""
        *whole, rest = text.split("\n")
        self._partial = rest.encode(errors="surrogateescape")[-_CHUNK:]
        # An unfinished line, such as a prompt, is drawn as part of the frame, as far as it is text.
        begun = "".join(filter(str.isprintable, rest.rpartition("\r")[2]))[:width]
        frame = [begun, *lines] if begun else lines
        if not whole and frame == self._drawn:
            return ""
        up = f"\r\x1b[{len(self._drawn)}A" if self._drawn else "\r"
        self._drawn = frame
        # Cleared first: a line may end in a carriage return.
        above = "".join(f"\x1b[K{line}\n" for line in whole)
        return f"{up}{above}" + "".join(f"{line}\x1b[K\n" for line in frame) + "\x1b[J"


def is_live(args: argparse.Namespace) -> bool:
    """Whether stdout is a terminal to draw a live view on."""
    return not args.json and os.isatty(STDOUT) and os.environ.get("TERM", "dumb") != "dumb"


@contextlib.contextmanager
def screen_for(args: argparse.Namespace, *, shared: bool | None = None) -> Iterator[Screen | None]:
    """Return a Screen on stdout if possible. Other output to the same terminal goes through it.

    ``shared`` says whether other output exists. By default it is true if stderr is the same terminal.
    """
    if not is_live(args):
        yield None
        return
    if shared is None:
        shared = os.path.samestat(os.fstat(STDOUT), os.fstat(STDERR))
    sys.stdout.flush()
    with Screen(STDOUT, colour=has_colours(), shared=shared) as screen, contextlib.ExitStack() as stack:
        if screen.console is not None:
            stream = stack.enter_context(open(screen.console, "w", closefd=False))
            verbosity, as_json = args.verbose - args.quiet, bool(args.log_json)
            log.configure(verbosity, json=as_json, stream=stream)
            stack.callback(log.configure, verbosity, json=as_json)
        yield screen


def has_colours() -> bool:
    """Whether stdout can show half blocks in 256 colours."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return sys.stdout.isatty() and not plain and sys.stdout.encoding.lower().replace("-", "") == "utf8"
