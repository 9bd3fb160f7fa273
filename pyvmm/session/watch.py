# SPDX-License-Identifier: Apache-2.0
"""Observe a run: show it on a terminal, and write its picture and its trace to files.

A :class:`Watch` owns one thread (``pyvmm-watch``), the recording of faults and the files. The vCPUs are not involved:
the thread reads the ledger and drains the rings a few times a second.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from typing import TYPE_CHECKING, Self

from pyvmm.kvm.faulttrace import FaultTrace
from pyvmm.labenv import TCG_NOTE, in_lab
from pyvmm.machine import layout
from pyvmm.observe.grid import size
from pyvmm.observe.pagemap import PageMap
from pyvmm.observe.timeline import Timeline
from pyvmm.session.outputfile import OutputFile
from pyvmm.session.tracing import Tracing

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.machine.machine import Machine
    from pyvmm.session.screen import Screen
    from pyvmm.vcpu.outcome import Outcome

PERIOD = 0.1
"""Pause between two looks: at least this many seconds, and this many times the last look's duration."""
PATIENCE = 5


class Watch:
    """Watches one run; a context manager, entered before the machine is built and left after it is closed.

    ``svg`` is the file for its picture and ``trace`` its tracing. ``screen`` is a terminal that shows the changing map,
    ``console`` the descriptor of the guest's output. ``finished`` is called at the end, while the machine still exists.
    """

    def __init__(
        self,
        svg: str | None = None,
        *,
        trace: Tracing | None = None,
        screen: Screen | None = None,
        console: int = 1,
        finished: Callable[[Machine, PageMap, Outcome], None] | None = None,
    ) -> None:
        self.console = console
        self._path, self._tracing, self._screen, self._finished = svg, trace, screen, finished
        self._picture: OutputFile | None = None
        self._timeline: Timeline | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as half:
            faults = None
            if self._path is not None or (self._tracing is not None and self._tracing.faults):
                faults = half.enter_context(FaultTrace(range(layout.RAM_BASE, layout.RAM_LIMIT)))
            if self._path is not None:
                self._picture = half.enter_context(OutputFile(self._path))
                self._timeline = Timeline(faults)
            if self._tracing is not None:
                self._timeline = half.enter_context(self._tracing).record(faults)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
            half.callback(os.close, self._wake)
            half.callback(self._stop)
            self._stack = half.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self, machine: Machine) -> None:
        """Start to watch, just before the guest starts."""
        self.machine = machine
        if self._timeline is not None:
            self._timeline.watch(machine.memory, machine.natives)
        if self._tracing is not None:
            self._tracing.begin(machine)
        if self._timeline is not None or self.looks:
            self._thread = threading.Thread(target=self._look, name="pyvmm-watch", daemon=True)
            self._thread.start()

    def end(self, outcome: Outcome) -> None:
        """Look for the last time, and write the files."""
        self._stop()
        page_map = PageMap.of(self.machine.memory.ledger)
        self.show_last(page_map)
        if self._timeline is not None and self._picture is not None:
            from pyvmm.observe.timesvg import svg_run

            events = self._timeline.events()
            notes = [f"the end: {outcome.reason}", *self._timeline.notes]
            if in_lab():
                notes.append(TCG_NOTE)
            self._picture.write(
                svg_run(_title(self.machine), page_map, events, start=self.machine.started_ns, notes=notes)
            )
        if self._tracing is not None:
            self._tracing.end(self.machine)
        if self._finished is not None:
            self._finished(self.machine, page_map, outcome)

    @property
    def looks(self) -> bool:
        """Whether there is something to show while the run lasts."""
        return self._screen is not None

    def show(self, machine: Machine) -> None:
        """Show the current state. The thread calls it several times a second."""
        if self._screen is not None:
            self._screen.show(PageMap.of(machine.memory.ledger))

    def show_last(self, page_map: PageMap) -> None:
        """Show the final state."""
        if self._screen is not None:
            self._screen.finish(page_map)

    def _stop(self) -> None:
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            self._thread = None

    def _look(self) -> None:
        try:
            while True:
                began = time.monotonic()
                if self._timeline is not None:
                    self._timeline.collect()
                if self.looks:
                    self.show(self.machine)
                if self._woken(max(PERIOD, PATIENCE * (time.monotonic() - began))):
                    return
        except OSError as error:
            self.machine.stop(f"cannot update the display: {error.strerror}")

    def _woken(self, seconds: float) -> bool:
        """Wait, and read guest output meanwhile. Returns early to show output, and True to stop."""
        deadline = time.monotonic() + seconds
        source = None if self._screen is None else self._screen.source
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if source is not None:
            poll.register(source, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            ready = dict(poll.poll(left * 1000))
            if self._wake in ready:
                return True
            if self._screen is not None and source in ready and not self._screen.take():
                break
        return False


def _title(machine: Machine) -> str:
    config = machine.config
    cpus = f"{config.cpus} vCPU{'' if config.cpus == 1 else 's'}"
    return f"{config.title}: protection {config.protection.value}, {cpus}, {size(config.memory)} of {config.backing}"
