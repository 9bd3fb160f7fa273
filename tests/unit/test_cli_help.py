# SPDX-License-Identifier: Apache-2.0
"""``pyvmm help``: the list of pages, a page on a pipe and on a terminal, and topics that do not exist."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm import cli
from pyvmm.cli.help import DIRECTORY, TOPICS, answer, page


def on_terminal(*words: str, pager: str) -> str:
    """Return what a terminal shows of a command."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "wb") as terminal:
        child = subprocess.Popen(
            [sys.executable, "-m", "pyvmm", *words],
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            env=os.environ | {"PAGER": pager},
        )
    shown = b""
    with os.fdopen(ours, "rb", buffering=0) as screen:
        try:
            while some := screen.read(1 << 16):
                shown += some
        except OSError:  # the error of Linux when the other side has closed
            pass
    assert child.wait(60) == 0
    return shown.decode().replace("\r\n", "\n")


def test_every_page_is_a_topic() -> None:
    assert {path.name for path in DIRECTORY.iterdir()} == {f"{topic}.md" for topic in TOPICS}


@pytest.mark.parametrize("topic", TOPICS)
def test_page_begins_with_its_title_and_a_line_about_the_question_it_answers(topic: str) -> None:
    title, empty, said, empty_again = page(topic).split("\n")[:4]
    assert title.startswith("# ")
    assert (empty, empty_again) == ("", "")
    assert said == answer(page(topic))
    assert said.endswith(".")
    assert len(said) <= 90


def test_list_has_every_topic_with_the_question_it_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    listed = [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  ")]
    assert listed == [[topic, answer(page(topic))] for topic in TOPICS]


def test_page_on_a_pipe_is_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help", "private-memory"]) == 0
    assert capsys.readouterr() == ((DIRECTORY / "private-memory.md").read_text(), "")


def test_page_on_a_terminal_goes_through_the_pager(tmp_path: Path) -> None:
    pager = tmp_path / "pager"
    pager.write_text('#!/bin/sh\necho "$1"; cat\n')
    pager.chmod(0o755)
    assert on_terminal("help", "lab", pager=f"{pager} --title") == f"--title\n{page('lab')}"


def test_page_is_shown_without_an_installed_pager() -> None:
    assert on_terminal("help", "lab", pager="/nowhere/less") == page("lab")


def test_reader_may_quit_before_the_end_of_the_page() -> None:
    assert on_terminal("help", "numbers", pager="true") == ""


@pytest.mark.parametrize(
    ("topic", "hint"),
    [
        ("device", "the nearest: devices"),
        ("privat-memory", "the nearest: private-memory"),
        ("ctl", "its options: pyvmm ctl --help"),
        ("../docs/lab", "known are first-steps, "),
        ("", f"known are {', '.join(TOPICS)}"),
    ],
)
def test_unknown_topic_is_refused_with_the_nearest(topic: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help", topic]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"pyvmm: no page is called {topic!r}\n  hint: {hint}")
