# SPDX-License-Identifier: Apache-2.0
"""How far the making of an image or a kernel is, on stderr."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SILENCE: Final = 60.0
"""Seconds after which a step that goes on says so."""


@contextmanager
def showing() -> Iterator[Callable[[str, float], None]]:
    """Show progress on stderr: bars on a terminal, a line for each step elsewhere."""
    if not sys.stderr.isatty():
        told: dict[str, float] = {}

        def say(what: str, share: float) -> None:
            now = time.monotonic()
            if what not in told:
                print(f"pyvmm: lab: {what}", file=sys.stderr, flush=True)
            elif now - told[what] > SILENCE and share < 1:
                print(f"pyvmm: lab: {what}: {share:.0%}", file=sys.stderr, flush=True)
            else:
                return
            told[what] = now

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(24), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as display:
        tasks: dict[str, TaskID] = {}

        def show(what: str, share: float) -> None:
            if what not in tasks:
                for task in tasks.values():
                    display.update(task, total=1.0, completed=1.0)
                tasks[what] = display.add_task(what, total=None)
            if share > 0:
                display.update(tasks[what], total=1.0, completed=share)

        yield show
        for task in tasks.values():
            display.update(task, total=1.0, completed=1.0)
