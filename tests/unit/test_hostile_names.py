# SPDX-License-Identifier: Apache-2.0
"""Names with escape sequences, of files, guests, hosts and options: no command sends one to a terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm import cli, log
from pyvmm.cli import main
from pyvmm.errors import UsageError
from pyvmm.options.entries import parse
from pyvmm.options.written import _quoted
from pyvmm.session.control import Control
from pyvmm.session.summary import print_summary
from pyvmm.terminal import clean
from pyvmm.vcpu.outcome import Ending
from tests.unit import atlas_samples

NAME = "n\x1b]0;owned\x07\x9b31m\u202e\r.img"
"""It renames a terminal's window, makes it red and turns the rest of the line round."""
LOST = f"lost{NAME}"

COMMANDS: tuple[tuple[str, ...], ...] = (
    ("run", NAME),
    ("run", LOST),
    ("run", "--dry-run", NAME),
    ("run", "--dry-run", NAME, NAME),
    ("run", "--dry-run", f"payload:{NAME}"),
    ("run", "--dry-run", f"debian:{NAME}"),
    ("run", "--dry-run", "-p", NAME, "payload:hello"),
    ("run", "--dry-run", "-i", NAME, "payload:hello"),
    ("run", "--dry-run", "-i", LOST, "payload:hello"),
    ("run", "--dry-run", "--dtb", NAME, "payload:hello"),
    ("run", "--dry-run", "--dtb", LOST, "payload:hello"),
    ("run", "--dry-run", "-d", NAME, "payload:hello"),
    ("run", "--dry-run", "-d", LOST, "payload:hello"),
    ("run", "--dry-run", "-d", f"{NAME},x", "payload:hello"),
    ("run", "--dry-run", "--net", f"tap={NAME}", "payload:hello"),
    ("run", "--dry-run", "--net", f"socket={NAME}", "payload:hello"),
    ("run", "--dry-run", "--vsock", f"uds={NAME},cid=3", "payload:hello"),
    ("run", "--dry-run", "--vsock", f"uds={9 * NAME},cid=3", "payload:hello"),
    ("run", "--dry-run", "--console", f"file={NAME}", "payload:hello"),
    ("run", "--dry-run", "--console", NAME, "payload:hello"),
    ("run", "--dry-run", "--serial", NAME, "payload:hello"),
    ("run", "--dry-run", "--device", NAME, "payload:hello"),
    ("run", "--dry-run", "--backing", NAME, "payload:hello"),
    ("run", "--dry-run", "-m", NAME, "payload:hello"),
    ("run", "--dry-run", "--dump-dtb", f"{LOST}/x", "payload:hello"),
    ("run", "--print-config", "-d", NAME, "-p", NAME, "payload:hello"),
    ("run", "--config", NAME),
    ("run", "--config", LOST),
    ("run", "--config", "hostile.toml"),
    ("run", "--restore", NAME),
    ("run", "--restore", LOST),
    ("run", "--restore", NAME, NAME),
    ("run", f"--{NAME}"),
    ("run", f"--lab-{NAME}"),
    (NAME,),
    (f"--lab-{NAME}", "run"),
    ("help", NAME),
    ("completion", NAME),
    ("atlas", NAME, "--list"),
    ("atlas", "diff", NAME, NAME),
    ("atlas", "diff", LOST, NAME),
    ("atlas", "diff", "hostile.json", "hostile.json"),
    ("bench", NAME, "--list"),
    ("bench", "compare", NAME, NAME),
    ("bench", "compare", LOST, NAME),
    ("bench", "report", NAME),
    ("bench", "sweep", NAME),
    ("bench", "sweep", LOST),
    ("bench", "sweep", "--list", "hostile.toml"),
    ("bench", "fault", "--axis", NAME),
    ("bench", "fault", "--versus", NAME),
    ("ctl", NAME, "info"),
    ("ctl", LOST, "info"),
    ("ctl", NAME),
    ("ctl", "info", NAME),
    ("ctl", "balloon", NAME),
    ("top", NAME),
    ("trace", NAME),
    ("map", NAME),
    ("lab", NAME),
    ("-v", "run", "--restore", LOST),
)
FOREIGN = [word for words in COMMANDS for word in words if NAME in word]


