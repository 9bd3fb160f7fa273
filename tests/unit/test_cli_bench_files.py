# SPDX-License-Identifier: Apache-2.0
"""``pyvmm bench`` with files: ``report`` and ``compare``, and what they refuse."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyvmm.bench import model
from tests.unit import bench_samples as samples
from tests.unit.bench_command import FEW, STEADY, lines, told, write

NEEDED = ("numpy", "scipy", "matplotlib")
if any(importlib.util.find_spec(name) is None for name in NEEDED):
    pytest.skip("reports need numpy, scipy and matplotlib", allow_module_level=True)


@pytest.mark.parametrize("words", [["report"], ["compare"]], ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "is empty: no benchmark's results"),
        ("what is this", "line 1 is not of a benchmark's results"),
        ('{"pyvmm bench": 3}\n', "its format is 3, this pyvmm reads 1 and 2"),
        ("".join(lines()).replace('"per":', '"pre":', 1), "line 2: an invalid series"),
        ("".join(lines()).replace('"values":[', '"values":', 1), "line 2 is not of a benchmark's results"),
    ],
)
def test_damaged_results_and_other_files_are_refused_by_name(
    words: list[str], text: str | None, why: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    if text is not None:
        file.write_text(text)
    good = [write(tmp_path / "b.jsonl", *lines())] if words == ["compare"] else []
    status, out, err = told(capfd, *words, file, *good)
    assert (status, out) == (2, "")
    assert why in err


@pytest.mark.parametrize("subverb", ["report", "compare"])
def test_values_that_are_not_numbers_are_refused_with_the_series_name(
    subverb: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write(tmp_path / "a", samples.text(samples.run(samples.series([1.0, "x"]))))
    status, out, err = told(capfd, subverb, *[file] * (2 if subverb == "compare" else 1))
    assert status in (1, 2)
    assert out == ""
    assert "fault, touch" in err


def test_a_file_truncated_in_its_last_line_is_readable_up_to_there(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write(tmp_path / "a.jsonl", "".join(lines())[:-300])
    status, out, _ = told(capfd, "report", file)
    assert status == 0
    assert "touch" in out
    assert "whole range" not in out


def test_the_exit_status_of_compare_says_whether_runs_differ(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    slower = [replace(each, values=tuple(2 * value for value in each.values)) for each in FEW.series]
    one, other = (write(tmp_path / name, samples.text(run)) for name, run in (("a", FEW), ("b", samples.run(*slower))))
    assert told(capfd, "compare", one, one)[0] == 0
    status, out, _ = told(capfd, "compare", one, other)
    assert status == 1
    assert "slower" in out


def test_compare_with_too_few_rounds_has_its_own_exit_status_and_says_what_is_missing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = samples.run(samples.per_round(STEADY[:2]))
    slower = samples.run(replace(few.series[0], values=tuple(1.05 * value for value in few.series[0].values)))
    one, other = (write(tmp_path / name, samples.text(run)) for name, run in (("a", few), ("b", slower)))
    status, out, _ = told(capfd, "compare", one, other)
    assert status == 3
    assert "B against A: 1 cannot tell" in out
    assert "measure with --rounds" in " ".join(out.split())


def two_states() -> model.Run:
    cold = samples.per_round(STEADY, point={"protection": "pkvm", "state": "cold"})
    populated = replace(
        cold, point={**cold.point, "state": "populated"}, values=tuple(each / 2 for each in cold.values)
    )
    return samples.run(cold, populated, samples.per_round(STEADY, case="exit", point={"kind": "hvc"}))


def test_a_file_is_compared_with_itself_across_an_axis(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", samples.text(two_states()))
    status, out, _ = told(capfd, "compare", file, "--across", "state=cold,populated")
    assert status == 1
    assert "B against A: 1 faster" in out
    assert "cold / populated" in out
    assert "0.500" in out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--across", "stat=cold,populated"], "no series of this run has an axis 'stat'"),
        (["--across", "state=cold,mapped"], "this run measured nothing at state=mapped"),
        (["--across", "state=cold"], "expected two values"),
        (["--across", "state=cold,populated,mapped"], "expected two values"),
        (["--across", "state"], "expected AXIS=VALUE"),
        (["--across", "state=cold,populated", "b.jsonl"], "2 files given, it takes 1"),
        (["b.jsonl", "--figures", "f"], "draws no figures"),
        (["b.jsonl", "--margin", "0"], "not a percentage"),
    ],
)
def test_invalid_comparisons_are_refused(
    words: list[str], why: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, err = told(capfd, "compare", write(tmp_path / "a.jsonl", samples.text(two_states())), *words)
    assert (status, out) == (2, "")
    assert why in err


def test_compare_writes_its_table_and_its_verdicts(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", samples.text(FEW))
    page, data = tmp_path / "y.html", tmp_path / "y.json"
    status, out, _ = told(capfd, "compare", "--html", page, file, "--json", data, file)
    assert status == 0
    assert "B against A: 2 the same" in out
    assert "B against A: 2 the same" in page.read_text()
    assert [each["verdict"] for each in json.loads(data.read_text())["series"]] == ["the same", "the same"]


def test_the_margin_decides_what_counts_as_a_difference(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    constant = samples.series([100.0] * 6, rounds=[1] * 6)
    other = replace(constant, values=(100.5,) * 6)
    files = [write(tmp_path / name, samples.text(samples.run(each))) for name, each in (("a", constant), ("b", other))]
    assert told(capfd, "compare", *files)[0] == 0
    assert told(capfd, "compare", *files, "--margin", "0.2")[0] == 1


def test_report_takes_options_between_its_words(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", samples.text(FEW))
    assert told(capfd, "report", "--html", tmp_path / "y.html", file)[0] == 0
    assert (tmp_path / "y.html").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"environment": {**samples.ENVIRONMENT, "cpu": "another"}}, "not of the same cpu"),
        ({"environment": {**samples.ENVIRONMENT, "counts": "instructions"}}, "not of the same counts"),
        ({"series": (replace(FEW.series[0], case="exit"),)}, "no series in common"),
    ],
)
def test_runs_that_cannot_be_compared_have_a_distinct_exit_status(
    changed: dict[str, Any],
    why: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    one = write(tmp_path / "a", samples.text(FEW))
    other = write(tmp_path / "b", samples.text(replace(FEW, **changed)))
    status, out, err = told(capfd, "compare", one, other)
    assert (status, out) == (2, "")
    assert why in err
    status, _, err = told(capfd, "compare", one)
    assert status == 2
    assert "this run has only one side" in err
