# SPDX-License-Identifier: Apache-2.0
"""Runs claims and benchmark cases, each in a child process with a deadline, so that none can hurt its neighbours.

A child process that dies, or that is past its deadline and killed with all it started, has that for its result. What
it may have left changed of the host's settings is put back. Must be called in a process without other threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

from pyvmm.experiment.child import CrashedError, run_in_child
from pyvmm.experiment.host.settings import SavedSettings

R = TypeVar("R")


class Task(Protocol[R]):
    """One thing to run, and what its result is."""

    @property
    def seconds(self) -> float:
        """How long it may take, unless whoever runs it says otherwise."""
        ...

    def conduct(self, seconds: float, /) -> Any:
        """Do it, in the child process, which is killed after ``seconds``; return plain values, as JSON has them."""
        ...

    def result(self, data: Any, /) -> R:
        """Return the result that :meth:`conduct` returned as plain values."""
        ...

    def crashed(self, why: str, seconds: float, /) -> R:
        """Return the result of a child process that did not come to its end, after ``seconds``."""
        ...

    def is_orderly(self, result: R, /) -> bool:
        """Whether whatever had this result has put the host's settings back itself."""
        ...


def run(tasks: Iterable[Task[R]], *, deadline: float | None = None) -> Iterator[R]:
    """Run one task after the other and yield results as they come; ``deadline`` seconds replace the tasks' own."""
    before = SavedSettings()
    for task in tasks:
        orderly = False
        try:
            result = run_one(task, task.seconds if deadline is None else deadline)
            orderly = task.is_orderly(result)
        finally:
            if not orderly:  # it crashed, or was killed because we are to end
                before.restore()
        yield result


def run_one(task: Task[R], deadline: float) -> R:
    """Run a task in a child process and return its result, or the one that says how that process ended."""
    begun = time.monotonic()
    try:
        return task.result(run_in_child(lambda: task.conduct(deadline), deadline))
    except CrashedError as crash:
        return task.crashed(crash.message, round(time.monotonic() - begun, 3))
