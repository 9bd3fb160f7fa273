# SPDX-License-Identifier: Apache-2.0
"""A page map, or other lines, at the bottom of a terminal, drawn over and over, with the guest's output above it.

A :class:`Screen` owns what is on the terminal from its first line to the cursor, and the pipe through which output
comes that would otherwise go to the same terminal. One thread at a time uses it.
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
"""Of the terminal's lines kept for output, however large the map."""
_CHUNK = 1 << 16
_MOST_PENDING = 1 << 18


class Screen:
    """Draws on the descriptor ``terminal``; a context manager.

    With ``shared`` other output goes to the same terminal: it has to be written to :attr:`console`, and read with
    :meth:`take` when :attr:`source` is readable.
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
        # What came when the map was no longer looked at; nobody can be told that it cannot be written.
        with contextlib.suppress(OSError):
            self._write(self._pending)
        for fd in (self.source, self.console):
            if fd is not None:
                os.close(fd)

    def take(self) -> bool:
        """Read output that has come; False when it should be shown before more is read."""
        try:
            self._pending += os.read(self.source, _CHUNK) if self.source is not None else b""
        except BlockingIOError:
            return False
        return len(self._pending) < _MOST_PENDING

    def show(self, page_map: PageMap) -> None:
        """Write what output there is, and the map below it."""
        self.draw(lambda width, height: render(page_map, width=width, height=height, colour=self._colour))

    def draw(self, lines: Callable[[int, int], list[str]]) -> None:
        """Write what output there is, and below it what ``lines`` makes of a width and a height."""
        columns, rows = os.get_terminal_size(self._terminal)
        if not columns or not rows:  # it has not been told
            columns, rows = 80, 24
        # A line as wide as the terminal would leave some in doubt where the cursor is.
        height = min(rows - 1 - LINES_ABOVE, MOST_LINES)
        self._write(self.frame(lines(columns - 1, height), columns - 1).encode(errors="surrogateescape"))

    def finish(self, page_map: PageMap) -> None:
        """Show the last map below everything that was written."""
        self.drain()
        self.show(page_map)

    def drain(self) -> None:
        """Take all output that has come."""
        with contextlib.suppress(BlockingIOError):
            while self.source is not None:
                self._pending += os.read(self.source, _CHUNK)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._terminal, data) :]

    def frame(self, lines: list[str], width: int) -> str:
        """Return what to write so that ``lines`` stand below all output; nothing where that is so."""
        text = (self._partial + self._pending).decode(errors="surrogateescape")
        self._pending = b""
        *whole, rest = text.split("\n")
        self._partial = rest.encode(errors="surrogateescape")[-_CHUNK:]
        # A line that is not ended yet, a prompt say, is drawn as part of the frame, as far as it is text.
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
    """Whether stdout is a terminal on which something live is to be shown."""
    return not args.json and os.isatty(STDOUT) and os.environ.get("TERM", "dumb") != "dumb"


@contextlib.contextmanager
def screen_for(args: argparse.Namespace, *, shared: bool | None = None) -> Iterator[Screen | None]:
    """Make stdout the terminal of something live if it can be; what else would be written there comes through it.

    ``shared`` says whether there is anything else; if stderr is the same terminal, unless told.
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
    """Whether stdout takes half blocks in 256 colours."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return sys.stdout.isatty() and not plain and sys.stdout.encoding.lower().replace("-", "") == "utf8"
