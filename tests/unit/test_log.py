"""Events reach stderr in the form and at the level asked for, and cost nothing until then."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from pyvmm import log


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def back_to_default():
    yield
    log.configure()


def emit(stream, verbosity=0, **options):
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
def test_verbosity_chooses_the_events(verbosity, events):
    lines = emit(io.StringIO(), verbosity, json=True).splitlines()
    assert [json.loads(line)["event"] for line in lines] == events


def test_json_lines_keep_numbers_as_numbers():
    line = json.loads(emit(io.StringIO(), 1, json=True).splitlines()[0])
    assert line["timestamp"].endswith("Z")
    del line["timestamp"]
    assert line == {"component": "machine", "event": "started", "gpa": 0x8000_0000, "level": "info"}


def test_a_terminal_gets_colours_and_a_file_does_not():
    assert "\x1b[" in emit(Terminal())
    text = emit(io.StringIO())
    assert "\x1b[" not in text
    assert "odd" in text
    assert "vcpu=1" in text


def test_events_go_to_stderr_unless_said(capsys):
    log.configure()
    log.get_logger("x").error("failed")
    out, err = capsys.readouterr()
    assert out == ""
    assert "failed" in err


def test_a_logger_made_before_configuring_follows_it():
    logger = log.get_logger("x")
    first, second = io.StringIO(), io.StringIO()
    log.configure(stream=first)
    logger.warning("one")
    log.configure(stream=second, json=True)
    logger.warning("two")
    assert "one" in first.getvalue()
    assert "two" not in first.getvalue()
    assert json.loads(second.getvalue())["event"] == "two"


def test_an_exceptions_traceback_is_written():
    stream = io.StringIO()
    log.configure(stream=stream, json=True)
    try:
        raise ValueError("broken")
    except ValueError as error:
        log.get_logger("x").error("failed", exc_info=error)
    assert "ValueError: broken" in json.loads(stream.getvalue())["exception"]


def test_events_nobody_wants_do_not_load_structlog():
    code = (
        "import sys; from pyvmm import log; log.configure(); l = log.get_logger('x'); l.info('a'); l.debug('b');"
        "sys.exit('structlog' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
