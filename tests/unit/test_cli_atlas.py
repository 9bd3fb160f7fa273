# SPDX-License-Identifier: Apache-2.0
"""``pyvmm atlas`` and ``pyvmm repl`` at the command line: what they refuse, and with which messages."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm import cli
from pyvmm.atlas import claim as claims
from pyvmm.atlas.model import Atlas, Result
from pyvmm.atlas.task import Task
from pyvmm.cli import atlas as verb
from pyvmm.experiment.record import Evidence, Picture, Verdict
from pyvmm.kvm.fd import KERNEL
from pyvmm.kvm.system import System

X86 = pytest.mark.skipif(platform.machine() == "aarch64", reason="about hosts that are not arm64")


@pytest.fixture
def arm64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the verb believe that experiments can run here. None runs."""
    monkeypatch.setattr(verb, "require_arm64", lambda *_, **__: None)
    monkeypatch.setattr("pyvmm.experiment.environment.host", lambda: {"kernel": "7.3.4", "mode": "protected"})


def answer(monkeypatch: pytest.MonkeyPatch, *verdicts: Verdict | BaseException) -> None:
    """Give these verdicts in turn instead of running experiments."""
    given = iter(verdicts)

    def run(todo: Iterable[Task], *, deadline: float | None = None) -> Iterator[Result]:
        for task in todo:
            found = next(given, Verdict.HOLDS)
            if isinstance(found, BaseException):
                raise found
            picture = (Picture("before", [(0x8000_0000, 4, 2)]),)
            yield Result(
                task.claim.id,
                task.claim.group,
                task.claim.says,
                task.claim.origin,
                task.place.protection.value,
                task.place.backing,
                found,
                evidence=(Evidence("a", 1, 1),),
                pictures=picture,
                times={"seconds": 0.5, "deadline": deadline},
            )

    monkeypatch.setattr("pyvmm.experiment.runner.run", run)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(["atlas", *words])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return status, out, err


def test_an_unknown_claim_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = said(capsys, "fault-in/a-first-raed-faults-once")
    assert status == 2
    assert "no claim is called 'fault-in/a-first-raed-faults-once'" in err
    assert "fault-in/a-first-read-faults-once" in err


