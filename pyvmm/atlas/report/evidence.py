# SPDX-License-Identifier: Apache-2.0
"""A result's evidence as an HTML table: what was seen, and what was wanted. Pure."""

from __future__ import annotations

from pyvmm.atlas.model import Result
from pyvmm.atlas.report import wording
from pyvmm.experiment.record import Evidence, Verdict
from pyvmm.reports.escaping import escaped

_MARKS = {True: ("ok", Verdict.HOLDS.mark), False: ("no", Verdict.FAILS.mark), None: ("told", "")}
"""A row's class and mark, by whether it has the wanted value."""
_HEAD = '<table class="evidence"><thead><tr><th></th><th>what</th><th>seen</th><th>wanted</th></tr></thead><tbody>'


def table(result: Result) -> str:
    """Return the table, or nothing for a result without evidence."""
    if not result.evidence:
        return ""
    return "\n".join((_HEAD, *map(_row, result.evidence), "</tbody></table>"))


def _row(each: Evidence) -> str:
    kind, mark = _MARKS[each.ok]
    wanted = "" if each.wanted is None else wording.value_text(each.wanted)
    values = "".join(f'<td class="value">{escaped(value)}</td>' for value in (wording.value_text(each.saw), wanted))
    return f'<tr class="{kind}"><td>{mark}</td><td>{escaped(each.what)}</td>{values}</tr>'
