# SPDX-License-Identifier: Apache-2.0
"""The command line: what it accepts and refuses, and how errors and signals end it."""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyvmm
from pyvmm import cli
from pyvmm.cli.common import LAB_ACTIONS
from pyvmm.errors import HostError, PyvmmError, UsageError
from pyvmm.interrupt import Interrupted
from pyvmm.memory.choices import BACKINGS, ConversionPolicy
from pyvmm.options import machine
from pyvmm.protection import Protection
from pyvmm.syntax.values import parse_memory, parse_seconds, parse_size

X86 = pytest.mark.skipif(platform.machine() == "aarch64", reason="about hosts that are not arm64")


def parse(*words: str) -> argparse.Namespace:
    return cli.make_parser(words).parse_args(words)


def execute(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyvmm", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


# ---- errors of a command line


@pytest.mark.parametrize(
    ("line", "wrong", "hint"),
    [
        ("runn", "pyvmm: there is no verb 'runn'; there are demo, doctor, run, map,", "did you mean run? pyvmm --help"),
        ("xyzzy", "pyvmm: there is no verb 'xyzzy'", "pyvmm --help"),
        ("", "pyvmm: the following arguments are required: VERB", "pyvmm --help"),
        ("--lab exec true", "pyvmm: there is no verb 'exec'", "pyvmm lab exec ..."),
        ("--lab shell", "pyvmm: there is no verb 'shell'", "pyvmm lab shell ..."),
        ("lab exek true", "pyvmm lab: there is no action 'exek'", "did you mean exec? pyvmm lab --help"),
        ("run --memm 3 x", "pyvmm run: there is no option --memm", "did you mean --mem? pyvmm run --help"),
        ("run --memm=3 x", "pyvmm run: there is no option --memm", "did you mean --mem? pyvmm run --help"),
        ("lab build --refrsh", "pyvmm lab build: there is no option --refrsh", "did you mean --refresh?"),
        ("run -x y", "pyvmm run: there is no option -x", "pyvmm run --help"),
        ("run a b c", "pyvmm run: 'b' is one word too many", "pyvmm run --help"),
        ("run -c x y", "pyvmm run: argument -c/--cpus: 'x' is ", "pyvmm run --help"),
        ("run --backing memd y", "pyvmm run: argument --backing: 'memd' is none of memfd,", "did you mean memfd?"),
        ("run --lab x", "pyvmm run: --lab goes before the verb", "pyvmm --lab run ..."),
        ("run --host-kernel own x", "pyvmm run: --host-kernel goes before", "pyvmm --lab --host-kernel ... run ..."),
        (
            "lab exec --lab-icount -- x",
            "pyvmm lab exec: there is no option --lab-icount",
            "pyvmm lab exec --icount ...",
        ),
        ("lab build --lab-cpus 2", "pyvmm lab build: there is no option --lab-cpus", "pyvmm lab build --help"),
        ("run --version", "pyvmm run: --version goes before the verb", "pyvmm --version ... run ..."),
        ("run --pkvm --protected-vm x", "pyvmm run: argument --protected-vm: not allowed", "pyvmm run --help"),
    ],
)
def test_an_error_is_one_line_and_a_hint(line: str, wrong: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(wrong)
    assert second.startswith(f"  hint: {hint}")


def test_hints_name_only_existing_actions_of_the_lab() -> None:
    words = ["lab", "status"]
    [verbs] = [action.choices for action in cli.make_parser(words)._actions if isinstance(action.choices, dict)]
    [actions] = [action.choices for action in verbs["lab"]._actions if isinstance(action.choices, dict)]
    assert set(LAB_ACTIONS) == set(actions)


# ---- values


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512 << 20), ("512M", 512 << 20), ("1g", 1 << 30), ("64K", 64 << 10), ("4096b", 4096), ("2P", 2 << 50)],
)
def test_a_size_is_mib_unless_its_unit_says_otherwise(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "1X", "1MB", "0x10", " 1", "1 ", "٣"])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError):
        parse_size(text)


@given(st.integers(0, 1 << 60), st.sampled_from("BKMGTP"))
def test_every_size_equals_its_number_times_its_unit(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number << 10 * "BKMGTP".index(unit)


def test_the_memory_option_takes_an_address() -> None:
    assert parse_memory("512M") == (512 << 20, None)
    assert parse_memory("1G@0x80000000") == (1 << 30, 0x8000_0000)
    for bad in ("1G@", "1G@x", "@0x80000000"):
        with pytest.raises(ArgumentTypeError):
            parse_memory(bad)


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "inf", ""])
def test_a_deadline_is_a_positive_finite_time(text: str) -> None:
    with pytest.raises(ArgumentTypeError):
        parse_seconds(text)


# ---- run's options


