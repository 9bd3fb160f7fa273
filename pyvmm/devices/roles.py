# SPDX-License-Identifier: Apache-2.0
"""What single devices can do beside serving the guest. A machine finds them by type: ``machine.role(Terminal)``.

A device has a role by having its methods. All of them may be called from any thread.
"""

from __future__ import annotations

from pyvmm.typed import Protocol, checkable


@checkable
class Printing(Protocol):
    """Writes what the guest prints to somebody who may be slow."""

    def drain(self) -> None:
        """Finish what the guest has begun, at its end, waiting for who reads it unless aborted."""
        ...

    def abort(self) -> None:
        """Have no more than a moment's patience with who reads what the guest writes."""
        ...


@checkable
class Terminal(Protocol):
    """A console of the guest that somebody types on, and that has a size."""

    @property
    def interactive(self) -> bool:
        """Whether it was made with an input."""
        ...

    def offer(self, keys: bytes) -> bool:
        """Type ``keys``; False, and none of them, without room for all."""
        ...

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest of the terminal's size."""
        ...


@checkable
class MemoryBalloon(Protocol):
    """Takes memory of the guest that the host wants back."""

    def hold(self, size: int | None = None) -> dict[str, int]:
        """Tell the guest how many bytes to give up, unless None, and say how many it has, in bytes.

        ``target`` and ``actual``, and ``given_back``: what the host has been given until now, by it and by reports of
        free pages. Raises UsageError for more memory than there is.
        """
        ...
