# SPDX-License-Identifier: Apache-2.0
"""The shape of a TOML text: how deep it is, and on which lines its statements and their elements stand.

tomllib tells no lines. It also calls itself for each bracket, and looks at a key's parts once for each of them, so the
depth of a text must be known before. https://toml.io/en/v1.0.0 has the grammar.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_DEEP: Final = 64
"""Maximum open brackets, and maximum parts of a key."""
_TOKEN: Final = re.compile(
    r"""
      (?P<string> \"{3} (?: [^"\\] | \\. | "(?!"") )*+ (?: \"{3,5} | \Z )
                | '{3} (?: [^'] | '(?!'') )*+ (?: '{3,5} | \Z )
                | " (?: [^"\\\n] | \\. )*+ "?
                | ' [^'\n]*+ '? )
    | (?P<skip> [ \t\r]++ | \#[^\n]*+ )
    | (?P<newline> \n )
    | (?P<open> [\[{] )
    | (?P<close> [\]}] )
    | (?P<mark> [,.=] )
    | (?P<word> [^\s\#"'\[\]{},.=]++ | . )
    """,
    re.VERBOSE | re.DOTALL,
)


class Statement(NamedTuple):
    """A statement: its first line, its text, and the lines on which the elements of an array begin."""

    line: int
    text: str
    elements: tuple[int, ...]

    @property
    def is_header(self) -> bool:
        """Whether it begins a table."""
        return self.text.lstrip().startswith("[")


def check_depth(text: str) -> None:
    """Raise ValueError if ``text`` is deeper than MOST_DEEP. It need not be TOML."""
    depth = parts = 0
    line = 1
    for token in _TOKEN.finditer(text):
        kind, what = token.lastgroup, token[0]
        if kind == "open":
            depth += 1
        elif kind == "close":
            depth -= 1
        # The parts of a key stand on one line, with a dot between each two.
        if what == ".":
            parts += 1
        elif kind not in ("string", "word", "skip"):
            parts = 0
        if depth > MOST_DEEP:
            raise ValueError(f"it nests too deeply: {depth} brackets are open on line {line}")
        if parts > MOST_DEEP:
            raise ValueError(f"it nests too deeply: a key on line {line} has more than {MOST_DEEP} parts")
        line += what.count("\n")


def statements(text: str) -> Iterator[Statement]:
    """Yield the statements of a TOML text."""
    first, start, depth, line = 1, 0, 0, 1
    elements: list[int] = []
    begun = valued = expecting = False
    for token in _TOKEN.finditer(text):
        kind, what = token.lastgroup, token[0]
        if kind == "newline" and depth == 0:
            if begun:
                yield Statement(first, text[start : token.start()], tuple(elements))
            first, start, begun, valued, elements = line + 1, token.end(), False, False, []
        elif kind not in ("skip", "newline"):
            begun = True
            valued |= what == "="
            if expecting and depth == 1 and kind != "close":
                elements.append(line)
                expecting = False
            depth += (kind == "open") - (kind == "close")
            if valued and depth == 1 and what in ("[", ","):
                expecting = True
        line += what.count("\n")
    if begun:
        yield Statement(first, text[start:], tuple(elements))
