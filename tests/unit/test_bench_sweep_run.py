# SPDX-License-Identifier: Apache-2.0
"""A running sweep: results arrive, workers are lost, signals and kills come, and the sweep continues."""

from __future__ import annotations

import argparse
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from pyvmm.bench import model
from pyvmm.bench.sweep.export import export
from pyvmm.bench.sweep.plan import Task
from pyvmm.bench.sweep.run import Sweep
from pyvmm.bench.sweep.store import Counts, Store
from pyvmm.bench.sweep.work import Answer, LostError, PointError
from pyvmm.bench.sweep.workers import Here, Workers
from pyvmm.cli import bench_sweep
from pyvmm.errors import HostError, PyvmmError
from tests.unit.bench_sweep_samples import CASES, FOUR, answer, plan, pretend

PATIENCE = 60.0


class Threads(Workers):
    """Threads that call a function for a point and the number of the try."""

    window = 2

    def __init__(self, function: Callable[[Task, int], Answer]) -> None:
        super().__init__()
        self._function = function
        self._executor = ThreadPoolExecutor(2)
        self.asked: list[int] = []

    @property
    def title(self) -> str:
        return "threads"

    def submit(self, task: Task) -> Future[Answer]:
        self.asked.append(task.number)
        return self._executor.submit(self._function, task, self.asked.count(task.number))

    def stop(self) -> None:
        self._executor.shutdown()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sweep.sqlite")


def sweep(path: str, workers: Workers, shown: list[Counts] | None = None) -> int | None:
    with Store(path, plan()) as store, workers:
        return Sweep(store, workers, lambda counts, _left: None if shown is None else shown.append(counts)).run()


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not in {PATIENCE:.0f} s: {what}"
        time.sleep(0.02)


def test_every_point_is_measured_once_and_stored(path: str) -> None:
    shown: list[Counts] = []
    workers = Threads(lambda task, _try: answer(float(task.number)))
    assert sweep(path, workers, shown) is None
    assert sorted(workers.asked) == [0, 1, 2, 3]
    assert (shown[0], shown[-1]) == ((4, 0, 0), (4, 4, 0))
    with Store(path, plan()) as store:
        assert [series.values for _, series in store.results(1)] == [(0.0,), (1.0,), (2.0,), (3.0,)]
    again = Threads(lambda _task, _try: answer())
    assert sweep(path, again) is None
    assert again.asked == []


def test_a_lost_workers_point_is_tried_again_and_given_up_after_three_tries(path: str) -> None:
    def measure(task: Task, tries: int) -> Answer:
        if task.number == 3 or (task.number == 1 and tries < 3):
            raise LostError("the lab ended")
        return answer()

    workers = Threads(measure)
    assert sweep(path, workers) is None
    assert [workers.asked.count(number) for number in range(4)] == [1, 3, 1, 3]
    with Store(path, plan()) as store:
        assert store.counts() == (4, 3, 1)
        assert store.failures() == [(plan().tasks[3], "tried 3 times: the lab ended")]


def test_a_point_that_fails_is_not_tried_again_and_stops_no_other(path: str) -> None:
    def measure(task: Task, _try: int) -> Answer:
        if task.number == 1:
            raise PointError("no such thing")
        return answer()

    workers = Threads(measure)
    assert sweep(path, workers) is None
    assert sorted(workers.asked) == [0, 1, 2, 3]
    with Store(path, plan()) as store:
        assert store.failures() == [(plan().tasks[1], "no such thing")]


@pytest.mark.parametrize("error", [HostError("QEMU is not installed"), ZeroDivisionError("a bug")])
def test_a_failure_that_concerns_every_point_ends_the_sweep_which_can_continue(path: str, error: Exception) -> None:
    def measure(task: Task, _try: int) -> Answer:
        if task.number == 2:
            raise error
        return answer()

    with pytest.raises(PyvmmError, match=str(error)):
        sweep(path, Threads(measure))
    assert sweep(path, Threads(lambda _task, _try: answer())) is None
    with Store(path, plan()) as store:
        assert store.counts() == (4, 4, 0)


def test_processes_measure_and_killed_processes_run_again(path: str, tmp_path: Path) -> None:
    python = pretend(tmp_path, "if name == 'pkvm-256' and tries == 1: os.kill(os.getpid(), 9)")
    assert sweep(path, Here(python)) is None
    assert len(list(tmp_path.glob("pkvm-256.*"))) == 2
    assert len(list(tmp_path.glob("*-*.*"))) == 5
    with Store(path, plan()) as store:
        assert store.counts() == (4, 4, 0)
        task, series = next(store.results(1))
        assert (series.case, series.point, series.values) == ("fault", task.point, (1.0, 2.0))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("sys.exit('it is broken')", "ended with status 1; it said: it is broken"),
        ("print('{'); sys.exit(0)", "line 1 is not of a benchmark's results"),
        ("from pyvmm.bench.model import header; print(header({}, {}), end=''); sys.exit(0)", "end in the middle"),
    ],
)
def test_a_process_without_a_result_fails_its_point(path: str, tmp_path: Path, what: str, reason: str) -> None:
    assert sweep(path, Here(pretend(tmp_path, f"if name == 'none-256':\n    {what}"))) is None
    with Store(path, plan()) as store:
        [(task, said)] = store.failures()
        assert task.number == 0
        assert reason in said


@pytest.mark.skipif(platform.machine() == "aarch64", reason="it can be measured here")
def test_a_host_that_cannot_measure_ends_the_sweep_and_fails_no_point(path: str) -> None:
    with pytest.raises(HostError, match=f"cannot measure: this host is {platform.machine()}"):
        sweep(path, Here())
    with Store(path, plan()) as store:
        assert store.counts() == (4, 0, 0)


