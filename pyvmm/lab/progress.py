# SPDX-License-Identifier: Apache-2.0
"""Show the progress of building an image or a kernel, and of starting a lab, on stderr."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from pyvmm.terminal import clean
from pyvmm.terminal import say as tell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

SILENCE: Final = 60.0
"""Seconds after which a step that goes on says so."""


TELLING: Final = 20.0, 0.02, 0.99
"""Seconds and the share of a step that must be behind it before it is said how long the rest takes; and the share from
which on nobody knows: what is measured by an expectation may come to more."""


def left(took: float, share: float) -> str:
    """Estimate the rest of a step of which ``share`` took ``took`` seconds; empty if that would be a guess."""
    least, first, last = TELLING
    if took < least or not first <= share < last:
        return ""
    seconds = took * (1 - share) / share
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {max(round(seconds, -1), 10):.0f} s left"


@contextmanager
def showing() -> Iterator[Callable[[str, float], None]]:
    """Show progress on stderr with the remaining time: bars on a terminal, elsewhere a line for each step."""
    began: dict[str, float] = {}

    def rest(what: str, share: float) -> str:
        now = time.monotonic()
        return left(now - began.setdefault(what, now), share)

    if not sys.stderr.isatty():
        told: dict[str, float] = {}

        def say(what: str, share: float) -> None:
            now = time.monotonic()
            remaining = rest(what, share)
            if what not in told:
                tell(f"pyvmm: lab: {what}")
            elif now - told[what] > SILENCE and share < 1:
                tell(f"pyvmm: lab: {what}: {share:.0%}{remaining and f', {remaining}'}")
            else:
                return
            told[what] = now

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as display:
        tasks: dict[str, TaskID] = {}

        def finish() -> None:
            for task in tasks.values():
                display.update(task, total=1.0, completed=1.0, left="")

        def show(what: str, share: float) -> None:
            if what not in tasks:
                finish()
                tasks[what] = display.add_task(what, total=None, left="")
            remaining = rest(what, share)
            if share > 0:
                display.update(tasks[what], total=1.0, completed=share, left=remaining)

        yield show
        finish()


class Ticker:
    """A line on a terminal with the current step and its duration. Elsewhere it prints nothing.

    It does not use rich: importing that takes a tenth of the second that a lab needs to start.
    """

    INTERVAL: Final = 0.1
    MARKS: Final = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"

    def __init__(self, what: str) -> None:
        self.what = what
        """What is waited for; it may change meanwhile."""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._thread = threading.Thread(target=self._tick, name="pyvmm-ticker", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Erase the line, before other output. May be called again."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _tick(self) -> None:
        started = time.monotonic()
        turn = 0
        while not self._ended.wait(self.INTERVAL):
            mark = self.MARKS[turn % len(self.MARKS)]
            turn += 1
            _write(f"\r\33[K{mark} {clean(self.what)}, {time.monotonic() - started:.0f} s")
        if turn:
            _write("\r\33[K")


def _write(text: str) -> None:
    with suppress(OSError, UnicodeError):  # the terminal has closed, or cannot print these characters
        sys.stderr.write(text)
        sys.stderr.flush()
