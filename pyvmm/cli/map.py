# SPDX-License-Identifier: Apache-2.0
"""``pyvmm map``: run a guest as ``run`` does and show its page map, live on a terminal, and as it is at the end.

A verb's product is on stdout: of ``run`` that is the guest's output, of ``map`` it is the map, and the guest's output
goes to stderr. Where both are the same terminal, output scrolls by above the map.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING

from pyvmm.cli.common import Help, add_common
from pyvmm.cli.run import add_guest_options, ready, run_guest, traced

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm.machine.machine import Machine
    from pyvmm.observe.pagemap import PageMap
    from pyvmm.session.screen import Screen
    from pyvmm.vcpu.outcome import Outcome

STDOUT, STDERR = 1, 2


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Define the verb's options."""
    parser = subparsers.add_parser(
        "map",
        help="run a guest and show its page map",
        allow_abbrev=False,
        formatter_class=Help,
        description="Run a guest until it powers off, and show whose its pages are: on stdout, while it runs if that\n"
        "is a terminal, and at the end. The guest's output goes to stderr. Exit status as of run.",
        epilog="examples:\n"
        "  pyvmm map --protection pkvm -c 4 payload:echo\n"
        "  pyvmm map --protection emulated --map echo.svg payload:echo\n"
        "  pyvmm map --json payload:touch | jq .counts",
    )
    add_guest_options(parser)
    parser.add_argument("--json", action="store_true", help="write the last map as JSON: runs of pages, and counts")
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Run the guest and show its map; returns the exit status of the run."""
    kernel, tracing = ready(args), traced(args)
    from pyvmm.session.watch import Watch

    finished = _print_json if args.json else None if _is_live(args) else _print
    with screen_for(args) as screen:
        console = STDERR if screen is None or screen.console is None else screen.console
        watch = Watch(args.map, trace=tracing, screen=screen, console=console, finished=finished)
        return run_guest(args, kernel, watch)


def _is_live(args: argparse.Namespace) -> bool:
    return not args.json and os.isatty(STDOUT) and os.environ.get("TERM", "dumb") != "dumb"


@contextlib.contextmanager
def screen_for(args: argparse.Namespace, *, shared: bool | None = None) -> Iterator[Screen | None]:
    """Make stdout the terminal of something live if it can be; what else would be written there comes through it.

    ``shared`` says whether there is anything else; if stderr is the same terminal, unless told.
    """
    if not _is_live(args):
        yield None
        return
    from pyvmm import log
    from pyvmm.session.screen import Screen

    if shared is None:
        shared = os.path.samestat(os.fstat(STDOUT), os.fstat(STDERR))
    sys.stdout.flush()
    with Screen(STDOUT, colour=_colours(), shared=shared) as screen, contextlib.ExitStack() as stack:
        if screen.console is not None:
            stream = stack.enter_context(open(screen.console, "w", closefd=False))
            verbosity, as_json = args.verbose - args.quiet, bool(args.log_json)
            log.configure(verbosity, json=as_json, stream=stream)
            stack.callback(log.configure, verbosity, json=as_json)
        yield screen


def _colours() -> bool:
    """Whether stdout takes half blocks in 256 colours."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return sys.stdout.isatty() and not plain and sys.stdout.encoding.lower().replace("-", "") == "utf8"


def _print(_machine: Machine, page_map: PageMap, _outcome: Outcome) -> None:
    import shutil

    from pyvmm.observe.mapterm import render

    width, _ = shutil.get_terminal_size()
    print("\n".join(render(page_map, width=width, height=40, colour=_colours())), flush=True)


def _print_json(machine: Machine, page_map: PageMap, outcome: Outcome) -> None:
    config = machine.config
    print(
        json.dumps(
            {
                "kernel": config.kernel,
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
