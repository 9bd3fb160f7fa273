# SPDX-License-Identifier: Apache-2.0
"""A sweep in several labs at once. If a lab dies, another lab measures its point."""

from __future__ import annotations

import os
import signal
import sqlite3
from pathlib import Path

import pytest

from pyvmm.bench.case import all_cases
from pyvmm.bench.sweep import plan as plans
from pyvmm.bench.sweep.run import Sweep
from pyvmm.bench.sweep.store import Counts, Store
from pyvmm.bench.sweep.workers import Labs
from pyvmm.lab import Lab, LabOptions, build_image

pytestmark = pytest.mark.lab

PLAN = """
case = "exit"
repeat = 2
[axes]
protection = ["none", "pkvm"]
kind = "nothing"
"""


def test_the_sweep_reboots_a_lab_killed_while_measuring_and_repeats_its_point(tmp_path: Path) -> None:
    plan = plans.parse(PLAN, "plan.toml", all_cases())
    image = build_image()
    killed: list[int] = []

    def kill(counts: Counts, _left: float | None) -> None:
        if counts.done == 1 and not killed:
            killed.append(workers.pids[0])
            os.kill(killed[0], signal.SIGKILL)

    path = tmp_path / "sweep.sqlite"
    with Store(str(path), plan) as store:
        with Labs(2, lambda: Lab(LabOptions(memory=1024), image=image, cwd=Path("/"))) as workers:
            assert Sweep(store, workers, kill).run() is None
            assert killed[0] not in workers.pids
            assert len(workers.pids) == 2
        assert store.counts() == (4, 4, 0)
        [(number, environment)] = store.environments()
        series = [series for _, series in store.results(number)]
    assert environment["tcg"] is True
    assert {each.metric for each in series} >= {"exit"}
    assert [each.unavailable for each in series if not each.values] == []
    with sqlite3.connect(path) as db:
        assert sorted(tries for (tries,) in db.execute("SELECT tries FROM points")) == [1, 1, 1, 2]
