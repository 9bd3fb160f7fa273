# SPDX-License-Identifier: Apache-2.0
"""``pyvmm bench`` at the command line: what it refuses, with which messages, and that it loses no result."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyvmm import cli
from pyvmm.bench import model
from pyvmm.cli import bench as verb
from pyvmm.errors import PyvmmError
from tests.unit import bench_samples as samples
from tests.unit.bench_command import FEW, lines, sides, told, write

X86 = pytest.mark.skipif(platform.machine() == "aarch64", reason="about hosts that are not arm64")
NEEDED = ("numpy", "scipy", "matplotlib")
if any(importlib.util.find_spec(name) is None for name in NEEDED):
    pytest.skip("reports need numpy, scipy and matplotlib", allow_module_level=True)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str | BaseException]:
    """Emit these lines instead of measuring, and raise those that are exceptions."""
    said: list[str | BaseException] = [*lines()]

    def measure(_plan: object, say: Callable[[str], None], **_options: Any) -> None:
        for each in said:
            if isinstance(each, BaseException):
                raise each
            say(each)

    monkeypatch.setattr(verb, "require_arm64", lambda *_, **__: None)
    monkeypatch.setattr("pyvmm.bench.collect.measure", measure)
    return said


# -- invalid requests


@pytest.mark.parametrize(
    ("words", "why", "hint"),
    [
        (["fualt"], "no case is called 'fualt'", "nearest: fault"),
        (["fault", "--axis", "stat=cold"], "an axis 'stat'", "nearest: state"),
        (["fault", "--axis", "state=cold,clod"], "state of fault is never 'clod'", "nearest: cold"),
        (["--axis", "protection=pkmv"], "protection is never 'pkmv' in any case", "nearest: pkvm"),
        (["fault", "--axis", "cpus=0"], "cpus of fault is a number above 0, not '0'", ""),
        (["fault", "--axis", "cpus=1,"], "cpus of fault is a number above 0, not ''", ""),
        (["fault", "--axis", "state"], "--axis state: expected AXIS=VALUE", ""),
        (["fault", "--versus", "state="], "--versus state=: expected AXIS=VALUE", ""),
        (["fault", "--versus", "=cold"], "--versus =cold: expected AXIS=VALUE", ""),
        (["fault", "--versus", "state=clod"], "state of fault is never 'clod'", "nearest: cold"),
        (["fault", "--versus", "stat=cold"], "an axis 'stat'", "nearest: state"),
        (["--list", "fualt"], "no case is called 'fualt'", "nearest: fault"),
        (["compare"], "bench compare: 0 files given, it takes 1 or 2", ""),
        (["compare", "a", "b", "c"], "3 files given", ""),
        (["report"], "bench report: 0 files given, it takes 1", ""),
    ],
)
@pytest.mark.parametrize("lab", [(), ("--lab",)], ids=["here", "lab"])
def test_invalid_requests_are_refused_before_anything_runs(
    words: list[str],
    why: str,
    hint: str,
    lab: tuple[str, ...],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pyvmm.cli.lab.run_verb", None)
    status, out, err = told(capfd, *words, lab=lab)
    assert (status, out) == (2, "")
    if lab and words[0] in ("compare", "report"):
        why, hint = f"bench {words[0]} does not run in the lab", f"pyvmm bench {words[0]}"
    assert why in err
    assert hint in err


@pytest.mark.parametrize("words", [["--turns", "0"], ["--deadline", "0"], ["--deadline", "soon"]])
def test_invalid_values_are_usage_errors(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert told(capfd, "fault", *words)[0] == 2


@X86
def test_the_error_on_a_host_other_than_arm64_names_the_lab(capfd: pytest.CaptureFixture[str]) -> None:
    status, _, err = told(capfd, "fault", "--json", "x y")
    assert status == 5
    assert "pyvmm --lab bench fault --json 'x y'" in err


@pytest.mark.parametrize("lab", [(), ("--lab",)], ids=["here", "lab"])
def test_the_list_names_cases_axes_and_values(capfd: pytest.CaptureFixture[str], lab: tuple[str, ...]) -> None:
    status, out, _ = told(capfd, "--list", lab=lab)
    assert status == 0
    assert "share: " in out
    assert "\n    policy       preserve, zero, punch, copy\n" in out
    only = told(capfd, "--list", "convert")[1]
    assert "convert: " in only
    assert "share: " not in only


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize("lab", [(), ("--lab",)], ids=["here", "lab"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(
    option: str,
    lab: tuple[str, ...],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(verb, "require_arm64", lambda *_, **__: None)
    monkeypatch.setattr("pyvmm.bench.collect.measure", None)
    monkeypatch.setattr("pyvmm.cli.lab.run_verb", None)
    status, _, err = told(capfd, "fault", option, tmp_path / "none" / "file", lab=lab)
    assert status == 2
    assert "cannot be written: No such file or directory" in err


# -- measuring


def test_bench_makes_everything_requested(
    measured: list[str | BaseException], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, err = told(
        capfd, "fault", "--json", tmp_path / "a.jsonl", "--html", tmp_path / "a.html", "--figures", tmp_path / "f"
    )
    assert (status, err) == (0, "")
    assert "whole range" in out
    assert "QEMU TCG: times are relative only" in out
    assert (tmp_path / "a.jsonl").read_text() == "".join(map(str, measured))
    assert model.read(str(tmp_path / "a.jsonl")) == FEW
    assert "<!doctype html>" in (tmp_path / "a.html").read_text().lower()
    assert list((tmp_path / "f").glob("*.svg"))
    for source in ("a.jsonl", "a.html"):
        assert told(capfd, "report", tmp_path / source)[:2] == (0, out)


def test_a_crashed_point_gives_exit_status_1(
    measured: list[str | BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    crashed = samples.series([], unavailable="the process was killed by SIGSEGV", notes={"crashed": True})
    measured[-1:] = [model.line(crashed)]
    status, out, _ = told(capfd, "fault")
    assert status == 1
    assert "killed by SIGSEGV" in out


def test_a_full_disk_loses_only_the_file_and_bench_says_so(
    measured: list[str | BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    status, out, err = told(capfd, "fault", "--json", "/dev/full")
    assert measured
    assert status == 1
    assert "whole range" in out
    assert "/dev/full cannot be written: No space left on device" in err


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        (KeyboardInterrupt(), 130, ""),
        (PyvmmError("the lab ended", hint="look at its console"), 1, "pyvmm: the lab ended\n  hint: look"),
    ],
)
def test_bench_cut_short_reports_its_results_and_says_why(
    end: KeyboardInterrupt | PyvmmError,
    status: int,
    words: str,
    measured: list[str | BaseException],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    measured[3:] = [end]
    found, out, err = told(capfd, "fault", "--json", tmp_path / "a.jsonl", "--html", tmp_path / "a.html")
    assert found == status
    assert words in err
    assert "touch" in out
    assert "whole range" not in out
    run = model.read(str(tmp_path / "a.jsonl"))
    assert (run.series, run.end) == (FEW.series[:1], None)
    assert (tmp_path / "a.html").stat().st_size > 1000


@pytest.mark.parametrize("words", [[], ["--collect"]], ids=["here", "in the lab"])
def test_a_signal_ends_bench_cleanly_and_a_second_signal_waits(
    words: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    way_out = []

    def measure(_plan: object, say: Callable[[str], None], **_options: Any) -> None:
        for each in lines()[:3]:
            say(each)
        try:
            signal.raise_signal(signal.SIGTERM)
            say(lines()[3])
        finally:
            signal.raise_signal(signal.SIGHUP)
            way_out.append("whole")

    monkeypatch.setattr(verb, "require_arm64", lambda *_, **__: None)
    monkeypatch.setattr("pyvmm.bench.collect.measure", measure)
    numbers = (signal.SIGTERM, signal.SIGHUP)

    def nothing(*_: object) -> None:
        """Handle a signal by failing the test, without ending the process."""

    old = [signal.signal(number, nothing) for number in numbers]
    try:
        status, out, _ = told(capfd, "fault", *words)
        assert [signal.getsignal(number) for number in numbers] == [nothing, nothing]
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)
    assert (status, way_out) == (128 + signal.SIGTERM, ["whole"])
    assert "touch" in out
    assert "whole range" not in out


def test_bench_cut_short_before_any_result_reports_nothing(
    measured: list[str | BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    for rest in (1, 0):
        measured[rest:] = [KeyboardInterrupt()]
        assert told(capfd, "fault") == (130, "", "")


def test_bench_compares_two_sides_measured_in_turns(
    measured: list[str | BaseException], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    measured[:] = lines(sides())
    status, out, _ = told(capfd, "fault", "--versus", "state=mapped", "--json", tmp_path / "a.jsonl")
    assert status == 0
    assert "slower" in out
    assert "cold / mapped" in out
    assert told(capfd, "compare", tmp_path / "a.jsonl")[:2] == (1, out)
    # A turn that was cut off does not affect the others.
    write(tmp_path / "b.jsonl", samples.text(sides(b_turns=7)))
    status, out, _ = told(capfd, "compare", tmp_path / "b.jsonl")
    assert status == 1
    assert "unpaired" not in out


def test_bench_cut_short_before_the_second_side_prints_the_reason(
    measured: list[str | BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    measured[:] = [*lines(sides(turns=1, b_turns=0)), KeyboardInterrupt()]
    assert told(capfd, "fault", "--versus", "state=mapped")[0] == 130


# -- in the lab


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace a lab: its output comes in pieces of a given size, and then it ends."""

    class Lab(argparse.Namespace):
        text, size, status = "".join(lines()).encode(), 7, 0
        seen: Any = None

    stand_in = Lab()

    def run_verb(
        argv: list[str],
        _args: argparse.Namespace,
        *,
        outputs: tuple[Any, ...],
        stdout: verb.Lines,
        visible: tuple[Any, ...],
        env: dict[str, str],
    ) -> int:
        stand_in.seen = (argv, outputs, visible, env)
        for at in range(0, len(stand_in.text), stand_in.size):
            stdout(stand_in.text[at : at + stand_in.size])
        return stand_in.status

    monkeypatch.setattr("pyvmm.cli.lab.run_verb", run_verb)
    return stand_in


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_the_lab_measures_and_the_report_is_made_here(
    lab: Any, size: int, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lab.size = size
    file = tmp_path / "a.jsonl"
    status, out, err = told(capfd, "fault", "--quick", "--json", file, lab=("-v", "--lab"))
    assert (status, err) == (0, "")
    assert "whole range" in out
    assert file.read_bytes() == lab.text
    argv, outputs, visible, env = lab.seen
    assert argv == ["-v", "bench", "fault", "--quick", "--json", str(file), "--collect"]
    assert (outputs, visible, env) == ((), (), None)


def test_a_lab_that_ends_in_the_middle_of_a_line_leaves_the_whole_lines(
    lab: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole = "".join(lines()[:3]).encode()
    lab.text, lab.status = whole + lines()[3].encode()[:-20], 1
    status, out, _ = told(capfd, "fault", "--json", tmp_path / "a.jsonl", lab=("--lab",))
    assert status == 1
    assert "touch" in out
    assert (tmp_path / "a.jsonl").read_bytes() == whole


def test_bench_passes_on_the_exit_status_of_a_lab_without_output(lab: Any, capfd: pytest.CaptureFixture[str]) -> None:
    lab.text, lab.status = b"", 5
    assert told(capfd, "fault", lab=("--lab",)) == (5, "", "")


# -- without numpy


@pytest.fixture
def no_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "numpy" else find(name, *rest))


@pytest.mark.usefixtures("no_numpy", "measured")
@pytest.mark.parametrize("words", [["fault"], ["compare", "a"], ["report", "a"], ["--json", "a", "--html", "b"]])
def test_bench_without_numpy_says_what_to_install_before_it_measures(
    words: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = told(capfd, *words)
    assert (status, out) == (5, "")
    assert "need numpy, which this Python does not have" in err
    assert f"hint: {sys.executable} -m pip install numpy; or keep the raw results with --json" in err


@pytest.mark.usefixtures("no_numpy")
def test_bench_without_numpy_can_still_keep_raw_results(
    measured: list[str | BaseException], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, err = told(capfd, "fault", "--json", tmp_path / "a.jsonl")
    assert (status, out) == (0, "")
    assert "no table: statistics and reports need numpy" in err
    assert (tmp_path / "a.jsonl").read_text() == "".join(map(str, measured))


@pytest.mark.usefixtures("no_numpy")
def test_bench_needs_no_numpy_to_collect_lines_only(
    measured: list[str | BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    assert told(capfd, "fault", "--collect") == (0, "".join(map(str, measured)), "")


def test_the_rounds_asked_for_are_kept_besides_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(verb, "require_arm64", lambda *_, **__: None)
    monkeypatch.setattr("pyvmm.bench.collect.measure", lambda plan, *_, **__: seen.append(plan))
    for words in (["fault"], ["fault", "--rounds", "12"]):
        cli.main(["bench", *words])
    assert [plan.rounds for plan in seen] == [model.ROUNDS, 13]


def test_parsing_a_command_line_loads_no_heavy_module() -> None:
    code = (
        "import sys; from pyvmm.cli import make_parser;"
        "words = ['bench', 'fault', '--axis', 'cpus=1']; make_parser(words).parse_args(words);"
        "import json; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"numpy", "scipy", "matplotlib", "rich", "dask"} & set(loaded)
