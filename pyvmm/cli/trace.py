# SPDX-License-Identifier: Apache-2.0
"""``pyvmm trace``: run a guest as ``run`` does and write a trace of it, for https://ui.perfetto.dev.

Every verb that runs a guest can do the same with ``--trace``.
"""

from __future__ import annotations

import argparse

from pyvmm.cli.common import Help, add_common, ready
from pyvmm.options.guest import GUEST_OPTIONS
from pyvmm.options.table import Table
from pyvmm.syntax.option import RUN, Option
from pyvmm.syntax.paths import OutputPath

DEFAULT = "trace.pftrace"

# Both -o and --trace name the file. Without either, the default file is written.
TABLE = Table(
    (
        Option(
            "-o",
            "--output",
            dest="trace",
            metavar="FILE",
            type=OutputPath,
            default=OutputPath(DEFAULT),
            about=RUN,
            help=f"the file to write (default {DEFAULT})",
        ),
        *GUEST_OPTIONS,
    ),
    add_common,
)


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
    TABLE.add_to(parser)


def main(args: argparse.Namespace) -> int:
    """Run the guest and write its trace; returns the exit status of the run."""
    ready(args)
    from pyvmm.session.run import GuestRun
    from pyvmm.session.tracing import tracing_of
    from pyvmm.session.watch import Watch

    status = GuestRun(args, TABLE, Watch(args.map, trace=tracing_of(args))).to_end()
    if not args.log_json:
        from pyvmm.terminal import say

        say(f"pyvmm: open {args.trace} at https://ui.perfetto.dev")
    return status
