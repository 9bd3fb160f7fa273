# SPDX-License-Identifier: Apache-2.0
"""Where a guest's consoles go: the UART (``--serial``) and the virtio console (``--console``)."""

from __future__ import annotations

import os

from pyvmm.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Final

Ends = tuple[int | None, int | None]
"""A console's descriptors: output and input."""

NOWHERE: Final[Ends] = (None, None)
KNOWN: Final = "expected stdio, file=PATH or none"


def places(args: argparse.Namespace) -> tuple[str, str]:
    """Return where the UART and the virtio console go. The UART gets stdio unless the virtio console has it.

    Raises OptionError if both ask for stdio, or if a place is invalid.
    """
    console: str = args.console or "none"
    serial: str = args.serial or ("none" if console == "stdio" else "stdio")
    for option, where in (("serial", serial), ("console", console)):
        if where not in ("stdio", "none") and not (where.startswith("file=") and where != "file="):
            raise OptionError(f"--{option} {where}: {KNOWN}", option)
    if serial == console != "none":
        raise OptionError(
            f"--serial {serial} and --console {console}: only one console can have it",
            "serial",
            "console",
            hint="drop --serial, use --serial none, or give each its own file=PATH",
        )
    return serial, console


def terminal_size(out: int | None) -> tuple[int, int] | None:
    """Return the columns and rows of the terminal ``out``, or None if it is not a terminal."""
    if out is None or not os.isatty(out):
        return None
    try:
        columns, rows = os.get_terminal_size(out)
    except OSError:
        return None
    return columns, rows
