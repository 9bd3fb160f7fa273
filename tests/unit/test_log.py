# SPDX-License-Identifier: Apache-2.0
"""Events reach stderr in the requested form and level, and unwanted ones cost nothing."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm import cli, log
from pyvmm.cli import run
from pyvmm.errors import HostError
from pyvmm.vcpu.counters import Counters
from pyvmm.vcpu.outcome import Ending, Outcome


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def back_to_default() -> Iterator[None]:
    yield
    log.configure()


def emit(stream: Terminal | io.StringIO, verbosity: int = 0, **options: bool) -> str:
    log.configure(verbosity, stream=stream, **options)
    logger = log.get_logger("machine")
    logger.debug("debugged")
    logger.info("started", gpa=0x8000_0000)
    logger.warning("odd", vcpu=1)
    logger.error("failed", why="because")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("verbosity", "events"),
    [
        (-3, ["failed"]),
        (-1, ["failed"]),
        (0, ["odd", "failed"]),
        (1, ["started", "odd", "failed"]),
        (2, ["debugged", "started", "odd", "failed"]),
        (9, ["debugged", "started", "odd", "failed"]),
    ],
)
def test_verbosity_chooses_the_events(verbosity: int, events: list[str]) -> None:
    lines = emit(io.StringIO(), verbosity, json=True).splitlines()
    assert [json.loads(line)["event"] for line in lines] == events


def test_json_lines_keep_numbers_as_numbers() -> None:
    line = json.loads(emit(io.StringIO(), 1, json=True).splitlines()[0])
    assert line["timestamp"].endswith("Z")
    del line["timestamp"]
    assert line == {"component": "machine", "event": "started", "gpa": 0x8000_0000, "level": "info"}


def test_a_terminal_gets_colours_and_a_file_does_not() -> None:
    assert "\x1b[" in emit(Terminal())
    text = emit(io.StringIO())
    assert "\x1b[" not in text
    assert "odd" in text
    assert "vcpu=1" in text


def test_events_go_to_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    log.get_logger("x").error("failed")
    out, err = capsys.readouterr()
    assert out == ""
    assert "failed" in err


def test_a_logger_made_before_configuring_follows_it() -> None:
    logger = log.get_logger("x")
    first, second = io.StringIO(), io.StringIO()
    log.configure(stream=first)
    logger.warning("one")
    log.configure(stream=second, json=True)
    logger.warning("two")
    assert "one" in first.getvalue()
    assert "two" not in first.getvalue()
    assert json.loads(second.getvalue())["event"] == "two"


def test_an_exceptions_traceback_is_written() -> None:
    stream = io.StringIO()
    log.configure(stream=stream, json=True)
    try:
        raise ValueError("broken")
    except ValueError as error:
        log.get_logger("x").error("failed", exc_info=error)
    assert "ValueError: broken" in json.loads(stream.getvalue())["exception"]


def test_unwanted_events_do_not_load_structlog() -> None:
    code = (
        "import sys; from pyvmm import log; log.configure(); l = log.get_logger('x'); l.info('a'); l.debug('b');"
        "sys.exit('structlog' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- a reader that does not read


class Unread:
    """A pipe for events that holds a page. Its reader reads only on request."""

    def __init__(self, stack: contextlib.ExitStack, **options: Any) -> None:
        self.reader, writer = os.pipe()
        stack.callback(os.close, self.reader)
        self.stream = stack.enter_context(os.fdopen(writer, "w"))
        self.size = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1)
        log.configure(stream=self.stream, **options)

    def fill(self) -> None:
        """Fill the pipe."""
        os.write(self.stream.fileno(), b"x" * self.size)

    def emptied(self) -> str:
        """Read once, and return the data."""
        return os.read(self.reader, 1 << 16).decode()

    def read_to_the_end(self) -> Callable[[], str]:
        """Start a thread that reads slowly. Returns it, and the list of its data, complete once it is joined."""
        got = []

        def read() -> None:
            time.sleep(0.3)
            while part := os.read(self.reader, 1000):
                got.append(part)

        thread = threading.Thread(target=read)
        thread.start()

        def end() -> str:
            self.stream.close()
            thread.join()
            return b"".join(got).decode()

        return end


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def within(seconds: int, work: Callable[..., Any]) -> None:
    """Fail if ``work`` takes longer: then it blocks."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive()


def said(text: str, as_json: bool) -> list[tuple[str, int | None]]:
    """Return events and their counts."""
    if as_json:
        return [(line["event"], line.get("count")) for line in map(json.loads, text.splitlines())]
    form = re.compile(r"\S+ \[\w+ *\] (\w+) +component=\w+(?: count=(\d+))?(?: text=y+)?")
    lines = [form.fullmatch(line) for line in text.splitlines()]
    assert None not in lines
    return [(line[1], int(line[2]) if line[2] else None) for line in lines if line]


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_events_without_room_are_dropped_and_the_next_line_counts_them(
    stack: contextlib.ExitStack, as_json: bool
) -> None:
    pipe = Unread(stack, json=as_json)
    logger = log.get_logger("x")
    with log.never_waiting():
        logger.warning("first")
        assert said(pipe.emptied(), as_json) == [("first", None)]
        pipe.fill()
        for _ in range(3):
            within(20, lambda: logger.warning("lost"))
        assert pipe.emptied() == "x" * pipe.size
        logger.warning("second")
        logger.warning("third")
        expected = [("log_dropped", 3), ("second", None), ("third", None)]
        assert said(pipe.emptied(), as_json) == expected
    logger.warning("after")
    assert said(pipe.emptied(), as_json) == [("after", None)]