def test_runs_options_have_the_names_other_tools_use() -> None:
    plain = parse("run", "k")
    assert (plain.kernel, plain.protection, plain.cpus, plain.mem, plain.params) == ("k", "none", 1, (None, None), [])
    for words in (["--protection", "pkvm"], ["--protected-vm"], ["--pkvm"]):
        assert parse("run", *words, "k").protection == "pkvm"
    assert parse("run", "-p", "a", "--params", "b", "--cmdline", "c", "--append", "d", "k").params == list("abcd")
    assert parse("run", "--initramfs", "i", "k").initrd == parse("run", "-i", "i", "k").initrd == "i"
    assert parse("run", "-k", "k").kernel_option == "k"
    assert parse("run", "-m", "1G", "k").mem == (1 << 30, None)


@pytest.mark.parametrize("words", [[], ["--prefault"]])
def test_run_prefaults_only_on_request(words: list[str]) -> None:
    assert machine.machine_config(parse("run", *words, "k")).prefault is bool(words)


def test_every_protection_and_policy_can_be_chosen() -> None:
    for protection in Protection:
        assert parse("run", "--protection", protection.value, "k").protection == protection.value
    for policy in ConversionPolicy:
        assert parse("run", "--conversion", policy.value, "k").conversion == policy.value
    for backing in BACKINGS:
        assert parse("run", "--backing", backing, "k").backing == backing


def test_a_single_word_for_the_crash_payload_is_its_kind_of_crash() -> None:
    assert machine.params("payload:crash", ["undefined"]) == ("way=undefined",)
    assert machine.params("payload:crash", ["way=loop", "bytes=9"]) == ("way=loop", "bytes=9")
    assert machine.params("Image", ["quiet"]) == ("quiet",)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["run", "--backing", "floppy", "k"],
        ["run", "--protection", "total", "k"],
        ["run", "-m", "lots", "k"],
        ["run", "-c", "0", "k"],
        ["run", "--deadline", "0", "k"],
        ["run", "--prot", "pkvm", "k"],
        ["run", "a", "b"],
        ["run"],
        ["run", "k", "-k", "k"],
        ["doctor", "--yaml"],
        ["-m", "1G", "run", "k"],
    ],
)
def test_a_wrong_command_line_exits_2_and_says_so_on_stderr(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "pyvmm" in err


def test_the_hint_corrects_a_lab_option_after_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--lab", "payload:hello"]) == 2
    assert "--lab goes before the verb\n  hint: pyvmm --lab run" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["doctor", "-h"], ["demo", "-h"], ["--version"]])
def test_help_and_version_go_to_stdout_and_exit_0(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert out
    assert err == ""


def test_help_names_every_verb_and_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in cli.VERBS)
    assert "exit status" in out


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"pyvmm {pyvmm.__version__}\n"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ("bench sweep --labs 2 plan.toml", "bench --labs 2 sweep plan.toml", "bench sweep plan.toml --labs 2"),
            "words",
        ),
        (("bench report --html y.html q.jsonl", "bench --html y.html report q.jsonl"), "words"),
        (
            ("bench compare --html y.html a b", "bench compare a --html y.html b", "bench compare a b --html y.html"),
            "words",
        ),
        (("bench fault --axis cpus=1 exit", "bench --axis cpus=1 fault exit"), "words"),
        (("atlas diff --json x a b", "atlas --json x diff a b", "atlas diff a --json x b"), "claims"),
        (("ctl 7 --json info", "ctl --json 7 info", "ctl 7 info --json"), "words"),
        (("run payload:hello -m 96M -c 2", "run -m 96M payload:hello -c 2", "run -m 96M -c 2 payload:hello"), "kernel"),
        (("map payload:hello -m 96M", "map -m 96M payload:hello"), "kernel"),
        (("trace payload:hello --trace x", "trace --trace x payload:hello"), "kernel"),
        (("help -v bench", "help bench -v"), "topic"),
        (("completion -v bash", "completion bash -v"), "shell"),
        (("lab -v status --json", "lab status -v --json", "lab status --json -v"), "lab_action"),
    ],
)
def test_options_may_stand_before_between_and_after_words(lines: tuple[str, ...], words: str) -> None:
    parsed = [vars(cli.make_parser(line.split()).parse_args(line.split())) for line in lines]
    for each in parsed:
        del each["verb_argv"]
    assert parsed[0][words]
    assert all(each == parsed[0] for each in parsed)


def test_a_wrong_option_between_words_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["bench", "fault", "--bogus", "exit"]
    with pytest.raises(SystemExit):
        cli.make_parser(line).parse_args(line)
    assert "there is no option --bogus" in capsys.readouterr().err


def test_message_options_may_come_before_or_after_the_verb() -> None:
    assert parse("-v", "doctor").verbose == parse("doctor", "-v").verbose == 1
    assert parse("-v", "doctor", "-q").quiet == 1
    assert parse("-v", "doctor", "-q").verbose == 1
    assert parse("--log-json", "doctor").log_json
    assert not parse("doctor").log_json


