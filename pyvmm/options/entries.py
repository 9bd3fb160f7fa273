# SPDX-License-Identifier: Apache-2.0
"""What a file of options says, key by key, and on which line of it.

The lines are for whoever has to say what is wrong with the file: tomllib, which reads it, tells none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True)
class Entry:
    """A key of the file, with its value, and where that is said.

    ``lines`` are those of the elements of an array, or of the tables, or the one of anything else; ``parts`` those of
    the keys in each.
    """

    key: str
    value: Any
    lines: tuple[int, ...]
    parts: tuple[Mapping[str, int], ...] = ()

    def line(self, number: int = 0, part: str | None = None) -> int:
        """Return where the element of this number is said, or its key ``part``."""
        if part is not None and number < len(self.parts) and part in self.parts[number]:
            return self.parts[number][part]
        return self.lines[min(number, len(self.lines) - 1)]

    @property
    def elements(self) -> list[Any]:
        """The elements of an array or of tables of one name; a value that is alone is the only one."""
        return self.value if isinstance(self.value, list) else [self.value]

    def without(self, number: int, part: str | None = None) -> Entry:
        """Return what is left without the element of this number, or without its key ``part``."""
        left = list(self.elements)
        if part is None:
            del left[number]
        else:
            left[number] = {key: value for key, value in left[number].items() if key != part}
        return replace(self, value=left if isinstance(self.value, list) else left[0])


def parse(text: str) -> list[Entry]:
    """Return what TOML says, in its order; ValueError for what is none."""
    import tomllib

    whole = tomllib.loads(text)
    lines: dict[str, list[int]] = {}
    parts: dict[str, list[dict[str, int]]] = {}
    table = ""
    for first, elements, statement, header in _statements(text):
        if table and not header:
            parts[table][-1].update(dict.fromkeys(statement, first))
            continue
        for key, value in statement.items():
            table = key if header else ""
            if key not in lines or (header and isinstance(value, list)):
                lines.setdefault(key, []).extend(elements or [first])
                parts.setdefault(key, []).append({})
            if isinstance(value, dict):  # of a dotted key, an inline table, or a table in a table
                parts[key][-1].update(dict.fromkeys(value, first))
    return [Entry(key, value, tuple(lines[key]), tuple(parts[key])) for key, value in whole.items()]


def _statements(text: str) -> Iterator[tuple[int, list[int], dict[str, Any], bool]]:
    """Yield (line, lines of an array's elements, what it says, whether it is a table's header) of each statement.

    ``text`` is TOML. A statement is over when what there is of it is TOML by itself: until then a string or an array is
    still open. An element of an array is over when a bracket would end that.
    """
    first, element, lines = 1, 1, ""
    elements: list[int] = []
    for number, line in enumerate(text.split("\n"), 1):
        lines = f"{lines}{line}\n"
        statement = _toml(lines)
        so_far = _toml(f"{lines}]") if statement is None else statement
        if so_far is None:
            continue
        for value in so_far.values():
            if isinstance(value, list):
                elements += [element] * (len(value) - len(elements))
        element = number + 1
        if statement is not None:
            yield first, elements, statement, lines.lstrip().startswith("[")
            first, elements, lines = number + 1, [], ""


def _toml(text: str) -> dict[str, Any] | None:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None
