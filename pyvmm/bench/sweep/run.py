# SPDX-License-Identifier: Apache-2.0
"""Connects a sweep's points, workers and store: stores each result as it comes, and retries lost points.

Runs in the main thread. Owns only the queue of results and signals.
"""

from __future__ import annotations

import queue
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Final

from pyvmm.bench.sweep.plan import Task
from pyvmm.bench.sweep.store import Counts, Store
from pyvmm.bench.sweep.work import Answer, LostError, PointError
from pyvmm.bench.sweep.workers import Workers

TRIES: Final = 3
"""How often a point is measured whose worker is lost, before it counts as failed."""

TICK: Final = 1.0
"""Seconds between two reports of progress."""

Show = Callable[[Counts, float | None], None]
"""Is told how far the sweep is, and how many seconds it will take, if that can be said."""


class Sweep:
    """One run of a sweep: it measures the waiting points of the store until none is left, or until a signal."""

    def __init__(self, store: Store, workers: Workers, show: Show) -> None:
        self._store = store
        self._workers = workers
        self._show = show
        self._events: queue.SimpleQueue[Future[Answer] | int] = queue.SimpleQueue()
        self._running: dict[Future[Answer], Task] = {}
        self._losses: Counter[int] = Counter()
        self._settled = 0

    def interrupt(self, number: int) -> None:
        """End the sweep because of a signal; for its handler."""
        self._events.put(number)

    def run(self) -> int | None:
        """Measure the waiting points. Returns the number of the signal that ended the run, None if no point is left.

        Raises PyvmmError if it cannot continue, for example with a full disk. The results stored by then are complete.
        """
        waiting = deque(self._store.waiting())
        begun = time.monotonic()
        while True:
            while waiting and (self._workers.window is None or len(self._running) < self._workers.window):
                self._submit(waiting.popleft())
            counts = self._store.counts()
            self._show(counts, self._left(counts, begun))
            if not self._running:
                return None
            try:
                event = self._events.get(timeout=TICK)
            except queue.Empty:
                continue
            if isinstance(event, int):
                return event
            task = self._running.pop(event)
            if not self._settle(task, event):
                waiting.appendleft(task)

    def _submit(self, task: Task) -> None:
        future = self._workers.submit(task)
        self._running[future] = task
        future.add_done_callback(self._events.put)

    def _settle(self, task: Task, future: Future[Answer]) -> bool:
        """Store the result of a point; return False if the point must be tried again."""
        try:
            answer = future.result()
        except (Exception, CancelledError) as raised:
            error = self._workers.judge(raised)
            if isinstance(error, LostError):
                self._losses[task.number] += 1
                if self._losses[task.number] < TRIES:
                    self._store.lost(task, str(error))
                    return False
                self._store.fail(task, f"tried {TRIES} times: {error}")
            elif isinstance(error, PointError):
                self._store.fail(task, str(error))
            else:
                raise error from raised
        else:
            self._store.done(task, answer)
        self._settled += 1
        return True

    def _left(self, counts: Counts, begun: float) -> float | None:
        if not self._settled:
            return None
        return (time.monotonic() - begun) / self._settled * counts.waiting
