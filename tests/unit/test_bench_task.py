# SPDX-License-Identifier: Apache-2.0
"""Points are measured in child processes. A failed process gives a series with the reason."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from pyvmm.bench import case as cases
from pyvmm.bench.case import Case
from pyvmm.bench.measure import Bench
from pyvmm.bench.model import Series
from pyvmm.bench.task import Task, measure_point
from pyvmm.errors import KvmError, PyvmmError, UsageError
from pyvmm.experiment import runner

DEADLINE = 20.0


def case(function: Callable[..., Any], seconds: float = DEADLINE) -> Case:
    axes = {"protection": ("pkvm",), "size": (1, 2)}
    return Case("fault", "says", axes, function, (), (), lambda _: "", seconds)


def measure(function: Callable[..., Any], *, deadline: float | None = None, **more: float) -> list[Series]:
    task = Task(case(function, **more), {"protection": "pkvm", "size": 2})
    [series] = runner.run([task], deadline=deadline)
    return series


def test_a_series_has_all_rounds_and_the_first_is_warm_up() -> None:
    def keep(bench: Bench) -> None:
        bench.keep("touch", [[9.0, 8.0], [1.0004, 2.0]], places=[0, 0, 1, 0], began=[0, 0, 0, 1.26], seed=3)
        bench.keep("PSS", [[float(os.getpid())]], clock="memory", unit="bytes", per="VM")

    touch, pss = measure(keep)
    assert (touch.values, touch.rounds, touch.warmup, touch.rule) == ((9, 8, 1, 2), (2, 2), 2, "the first round")
    assert (touch.case, touch.point) == ("fault", {"protection": "pkvm", "size": 2})
    assert (touch.unit, touch.clock, touch.per) == ("ns", "guest", "page")
    assert (touch.places, touch.began, touch.notes) == ((0, 0, 1, 0), (0, 0, 0, 1.3), {"seed": 3})
    assert (pss.warmup, pss.rule, pss.rounds) == (0, "", (1,))
    assert pss.values != (os.getpid(),)  # of a child process


def test_series_are_in_instructions_where_time_counts_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvmm.bench.measure.counts", lambda: "instructions")
    [touch, count] = measure(lambda bench: (bench.keep("a", [[1.0]]), bench.keep("b", [[1.0]], unit="count")))
    assert (touch.unit, count.unit) == ("instructions", "count")


def refuse(error: KvmError | OSError | PyvmmError) -> Callable[..., None]:
    def function(bench: Bench) -> None:
        bench.keep("before", [[1.0]])
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KvmError("KVM_CREATE_GUEST_MEMFD", "vm=7", 22), r"KVM_CREATE_GUEST_MEMFD\(vm=7\): EINVAL: Invalid argument"),
        (PyvmmError("not here", hint="there"), "not here"),
        (OSError(28, "No space left on device"), r"\[Errno 28\] No space left on device"),
    ],
)
def test_a_refused_round_gives_a_series_with_the_reason_after_the_measured_ones(
    error: KvmError | OSError | PyvmmError, words: str
) -> None:
    before, nothing = measure(refuse(error))
    assert before.values == (1.0,)
    assert (nothing.values, nothing.notes, nothing.point) == ((), {}, {"protection": "pkvm", "size": 2})
    assert re.fullmatch(words, nothing.unavailable)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda _: os.kill(os.getpid(), signal.SIGKILL), "the process was killed by SIGKILL"),
        (lambda _: (os.write(2, b"alas\n"), os._exit(3)), "the process exited with status 3; it said: alas"),
        (lambda bench: bench["nothing"], "the process exited with status 1.*"),
    ],
)
def test_a_crash_is_a_series_with_its_last_words_and_the_next_point_is_measured(
    function: Callable[..., Any], words: str
) -> None:
    tasks = [Task(case(each), {}) for each in (function, lambda bench: bench.keep("touch", [[1.0]]))]
    [[crashed], [good]] = runner.run(tasks)
    assert (crashed.values, crashed.notes) == ((), {"crashed": True})
    assert re.fullmatch(words, crashed.unavailable, re.DOTALL)
    assert good.values == (1.0,)


@pytest.mark.parametrize("more", [{"deadline": 0.2}, {"seconds": 0.2}])
def test_a_point_past_any_deadline_is_a_series_that_says_so(more: dict[str, float]) -> None:
    [late] = measure(lambda _: time.sleep(60), **more)
    assert (late.unavailable, late.notes) == ("not done after 0.2 s, and killed", {"crashed": True})


@pytest.mark.parametrize(("more", "seconds"), [({}, DEADLINE), ({"seconds": 0.001, "deadline": 9.0}, 9.0)])
def test_a_case_may_wait_for_its_guest_up_to_any_deadline(more: dict[str, float], seconds: float) -> None:
    [kept] = measure(lambda bench: bench.keep("seconds", [[bench.seconds]]), **more)
    assert kept.values == (seconds,)


def test_settings_that_a_killed_process_changed_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class SavedSettings:
        def restore(self) -> None:
            seen.append("restored")

    monkeypatch.setattr(runner, "SavedSettings", SavedSettings)
    list(runner.run([Task(case(refuse(PyvmmError("no"))), {})]))
    assert seen == []
    monkeypatch.setitem(cases.all_cases(), "fault", case(lambda _: os._exit(1)))
    assert measure_point("fault", {"size": 2})[0].notes == {"crashed": True}
    assert seen == ["restored"]


def test_one_point_is_measured_by_name_and_some_of_its_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.all_cases(), "fault", case(lambda bench: bench.keep("touch", [[bench["size"]]])))
    [found] = measure_point("fault", {"size": "2"})
    assert (found.point, found.values) == ({"protection": "pkvm", "size": 2}, (2,))
    for name, point, words in (("fualt", {}, "'fualt'"), ("fault", {"siez": 1}, "'siez'"), ("fault", {"size": 0}, "0")):
        with pytest.raises(UsageError, match=words):
            measure_point(name, point)
