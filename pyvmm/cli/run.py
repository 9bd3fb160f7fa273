# SPDX-License-Identifier: Apache-2.0
"""``pyvmm run``: run one guest from start to end; with ``--dry-run``, only print the plan.

The default protection is ``none``: it works on every arm64 host. A guest counts as protected only if the user asked for
protection by name.
"""

from __future__ import annotations

import argparse

from pyvmm.cli.common import Help, add_common, is_arm64, ready
from pyvmm.errors import PyvmmError, UsageError
from pyvmm.options.guest import GUEST_OPTIONS
from pyvmm.options.table import Table
from pyvmm.syntax.option import FLAG, RUN, Option

TABLE = Table(
    (
        *GUEST_OPTIONS,
        Option(
            "--reboot",
            takes=FLAG,
            about=RUN,
            help="start the guest again, in a new VM, when it asks for a reset: after a pause, which grows up to 10 s "
            "while lives are short",
        ),
        Option(
            "--confine",
            choices=("off", "log", "on"),
            default="off",
            about=RUN,
            help="on: once the guest runs, the process opens no file, starts no program, connects nowhere, and has no "
            "privileges; log: report what that would refuse; off (default)",
        ),
    ),
    add_common,
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Define the verb's options."""
    parser = subparsers.add_parser(
        "run",
        help="run a guest",
        allow_abbrev=False,
        formatter_class=Help,
        description="Run a guest until it powers off. Its console is stdin and stdout; on a terminal Ctrl-A x quits, "
        "and Ctrl-A b sends a BREAK.",
        epilog="examples:\n"
        "  pyvmm run payload:hello\n"
        "  pyvmm run --protection pkvm -m 256M -c 2 payload:echo\n"
        "  pyvmm run --deadline 10 payload:crash -p loop\n"
        "  pyvmm run --protection pkvm -i shell: debian:\n"
        "  pyvmm run -i shell: -p 'quiet -- cat /proc/cpuinfo' own:\n"
        "  pyvmm --lab run --protection pkvm payload:hello",
    )
    TABLE.add_to(parser)


def main(args: argparse.Namespace) -> int:
    """Run the guest; returns the exit status."""
    ready(args)
    confinement = None
    if args.confine != "off":
        from pyvmm.session.confinement import Confinement

        confinement = Confinement.asked_for(args)
    from pyvmm.session.run import GuestRun

    if args.map is None and args.trace is None:
        return GuestRun(args, TABLE, confinement=confinement).to_end()
    from pyvmm.session.tracing import tracing_of
    from pyvmm.session.watch import Watch

    return GuestRun(args, TABLE, Watch(args.map, trace=tracing_of(args)), confinement=confinement).to_end()


def dry_run(args: argparse.Namespace) -> int:
    """Print the plan of the machine, for any verb that would run it; returns 0."""
    if args.restore is not None:
        raise UsageError("--dry-run with --restore: only a new machine can be planned, not a restored one")
    from pyvmm._native_source import require_fresh_native
    from pyvmm.options.contradictions import check_run, kernel_of

    check_run(args)
    kernel_of(args)
    require_fresh_native()
    from pyvmm.machine.plan import Plan
    from pyvmm.options.machine import machine_config, with_files
    from pyvmm.syntax.paths import write_output
    from pyvmm.terminal import clean

    with Plan(with_files(machine_config(args)), gic=_planned_gic()) as plan:
        if args.dump_dtb is not None:
            write_output(args.dump_dtb, plan.machine.entry.described())
        print(clean("\n".join(plan.lines())))
    return 0


def _planned_gic() -> int:
    """Return the version of this host's interrupt controller, or 3 (that of pKVM hosts) if KVM cannot be asked."""
    if not is_arm64():
        return 3
    from pyvmm.machine.gic import host_gic

    try:
        return host_gic() or 3
    except PyvmmError:
        return 3
