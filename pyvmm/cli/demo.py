# SPDX-License-Identifier: Apache-2.0
"""``pyvmm demo``: show the life of a protected guest in one screen, on this host if it runs pKVM, else in the lab."""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import TYPE_CHECKING

from pyvmm.cli.common import add_common, is_arm64
from pyvmm.errors import PyvmmError
from pyvmm.protection import Protection

if TYPE_CHECKING:
    from pyvmm.experiment.story import Step

_WIDTH = 100


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Define the verb's options."""
    parser = subparsers.add_parser(
        "demo",
        help="the life of a protected guest in one screen",
        allow_abbrev=False,
        description="Run a protected guest through its whole life and check every step. Uses this host if it runs "
        "pKVM, else builds and uses the lab. Exit status 1 if any step fails.",
    )
    parser.add_argument(
        "--protection",
        choices=(Protection.PKVM.value, Protection.EMULATED.value),
        default=Protection.PKVM.value,
        help="who keeps the host out: the hypervisor (pkvm), or pyvmm itself on any arm64 KVM (emulated)",
    )
    parser.add_argument("--here", action="store_true", help="use this host, even without pKVM")
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Run the demo here or in the lab, and return the exit status."""
    protection = Protection(args.protection)
    runs_here = runs_protected_guests if protection.by_hypervisor else is_arm64
    if not (args.here or runs_here()):
        from pyvmm.cli.lab import run_verb

        return int(run_verb(["demo", "--here", "--protection", args.protection], args))

    from pyvmm._native_source import require_fresh_native

    require_fresh_native()
    from pyvmm.experiment.story import Story

    colours = sys.stdout.isatty()
    print(_paint("The life of a protected guest", "1", colours), flush=True)
    number = 0

    def say(step: Step) -> None:
        nonlocal number
        number += 1
        print("\n".join(lines(number, step, colours=colours)), flush=True)

    story = Story(say, protection)
    statistics = story.tell()
    verdict = (
        "Every step was as it should be."
        if story.ok
        else "Not every step was as it should be: see the lines marked NO."
    )
    print(_paint(verdict, "32" if story.ok else "31", colours), flush=True)
    print(f"pyvmm: {statistics}", file=sys.stderr)
    return 0 if story.ok else 1


def runs_protected_guests() -> bool:
    """Whether this host runs protected guests itself. Probing taints the kernel, so only arm64 hosts are probed."""
    if not is_arm64():
        return False
    from pyvmm.kvm.system import System

    try:
        with System.open() as system:
            return system.supports_protected()
    except PyvmmError:
        return False


def lines(number: int, step: Step, *, colours: bool) -> list[str]:
    """Return the printed lines of a step: its title, then one line per fact."""
    out = [_paint(f"{number}. {step.title}", "1", colours)]
    for good, what in step.facts:
        mark = _paint("ok", "32", colours) if good else _paint("NO", "31", colours)
        first, *more = textwrap.wrap(what, _WIDTH - 7)
        out += [f"   {mark}  {first}", *(f"{'':7}{line}" for line in more)]
    return out


def _paint(words: str, code: str, colours: bool) -> str:
    return f"\x1b[{code}m{words}\x1b[0m" if colours else words
