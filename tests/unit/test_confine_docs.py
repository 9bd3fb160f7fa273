# SPDX-License-Identifier: Apache-2.0
"""The page on confinement has the table of the rules. To write it anew: python -m tests.unit.test_confine_docs."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from pyvmm.confine.rules import RULES, Rule

PAGE = Path(__file__).resolve().parents[2] / "pyvmm" / "docs" / "confinement.md"
BEGIN = "| call | only | in runs with | why |\n|---|---|---|---|\n"


def rows(rule: Rule) -> str:
    only = ", ".join(f"`{test.says}`" if test.says.isupper() else test.says for test in rule.when)
    return f"| `{rule.call}` | {only} | {rule.part} | {rule.why} |\n"


def table() -> str:
    return BEGIN + "".join(rows(rule) for _, same in groupby(RULES, lambda rule: rule.call) for rule in same)


def parts(text: str) -> tuple[str, str, str]:
    """Return the page before its table, the table, and what follows."""
    before, _, rest = text.partition(BEGIN)
    lines = rest.splitlines(keepends=True)
    count = next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return before, BEGIN + "".join(lines[:count]), "".join(lines[count:])


def test_the_page_has_every_rule() -> None:
    assert parts(PAGE.read_text())[1] == table()


if __name__ == "__main__":
    before, _, after = parts(PAGE.read_text())
    PAGE.write_text(before + table() + after)
