# SPDX-License-Identifier: Apache-2.0
"""What a wheel installs beside the package: the manual page pyvmm(1) and a completion script for each shell.

argparse-manpage and shtab make them of the command line's own parser when the wheel is built.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MANUAL = "share/man/man1/pyvmm.1"
"""Where the page is installed, below the environment or the prefix."""
COMPLETIONS = {
    "bash": "share/bash-completion/completions/pyvmm",
    "zsh": "share/zsh/site-functions/_pyvmm",
    "fish": "share/fish/vendor_completions.d/pyvmm.fish",
}
"""Where each shell looks for scripts of installed programs, below the prefix."""


def write_shared_data(directory: Path) -> list[str]:
    """Write all files below ``directory`` and return their paths there. ImportError where a generator is missing."""
    from pyvmm.cli.completion import script

    texts = {MANUAL: manual(), **{path: script(shell) for shell, path in COMPLETIONS.items()}}
    for path, text in texts.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text, encoding="utf-8")
    return list(texts)


def manual() -> str:
    """Return the page. ImportError where argparse-manpage is not installed."""
    from argparse_manpage.manpage import Manpage

    from pyvmm import __version__
    from pyvmm.cli.common import STATUSES
    from pyvmm.cli.completion import whole_parser

    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"  # man lays lines out, not argparse
    try:
        parser = whole_parser()
        parser.epilog = None
        page = Manpage(parser, format="single-commands-section")
        page.source, page.manual = f"pyvmm {__version__}", "pyvmm"
        page.description = str(parser.description).rstrip(".")
        lines = STATUSES.replace("-", r"\-").splitlines()
        page.add_section("exit status", "=", "\n".join([".nf", *lines[1:], ".fi"]))
        page.add_section("see also", "=", r"\fBpyvmm help\fR lists the pages of the documentation.")
        return str(page)
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
