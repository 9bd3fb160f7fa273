# SPDX-License-Identifier: Apache-2.0
"""A sweep's database: stored results stay, and results that do not belong together are refused."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from pyvmm.bench.model import BenchError
from pyvmm.bench.sweep import store as stores
from pyvmm.bench.sweep.store import Store
from tests.unit.bench_sweep_samples import FOUR, answer, plan


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sweep.sqlite")


def refusal(path: str, text: str = FOUR, **options: bool) -> str:
    with pytest.raises(BenchError) as caught, Store(path, plan(text), **options):
        pass
    return str(caught.value)


def test_stored_points_are_not_measured_again_when_the_sweep_continues(path: str) -> None:
    with Store(path, plan()) as store:
        tasks = store.waiting()
        assert tasks == list(plan().tasks)
        store.done(tasks[1], answer())
        store.fail(tasks[2], "it does not work")
        store.lost(tasks[3], "the lab ended")
    with Store(path, plan()) as store:
        assert store.waiting() == [tasks[0], tasks[3]]
        assert store.counts() == (4, 1, 1)
        assert store.failures() == [(tasks[2], "it does not work")]
        assert [(task, series.values) for task, series in store.results(1)] == [(tasks[1], (1.0,))]
        store.retry_failed()
        assert store.waiting() == [tasks[0], *tasks[2:]]


def test_a_database_of_another_plan_is_refused_with_the_difference(path: str) -> None:
    with Store(path, plan("case = 'exit'")):
        pass
    with Store(path, plan()) as store:  # nothing was measured for the other plan
        store.lost(store.waiting()[0], "the lab ended")
    said = refusal(path, FOUR.replace("1024", "2048"))
    assert "sweep 1.axes.pages: [256, 1024] there, [256, 2048] here" in said
    assert "--restart" in said


def test_results_of_another_pyvmm_are_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "__version__", "0.0.7")
    with Store(path, plan()) as store:
        store.done(store.waiting()[0], answer())
    monkeypatch.undo()
    assert "it was measured with pyvmm 0.0.7, this is " in refusal(path)


@pytest.mark.parametrize("number", [1, 99])
def test_another_format_is_refused_and_restart_discards_it(path: str, number: int) -> None:
    with Store(path, plan()) as store:
        store.done(plan().tasks[0], answer())
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {number}")
        db.execute("DROP TABLE points")
    assert f"its format is {number}, this pyvmm's is 2" in refusal(path)
    with Store(path, plan(), restart=True) as store:
        assert len(store.waiting()) == 4
        assert list(store.environments()) == []


def test_a_file_that_is_not_a_sweeps_is_refused_and_restart_does_not_change_it(path: str) -> None:
    Path(path).write_text("my thesis\n" * 100)
    assert "is no database" in refusal(path, restart=True)
    assert Path(path).read_text().startswith("my thesis")
    Path(path).unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE points (mine)")
    assert "no sweep's" in refusal(path, restart=True)


def test_a_second_process_is_refused_while_the_first_runs(path: str) -> None:
    with Store(path, plan()):
        assert "is in use" in refusal(path)
        assert "is in use" in refusal(path, restart=True)
    with Store(path, plan()):
        pass


def test_a_full_disk_loses_no_stored_result_and_the_sweep_continues_with_space(path: str) -> None:
    big = answer()
    big.series[0]["values"] = [1.5] * 20_000
    with Store(path, plan()) as store:
        tasks = store.waiting()
        store.done(tasks[0], answer())
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages + 5}")
        with pytest.raises(BenchError, match="the disk is full") as caught:
            store.done(tasks[1], big)
        assert "goes on" in (caught.value.hint or "")
        assert store.counts() == (4, 1, 0)
    with Store(path, plan()) as store:
        assert store.waiting() == tasks[1:]
        assert [series.values for _, series in store.results(1)] == [(1.0,)]
        store.done(tasks[1], big)
        assert store.counts().done == 2


def test_the_error_names_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    assert "cannot be written: No such file or directory" in refusal(str(tmp_path / "no" / "a.sqlite"))
