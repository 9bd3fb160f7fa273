# SPDX-License-Identifier: Apache-2.0
"""The page of numbers: each table has its command, and a benchmark's command measures what the table's rows tell.

That each command parses, and that its modules exist, is checked with those of all documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import pytest

from pyvmm import cli
from pyvmm.cli import bench
from pyvmm.cli.help import page
from tests.documents import commands, cut


@dataclass(frozen=True)
class Table:
    """A table of the page, and the shell commands above it in its section."""

    section: str
    rows: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        return f"{self.section}: {self.rows[0].strip('| ')}"


def tables(text: str) -> Iterator[Table]:
    for section in text.split("\n## ")[1:]:
        lines = section.splitlines()
        starts = [at for at, line in enumerate(lines) if line.startswith("|") and not lines[at - 1].startswith("|")]
        for at in starts:
            above = cut("numbers.md", "\n".join(lines[:at]))
            said = [tuple(words) for block in above if block.language == "sh" for words in commands(block.text)]
            rows = tuple(takewhile(lambda line: line.startswith("|"), lines[at:]))
            yield Table(lines[0], rows, tuple(said))


TABLES = list(tables(page("numbers")))


def measured(table: Table) -> list[dict[str, object]]:
    """Return the points that the benchmark above a table measures."""
    [words] = [each for each in table.commands if each[0] == "pyvmm"]
    args = cli.make_parser(words[1:]).parse_args(list(words[1:]))
    return [dict(step.point) for step in bench._plan(args).steps()]


def of(section: str) -> Table:
    [found] = [table for table in TABLES if table.section == section]
    return found


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_table_has_a_command(table: Table) -> None:
    assert table.commands or re.search(r"`(?:python|pyvmm|pytest) ", "\n".join(table.rows))


def test_a_table_without_a_command_is_noticed() -> None:
    [table] = tables("# x\n\n## Memory\n\n| a | b |\n|---|---|\n| c | 1 |\n")
    assert (table.name, table.commands) == ("Memory: a | b", ())


def test_the_prefault_command_measures_a_point_for_each_row() -> None:
    table = of("Prefaulting")
    first = [row.split("|")[1].strip(" `") for row in table.rows[2:]]
    points = measured(table)
    assert {(point["protection"], point["size"]) for point in points} == {("pkvm", 32)}
    means = [str(point["means"]) for point in points]
    assert len(first) == len(means)
    assert all(row.startswith(mean) or mean == "populate" for row, mean in zip(first, means, strict=True))


def test_the_virtio_command_measures_a_point_for_each_row() -> None:
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in of("Kicks of a Linux guest").rows[2:]]
    points = measured(of("Kicks of a Linux guest"))
    for protection in (row[1] for row in rows):
        assert {"blk 4 KiB read", "net round trip"} == {
            str(point["operation"]) for point in points if point["protection"] == protection
        }
    assert {row[0] for row in rows} == {"read 4 KiB past the cache", "", "ping"}
