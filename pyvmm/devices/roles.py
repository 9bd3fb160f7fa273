# SPDX-License-Identifier: Apache-2.0
"""Roles of devices besides serving the guest. A machine finds devices by role: ``machine.role(Terminal)``.

A device has a role by having its methods. All of them may be called from any thread.
"""

from __future__ import annotations

from pyvmm.typed import NamedTuple, Protocol, checkable


@checkable
class Printing(Protocol):
    """Writes the guest's output to a reader that may be slow."""

    def drain(self) -> None:
        """Write the rest of the guest's output at its end, waiting for the reader unless aborted."""
        ...

    def abort(self) -> None:
        """Stop waiting for the reader of the guest's output, after a moment."""
        ...


@checkable
class Terminal(Protocol):
    """A console of the guest with input and a size."""

    @property
    def interactive(self) -> bool:
        """Whether it was made with an input."""
        ...

    def offer(self, keys: bytes) -> bool:
        """Type ``keys``. Without room for all, type none and return False."""
        ...

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest of the terminal's size."""
        ...


@checkable
class MemoryBalloon(Protocol):
    """Returns guest memory to the host."""

    def hold(self, size: int | None = None) -> dict[str, int]:
        """Ask the guest to give up a number of bytes, unless None. Returns the balloon's numbers, in bytes.

        They are ``target`` and ``actual``, and ``given_back``: the total returned to the host so far, including reports
        of free pages. Raises UsageError for more than the guest's memory.
        """
        ...


class Reach(NamedTuple):
    """What serving a guest asks of the host, besides memory and open files.

    ``parts`` are those of :mod:`pyvmm.confine.rules`. Files are removed from the directories ``removes``, Unix sockets
    in the directories ``connects`` are connected to, and the processes ``children`` are ended and waited for.
    """

    parts: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()
    connects: tuple[str, ...] = ()
    children: tuple[int, ...] = ()


@checkable
class Reaching(Protocol):
    """Asks the host for more than others while it serves its guest."""

    def reach(self) -> Reach:
        """Return what it asks for, before the start."""
        ...