@pytest.mark.parametrize(
    ("words", "status", "booted"),
    [
        (["fault-in/a-first-raed-faults-once"], 2, False),
        (["fault-in/pins-are-told-apart", "--backing", "hugetlb"], 2, False),
        (["share", "--list"], 0, False),
        (["fault-in/pins-are-told-apart"], 7, True),
        (["diff", "a.json", "b.json"], 7, True),
        ([], 7, True),
    ],
)
def test_unknown_names_are_refused_before_a_lab_boots(
    words: list[str], status: int, booted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run_verb(argv: list[str], _args: object) -> int:
        ran.append(argv)
        return 7

    monkeypatch.setattr("pyvmm.cli.lab.run_verb", run_verb)
    assert cli.main(["-q", "--lab", "atlas", *words]) == status
    assert ran == ([["-q", "atlas", *words]] if booted else [])


def test_a_place_where_no_claim_is_tried_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = said(capsys, "fault-in/pins-are-told-apart", "--backing", "hugetlb")
    assert status == 2
    assert "none of these claims is tried with hugetlb" in err


@pytest.mark.parametrize("words", [["--protection", "tdx"], ["--backing", "disk"], ["--deadline", "0"]])
def test_invalid_values_are_usage_errors(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, *words)[0] == 2


@X86
def test_the_error_on_a_host_other_than_arm64_names_the_lab(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = said(capsys, "share", "--json", "x.json")
    assert status == 5
    assert "pyvmm --lab atlas share --json x.json" in err
    assert cli.main(["repl"]) == 5
    assert "pyvmm --lab repl" in capsys.readouterr().err


def test_the_atlas_says_that_kvm_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Arm64:
        machine = "aarch64"

    monkeypatch.setattr(os, "uname", lambda: Arm64)
    opening: Any = System.open
    monkeypatch.setattr(opening.__func__, "__defaults__", ("/nonexistent/kvm", KERNEL))
    status, _, err = said(capsys, "share")
    assert status == 5
    assert "this host has no KVM" in err


def test_the_list_names_every_claim_and_where_it_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(capsys, "--list")
    assert status == 0
    for claim in claims.all_claims():
        assert f"  {claim.id}\n" in out
    assert "tried in none/memfd" in out


@pytest.mark.parametrize("option", ["--json", "--html", "--junit", "--map"])
@pytest.mark.usefixtures("arm64")
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("pyvmm.experiment.runner.run", None)
    status, _, err = said(capsys, "share", option, str(tmp_path / "none" / "file"))
    assert status == 2
    assert "cannot be written: No such file or directory" in err


@pytest.mark.usefixtures("arm64")
def test_every_requested_file_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answer(monkeypatch, Verdict.FAILS)
    kinds = {"--json": '{\n "atlas"', "--html": "<!doctype html>", "--junit": "<?xml", "--map": "<"}
    words = [word for kind in kinds for word in (kind, str(tmp_path / kind))]
    status, out, _ = said(capsys, "fault-in", "--deadline", "3", *words)
    assert status == 0
    assert "does not hold" in out
    for kind, start in kinds.items():
        assert (tmp_path / kind).read_text().lower().startswith(start.lower())
    read = Atlas.load(tmp_path / "--json")
    assert read.results[0].verdict is Verdict.FAILS
    assert read.results[0].times["deadline"] == 3.0


@pytest.mark.usefixtures("arm64")
def test_a_crash_is_exit_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answer(monkeypatch, Verdict.HOLDS, Verdict.CRASHED)
    assert said(capsys, "fault-in")[0] == 1


@pytest.mark.usefixtures("arm64")
def test_an_interrupted_atlas_writes_its_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answer(monkeypatch, Verdict.HOLDS, Verdict.HOLDS, KeyboardInterrupt())
    status, _, _ = said(capsys, "fault-in", "--json", str(tmp_path / "a.json"))
    assert status == 130
    assert len(Atlas.load(tmp_path / "a.json").results) == 2


# -- diff


@pytest.mark.usefixtures("arm64")
def test_the_exit_status_of_diff_says_whether_atlases_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, other = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    answer(monkeypatch)
    said(capsys, "fault-in", "--json", one)
    answer(monkeypatch, Verdict.FAILS)
    said(capsys, "fault-in", "--json", other)
    assert said(capsys, "diff", one, one)[0] == 0
    status, out, _ = said(capsys, "diff", one, other, "--json", str(tmp_path / "diff.json"))
    assert status == 1
    assert "every-fresh-page-faults" in out
    assert "holds → does not hold" in out
    assert json.loads((tmp_path / "diff.json").read_text())


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (None, "cannot be read"),
        ("", "is not JSON"),
        ("[]", "is not an atlas"),
        ('{"claims": []}', "is an atlas of format None"),
        ('{"atlas": 1, "claims": [{}], "host": {}}', "is not a whole atlas"),
    ],
)
def test_diff_refuses_a_file_that_is_not_an_atlas(
    contents: str | None, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "a.json"
    if contents is not None:
        file.write_text(contents)
    status, _, err = said(capsys, "diff", str(file), str(file))
    assert status == 2
    assert words in err


@pytest.mark.parametrize("names", [[], ["a"], ["a", "b", "c"]])
def test_diff_needs_two_files(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = said(capsys, "diff", *names)
    assert status == 2
    assert "diff compares two" in err


def test_the_examples_in_the_help_name_claims_and_groups_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["atlas", "--help"]) == 0
    lines = [line.split("   ")[0].split() for line in capsys.readouterr().out.splitlines() if "--lab atlas" in line]
    named = [words[3] for words in lines if len(words) > 3 and not words[3].startswith("-")]
    assert len(named) >= 2
    for name in named:
        assert cli.main(["atlas", "--list", name]) == 0
