# SPDX-License-Identifier: Apache-2.0
"""The remaining time of building an image or a kernel, as printed on stderr."""

from __future__ import annotations

import time

import pytest

from pyvmm.lab import progress


@pytest.mark.parametrize(
    ("took", "share", "said"),
    [
        (19.0, 0.5, ""),
        (100.0, 0.0, ""),
        (100.0, 0.01, ""),
        (30.0, 0.1, "about 4 min left"),
        (300.0, 0.5, "about 5 min left"),
        (100.0, 0.6, "about 70 s left"),
        (600.0, 0.985, "about 10 s left"),
        (600.0, 0.99, ""),
        (600.0, 1.0, ""),
    ],
)
def test_the_remaining_time_is_printed_once_enough_is_done_to_estimate_it(took: float, share: float, said: str) -> None:
    assert progress.left(took, share) == said


def test_a_pipe_gets_progress_and_remaining_time_rarely(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.showing() as show:
        for second in range(0, 200, 5):
            now[0] = float(second)
            show("compiling", second / 400)
        show("linking", 0.0)
    assert capsys.readouterr().err.splitlines() == [
        "pyvmm: lab: compiling",
        "pyvmm: lab: compiling: 16%, about 6 min left",
        "pyvmm: lab: compiling: 32%, about 4 min left",
        "pyvmm: lab: compiling: 49%, about 3 min left",
        "pyvmm: lab: linking",
    ]
