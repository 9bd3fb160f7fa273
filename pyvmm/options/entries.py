# SPDX-License-Identifier: Apache-2.0
"""Read a file of options: its keys, their values, and their lines.

Error messages name the lines. tomllib, which parses the file, does not report them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pyvmm.syntax.foreign import load_toml
from pyvmm.syntax.toml import statements

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Entry:
    """A key of the file, with its value and its lines.

    ``lines`` has one line per element of an array or per table, and one for any other value. ``parts`` has the lines of
    the keys in each.
    """

    key: str
    value: Any
    lines: tuple[int, ...]
    parts: tuple[Mapping[str, int], ...] = ()

    def line(self, number: int = 0, part: str | None = None) -> int:
        """Return the line of the element with this number, or of its key ``part``."""
        if part is not None and number < len(self.parts) and part in self.parts[number]:
            return self.parts[number][part]
        return self.lines[min(number, len(self.lines) - 1)]

    @property
    def elements(self) -> list[Any]:
        """The elements of an array or of tables with one name. A single value counts as one element."""
        return self.value if isinstance(self.value, list) else [self.value]

    def without(self, number: int, part: str | None = None) -> Entry:
        """Return the entry without the element of this number, or without that element's key ``part``."""
        left = list(self.elements)
        if part is None:
            del left[number]
        else:
            left[number] = {key: value for key, value in left[number].items() if key != part}
        return replace(self, value=left if isinstance(self.value, list) else left[0])


def parse(text: str) -> list[Entry]:
    """Return the entries of a TOML text, in its order. Raises ValueError for invalid TOML."""
    whole = load_toml(text)
    lines: dict[str, list[int]] = {}
    parts: dict[str, list[dict[str, int]]] = {}
    table = ""
    for statement in statements(text):
        first, header = statement.line, statement.is_header
        parsed = load_toml(statement.text)
        if table and not header:
            parts[table][-1].update(dict.fromkeys(parsed, first))
            continue
        for key, value in parsed.items():
            table = key if header else ""
            if key not in lines or (header and isinstance(value, list)):
                several = isinstance(value, list) and not header
                lines.setdefault(key, []).extend((several and statement.elements) or [first])
                parts.setdefault(key, []).append({})
            if isinstance(value, dict):  # of a dotted key, an inline table, or a table in a table
                parts[key][-1].update(dict.fromkeys(value, first))
    return [Entry(key, value, tuple(lines[key]), tuple(parts[key])) for key, value in whole.items()]