def obeyed(text: str) -> list[str]:
    """Return the characters that a terminal obeys, other than line ends and tabs."""
    return sorted({char for char in text if not (char.isprintable() or char in "\n\t")})


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    Path(NAME).write_text("x" * 4096)
    Path("hostile.toml").write_text(f'case = {json.dumps(NAME)}\n{json.dumps(NAME)} = 1\nkernel = "payload:hello"\n')
    sample = json.dumps(atlas_samples.realistic().to_json())
    Path("hostile.json").write_text(sample.replace("7.3", json.dumps(NAME)[1:-1]))
    return tmp_path


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: clean(" ".join(words)))
@pytest.mark.usefixtures("directory")
def test_no_command_shows_a_name_that_a_terminal_obeys(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    main(words)
    said = "".join(capsys.readouterr())
    assert said
    assert obeyed(said) == []
    assert "this is a bug" not in said


def test_a_traceback_shows_no_name_that_a_terminal_obeys() -> None:
    code = (
        "import sys\nfrom pyvmm import cli\nfrom pyvmm.cli import doctor\n"
        "def main(args): raise ZeroDivisionError(sys.argv[1])\ndoctor.main = main\nsys.exit(cli.main(['-v', 'doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code, NAME], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: n\\x1b]0;owned" in done.stderr
    assert obeyed(done.stderr) == []


def test_an_event_shows_no_value_that_a_terminal_obeys_or_that_looks_like_another_line() -> None:
    stream = io.StringIO()
    log.configure(2, stream=stream)
    try:
        try:
            raise OSError(NAME)
        except OSError as error:
            log.get_logger("x").error("happened", path=f"{NAME}\n12:00:00 [error] forged", reason=error, exc_info=error)
    finally:
        log.configure()
    said = stream.getvalue()
    assert obeyed(said) == []
    assert not any(line.startswith("12:00:00 [error] forged") for line in said.split("\n"))
    assert "OSError" in said


def test_the_end_of_a_run_shows_no_reason_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    outcome: Any = SimpleNamespace(ending=Ending.FAILED, reason=f"disk {NAME}", hint=f"rm {NAME}", vcpu=None)
    counters: Any = SimpleNamespace(line=lambda: "0 exits")
    print_summary(outcome, counters, table=False)
    said = capsys.readouterr().err
    assert said.count("owned") == 2
    assert obeyed(said) == []


def test_answers_of_a_run_show_nothing_that_a_terminal_obeys(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = {
        "kernel": NAME,
        "state": NAME,
        "elapsed_ns": 1,
        "pid": 1,
        "protection": NAME,
        "memory": 1 << 20,
        "backing": NAME,
        "cpus": 1,
        "slots": [],
        "devices": [{"name": NAME, "gpa": 0, "size": 1, "spi": None, "about": NAME}],
    }
    path = str(directory / "s")
    with Control({"info": lambda: info, "pause": lambda: {NAME: NAME}}, path):
        for words in (("ctl", path, "info"), ("ctl", path, "pause"), ("ctl", "--json", path, "info")):
            assert main(words) == 0
            said = capsys.readouterr().out
            assert "owned" in said
            assert obeyed(said) == []
    assert "pyvmm-control" not in {thread.name for thread in threading.enumerate()}


@given(st.text())
def test_text_in_a_configuration_is_printable_and_reads_back_as_it_was(text: str) -> None:
    try:
        quoted = _quoted(text)
    except UsageError:  # lone surrogates
        return
    assert obeyed(quoted) == []
    assert "\n" not in quoted
    [entry] = parse(f"a = {quoted}")
    assert entry.value == text


def test_every_kind_of_command_is_among_these() -> None:
    verbs = {word for words in COMMANDS for word in words} & cli.VERBS.keys()
    assert cli.VERBS.keys() - verbs == {"demo", "doctor", "repl"}  # which take no name
    assert len(FOREIGN) > len(COMMANDS) // 2
    assert os.fsencode(NAME)
