# SPDX-License-Identifier: Apache-2.0
"""The benchmark as users run it: measured in a lab, reported here. Its results must repeat."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.bench.model import read
from pyvmm.bench.report.embedded import read_html
from tests.bench.bench_bars import repeats

pytestmark = pytest.mark.lab

WORDS = ("bench", "exit", "share", "--axis", "protection=pkvm")


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyvmm", "--lab", "--lab-icount", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


def test_two_fresh_labs_count_the_same_instructions(tmp_path: Path) -> None:
    runs = []
    for name in ("a.jsonl", "b.jsonl"):
        done = bench(*WORDS, "--json", str(tmp_path / name), "--html", str(tmp_path / f"{name}.html"))
        assert done.returncode == 0, done.stderr
        assert "QEMU TCG: times are relative only" in done.stdout
        assert "announced share" in done.stdout
        runs.append(read(str(tmp_path / name)))
    assert {each.unit for each in runs[0].series} == {"instructions", "count"}
    assert runs[0].environment["counts"] == "instructions"
    worst, where = repeats(*runs)
    assert worst <= 0.01, where
    assert read_html(str(tmp_path / "a.jsonl.html")).series == runs[0].series


def test_a_protected_guest_pays_the_same_for_its_pages_whoever_ran_before(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    point = ("--axis", "protection=pkvm", "--axis", "pages=64")
    done = bench("bench", "fault", *point, "--axis", "history=settled,first", "--axis", "access=write,read,execute",
                 "--rounds", "4", "--json", str(file))  # fmt: skip
    assert done.returncode == 0, done.stderr
    touches = [each for each in read(str(file)).series if each.metric == "touch"]
    first, *settled = (statistics.median(each.kept) for each in touches)
    assert [each.point["history"] for each in touches] == ["first", "settled", "settled", "settled"]
    assert max(settled) / min(settled) < 1.01
    assert first > 1.05 * max(settled)


def test_bench_measures_two_values_of_an_axis_in_turns_and_compares_them() -> None:
    done = bench("bench", "fault", "--axis", "protection=pkvm", "--axis", "pages=64", "--versus", "state=populated")
    assert done.returncode == 0, done.stderr
    assert "faster" in done.stdout, done.stdout
