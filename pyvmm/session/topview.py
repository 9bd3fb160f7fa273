# SPDX-License-Identifier: Apache-2.0
"""Show the reports of ``pyvmm top``: redrawn on a terminal, one after the other elsewhere, or as JSON.

A :class:`View` owns no descriptor; its creator owns the screen. A :class:`Top` watches a guest of this process.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from pyvmm.observe.rates import lines, report, since_start, take_reading
from pyvmm.session.watch import Watch

if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine
    from pyvmm.observe.pagemap import PageMap
    from pyvmm.observe.rates import Reading, Report
    from pyvmm.session.screen import Screen
    from pyvmm.session.tracing import Tracing

STDERR = 2


class View:
    """Shows reports on ``screen``, or on stdout if that is None."""

    def __init__(self, screen: Screen | None, *, as_json: bool) -> None:
        self.screen, self._as_json = screen, as_json
        self._latest: Report | None = None

    def put(self, latest: Report) -> None:
        """Show a report."""
        first, self._latest = self._latest is None, latest
        if self.screen is not None:
            self.again()
        elif self._as_json:
            print(json.dumps(latest), flush=True)
        else:
            print("\n".join([*([] if first else [""]), *lines(latest)]), flush=True)

    def again(self) -> None:
        """Show new output of the guest above the last report."""
        latest = self._latest
        if self.screen is not None:
            self.screen.draw(lambda width, height: lines(latest, width=width, height=height) if latest else [])


class Top(Watch):
    """Watches a run with reports instead of page maps: one every ``interval`` seconds, and one at the end.

    Without an interval, or on a terminal, the last report covers the whole run.
    """

    def __init__(self, view: View, svg: str | None, *, trace: Tracing | None, interval: float | None) -> None:
        console = STDERR if view.screen is None or view.screen.console is None else view.screen.console
        super().__init__(svg, trace=trace, screen=view.screen, console=console)
        self._view, self._interval = view, interval
        self._before: Reading | None = None
        self._last: Reading | None = None
        self._due = 0.0

    @property
    def looks(self) -> bool:
        """Always true: a thread's CPU accounting disappears when the thread ends."""
        return True

    def show(self, machine: Machine) -> None:
        """Report when an interval has passed, and show new output of the guest."""
        self._last = now = take_reading(machine)
        if time.monotonic() < self._due or self._interval is None:
            self._view.again()
            return
        if self._before is not None:
            self._view.put(report(self._before, now))
        self._before, self._due = now, time.monotonic() + self._interval

    def show_last(self, page_map: PageMap) -> None:  # noqa: ARG002 - a report says of pages how many
        """Report on the time since the last report, or on the whole run."""
        now = take_reading(self.machine)
        for vcpu, last in zip(now["vcpus"], self._last["vcpus"] if self._last else (), strict=False):
            for key in ("guest_cpu_ns", "kernel_cpu_ns"):
                vcpu[key] = last[key] if vcpu[key] is None else vcpu[key]
        if self._view.screen is not None:
            self._view.screen.drain()
        whole = self._before is None or self._interval is None or self._view.screen is not None
        self._view.put(since_start(now) if whole or self._before is None else report(self._before, now))
