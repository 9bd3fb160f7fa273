# SPDX-License-Identifier: Apache-2.0
"""``pyvmm trace``: run a guest as ``run`` does and write a trace of it, for https://ui.perfetto.dev.

Also what ``--trace`` does, of every verb that runs a guest.

The file is opened before the guest starts and written when it has ended: a disk that is full does the guest no harm.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Self

from pyvmm.cli.common import Help, add_common
from pyvmm.cli.run import add_guest_options, ready, run_guest, traced
from pyvmm.labenv import TCG_NOTE, in_lab
from pyvmm.log import get_logger
from pyvmm.syntax.paths import OutputPath

if TYPE_CHECKING:
    from pyvmm.kvm.faulttrace import FaultTrace
    from pyvmm.machine.machine import Machine
    from pyvmm.observe.hyptrace import HypTrace
    from pyvmm.observe.recorder import Recorder
    from pyvmm.observe.tracefile import About

DEFAULT = "trace.pftrace"
LARGE = 1 << 17
"""Records after which writing is told of: it takes a second or so, and in the lab a quarter of a minute."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Define the verb's options."""
    parser = subparsers.add_parser(
        "trace",
        help="run a guest and record its exits",
        allow_abbrev=False,
        formatter_class=Help,
        description="Run a guest as run does, and write what happened, exit by exit, to a file for\n"
        "https://ui.perfetto.dev. Exit status as of run.",
        epilog="examples:\n"
        "  pyvmm --lab trace -o echo.pftrace --protection pkvm -c 4 payload:echo\n"
        "  pyvmm --lab trace --trace-faults --protection pkvm payload:touch",
    )
    parser.add_argument(
        "-o", "--output", dest="trace", type=OutputPath, metavar="FILE", help=f"the file to write (default {DEFAULT})"
    )
    add_guest_options(parser)
    # Both -o and --trace say it.
    parser.set_defaults(trace=OutputPath(DEFAULT))
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Run the guest and write its trace; returns the exit status of the run."""
    kernel = ready(args)
    from pyvmm.session.watch import Watch

    status = run_guest(args, kernel, Watch(args.map, trace=traced(args)))
    if not args.log_json:
        print(f"pyvmm: open {args.trace} at https://ui.perfetto.dev", file=sys.stderr)
    return status


class Tracing:
    """The trace of one run; a context manager, entered before the machine is built and left after it is closed.

    ``path`` is the file; with ``faults`` and ``el2`` there is more in it, where the kernel tells. Used by a
    :class:`~pyvmm.session.watch.Watch`.
    """

    def __init__(self, path: str, *, faults: bool = False, el2: bool = False) -> None:
        self.faults = faults
        self._path, self._el2 = path, el2
        self._recorder: Recorder | None = None
        self._hypervisor: HypTrace | None = None
        self._stack, self._listening = contextlib.ExitStack(), contextlib.ExitStack()

    def __enter__(self) -> Self:
        from pyvmm.session.watch import Picture

        with contextlib.ExitStack() as half:
            self._file = half.enter_context(Picture(self._path))
            self._stack = half.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def record(self, faults: FaultTrace | None) -> Recorder:
        """Return what is to record the run, faults with it if they are told."""
        from pyvmm.observe.recorder import Recorder

        self._recorder = Recorder(faults)
        self._stack.callback(self._recorder.stop)
        return self._recorder

    def begin(self, machine: Machine) -> None:
        """Listen to devices, and to the hypervisor; just before the guest starts."""
        if self._recorder is not None:
            self._recorder.listen(machine.relay)
        if self._el2:
            from pyvmm.observe.hyptrace import HypTrace

            self._stack.push(self._listening)
            self._hypervisor = self._listening.enter_context(HypTrace())

    def end(self, machine: Machine) -> None:
        """Write the trace. Raises PyvmmError where it cannot be."""
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
            notes = write_trace(put, self._recorder, _about(machine), events)
        self._tell(notes)

    def _tell(self, lost: list[str]) -> None:
        """Say what was asked for but is not in the trace."""
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


def _about(machine: Machine) -> About:
    from pyvmm.observe.tracefile import About
    from pyvmm.protection import Protection

    config = machine.config
    labels = [f"protection {config.protection.value}", f"{config.memory >> 20} MiB of {config.backing}"]
    if in_lab():
        labels.append(TCG_NOTE)
    return About(
        name=f"pyvmm {config.kernel}",
        labels=tuple(labels),
        devices=tuple((placed.device.name, placed.base, placed.device.size) for placed in machine.bus.placed),
        protected=config.protection is not Protection.NONE,
        donated=config.protection is Protection.PKVM,
        start_ns=machine.started_ns,
        end_ns=machine.ended_ns,
    )
