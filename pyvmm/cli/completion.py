# SPDX-License-Identifier: Apache-2.0
"""``pyvmm completion``: a script with which a shell completes pyvmm's command lines.

shtab makes it of the parser. It is an optional dependency: the script needs neither shtab nor pyvmm when it runs. The
build of a wheel makes the scripts with the same function.
"""

from __future__ import annotations

import argparse
import sys

from pyvmm.cli.common import Help, add_common
from pyvmm.errors import HostError, pip_install

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

SHELLS = ("bash", "zsh", "fish")
FILES = ("FILE", "PATH", "KERNEL", "PLAN")
"""How the metavars of options begin that take a file."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Define the verb's options."""
    parser = subparsers.add_parser(
        "completion",
        help="a script that completes command lines, for a shell",
        allow_abbrev=False,
        formatter_class=Help,
        description="Print a script with which a shell completes pyvmm's verbs, options and their values.",
        epilog="examples:\n"
        "  pyvmm completion bash > ~/.local/share/bash-completion/completions/pyvmm\n"
        "  pyvmm completion zsh > ~/.zfunc/_pyvmm\n"
        "  pyvmm completion fish > ~/.config/fish/completions/pyvmm.fish",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Print the script; returns the exit status. Raises HostError where shtab is not installed."""
    try:
        text = script(args.shell)
    except ImportError as error:
        raise HostError(f"completion needs shtab: {error}", hint=pip_install("shtab")) from None
    sys.stdout.write(text)
    return 0


def script(shell: str) -> str:
    """Return the script for ``shell``, one of SHELLS. ImportError where shtab is not installed."""
    import shtab

    from pyvmm.cli.help import TOPICS

    parser = whole_parser()
    for action in actions(parser):
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        if metavar == "TOPIC":
            action.choices = TOPICS
        elif metavar.startswith(FILES):
            action.complete = shtab.FILE  # type: ignore[attr-defined] # where shtab looks
        elif metavar.startswith("DIR"):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell=shell))


def whole_parser() -> argparse.ArgumentParser:
    """Return the parser with all verbs and with the options of the lab: that of a command line which has them all."""
    from pyvmm.cli import VERBS, make_parser

    # The empty word is in the place of the verb: with one there the others have a summary only.
    return make_parser(["--lab", "", *VERBS])


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the options and arguments of a parser and of those below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from actions(below)
