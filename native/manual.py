# SPDX-License-Identifier: Apache-2.0
"""The manual page, pyvmm(1), which argparse-manpage makes of the command line's own parser when a wheel is built."""

from __future__ import annotations

import os
from pathlib import Path

SHARED = "share/man/man1/pyvmm.1"
"""Where it is installed, below the environment or the prefix."""


def write_manual(path: Path) -> None:
    """Write the page to ``path``. ImportError where argparse-manpage is not installed."""
    from argparse_manpage.manpage import Manpage

    from pyvmm import __version__
    from pyvmm.cli.common import STATUSES
    from pyvmm.cli.completion import whole_parser

    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"  # man lays lines out, not argparse
    try:
        parser = whole_parser()
        parser.epilog = None
        manual = Manpage(parser, format="single-commands-section")
        manual.source, manual.manual = f"pyvmm {__version__}", "pyvmm"
        manual.description = str(parser.description).rstrip(".")
        lines = STATUSES.replace("-", r"\-").splitlines()
        manual.add_section("exit status", "=", "\n".join([".nf", *lines[1:], ".fi"]))
        manual.add_section("see also", "=", r"\fBpyvmm help\fR lists the pages of the documentation.")
        path.write_text(str(manual), encoding="utf-8")
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
