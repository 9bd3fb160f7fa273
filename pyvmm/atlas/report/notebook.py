# SPDX-License-Identifier: Apache-2.0
"""One result of an atlas as a piece of HTML for a notebook: verdict, evidence, page maps and timeline.

Pure. Foreign text is escaped. The piece has no style sheet and no script: the notebook has its own.
"""

from __future__ import annotations

from pyvmm.atlas.model import Result
from pyvmm.atlas.report import evidence, wording
from pyvmm.atlas.report.figures import Figures
from pyvmm.reports.escaping import escaped, escaped_prose


def fragment(result: Result) -> str:
    """Return the HTML, one element."""
    figures = Figures(escaped)
    verdict = f"{result.verdict.mark} {result.verdict.value}"
    parts = [
        f"<p><b>{escaped(wording.full_name(result))}</b> {escaped(wording.place(result))}: <b>{verdict}</b></p>",
        f"<p>{escaped(result.says)}</p>",
        f"<p>{escaped_prose(result.reason)}</p>" if result.reason else "",
        evidence.table(result),
        figures.definitions() if result.pictures else "",
        *figures.of(result, ""),
    ]
    return f"<div>{''.join(parts)}</div>"
