# SPDX-License-Identifier: Apache-2.0
"""Where the options say that a guest's consoles go: the UART of ``--serial``, the virtio console of ``--console``."""

from __future__ import annotations

import os

from pyvmm.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Final

Ends = tuple[int | None, int | None]
"""Descriptors of a console: output and input."""

NOWHERE: Final[Ends] = (None, None)
KNOWN: Final = "stdio, file=PATH and none are known"


def places(args: argparse.Namespace) -> tuple[str, str]:
    """Return where the UART and the virtio console go. The UART has stdio unless the other one wants it.

    Raises OptionError where both are told to have it, or a place is none.
    """
    console: str = args.console or "none"
    serial: str = args.serial or ("none" if console == "stdio" else "stdio")
    for option, where in (("serial", serial), ("console", console)):
        if where not in ("stdio", "none") and not (where.startswith("file=") and where != "file="):
            raise OptionError(f"--{option} {where}: {KNOWN}", option)
    if serial == console != "none":
        raise OptionError(
            f"--serial {serial} and --console {console}: only one of the two can have it",
            "serial",
            "console",
            hint="leave --serial out, or say --serial none, or file=PATH for each",
        )
    return serial, console


def terminal_size(out: int | None) -> tuple[int, int] | None:
    """Return columns and rows of the terminal that ``out`` is; None where it is none."""
    if out is None or not os.isatty(out):
        return None
    try:
        columns, rows = os.get_terminal_size(out)
    except OSError:
        return None
    return columns, rows