# ---- errors


def verb_that(monkeypatch: pytest.MonkeyPatch, action: Callable[..., Any]) -> None:
    monkeypatch.setattr("pyvmm.cli.doctor.main", lambda _args: action())


def raising(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PyvmmError("it failed", hint="try this"), 1),
        (UsageError("it failed", hint="try this"), 2),
        (HostError("it failed", hint="try this"), 5),
    ],
)
def test_pyvmms_errors_have_a_message_a_hint_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: HostError | PyvmmError | UsageError,
    status: int,
) -> None:
    verb_that(monkeypatch, raising(error))
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().err == "pyvmm: it failed\n  hint: try this\n"


def test_pyvmms_errors_are_json_events_if_events_are_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_that(monkeypatch, raising(HostError("no", hint="yes")))
    assert cli.main(["--log-json", "doctor"]) == 5
    event = json.loads(capsys.readouterr().err)
    assert (event["event"], event["error"], event["hint"]) == ("failed", "no", "yes")


def test_an_unexpected_error_is_one_line_and_a_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_that(monkeypatch, raising(ZeroDivisionError("division by zero")))
    assert cli.main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("pyvmm: ZeroDivisionError: division by zero\n  hint: this is a bug")
    assert err.count("\n") == 2


def test_an_unexpected_error_shows_its_traceback_with_v(monkeypatch: pytest.MonkeyPatch) -> None:
    verb_that(monkeypatch, raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["-v", "doctor"])


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (Interrupted(signal.SIGTERM), 143), (Interrupted(signal.SIGINT), 130)],
)
def test_an_interruption_exits_with_128_plus_the_signal(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Interrupted | KeyboardInterrupt,
    status: int,
) -> None:
    verb_that(monkeypatch, raising(error))
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().err == ""


def test_a_reader_that_leaves_causes_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "pyvmm", "doctor"], stdout=gone, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert done.returncode == 141
    assert done.stderr == b""


@X86
def test_run_on_an_x86_host_suggests_the_lab() -> None:
    done = execute("run", "--protection", "pkvm", "-p", "a b", "payload:hello")
    assert done.returncode == 5
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"pyvmm: this host is {platform.machine()}, and pyvmm's guests are arm64: "
        "KVM runs guests of its own architecture",
        "  hint: run it in the lab, an emulated arm64 host: pyvmm --lab run --protection pkvm -p 'a b' payload:hello",
    ]


def test_other_files_do_not_get_the_numbers_of_closed_standard_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"exec {sys.executable} -m pyvmm doctor --json >{out} 0<&- 2>&-"
    done = subprocess.run(["sh", "-c", script], timeout=60, check=False)
    assert done.returncode in (0, 5)
    assert json.loads(out.read_text())["pyvmm"] == pyvmm.__version__


# ---- the lab


def test_lab_passes_the_verb_on_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run_verb(argv: list[str], _args: object) -> int:
        seen.append(argv)
        return 3

    monkeypatch.setattr("pyvmm.cli.lab.run_verb", run_verb)
    assert cli.main(["-v", "--lab", "run", "--protection", "pkvm", "payload:crash", "-p", "a b", "-q"]) == 3
    assert seen == [["-v", "-q", "run", "--protection", "pkvm", "payload:crash", "-p", "a b", "-q"]]


def test_a_wrong_verb_line_is_refused_before_the_lab_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pyvmm.cli.lab.run_verb", lambda *_: pytest.fail("the lab was started"))
    assert cli.main(["--lab", "run", "--backing", "floppy", "k"]) == 2
    assert "floppy" in capsys.readouterr().err


def test_the_lab_option_is_refused_in_the_lab(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--lab", "lab", "status"]) == 2
    assert "hint: pyvmm lab status" in capsys.readouterr().err


def test_the_module_runs_as_the_script_does() -> None:
    assert execute("--version").stdout == f"pyvmm {pyvmm.__version__}\n"
    assert Path(cli.__file__).with_name("run.py").exists()


@pytest.mark.parametrize("columns", [None, "0", "-5", "wide", ""])
@pytest.mark.parametrize(("terminal", "widest"), [(0, 80), (None, 80), (60, 60)])
def test_help_fits_a_terminal_of_any_claimed_width(
    monkeypatch: pytest.MonkeyPatch, columns: str | None, terminal: int | None, widest: int
) -> None:
    def size() -> os.terminal_size:
        if terminal is None:
            raise OSError(errno.ENOTTY, "no terminal")
        return os.terminal_size((terminal, 24))

    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(os, "get_terminal_size", size)
    lines = cli.make_parser(["run"]).format_usage().splitlines()
    assert widest - 20 < max(map(len, lines)) <= widest
