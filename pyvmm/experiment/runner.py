# SPDX-License-Identifier: Apache-2.0
"""Run claims and benchmark cases, each isolated in a child process with a deadline.

If a child process dies, or is killed at its deadline with its descendants, the result says so. Host settings that it
changed are restored. Call it in a process without other threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

from pyvmm.experiment.child import CrashedError, run_in_child
from pyvmm.experiment.host.settings import SavedSettings

R = TypeVar("R")


class Task(Protocol[R]):
    """One task to run, and its result."""

    @property
    def seconds(self) -> float:
        """Its default deadline in seconds."""
        ...

    def conduct(self, seconds: float, /) -> Any:
        """Run the task in the child process, which is killed after ``seconds``. Returns JSON values."""
        ...

    def result(self, data: Any, /) -> R:
        """Convert the JSON values of :meth:`conduct` to a result."""
        ...

    def crashed(self, why: str, seconds: float, /) -> R:
        """Return the result for a child process that did not finish, after ``seconds``."""
        ...

    def is_orderly(self, result: R, /) -> bool:
        """Whether a task with this result has restored the host's settings itself."""
        ...


def run(tasks: Iterable[Task[R]], *, deadline: float | None = None) -> Iterator[R]:
    """Run one task after the other and yield results as they come. ``deadline`` replaces the tasks' own."""
    before = SavedSettings()
    for task in tasks:
        orderly = False
        try:
            result = run_one(task, task.seconds if deadline is None else deadline)
            orderly = task.is_orderly(result)
        finally:
            if not orderly:  # it crashed, or was killed because the run ends
                before.restore()
        yield result


def run_one(task: Task[R], deadline: float) -> R:
    """Run a task in a child process and return its result, or a result that describes the process's end."""
    begun = time.monotonic()
    try:
        return task.result(run_in_child(lambda: task.conduct(deadline), deadline))
    except CrashedError as crash:
        return task.crashed(crash.message, round(time.monotonic() - begun, 3))
