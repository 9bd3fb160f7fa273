# SPDX-License-Identifier: Apache-2.0
"""What a guest's consoles are connected to: the UART of ``--serial``, the virtio console of ``--console``.

Owns the files that are named, and SIGWINCH while a run lasts; used by ``run``, from the main thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading

from pyvmm.devices.roles import Terminal
from pyvmm.interrupt import handling
from pyvmm.options.consoles import NOWHERE, Ends, terminal_size
from pyvmm.syntax.paths import open_output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

    from pyvmm.machine.machine import Machine

STDIN: Final = 0


def open_place(where: str, stack: contextlib.ExitStack, stdout: int, *, keep: bool = False) -> Ends:
    """Return the descriptors of a place; ``stdout`` is where stdio's output goes. Raises UsageError.

    A file is emptied, unless ``keep`` says that a guest goes on which wrote there before.
    """
    if where == "stdio":
        return stdout, STDIN
    if where == "none":
        return NOWHERE
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
    try:
        with handling(lambda _number, _frame: os.eventfd_write(changed, 1), [signal.SIGWINCH]):
            yield
    finally:
        # Not later than this: the machine's descriptors may be another's once it is closed.
        over.set()
        os.eventfd_write(changed, 1)
        thread.join()
        os.close(changed)
