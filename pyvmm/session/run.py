# SPDX-License-Identifier: Apache-2.0
"""Run one guest from start to end. Its output goes to stdout, ours to stderr, with the statistics last.

A :class:`GuestRun` opens everything that lasts for the whole run: signals, consoles, gdb, the socket for ``pyvmm ctl``.
It runs the guest in one VM after the other, and then writes the files and statistics. Used once, from the main thread.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading

from pyvmm import log
from pyvmm.errors import within_limits
from pyvmm.machine.granule import require_resolved_faults
from pyvmm.machine.hardware import OTHER_DESCRIPTORS
from pyvmm.machine.machine import Machine
from pyvmm.options.consoles import places
from pyvmm.options.machine import machine_config, with_files
from pyvmm.session.consoles import following_size, nobody, open_place
from pyvmm.session.control import Control
from pyvmm.session.requests import Requests
from pyvmm.session.signals import Signals
from pyvmm.syntax.paths import write_output
from pyvmm.vcpu.outcome import Ending

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Final

    from pyvmm.debug.server import GdbServer
    from pyvmm.machine.snapshot import Snapshot
    from pyvmm.options.consoles import Ends
    from pyvmm.options.table import Table
    from pyvmm.session.confinement import Confinement
    from pyvmm.session.keys import Keys
    from pyvmm.session.lives import Lives
    from pyvmm.session.watch import Watch
    from pyvmm.vcpu.outcome import Outcome

STDOUT: Final = 1


class GuestRun:
    """The run that ``args`` describe, observed by ``watch``. ``table`` is the table that parsed ``args``.

    With ``--reboot``, a reset by the guest destroys the VM and starts the guest in a new one. ``confinement`` has walls
    that go up before the first start.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        table: Table,
        watch: Watch | None = None,
        confinement: Confinement | None = None,
    ) -> None:
        self._args, self._table, self._watch = args, table, watch
        self._confinement = confinement
        self._held: list[Control | Keys] = []
        """What has a thread that must not start before the walls are there."""
        self._stack = contextlib.ExitStack()
        self._never_waiting = contextlib.ExitStack()
        self._signals = Signals()
        self._requests = Requests(
            options=self._machine_options, opens_files=confinement is None or not confinement.refuses
        )
        self._debugger: GdbServer | None = None
        self._snapshot: Snapshot | None = None
        self._machine: Machine | None = None
        self._failures: list[BaseException] = []
        self._lives: Lives | None = None
        if getattr(args, "reboot", False):
            from pyvmm.session.lives import Lives

            self._lives = Lives(args.deadline, lambda: self._asked_to_end)

    def to_end(self) -> int:
        """Run the guest; returns the exit status."""
        with within_limits(OTHER_DESCRIPTORS), self._stack:
            self._open()
            while (status := self._live()) is None:
                # A machine has many reference cycles, and a guest may reset more often than Python collects garbage.
                gc.collect()
            return status

    # -- what lasts as long as the run

    def _open(self) -> None:
        args, stack = self._args, self._stack
        # This also covers the time between two VMs: output of the last one may leave no room for the start of the next.
        stack.enter_context(self._never_waiting).enter_context(log.never_waiting())
        stack.enter_context(self._signals)
        stack.callback(setattr, threading, "excepthook", threading.excepthook)
        threading.excepthook = self._thread_failed
        if self._watch is not None:
            stack.enter_context(self._watch)
        serial, console = self._open_consoles()
        self._screen = console[0]
        if args.gdb is not None:
            from pyvmm.debug.server import GdbServer

            self._debugger = stack.enter_context(GdbServer(args.gdb))
        self._config = machine_config(args, serial, console)
        if args.restore is None:
            self._config = with_files(self._config)
            if not args.force:
                require_resolved_faults(self._config)
        else:
            from pyvmm.machine.snapshot import Snapshot

            self._snapshot = stack.enter_context(Snapshot(args.restore))
        self._control = Control(self._requests.verbs, args.socket, held=self._confinement is not None)
        stack.enter_context(self._control)
        self._held.append(self._control)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Hear of a thread that nobody else hears: what it was for is no longer done, so the run ends."""
        if failure.exc_value is None or isinstance(failure.exc_value, SystemExit):
            return
        self._failures.append(failure.exc_value)
        if self._machine is not None:
            self._machine.failed(failure.exc_value)

    def _open_consoles(self) -> list[Ends]:
        stdout = STDOUT if self._watch is None else self._watch.console
        keep = self._args.restore is not None
        ends = [open_place(where, self._stack, stdout, keep=keep) for where in places(self._args)]
        return [
            (out, self._keys_of(source, send_break))
            for (out, source), send_break in zip(ends, (self._send_break, None), strict=True)
        ]

    def _send_break(self) -> None:
        if self._machine is not None:
            self._machine.uart.send_break()

    def _keys_of(self, source: int | None, send_break: Callable[[], None] | None) -> int | None:
        """Return the input of a console that reads ``source``. A terminal delivers its keys one by one."""
        if source is None or not os.isatty(source):
            return source
        from pyvmm.session.keys import Keys
        from pyvmm.terminal import in_foreground

        if not in_foreground(source):
            # Reading the terminal from the background would stop us.
            return nobody(self._stack)
        held = self._confinement is not None
        keys = Keys(source, lambda: self._signals.end("Ctrl-A x"), send_break, held=held)
        self._held.append(self._stack.enter_context(keys))
        return keys.fd

    def _machine_options(self) -> str:
        from pyvmm.options.written import machine_options  # only needed to write a snapshot

        return machine_options(self._args, self._table, os.getcwd())

    # -- one life

    def _live(self) -> int | None:
        """Run the guest in one VM. Returns the exit status, or None if the guest must start again."""
        intercept = None if self._debugger is None else self._debugger.intercept
        with (
            Machine(self._config, intercept=intercept, start=self._snapshot) as machine,
            contextlib.ExitStack() as life,
        ):
            if self._args.dump_dtb is not None:
                write_output(self._args.dump_dtb, machine.entry.described())
            confinement, self._confinement = self._confinement, None
            if confinement is not None:
                self._wall_in(confinement, machine)
            if self._watch is not None:
                self._watch.begin(machine)
            self._machine = machine
            for error in self._failures:  # of threads that there were before
                machine.failed(error)
            self._signals.stop = machine.stop
            if self._debugger is not None:
                life.enter_context(self._debugger.serving(machine))
            with self._requests.about(machine), following_size(machine, self._screen):
                if asked := self._asked_to_end:  # before there was this machine
                    machine.stop(asked)
                if confinement is not None:
                    confinement.seal(gdb=self._debugger is not None)
                outcome = machine.run(spent=0.0 if self._lives is None else self._lives.spent)
            # A stop request that came too late for this VM applies to the next one.
            if self._lives is None or outcome.ending is not Ending.RESET or self._asked_to_end:
                return self._finish(machine, outcome)
            over = self._lives.reset(machine.started_ns, machine.elapsed_ns)
            if over is not None or self._asked_to_end:
                return self._finish(machine, over or outcome)
        # A protected VM's memory cannot be loaded again, so a reset makes a new VM, with any protection.
        self._lives.stand_by()
        return None

    def _wall_in(self, confinement: Confinement, machine: Machine) -> None:
        machine.make_ready()
        own = [] if self._debugger is None else self._debugger.directories
        confinement.wall_in(machine, [*self._control.directories, *own])
        for held in self._held:
            held.start()

    @property
    def _asked_to_end(self) -> str | None:
        return self._signals.asked or self._requests.asked

    # -- the end

    def _finish(self, machine: Machine, outcome: Outcome) -> int:
        """Write the files and the summary while the machine still exists. Returns the exit status."""
        if self._debugger is not None:
            self._debugger.ended(outcome)
        try:
            # The user waits for the following output, so writing it may block.
            self._never_waiting.close()
            if self._watch is not None:
                self._watch.end(outcome)
        finally:
            from pyvmm.session.summary import print_summary, print_summary_json

            summarize = print_summary_json if self._args.log_json else print_summary
            summarize(outcome, machine.counters, table=self._args.stats)
        return outcome.status if self._signals.received is None else 128 + self._signals.received
