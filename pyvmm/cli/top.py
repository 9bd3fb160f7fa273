# SPDX-License-Identifier: Apache-2.0
"""``pyvmm top``: report at intervals how busy a running guest is: exits by kind, where each vCPU's time goes, pages.

With a process ID, or nothing, it watches the guest of another ``pyvmm run`` of the same user. With a kernel it runs
that guest itself, as ``run`` does, and watches it. Use this form in the lab, where every command gets a new lab. The
report goes to stdout, and the output of such a guest to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import time

from pyvmm.cli.common import Help, add_common, ready
from pyvmm.errors import UsageError
from pyvmm.options.guest import GUEST_OPTIONS
from pyvmm.options.table import Table
from pyvmm.syntax.option import FLAG, RUN, Option
from pyvmm.syntax.values import parse_seconds

INTERVAL = 1.0

TABLE = Table(
    (
        Option(
            "--interval",
            metavar="SECONDS",
            type=parse_seconds,
            default=INTERVAL,
            about=RUN,
            help="between two reports (default 1)",
        ),
        Option(
            "--once",
            takes=FLAG,
            about=RUN,
            help="report once: after one interval, or at the end of a guest that is run here",
        ),
        Option("--json", takes=FLAG, about=RUN, help="write each report as a line of JSON"),
        *GUEST_OPTIONS,
    ),
    add_common,
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Define the verb's options."""
    parser = subparsers.add_parser(
        "top",
        help="how busy a running guest is",
        allow_abbrev=False,
        formatter_class=Help,
        usage="pyvmm top [-h] [--interval SECONDS] [--once] [--json] [PID | [run options] KERNEL]",
        description="Show exits a second, where the vCPUs' time goes, and pages: of the guest that process PID runs,\n"
        "of the only one that runs, or of KERNEL, which is then run here as run does.",
        epilog="times, as shares of each vCPU's:\n"
        "  guest    in the guest and at EL2, as the kernel accounts it, in ticks of 10 ms\n"
        "  kernel   in the host's kernel, likewise\n"
        "  vmm      between two entries into the guest, by the native loop's clock\n"
        "  waiting  the rest: the vCPU is halted or off, or other tasks have the CPU\n"
        "\n"
        "examples:\n"
        "  pyvmm top                      # the guest of the pyvmm run in another terminal\n"
        "  pyvmm top --json 1234 | jq .exits_per_second\n"
        "  pyvmm --lab top --protection pkvm -c 4 payload:smp",
    )
    TABLE.add_to(parser)


def main(args: argparse.Namespace) -> int:
    """Watch a guest until it ends or the user interrupts. Returns 0, or the exit status of a guest run here."""
    if args.kernel_option is not None or (args.kernel is not None and not args.kernel.isdecimal()):
        return _run(args)
    return _attach(args, None if args.kernel is None else int(args.kernel))


# -- a guest of another process


def _attach(args: argparse.Namespace, pid: int | None) -> int:
    from pyvmm.observe.rates import report
    from pyvmm.session.connection import Connection, only_one
    from pyvmm.session.screen import screen_for
    from pyvmm.session.topview import View
    from pyvmm.terminal import say

    _refuse_guest_options(args)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(Connection(only_one() if pid is None else pid))
        screen = None if args.once else stack.enter_context(screen_for(args, shared=False))
        view = View(screen, as_json=args.json)
        before = connection.ask("counters")
        while before is not None:
            time.sleep(args.interval)
            if (now := connection.ask("counters")) is None:
                break
            view.put(report(before, now))
            if args.once:
                return 0
            before = now
    say(f"pyvmm: the guest of {connection.name} has ended")
    return 0


def _refuse_guest_options(args: argparse.Namespace) -> None:
    firsts = {option.dest: option for option in reversed(GUEST_OPTIONS) if option.keys}
    asked = [option for option in firsts.values() if getattr(args, option.dest) != option.default]
    if asked:
        raise UsageError(
            f"{', '.join(f'--{option.key}' for option in reversed(asked))}: these options start a guest, but no "
            "kernel is named; a running guest has its own options",
            hint="pyvmm top KERNEL runs a guest",
        )


# -- a guest run here


def _run(args: argparse.Namespace) -> int:
    ready(args)
    from pyvmm.session.run import GuestRun
    from pyvmm.session.screen import screen_for
    from pyvmm.session.topview import Top, View
    from pyvmm.session.tracing import tracing_of

    with contextlib.ExitStack() as stack:
        screen = None if args.once else stack.enter_context(screen_for(args))
        interval = None if args.once else args.interval
        view = View(screen, as_json=args.json)
        return GuestRun(args, TABLE, Top(view, args.map, trace=tracing_of(args), interval=interval)).to_end()
