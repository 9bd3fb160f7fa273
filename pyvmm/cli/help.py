# SPDX-License-Identifier: Apache-2.0
"""``pyvmm help``: the pages of the documentation, which are files beside the code.

A page is Markdown. On a terminal it goes through ``$PAGER``, or ``less -FR``; elsewhere it is written as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from pyvmm.cli.common import Help, add_common
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

DIRECTORY = Path(__file__).resolve().parents[1] / "docs"
TOPICS = (
    "first-steps",
    "linux-guests",
    "devices",
    "private-memory",
    "atlas",
    "measuring",
    "watching",
    "python",
    "lab",
    "hosts",
    "security",
    "confinement",
    "internals",
    "numbers",
    "changes",
)
"""Every page, in the order to read them in."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Define the verb's options."""
    parser = subparsers.add_parser(
        "help",
        help="the documentation, a page a topic",
        allow_abbrev=False,
        formatter_class=Help,
        description="Show a page of the documentation, or list the pages. The options of a verb: pyvmm VERB --help.",
        epilog="examples:\n  pyvmm help\n  pyvmm help private-memory\n  PAGER=cat pyvmm help numbers",
    )
    parser.add_argument("topic", metavar="TOPIC", nargs="?", help="a page; without it, list all of them")
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Show the page, or the list of pages; returns the exit status."""
    if args.topic is None:
        print("\n".join(overview()))
        return 0
    show(page(args.topic))
    return 0


def page(topic: str) -> str:
    """Return the text of a page. Raises UsageError for an unknown topic, with the nearest one."""
    if topic not in TOPICS:
        from pyvmm.cli import VERBS
        from pyvmm.experiment.registry import nearest

        hint = f"its options: pyvmm {topic} --help" if topic in VERBS else nearest(topic, TOPICS)
        raise UsageError(f"no page is called {topic!r}", hint=hint)
    return (DIRECTORY / f"{topic}.md").read_text(encoding="utf-8")


def overview() -> Iterator[str]:
    """Yield the lines of the list: every topic and what its page answers."""
    yield "pyvmm help TOPIC shows a page:"
    yield ""
    for topic in TOPICS:
        yield f"  {topic:16}{answer(page(topic))}"
    yield ""
    yield "pyvmm VERB --help tells a verb's options."


def answer(text: str) -> str:
    """Return what a page answers: the one line below its title."""
    return text.split("\n", 3)[2]


def show(text: str) -> None:
    """Write a page: through a pager on a terminal, as it is to anything else."""
    if not sys.stdout.isatty():
        sys.stdout.write(text)
        return
    import shlex
    import subprocess

    pager = shlex.split(os.environ.get("PAGER", "")) or ["less", "-FR"]
    try:
        child = subprocess.Popen(pager, stdin=subprocess.PIPE)
    except OSError:  # it is not installed
        sys.stdout.write(text)
        return
    assert child.stdin is not None
    # A reader who quits before the page's end has read enough.
    with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
        pipe.write(text.encode())
    while child.returncode is None:
        # Ctrl-C is the pager's to handle: go on when it has given the terminal back.
        with contextlib.suppress(KeyboardInterrupt):
            child.wait()
