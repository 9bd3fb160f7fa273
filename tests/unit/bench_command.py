# SPDX-License-Identifier: Apache-2.0
"""Run ``pyvmm bench`` at the command line, and write the files that it reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pyvmm import cli
from pyvmm.bench import model
from tests.unit import bench_samples as samples

STEADY = [100.0, 101, 99, 100.5, 99.5, 100.2, 99.8, 100.1]
FEW = samples.run(samples.per_round(STEADY), samples.per_round(STEADY, metric="whole range"))


def lines(run: model.Run = FEW) -> list[str]:
    """Return the lines of a run: each series, followed by the line that says its point is done."""
    found = []
    for line in samples.text(run).splitlines(keepends=True):
        found.append(line)
        if '"series"' in line[:12]:
            found.append('{"done": {"case": "fault", "point": {"protection": "none"}, "seconds": 1}}\n')
    return found


def told(capfd: pytest.CaptureFixture[str], *words: Path | str, lab: tuple[str, ...] = ()) -> tuple[int, str, str]:
    status = cli.main([*lab, "bench", *map(str, words)])
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert "bug in pyvmm" not in err
    return status, out, err


def write(path: Path, *some: str) -> Path:
    path.write_text("".join(some))
    return path


def sides(differ: float = 1.5, turns: int = 8, b_turns: int | None = None) -> model.Run:
    """Return a run in turns; its second side is slower."""
    found = []
    for turn in range(turns):
        for side, factor, state in (("A", 1, "cold"), ("B", differ, "mapped")):
            if side == "A" or turn < (turns if b_turns is None else b_turns):
                point: model.Point = {"state": state}
                notes = {"side": side, "turn": turn, "pair": "cold / mapped"}
                values = [9.0, *(factor * (STEADY[turn] + each) for each in range(3))]
                found.append(samples.series(values, point=point, rounds=[1, 3], warmup=1, notes=notes))
    return replace(samples.run(*found), asked={"versus": ["state", "mapped"]})
