# SPDX-License-Identifier: Apache-2.0
"""Where a guest's consoles go: the UART of ``--serial``, the virtio console of ``--console``, one of them to stdio.

Owns the files that are named, and SIGWINCH while a run lasts; used by ``run``, from the main thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Final

from pyvmm.devices.roles import Terminal
from pyvmm.errors import UsageError
from pyvmm.syntax.paths import open_output

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from pyvmm.machine.machine import Machine

STDIN: Final = 0
KNOWN: Final = "stdio, file=PATH and none are known"

Ends = tuple[int | None, int | None]
"""Descriptors of a console: output and input."""


def places(args: argparse.Namespace) -> tuple[str, str]:
    """Return where the UART and the virtio console go. The UART has stdio unless the other one wants it.

    Raises UsageError where both are told to have it, or a place is none.
    """
    console: str = args.console or "none"
    serial: str = args.serial or ("none" if console == "stdio" else "stdio")
    for option, where in (("--serial", serial), ("--console", console)):
        if where not in ("stdio", "none") and not (where.startswith("file=") and where != "file="):
            raise UsageError(f"{option} {where}: {KNOWN}")
    if serial == console != "none":
        raise UsageError(
            f"--serial {serial} and --console {console}: only one of the two can have it",
            hint="leave --serial out, or say --serial none, or file=PATH for each",
        )
    return serial, console


def open_place(where: str, stack: contextlib.ExitStack, stdout: int, *, keep: bool = False) -> Ends:
    """Return the descriptors of a place; ``stdout`` is where stdio's output goes. Raises UsageError.

    A file is emptied, unless ``keep`` says that a guest goes on which wrote there before.
    """
    if where == "stdio":
        return stdout, STDIN
    if where == "none":
        return None, None
    fd = open_output(where.partition("=")[2], keep=keep)
    stack.callback(os.close, fd)
    with contextlib.suppress(OSError):  # what is no file has no end
        os.lseek(fd, 0, os.SEEK_END)
    return fd, None


def nobody(stack: contextlib.ExitStack) -> int:
    """Return an input where nothing ever arrives: of a console that has stdio, on a terminal not ours to read."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def terminal_size(out: int | None) -> tuple[int, int] | None:
    """Return columns and rows of the terminal that ``out`` is; None where it is none."""
    if out is None or not os.isatty(out):
        return None
    try:
        columns, rows = os.get_terminal_size(out)
    except OSError:
        return None
    return columns, rows


@contextlib.contextmanager
def following_size(machine: Machine, out: int | None) -> Iterator[None]:
    """Tell the guest's virtio console whenever the terminal ``out`` gets another size."""
    if terminal_size(out) is None:
        yield
        return

    terminals = machine.role(Terminal)

    def tell() -> None:
        size = terminal_size(out)
        if size is not None:
            for terminal in terminals:
                terminal.resize(*size)

    changed = os.eventfd(0, os.EFD_CLOEXEC)
    over = threading.Event()

    def follow() -> None:
        while os.eventfd_read(changed) and not over.is_set():
            tell()

    # A thread of its own: a handler runs between any two lines of the main thread, whose locks it must not take.
    thread = threading.Thread(target=follow, name="pyvmm-resize", daemon=True)
    thread.start()
    old = signal.signal(signal.SIGWINCH, lambda _number, _frame: os.eventfd_write(changed, 1))
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, old)
        # Not later than this: the machine's descriptors may be another's once it is closed.
        over.set()
        os.eventfd_write(changed, 1)
        thread.join()
        os.close(changed)
