# SPDX-License-Identifier: Apache-2.0
"""The host's pages that a balloon's guest has named in full. Its pages have 4 KiB, the host's may have more.

Only whole pages of the host can be returned. So the parts that the guest has named are remembered, until it takes one
back. Owns that memory: at most an entry for each of the host's pages in RAM.
"""

from __future__ import annotations

from pyvmm.pages import GUEST_PAGE, HOST_PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Final

PARTS: Final = HOST_PAGE // GUEST_PAGE
"""Pages of a balloon in a page of the host."""
_WHOLE: Final = (1 << PARTS) - 1


class NamedPages:
    """What a guest has named. Pages are named by their number, in units of 4 KiB."""

    def __init__(self) -> None:
        self._named: dict[int, int] = {}
        """Pages of the host by number: a bit for each part that the guest has named."""

    def give(self, numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Add pages. Yields the ranges to return, as gpa and size: the host's pages that these complete."""
        if PARTS == 1:
            yield from ((first * HOST_PAGE, count * HOST_PAGE) for first, count in _runs(numbers))
            return
        complete = set()
        for number in numbers:
            page, part = divmod(number, PARTS)
            self._named[page] = named = self._named.get(page, 0) | 1 << part
            if named == _WHOLE:
                complete.add(page)
        yield from ((first * HOST_PAGE, count * HOST_PAGE) for first, count in _runs(complete))

    def take(self, numbers: Iterable[int]) -> None:
        """Remove pages, which the guest is about to use."""
        for number in numbers:
            page, part = divmod(number, PARTS)
            if named := self._named.pop(page, 0) & ~(1 << part):
                self._named[page] = named

    def forget(self) -> None:
        """Remove all pages."""
        self._named.clear()


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield page numbers as runs: the first page, and the number of consecutive pages."""
    first = count = 0
    for number in sorted(set(numbers)):
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count
