# SPDX-License-Identifier: Apache-2.0
"""Connect a guest's consoles: the UART (``--serial``) and the virtio console (``--console``).

Owns the named files, and SIGWINCH during a run. Used by ``run``, from the main thread.
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
    """Return the descriptors of a place. ``stdout`` takes the output of stdio. Raises UsageError.

    A file is truncated, unless ``keep`` says that its guest continues from a snapshot.
    """
    if where == "stdio":
        return stdout, STDIN
    if where == "none":
        return NOWHERE
    fd = open_output(where.partition("=")[2], keep=keep)
    stack.callback(os.close, fd)
    with contextlib.suppress(OSError):  # a pipe or a device has no end
        os.lseek(fd, 0, os.SEEK_END)
    return fd, None


def nobody(stack: contextlib.ExitStack) -> int:
    """Return an input that never has data, for a console on a terminal that we may not read."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


@contextlib.contextmanager
def following_size(machine: Machine, out: int | None) -> Iterator[None]:
    """Report each size change of the terminal ``out`` to the guest's virtio console."""
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

    # A separate thread: a signal handler interrupts the main thread anywhere, and must not take its locks.
    thread = threading.Thread(target=follow, name="pyvmm-resize", daemon=True)
    thread.start()
    try:
        with handling(lambda _number, _frame: os.eventfd_write(changed, 1), [signal.SIGWINCH]):
            yield
    finally:
        # Join before the machine closes: its descriptor numbers may be reused afterwards.
        over.set()
        os.eventfd_write(changed, 1)
        thread.join()
        os.close(changed)
