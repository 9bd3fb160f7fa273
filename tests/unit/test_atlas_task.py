# SPDX-License-Identifier: Apache-2.0
"""Experiments in child processes: the verdict reports whatever they do, and nothing is left behind."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyvmm.atlas import task as module
from pyvmm.atlas.claim import Claim, Place
from pyvmm.atlas.model import Result
from pyvmm.errors import HostError
from pyvmm.experiment import Experiment, Untold, runner
from pyvmm.experiment.host import settings
from pyvmm.experiment.record import Evidence, Picture, Value, Verdict
from pyvmm.guest.orders import GuestSilent
from pyvmm.protection import Protection

DEADLINE = 20.0


class NoGuest:
    """An Experiment without a guest: these tests are about processes."""

    def __init__(self, *_place: object, **_options: object) -> None:
        self.evidence: list[Evidence] = []
        self.pictures: list[Picture] = []
        self.ticks: dict[str, int] = {}

    def __enter__(self) -> NoGuest:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check(self, what: str, saw: Value, wanted: Value = True) -> None:
        self.evidence.append(Evidence(what, saw, wanted))

    def events(self) -> tuple[tuple[()], list[str]]:
        return (), []

    def unasked_failures(self) -> list[str]:
        return []

    @property
    def verdict(self) -> Verdict:
        checked = [entry.ok for entry in self.evidence if entry.ok is not None]
        return Verdict.UNTOLD if not checked else Verdict.HOLDS if all(checked) else Verdict.FAILS


@pytest.fixture(autouse=True)
def no_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Experiment", NoGuest)


def task(function: Callable[..., Any]) -> module.Task:
    place = Place(Protection.NONE, "memfd")
    return module.Task(Claim("share/x", "share", "It is so.", "thread", (place,), function), place)


def run(function: Callable[..., Any], deadline: float = DEADLINE) -> Result:
    before = set(os.listdir("/proc/self/fd"))
    children: list[int] = []
    fork = os.fork

    def noted() -> int:
        children.append(fork())
        return children[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fork", noted)
        result = runner.run_one(task(function), deadline)
    assert set(os.listdir("/proc/self/fd")) == before
    (child,) = children
    with pytest.raises(ChildProcessError):  # the child is reaped
        os.waitpid(child, os.WNOHANG)
    return result


def test_checks_decide_the_verdict() -> None:
    assert run(lambda x: x.check("a", 1, 1)).verdict is Verdict.HOLDS
    failed = run(lambda x: (x.check("a", 1, 1), x.check("b", 2, 3)))
    assert failed.verdict is Verdict.FAILS
    assert failed.evidence == (Evidence("a", 1, 1), Evidence("b", 2, 3))


def test_an_experiment_without_checks_has_no_verdict() -> None:
    assert run(lambda _x: None).verdict is Verdict.UNTOLD


def test_an_inconclusive_experiment_keeps_its_reason_and_earlier_evidence() -> None:
    def experiment(x: Experiment) -> None:
        x.check("first", 1, 1)
        raise Untold("no huge pages here")

    result = run(experiment)
    assert (result.verdict, result.reason) == (Verdict.UNTOLD, "no huge pages here")
    assert result.evidence == (Evidence("first", 1, 1),)


def test_an_experiment_that_the_host_refuses_is_inconclusive_with_the_hosts_error() -> None:
    def experiment(_x: Experiment) -> None:
        raise HostError("KVM_CREATE_VM(type=0x80000000): EINVAL: this host is not pKVM")

    result = run(experiment)
    assert result.verdict is Verdict.UNTOLD
    assert "EINVAL: this host is not pKVM" in result.reason


def test_a_bug_in_an_experiment_is_a_crash_that_names_the_line() -> None:
    result = run(lambda _x: 1 // 0)
    assert result.verdict is Verdict.CRASHED
    assert "ZeroDivisionError" in result.reason
    assert "line" in result.reason


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGKILL])
def test_an_experiment_that_kills_its_process_is_reported_as_crashed(number: signal.Signals) -> None:
    result = run(lambda _x: os.kill(os.getpid(), number))
    assert result.verdict is Verdict.CRASHED
    assert f"killed by {number.name}" in result.reason


def test_the_last_output_of_a_crashed_experiment_is_kept() -> None:
    def experiment(_x: Experiment) -> None:
        os.write(2, b"something terrible\n")
        os._exit(7)

    result = run(experiment)
    assert result.verdict is Verdict.CRASHED
    assert result.reason == "the process exited with status 7; it said: something terrible"


def test_an_experiment_past_its_deadline_is_killed_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def experiment(_x: Experiment) -> None:
        child = subprocess.Popen(["sleep", "1000"])
        pids.write_text(f"{os.getpid()} {child.pid}")
        time.sleep(1000)

    result = run(experiment, deadline=1.0)
    assert result.verdict is Verdict.CRASHED
    assert "not done after 1 s" in result.reason
    for pid in pids.read_text().split():
        assert _gone(int(pid))


def test_processes_that_a_successful_experiment_leaves_are_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def experiment(x: Experiment) -> None:
        pids.write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
        x.check("done", True)

    assert run(experiment).verdict is Verdict.HOLDS
    assert _gone(int(pids.read_text()))


def _gone(pid: int) -> bool:
    """Return whether a process is gone, or is a zombie that its new parent will reap."""
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("ending", ["result", "crash"])
def test_a_result_does_not_wait_for_processes_left_behind(ending: str) -> None:
    """A forked process holds the pipe open. The experiment ends with its own process."""

    def experiment(x: Experiment) -> None:
        if os.fork() == 0:
            time.sleep(1000)
        x.check("done", True)
        if ending == "crash":
            os.abort()

    begun = time.monotonic()
    result = run(experiment)
    assert result.verdict is (Verdict.HOLDS if ending == "result" else Verdict.CRASHED)
    assert "not done" not in result.reason
    assert time.monotonic() - begun < DEADLINE


def test_a_contradiction_stays_one_whatever_happens_later() -> None:
    def experiment(x: Experiment) -> None:
        x.check("the host reads a private page", True, False)
        raise GuestSilent("OP_READ was not answered within 10 s")

    result = run(experiment)
    assert (result.verdict, result.reason) == (
        Verdict.FAILS,
        "the experiment stopped: OP_READ was not answered within 10 s",
    )


def test_an_experiment_that_the_system_refuses_is_inconclusive() -> None:
    def experiment(_x: Experiment) -> None:
        open("/nonexistent/file").close()

    assert run(experiment).verdict is Verdict.UNTOLD


def test_an_interrupt_restores_settings_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("never")
    monkeypatch.setattr(settings, "KNOWN", (str(setting),))

    def interrupt(*_: object) -> None:
        setting.write_text("always")
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_in_child", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(runner.run([task(lambda _x: None)]))
    assert setting.read_text() == "never"


def test_experiments_beside_a_crash_run_on() -> None:
    def die(_x: Experiment) -> None:
        os.abort()

    todo = [task(lambda x: x.check("a", True)), task(die), task(lambda x: x.check("b", True))]
    assert [result.verdict for result in runner.run(todo)] == [Verdict.HOLDS, Verdict.CRASHED, Verdict.HOLDS]


def test_the_next_experiment_finds_modules_imported_by_the_last_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "somebodys.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)

    def experiment(x: Experiment) -> None:
        for name in ("colorsys", "somebodys"):
            x.check(f"{name} is there", name in sys.modules)
            importlib.import_module(name)

    seen = [[entry.saw for entry in result.evidence] for result in runner.run([task(experiment)] * 2)]
    assert seen == [[False, False], [True, False]], "others' modules may do anything when they are imported"


def test_settings_that_a_killed_experiment_changed_are_restored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    setting, other = tmp_path / "enabled", tmp_path / "none"
    setting.write_text("always [never] advise\n")
    monkeypatch.setattr(settings, "KNOWN", (str(setting), str(other)))

    def die(_x: Experiment) -> None:
        settings.write(str(setting), "always")
        os.abort()

    done = [result.verdict for result in runner.run([task(die), task(lambda x: x.check("a", True))])]
    assert done == [Verdict.CRASHED, Verdict.HOLDS]
    assert setting.read_text() == "never"
    with pytest.raises(ValueError, match="is not a setting"):
        settings.write("/proc/sys/kernel/panic", "1")


def test_a_long_result_arrives_whole() -> None:
    def experiment(x: Experiment) -> None:
        for number in range(20000):
            x.check(f"check {number}", number, number)
        x.pictures.append(Picture("all of it", [(0x8000_0000 + 4096 * n, 1, 2) for n in range(5000)]))

    result = run(experiment)
    assert (len(result.evidence), len(result.pictures[0].runs)) == (20000, 5000)
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result
