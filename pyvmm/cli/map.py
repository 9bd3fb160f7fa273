# SPDX-License-Identifier: Apache-2.0
"""``pyvmm map``: run a guest as ``run`` does and show its page map, live on a terminal, and at the end.

stdout carries the verb's product. For ``map`` that is the map, and the guest's output goes to stderr. If both are the
same terminal, output scrolls above the map.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from pyvmm.cli.common import Help, add_common, ready
from pyvmm.options.guest import GUEST_OPTIONS
from pyvmm.options.table import Table
from pyvmm.syntax.option import FLAG, RUN, Option

if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine
    from pyvmm.observe.pagemap import PageMap
    from pyvmm.vcpu.outcome import Outcome

STDERR = 2

TABLE = Table(
    (
        *GUEST_OPTIONS,
        Option("--json", takes=FLAG, about=RUN, help="print the last map as JSON: runs of pages, and counts"),
    ),
    add_common,
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Define the verb's options."""
    parser = subparsers.add_parser(
        "map",
        help="run a guest and show its page map",
        allow_abbrev=False,
        formatter_class=Help,
        description="Run a guest until it powers off, and show who owns its pages: on stdout, while it runs if that\n"
        "is a terminal, and at the end. The guest's output goes to stderr. Exit status as of run.",
        epilog="examples:\n"
        "  pyvmm map --protection pkvm -c 4 payload:echo\n"
        "  pyvmm map --protection emulated --map echo.svg payload:echo\n"
        "  pyvmm map --json payload:touch | jq .counts",
    )
    TABLE.add_to(parser)


def main(args: argparse.Namespace) -> int:
    """Run the guest and show its map; returns the exit status of the run."""
    ready(args)
    from pyvmm.session.run import GuestRun
    from pyvmm.session.screen import is_live, screen_for
    from pyvmm.session.tracing import tracing_of
    from pyvmm.session.watch import Watch

    finished = _print_json if args.json else None if is_live(args) else _print
    with screen_for(args) as screen:
        console = STDERR if screen is None or screen.console is None else screen.console
        watch = Watch(args.map, trace=tracing_of(args), screen=screen, console=console, finished=finished)
        return GuestRun(args, TABLE, watch).to_end()


def _print(_machine: Machine, page_map: PageMap, _outcome: Outcome) -> None:
    import shutil

    from pyvmm.observe.mapterm import render
    from pyvmm.session.screen import has_colours

    width, _ = shutil.get_terminal_size()
    print("\n".join(render(page_map, width=width, height=40, colour=has_colours())), flush=True)


def _print_json(machine: Machine, page_map: PageMap, outcome: Outcome) -> None:
    config = machine.config
    print(
        json.dumps(
            {
                "kernel": config.title,
                "protection": config.protection.value,
                "backing": config.backing,
                "conversion": config.conversion.value,
                "cpus": config.cpus,
                "ending": outcome.ending.name.lower(),
                **page_map.to_json(),
            }
        ),
        flush=True,
    )