def test_dropped_events_are_reported_even_at_the_level_of_errors(stack: contextlib.ExitStack) -> None:
    pipe = Unread(stack, verbosity=-1, json=True)
    logger = log.get_logger("x")
    with log.never_waiting():
        pipe.fill()
        within(20, lambda: logger.error("lost"))
        pipe.emptied()
        logger.error("found")
    assert said(pipe.emptied(), True) == [("log_dropped", 1), ("found", None)]


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_partly_written_line_is_completed_before_the_next(stack: contextlib.ExitStack, as_json: bool) -> None:
    pipe = Unread(stack, json=as_json)
    logger = log.get_logger("x")
    with log.never_waiting():
        # Longer than PIPE_BUF: a pipe may take only a part of it.
        within(20, lambda: logger.warning("long", text="y" * 2 * pipe.size))
        within(20, lambda: logger.warning("lost"))
        text = pipe.emptied()
        assert len(text) == pipe.size
        for _ in range(2):
            within(20, lambda: logger.warning("lost"))
            text += pipe.emptied()
        logger.warning("found")
        text += pipe.emptied()
    assert said(text, as_json)[0] == ("long", None)
    assert text.count("y") == 2 * pipe.size
    events = said(text, as_json)[1:]
    # The last two may find room after the rest.
    assert sum(count or 0 for _, count in events) + [event for event, _ in events].count("lost") == 3
    assert events[-1] == ("found", None)


def test_the_end_of_the_run_waits_for_a_complete_line_and_the_count(stack: contextlib.ExitStack) -> None:
    before = os.listdir("/proc/self/fd")
    pipe = Unread(stack, json=True)
    logger = log.get_logger("x")
    with log.never_waiting():
        within(20, lambda: logger.warning("long", text="y" * 2 * pipe.size))
        within(20, lambda: logger.warning("lost"))
        end = pipe.read_to_the_end()
    logger.warning("after")
    assert said(end(), True) == [("long", None), ("log_dropped", 1), ("after", None)]
    stack.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_reader_that_has_gone_does_not_delay_the_end_of_a_run(stack: contextlib.ExitStack) -> None:
    pipe = Unread(stack)
    with log.never_waiting():
        pipe.fill()
        within(20, lambda: log.get_logger("x").warning("lost"))
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, pipe.reader)
        os.close(null)


def test_a_stream_without_a_descriptor_is_written_to_as_usual() -> None:
    stream = io.StringIO()
    log.configure(stream=stream)
    with log.never_waiting():
        log.get_logger("x").warning("odd")
    assert "odd" in stream.getvalue()


def test_log_loads_nothing_for_nonblocking_writes_before_the_first_event() -> None:
    code = (
        "import sys, threading; from pyvmm import log; log.configure(); old = set(sys.modules)\n"
        "with log.never_waiting(): log.get_logger('x').info('a')\n"
        "sys.exit(set(sys.modules) != old)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Machine:
    """A fake machine: its guest fills stderr, and then its vCPU logs an event."""

    counters = Counters((), 0, 0, 0, 0)

    def __init__(self, pipe: Unread, ending: HostError | Outcome) -> None:
        self.pipe, self.ending = pipe, ending
        self.read: Callable[[], str] | None = None

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stop(self, reason: str) -> None:
        pass

    def run(self, *, spent: float) -> Outcome:
        assert spent == 0
        self.pipe.fill()
        within(20, lambda: log.get_logger("guest").warning("lost"))
        self.read = self.pipe.read_to_the_end()
        if isinstance(self.ending, Exception):
            raise self.ending
        return self.ending


@pytest.mark.parametrize(
    ("flags", "ending", "status", "last"),
    [
        ([], Outcome(Ending.DEADLINE, "enough"), 4, ["pyvmm: deadline: enough", "pyvmm: 0 exits in"]),
        (["--log-json"], Outcome(Ending.DEADLINE, "enough"), 4, ['"event": "run_ended"']),
        ([], HostError("no KVM", hint="buy one"), 5, ["pyvmm: no KVM", "hint: buy one"]),
        (["--log-json"], HostError("no KVM"), 5, ['"error": "no KVM"']),
    ],
)
def test_a_run_does_not_wait_for_a_reader_before_its_end_and_then_loses_nothing(
    stack: contextlib.ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flags: list[str],
    ending: HostError | Outcome,
    status: int,
    last: list[str],
) -> None:
    pipe = Unread(stack)
    machine = Machine(pipe, ending)
    monkeypatch.setattr(sys, "stderr", pipe.stream)
    monkeypatch.setattr(run, "ready", lambda _args: None)
    monkeypatch.setattr("pyvmm.session.run.Machine", lambda *_, **__: machine)
    words = [*flags, "run", "--socket", str(tmp_path / "socket"), "--serial", "none", "payload:hello"]
    assert cli.main(words) == status
    assert machine.read is not None
    lines = machine.read().removeprefix("x" * pipe.size).splitlines()
    assert "log_dropped" in lines[0]
    assert len(lines) == 1 + len(last)
    for line, part in zip(lines[1:], last, strict=True):
        assert part in line
