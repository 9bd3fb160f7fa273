# SPDX-License-Identifier: Apache-2.0
"""The trace of a run, for https://ui.perfetto.dev.

The file is opened before the guest starts and written after it ended, so a full disk does not harm the guest.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, Self

from pyvmm.labenv import TCG_NOTE, in_lab
from pyvmm.log import get_logger
from pyvmm.session.outputfile import OutputFile

if TYPE_CHECKING:
    import argparse

    from pyvmm.kvm.faulttrace import FaultTrace
    from pyvmm.machine.machine import Machine
    from pyvmm.observe.hyptrace import HypTrace
    from pyvmm.observe.recorder import Recorder
    from pyvmm.observe.tracefile import TracedRun

LARGE: Final = 1 << 17
"""Records above which writing is announced: it takes a second or so, and in the lab some 15 seconds."""


def tracing_of(args: argparse.Namespace) -> Tracing | None:
    """Return the tracing that the options of a run ask for, or None."""
    return None if args.trace is None else Tracing(args.trace, faults=args.trace_faults, el2=args.trace_el2)


class Tracing:
    """The trace of one run; a context manager, entered before the machine is built and left after it is closed.

    ``path`` is the file. ``faults`` and ``el2`` add the kernel's fault and hypervisor events, where available.
    Used by a :class:`~pyvmm.session.watch.Watch`.
    """

    def __init__(self, path: str, *, faults: bool = False, el2: bool = False) -> None:
        self.faults = faults
        self._path, self._el2 = path, el2
        self._recorder: Recorder | None = None
        self._hypervisor: HypTrace | None = None
        self._stack, self._listening = contextlib.ExitStack(), contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as half:
            self._file = half.enter_context(OutputFile(self._path))
            self._stack = half.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def record(self, faults: FaultTrace | None) -> Recorder:
        """Return the recorder of the run, with faults if the kernel reports them."""
        from pyvmm.observe.recorder import Recorder

        self._recorder = Recorder(faults)
        self._stack.callback(self._recorder.stop)
        return self._recorder

    def begin(self, machine: Machine) -> None:
        """Start to record devices and the hypervisor, just before the guest starts."""
        if self._recorder is not None:
            self._recorder.listen(machine.relay)
        if self._el2:
            from pyvmm.observe.hyptrace import HypTrace

            # What the hypervisor records is stamped with the guest's virtual counter.
            machine.clock.goes_on = "the hypervisor is traced by it"
            self._stack.push(self._listening)
            self._hypervisor = self._listening.enter_context(HypTrace())

    def end(self, machine: Machine) -> None:
        """Write the trace. Raises PyvmmError if that fails."""
        if self._recorder is None:
            return
        from pyvmm.observe.tracefile import write_trace

        self._recorder.stop()
        events = []
        if self._hypervisor is not None:
            self._listening.close()
            events = self._hypervisor.events()
        if self._recorder.kept > LARGE:
            get_logger("trace").warning("trace_is_large", records=self._recorder.kept, now="writing it takes a while")
        with self._file.writing() as put:
            notes = write_trace(put, self._recorder, _traced_run(machine), events)
        self._tell(notes)

    def _tell(self, lost: list[str]) -> None:
        """Report what was requested but is missing from the trace."""
        log = get_logger("trace")
        log.info("trace_written", file=self._path)
        for note in lost:
            log.warning("trace_incomplete", file=self._path, reason=note)
        if self.faults and self._recorder is not None and self._recorder.why_no_faults:
            log.warning("trace_without_faults", reason=self._recorder.why_no_faults)
        if self._hypervisor is not None:
            if self._hypervisor.why_not:
                log.warning("trace_without_el2", reason=self._hypervisor.why_not)
            if self._hypervisor.lost:
                reason = f"{self._hypervisor.lost:,} of the hypervisor's events were overwritten, the oldest"
                log.warning("trace_incomplete", file=self._path, reason=reason)


def _traced_run(machine: Machine) -> TracedRun:
    from pyvmm.observe.tracefile import TracedRun
    from pyvmm.protection import Protection

    config = machine.config
    labels = [f"protection {config.protection.value}", f"{config.memory >> 20} MiB of {config.backing}"]
    if in_lab():
        labels.append(TCG_NOTE)
    return TracedRun(
        name=f"pyvmm {config.title}",
        labels=tuple(labels),
        devices=tuple((placed.device.name, placed.base, placed.device.size) for placed in machine.bus.placed),
        protected=config.protection is not Protection.NONE,
        donated=config.protection is Protection.PKVM,
        start_ns=machine.started_ns,
        end_ns=machine.ended_ns,
    )
