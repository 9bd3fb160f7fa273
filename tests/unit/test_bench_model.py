# SPDX-License-Identifier: Apache-2.0
"""A results file holds everything measured. Damaged and other files are refused by name."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.bench import model
from pyvmm.bench.model import BenchError, Run, Series
from pyvmm.cli.help import page
from tests.documents import blocks
from tests.unit import bench_samples as samples

HEADER = model.header(samples.ENVIRONMENT, {"points": 2})
LINE = model.line(samples.series([1.0, 2.5]))

numbers = st.floats(allow_nan=False)
texts = st.text(max_size=5)
values = st.one_of(texts, st.integers(), st.booleans(), numbers, st.none())
some_series = st.builds(
    Series, case=texts, point=st.dictionaries(texts, values, max_size=3), metric=texts, clock=texts, unit=texts,
    per=texts, values=st.lists(numbers, max_size=4).map(tuple), warmup=st.integers(0, 4), rule=texts,
    rounds=st.lists(st.integers(0, 4), max_size=3).map(tuple), places=st.lists(st.integers(0), max_size=3).map(tuple),
    began=st.lists(numbers, max_size=3).map(tuple), unavailable=texts,
    notes=st.dictionaries(texts, values, max_size=2),
)  # fmt: skip


@settings(max_examples=40)
@given(st.lists(some_series, max_size=3), st.booleans())
def test_a_run_reads_back_as_written(series: list[Series], whole: bool) -> None:
    run = Run(samples.ENVIRONMENT, {"cases": ["fault"]}, tuple(series), {"seconds": 1.5} if whole else None)
    assert model.parse(samples.text(run).splitlines(keepends=True), "a") == run


def test_warm_up_is_stored_but_left_out_of_the_kept_values() -> None:
    series = samples.series([9.0, 1.0, 2.0], rounds=[1, 2], warmup=1)
    assert (series.values, series.kept) == ((9.0, 1.0, 2.0), (1.0, 2.0))


def test_the_key_of_a_series_depends_on_neither_its_values_nor_the_order_of_axes() -> None:
    one = samples.series([1.0], point={"a": 1, "b": 2})
    assert one.key == samples.series([2.0], point={"b": 2, "a": 1}, rounds=[1]).key
    changes: list[dict[str, Any]] = [{name: "x"} for name in ("case", "metric", "clock", "per")]
    others = [samples.series([1.0], point=one.point, **change) for change in changes]
    others.append(samples.series([1.0], point={"a": 1, "b": 3}))
    assert len({one.key, *(each.key for each in others)}) == 6


@pytest.mark.parametrize("rest", [LINE[:-10], LINE[:1], "\n", LINE])
def test_a_truncated_run_is_readable_up_to_the_cut(rest: str) -> None:
    run = model.parse([HEADER, LINE, rest], "a")
    assert run.end is None
    assert [series.values for series in run.series] == [(1.0, 2.5)] * (2 if rest == LINE else 1)


def test_reading_format_1_gives_the_labs_clock_its_present_name() -> None:
    old = model.header({"kernel": "6.12", "emulated": True}, {}).replace('bench":2', 'bench":1')
    assert model.parse([old, LINE], "a").environment == {"kernel": "6.12", "tcg": True}
    new = model.header({"kernel": "6.12", "emulated": True}, {})
    assert model.parse([new, LINE], "a").environment == {"kernel": "6.12", "emulated": True}


def test_lines_of_unknown_kinds_are_skipped() -> None:
    run = model.parse([HEADER, '{"done": {"case": "fault"}}\n', LINE, model.footer({"seconds": 1})], "a")
    assert (len(run.series), run.end) == (1, {"seconds": 1})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a is empty"),
        ("what is this\n", "line 1 is not of a benchmark's results"),
        ("[1]\n", "line 1 is not of a benchmark's results: no object"),
        (HEADER[:40], "line 1 is not of a benchmark's results"),
        ('{"pyvmm atlas": 1}\n', "its format is none, this pyvmm reads 1 and 2"),
        (HEADER.replace('bench":2', 'bench":3'), "its format is 3, this pyvmm reads 1 and 2"),
        ('{"pyvmm bench": 1}\n', "line 1 is not of a benchmark's results: no environment"),
        ('{"pyvmm bench": 2, "environment": 3}\n', "line 1 is not of a benchmark's results: no environment"),
        ('{"pyvmm bench": 1, "environment": 3}\n', "line 1 is not of a benchmark's results: no environment"),
        (HEADER + LINE[:-10] + "\n" + LINE, "line 2 is not of a benchmark's results"),
        (HEADER + "\n" + LINE, "line 2 is not of a benchmark's results"),
        (HEADER + LINE.replace('"unit"', '"unti"') + LINE, "line 2: an invalid series: .*'unti'"),
        (HEADER + LINE.replace('"unit":"ns",', "") + LINE, "line 2: an invalid series: .*'unit'"),
        (HEADER + LINE.replace("[1.0,2.5]", "7") + LINE, "line 2: an invalid series"),
        (HEADER + '{"series": [1]}\n' + LINE, "line 2: an invalid series"),
    ],
)
def test_a_file_that_is_not_results_is_refused_with_the_line(text: str, why: str) -> None:
    with pytest.raises(BenchError, match=why) as caught:
        model.parse(text.splitlines(keepends=True), "a")
    assert caught.value.message.startswith("a")


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with pytest.raises(BenchError, match=rf"{file} cannot be read: No such file"):
        model.read(str(file))
    with pytest.raises(BenchError, match="cannot be read: Is a directory"):
        model.read(str(tmp_path))
    file.write_bytes(b"\x80\x81\xff")
    with pytest.raises(BenchError, match="cannot be read: it is not text"):
        model.read(str(file))


# ---- as the page measuring documents it


def test_keys_of_a_series_are_those_documented() -> None:
    rows = page("measuring").split("| key of `series` | is |")[1].split("\n\n")[0]
    documented = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\|([^|]*)\|", rows, re.MULTILINE)))
    assert sorted(documented) == sorted(field.name for field in fields(Series))


def test_documented_lines_for_pandas_take_every_series_and_nothing_else(tmp_path: Path) -> None:
    kept = samples.series([9.0, 1.0, 2.0], rounds=[1, 2], warmup=1)
    empty = samples.series([], unavailable="the host has none")
    run = Run(samples.ENVIRONMENT, {"cases": ["fault"]}, (kept, empty), {"seconds": 1.5})
    (tmp_path / "a.jsonl").write_text(samples.text(run))
    [block] = [each.text for each in blocks("text") if "pandas" in each.text]
    _, select, table = block.splitlines()
    found: dict[str, Any] = {"json": json, "open": lambda name: (tmp_path / name).open()}
    exec(select, found)
    assert [Series.from_json(each) for each in found["lines"]] == [kept, empty]
    assert 'explode("values")' in table
    assert all("values" in each for each in found["lines"]), "explode needs the column in each row"
