# SPDX-License-Identifier: Apache-2.0
"""A sweep's file: the points it expands to, and the errors for invalid files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.bench.sweep import plan as plans
from pyvmm.errors import UsageError
from tests.unit.bench_sweep_samples import CASES, FOUR, plan


def test_points_are_all_combinations_and_unnamed_axes_stay_at_their_base() -> None:
    points = [task.point for task in plan().tasks]
    assert points == [
        {"protection": protection, "pages": pages, "backing": "memfd"}
        for protection in ("none", "pkvm")
        for pages in (256, 1024)
    ]
    assert [task.number for task in plan().tasks] == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["repeat = 3\n" + FOUR, FOUR + "repeat = 3\n"])
def test_repetitions_take_turns(text: str) -> None:
    tasks = plan(text).tasks
    assert [task.repetition for task in tasks] == [1] * 4 + [2] * 4 + [3] * 4
    assert [task.point for task in tasks] == [task.point for task in plan().tasks] * 3
    assert len({task.key for task in tasks}) == 12


def test_sweeps_of_several_cases_take_turns_too_and_a_single_value_needs_no_list() -> None:
    made = plan("""
[[sweep]]
case = "fault"
repeat = 2
axes.pages = 512
[[sweep]]
case = "exit"
deadline = 7
[sweep.axes]
kind = ["hvc", "mmio"]
""")
    assert [(task.case, task.point.get("pages"), task.point.get("kind"), task.repetition) for task in made.tasks] == [
        ("fault", 512, None, 1),
        ("exit", None, "hvc", 1),
        ("exit", None, "mmio", 1),
        ("fault", 512, None, 2),
    ]
    assert [task.deadline for task in made.tasks] == [120, 7, 7, 120]


def test_invalid_combinations_are_left_out_and_counted() -> None:
    made = plan(FOUR + 'backing = ["memfd", "private"]')
    assert (len(made.tasks), made.left_out) == (6, 2)


SWEEP = '[[sweep]]\ncase = "exit"\n'
WRONG = [
    ('case = "falt"', "line 1: no case is called 'falt'", "the nearest: fault"),
    ("[axes]\npages = 1", "sweep.toml: no case is named", "known are fault, exit"),
    ("", "no case is named", ""),
    (FOUR + "page = [1]", "line 6: fault has no axis 'page'", "the nearest: pages"),
    ('case = "fault"\n[axes]\nprotection = [\n "none",\n "pvm"]', "line 3: protection of fault is never 'pvm'", "pkvm"),
    (FOUR + "backing = [[1]]", "line 6: backing has [1]", ""),
    (SWEEP * 2 + '[sweep.axes]\nkind = "x"', "line 6: kind of exit is never 'x'", "hvc"),
    (SWEEP + "axes = {knd = 1}", "[[sweep]] number 1: exit has no axis 'knd'", "kind"),
    ('case = "exit"\n' + SWEEP, "line 1: 'case' means nothing here", "belongs into each"),
    ('case = "fault"\nreapeat = 2', "line 2: 'reapeat' means nothing here", "repeat"),
    ('case = "exit"\ndeadline = 0', "line 2: deadline is seconds above 0, not 0", ""),
    (FOUR + "[lab]\nicounts = true", "line 7: a lab has no 'icounts'", "icount"),
    (FOUR + "[lab]\ncpus = true", "line 7: cpus of a lab is never True", ""),
    ("case = ", "sweep.toml is not TOML: ", ""),
]
NOTHING = [
    ('case = "exit"\n[axes]\nkind = []\nprotection = "none"', "line 3: a sweep with no points: the axis kind is empty"),
    ('case = "fault"\nrepeat = 0', "line 2: a sweep with no points: repeat is 0"),
    ("sweep = []", "line 1: a sweep with no points: it has no [[sweep]]"),
    ('case = "fault"\naxes = {backing = "private"}', "nothing of fault to measure: private memory needs pkvm"),
]


@pytest.mark.parametrize(("text", "message", "hint"), [*WRONG, *((*each, "") for each in NOTHING)])
def test_errors_have_the_line_and_the_nearest_known_name(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan(text)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        plans.read(str(tmp_path / "none.toml"), CASES)


def test_plans_differ_in_text_and_identity_but_not_by_their_deadlines() -> None:
    other = plan(FOUR.replace("1024", "2048") + "[lab]\nicount = true\n")
    assert plans.differences(plan().asked, other.asked) == [
        "sweep 1.axes.pages: [256, 2048] there, [256, 1024] here",
        "lab.icount: true there, nothing here",
    ]
    assert plan().identity != other.identity
    assert plan().identity == plan("deadline = 5\n" + FOUR).identity
