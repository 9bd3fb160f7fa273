# SPDX-License-Identifier: Apache-2.0
"""``pyvmm completion``: bash completes verbs, options, values and topics. Each shell can read its script."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm import cli
from pyvmm.cli.completion import SHELLS, whole_parser
from pyvmm.cli.help import TOPICS

needs_shtab = pytest.mark.usefixtures("_shtab")


@pytest.fixture
def _shtab() -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", shell]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@needs_shtab
@pytest.mark.parametrize("shell", SHELLS)
def test_shell_can_read_its_script(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = script(shell, capsys)
    assert all(verb in text for verb in cli.VERBS)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(text)
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)


@needs_shtab
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("ru", {"run"}),
        (
            "--la",
            {option for action in whole_parser()._actions for option in action.option_strings if "--la" in option},
        ),
        ("run --prot", {"--protection", "--protected-vm"}),
        ("run --protection p", {"pkvm"}),
        ("--lab run --conversion c", {"copy"}),
        ("help pri", {"private-memory"}),
        ("lab sh", {"shell"}),
        ("run -d dis", {"disk.img"}),
        ("completion f", {"fish"}),
    ],
)
def test_bash_completes_verbs_options_and_values(
    words: str, offered: set[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "disk.img").touch()
    (tmp_path / "script").write_text(script("bash", capsys))
    typed = ["pyvmm", *words.split(" ")]
    ask = 'source ./script; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_pyvmm; echo "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", ask, "bash", *typed], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert set(done.stdout.split()) == offered


def test_whole_parser_has_every_verb_and_topic() -> None:
    args = whole_parser().parse_args(["--lab", "--lab-cpus", "1", "help", TOPICS[0]])
    assert (args.lab, args.verb, args.topic) == (True, "help", TOPICS[0])


def test_completion_without_shtab_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pyvmm: completion needs shtab: ")
    assert err.endswith(f"\n  hint: {sys.executable} -m pip install shtab\n")


def test_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "tcsh"]) == 2
    assert "tcsh" in capsys.readouterr().err