def test_a_signal_ends_the_measurement_and_leaves_the_rest_for_the_next_run(path: str, tmp_path: Path) -> None:
    python = pretend(tmp_path, "if name == 'pkvm-256' and tries == 1: time.sleep(1000)")
    with Store(path, plan()) as store, Here(python) as workers:
        running = Sweep(store, workers, lambda *_: running.interrupt(15) if list(tmp_path.glob("pkvm-256.*")) else None)
        assert running.run() == 15
        assert store.counts() == (4, 2, 0)
    assert not any(is_alive(int(note.suffix[1:])) for note in tmp_path.glob("pkvm-256.*"))
    assert sweep(path, Here(python)) is None
    with Store(path, plan()) as store:
        assert store.counts() == (4, 4, 0)


def test_a_sweep_killed_at_any_time_continues_with_the_missing_points(path: str, tmp_path: Path) -> None:
    python = pretend(tmp_path, "if name == 'pkvm-256' and tries == 1: time.sleep(1000)")
    script = f"from tests.unit.test_bench_sweep_run import *\nsweep({path!r}, Here({python!r}))\n"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    try:
        wait_for(lambda: list(tmp_path.glob("pkvm-256.*")), "the third point runs")
    finally:
        process.kill()
        process.wait()
    [note] = tmp_path.glob("pkvm-256.*")
    wait_for(lambda: not is_alive(int(note.suffix[1:])), "what it ran ends with it")
    with Store(path, plan()) as store:
        assert [task.number for task in store.waiting()] == [2, 3]
    assert sweep(path, Here(python)) is None
    assert {name: len(list(tmp_path.glob(f"{name}.*"))) for name in ("none-256", "none-1024", "pkvm-256")} == {
        "none-256": 1,
        "none-1024": 1,
        "pkvm-256": 2,
    }


# -- results files


def test_results_of_one_environment_are_one_file_that_reports_can_read(path: str, tmp_path: Path) -> None:
    assert sweep(path, Threads(lambda task, _try: answer(float(task.number)))) is None
    with Store(path, plan()) as store:
        assert export(store, plan(), str(tmp_path / "all.json")) == [str(tmp_path / "all.json")]
    run = model.read(str(tmp_path / "all.json"))
    assert run.environment["kernel"] == "6.99"
    assert [series.values for series in run.series] == [(0.0,), (1.0,), (2.0,), (3.0,)]
    assert {series.notes["repetition"] for series in run.series} == {1}
    assert run.asked == plan().asked
    assert run.end is not None
    assert run.end["failed points"] == 0


def test_each_environment_has_its_file_and_an_unfinished_file_says_so(path: str, tmp_path: Path) -> None:
    with Store(path, plan()) as store:
        for task in plan().tasks[:3]:
            store.done(task, answer(cpu=f"kind {task.number % 2}"))
        names = export(store, plan(), str(tmp_path / "all.json"))
    assert [Path(name).name for name in names] == ["all-1.json", "all-2.json"]
    runs = [model.read(name) for name in names]
    assert [(run.environment["cpu"], len(run.series), run.end) for run in runs] == [
        ("kind 0", 2, None),
        ("kind 1", 1, None),
    ]


# -- the command line


def command(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    for option in ("--json", "--deadline"):
        parser.add_argument(option)
    parser.add_argument("--list", action="store_true")
    bench_sweep.add_options(parser)
    argv = ["sweep", *words]
    return parser.parse_args(argv, argparse.Namespace(verb_argv=["bench", *argv]))


def test_a_sweep_from_its_file_to_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pyvmm.bench.case.all_cases", lambda: CASES)
    file = tmp_path / "four.toml"
    file.write_text(FOUR)
    assert bench_sweep.main(command(str(file), "--list")) == 0
    assert capsys.readouterr().out.splitlines()[0] == "fault protection=none pages=256 backing=memfd #1"
    stops = "if name == 'pkvm-256' and tries == 1: os.kill(os.getppid(), 15); time.sleep(1000)"
    workers = [Here(pretend(tmp_path, f"{stops}\nif name == 'pkvm-1024': sys.exit(7)")) for _ in range(2)]
    monkeypatch.setattr(bench_sweep, "_workers", lambda *_: workers.pop())
    args = command(str(file), "--json", str(tmp_path / "four.json"))
    old = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as caught:
        bench_sweep.main(args)
    assert caught.value.args == (15,)
    assert signal.getsignal(signal.SIGTERM) is old
    said = capsys.readouterr().err
    assert f"2 points are left; to continue: pyvmm bench sweep {file} --json {tmp_path}/four.json" in said
    assert bench_sweep.main(args) == 1
    said = capsys.readouterr().err
    assert "failed: fault protection=pkvm pages=1024 backing=memfd #1: the process that measured it ended with" in said
    assert "3 of 4 points measured" in said
    assert len(model.read(str(tmp_path / "four.json")).series) == 3
    assert (tmp_path / "four.sqlite").exists()


@pytest.mark.skipif(platform.machine() == "aarch64", reason="it can be measured here")
def test_the_error_on_a_machine_other_than_arm64_names_the_lab(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="--labs 1"):
        bench_sweep._workers(command(str(tmp_path / "a.toml")), plan(), None)


def test_an_impossible_lab_is_refused_before_any_lab_boots() -> None:
    with pytest.raises(PyvmmError, match=r"sweep.toml: \[lab\]: icount counts the instructions of one CPU"):
        bench_sweep._workers(command("sweep.toml"), plan(FOUR + "[lab]\nicount = true\ncpus = 2"), None)
    with pytest.raises(PyvmmError, match="its own machines"):
        bench_sweep._workers(command("sweep.toml", "--scheduler", "tcp://a:1"), plan(FOUR + "[lab]\ncpus = 2"), None)
