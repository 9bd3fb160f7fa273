# SPDX-License-Identifier: Apache-2.0
"""Debian's programs as trees: they run from any path, and missing ones are reported."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import pytest

from pyvmm.cli import lab as cli
from pyvmm.errors import HostError, UsageError
from pyvmm.lab import peers, programs
from pyvmm.lab.trees import Recipe


def test_a_launcher_runs_its_program_wherever_the_tree_is(tmp_path: Path) -> None:
    tree = tmp_path / "a tree"
    (tree / programs.BIN).mkdir(parents=True)
    loader = tree / programs.LOADER
    loader.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    loader.chmod(0o755)
    [program] = programs.GDB.programs
    launcher = tree / programs.BIN / program
    launcher.write_text(programs.launcher(programs.GDB, program))
    launcher.chmod(0o755)
    said = subprocess.run([launcher, "-x", "a file"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [word.replace(f"/{programs.BIN}/..", "") for word in said] == [
        *programs.GDB.command(tree)[1:],
        "-x",
        "a file",
    ]


def test_every_program_is_found_by_its_name() -> None:
    assert set(programs.RECIPES) == {"passt", "gdb", "e2fsprogs", "qemu"}
    digests = {recipe().digest for recipe in programs.RECIPES.values()}
    assert len(digests) == len(programs.RECIPES)


def test_programs_come_before_the_labs_own_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "one" / programs.BIN).mkdir(parents=True)
    shown = peers.Prepared({"one": tmp_path / "one", "two": tmp_path / "two"}, {})
    assert shown.environment["PATH"] == f"{tmp_path}/one/bin:/usr/bin:/usr/sbin"
    assert "PATH" not in peers.Prepared({"two": tmp_path / "two"}, {}).environment


def test_an_unknown_name_is_refused_before_a_lab_boots() -> None:
    with pytest.raises(UsageError, match=r"called 'past'") as caught:
        cli._run(["true"], argparse.Namespace(lab_with=["past"]), is_tty=False)
    assert "passt" in (caught.value.hint or "")


def test_the_error_for_an_unavailable_program_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline() -> Recipe:
        raise HostError("no mirror")

    monkeypatch.setattr(peers, "ALL", {"passt": offline})
    with pytest.raises(HostError, match="no mirror"):
        peers.require(["passt"])
    assert peers.prepare(["passt"]).lacking == {"passt": "no mirror"}


def test_variables_of_two_users_of_trees_are_joined() -> None:
    ours, theirs = {"PATH": "/a", "X": "1=2"}, {"PATH": "/b", "Y": "3"}
    assert peers.joined(ours, theirs) == {"PATH": "/a:/b", "X": "1=2", "Y": "3"}
