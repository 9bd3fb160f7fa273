# SPDX-License-Identifier: Apache-2.0
"""How long the making of an image or a kernel still takes, as it is said on stderr."""

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
def test_what_is_left_is_said_once_enough_was_done_to_tell(took: float, share: float, said: str) -> None:
    assert progress.left(took, share) == said


def test_a_pipe_is_told_rarely_how_far_a_step_is_and_what_is_left(
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
