# SPDX-License-Identifier: Apache-2.0
"""Clients of a run's control socket that are many, silent, slow or hostile, and runs that end without a word."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm import log
from pyvmm.errors import PyvmmError, UsageError
from pyvmm.session import connection as client_side
from pyvmm.session import control
from pyvmm.session.connection import Connection
from pyvmm.session.control import MOST_CLIENTS, MOST_LINE, Control
from pyvmm.session.requests import Requests

LONG = "x" * 50_000


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return str(tmp_path / "vm.sock")


@pytest.fixture
def others(path: str) -> Iterator[Any]:
    """Connect as many clients as are asked for."""
    with contextlib.ExitStack() as stack:

        def connected(count: int) -> list[socket.socket]:
            clients = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(count)]
            for client in clients:
                client.settimeout(20)
                client.connect(path)
            return clients

        yield connected


def said(client: socket.socket) -> list[dict[str, Any]]:
    """Return all lines that a client gets until its connection ends."""
    with client.makefile() as file:
        return [json.loads(line) for line in file]


def ctl(path: str, order: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pyvmm", "ctl", path, order]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


RUN = """
import signal, sys, time
from pyvmm.session.control import Control

def stop():
    return {"state": "running"}

with Control({"stop": stop, "close": lambda: sys.exit()}, sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.readline()
"""
"""A process with a control socket, whose end is asked for on its stdin."""


@contextlib.contextmanager
def run(path: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", RUN, path]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# -- many clients


def test_a_stop_reaches_a_run_that_has_as_many_idle_clients_as_it_may(path: str, others: Any) -> None:
    stopped = threading.Event()

    def stop() -> dict[str, str]:
        stopped.set()
        return {"state": "running"}

    with Control({"stop": stop}, path):
        idle = others(MOST_CLIENTS)
        asking = ctl(path, "stop")
        assert stopped.wait(60)
        assert list(said(idle[0])[0]) == ["format", "busy"], "the client that was idle for longest gives way"
        with pytest.raises(subprocess.TimeoutExpired):
            asking.wait(0.3)
    assert asking.communicate(timeout=60) == ("state: ended\n", "")
    assert asking.returncode == 0


def test_a_stop_says_ended_only_when_the_run_has_ended_though_its_connection_gave_way(path: str, others: Any) -> None:
    with run(path) as process, Connection(path) as connection:
        assert connection.ask("stop") == {"state": "running"}
        newer = others(MOST_CLIENTS)
        newer[-1].sendall(b'{"do": "?"}\n')
        assert b"unknown request" in newer[-1].recv(4096)  # so all of them have been accepted
        assert not connection.wait_for_end(0.3)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert connection.wait_for_end(20)


def test_clients_that_keep_asking_stay_and_idle_ones_give_way(path: str, others: Any) -> None:
    with Control({"counters": lambda: 1}, path):
        asking, *idle = others(MOST_CLIENTS)
        for first in idle:
            asking.sendall(b'{"do": "counters"}\n')
            assert asking.recv(4096) == b'{"format": 1, "counters": 1}\n'
            others(1)
            assert [list(line) for line in said(first)] == [["format", "busy"]]


def test_a_connection_that_gave_way_is_made_again(path: str, others: Any) -> None:
    with Control({"counters": lambda: 1}, path), Connection(path) as connection:
        others(MOST_CLIENTS)
        assert connection.ask("counters") == 1
        others(MOST_CLIENTS)
        assert connection.ask("counters") == 1


def test_the_end_of_a_run_is_told_to_all_its_clients(path: str, others: Any) -> None:
    with Control({}, path):
        clients = others(3)
        clients[-1].sendall(b"?\n")
        assert b"error" in clients[-1].recv(4096)
    assert [said(client) for client in clients] == [[{"format": 1, "ended": True}]] * 3


# -- clients that do not read


def test_clients_that_never_read_do_not_delay_another(path: str, others: Any) -> None:
    answered: list[int] = []

    def info() -> str:
        answered.append(1)
        return LONG

    with Control({"info": info, "counters": lambda: 1}, path):
        silent = others(MOST_CLIENTS - 1)
        for each in silent:
            each.sendall(b'{"do": "info"}\n' * 200)
        with Connection(path) as connection:
            for _ in range(3):
                assert connection.ask("counters", patience=20) == 1
        most = len(silent) * 20  # what the kernel's buffers take
        assert len(answered) < most, "a client that does not read must not be answered on and on"
        [first, *_] = silent
        with first.makefile() as file:
            for _ in range(200):
                assert json.loads(file.readline()) == {"format": 1, "info": LONG}


def test_a_long_row_of_requests_is_answered_in_turn_with_other_clients(path: str, others: Any) -> None:
    order: list[str] = []
    begun, more = threading.Event(), threading.Event()

    def first() -> None:
        order.append("first")
        begun.set()
        more.wait(20)

    with Control({"first": first, "second": lambda: order.append("second")}, path):
        greedy, modest = others(2)
        greedy.sendall(b'{"do": "first"}\n' * 1000)
        assert begun.wait(20)
        modest.sendall(b'{"do": "second"}\n')
        more.set()
        assert modest.recv(4096) == b'{"format": 1, "second": null}\n'
        assert order.index("second") < 10


def test_a_request_that_is_too_long_is_refused_with_a_sentence(path: str) -> None:
    with Control({"kick": lambda text: len(text)}, path), Connection(path) as connection:
        assert connection.ask("kick", text="x" * (MOST_LINE // 2)) == MOST_LINE // 2
        with pytest.raises(PyvmmError, match=f"the request is longer than {MOST_LINE} bytes"):
            connection.ask("kick", text="x" * (4 * MOST_LINE), patience=20)


# -- requests that fail


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Collect the errors that are logged."""
    collected: list[dict[str, Any]] = []
    monkeypatch.setattr(control.log, "error", lambda event, **values: collected.append({"event": event} | values))
    return collected


def test_failing_requests_write_one_line_without_a_traceback(
    path: str, events: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log._state, "level", log.INFO)

    def broken() -> None:
        raise ZeroDivisionError("oh")

    with Control({"broken": broken, "strange": lambda: object()}, path), Connection(path) as connection:
        for _ in range(50):
            with pytest.raises(PyvmmError, match="ZeroDivisionError: oh"):
                connection.ask("broken")
        once = {"event": "request_failed", "request": "broken", "error": "ZeroDivisionError: oh", "count": 1}
        assert events == [once]
        monkeypatch.setattr(control, "_SELDOM", 0.0)
        monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 3600)
        with pytest.raises(PyvmmError, match="not JSON serializable"):
            connection.ask("strange", patience=7200)
    assert [event["count"] for event in events] == [1, 50]


@pytest.mark.parametrize(
    ("order", "members", "words"),
    [
        ("kick", {"text": 5}, "text: 5 is not text"),
        ("kick", {"text": ["^", "C"]}, r"text: \['\^', 'C'\] is not text"),
        ("kick", {"text": "\ud800"}, r"text: '\\ud800' is not text"),
        ("break", {"key": None}, "key: None is not text"),
        ("balloon", {"size": True}, "size: True is not a number of bytes"),
        ("balloon", {"size": -1}, "size: -1 is not a number of bytes"),
        ("balloon", {"size": 1.5}, "size: 1.5 is not a number of bytes"),
        ("snapshot", {"file": "guest"}, "file: 'guest' is not an absolute path"),
        ("snapshot", {"file": "/a\0b"}, r"file: '/a\\x00b' is not an absolute path"),
        ("snapshot", {"file": 1}, "file: 1 is not text"),
    ],
)
def test_members_of_a_wrong_kind_are_refused_and_are_not_a_bug(
    path: str, events: list[dict[str, Any]], order: str, members: dict[str, Any], words: str
) -> None:
    running: Any = SimpleNamespace(started_ns=1, ended_ns=0, paused=False, role=lambda _kind: ())
    with (
        Control(Requests(running).verbs, path),
        Connection(path) as connection,
        pytest.raises(PyvmmError, match=words),
    ):
        connection.ask(order, **members)
    assert events == []


# -- the format of the lines


def test_each_line_from_a_run_has_the_number_of_its_format(path: str, others: Any) -> None:
    with Control({"counters": lambda: 1}, path):
        [client] = others(1)
        for request in (
            b'{"do": "counters"}',
            b'{"do": "counters", "format": 1}',
            b"?",
            b'{"do": "counters", "format": 9}',
        ):
            client.sendall(request + b"\n")
        with client.makefile() as file:
            lines = [json.loads(file.readline()) for _ in range(4)]
    assert [line.pop("format") for line in lines] == [1, 1, 1, 1]
    assert lines[:2] == [{"counters": 1}] * 2
    assert lines[3] == {"error": "the request has the format 9, but this run knows format 1"}


@contextlib.contextmanager
def answering(path: str, answer: bytes) -> Iterator[None]:
    """Answer the first request with these bytes, and close the connection."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b'{"format": 2, "info": 1}\n', "answers in format 2, but this pyvmm reads format 1"),
        (b"[" * 100_000 + b"\n", "does not answer with a JSON object"),
        (b"[]\n", "does not answer with a JSON object"),
        (b"\xff\n", "does not answer with a JSON object"),
        (b"{}\n", "does not do 'info'"),
        (b"x" * 5000, "answers with more than 4096 bytes"),
        (b'{"info": 1}', "closed the connection without an answer to 'info', but has not ended"),
        (b"", "closed the connection without an answer to 'info', but has not ended"),
    ],
    ids=["newer", "nested", "list", "bytes", "empty", "endless", "cut", "silent"],
)
def test_an_answer_that_says_nothing_is_an_error_and_not_the_end_of_the_run(
    path: str, monkeypatch: pytest.MonkeyPatch, answer: bytes, words: str
) -> None:
    monkeypatch.setattr(client_side, "_DYING", 0.05)
    if words.startswith("answers with more"):
        monkeypatch.setattr(client_side, "_MOST", 4096)
    with answering(path, answer), Connection(path) as connection, pytest.raises(PyvmmError, match=words):
        connection.ask("info", patience=20)


def test_a_run_of_an_older_pyvmm_gives_no_number_and_is_read(path: str) -> None:
    with answering(path, b'{"info": {"state": "running"}}\n'), Connection(path) as connection:
        assert connection.ask("info", patience=20) == {"state": "running"}


# -- runs that end without a word


def test_a_stop_of_a_run_that_is_killed_meanwhile_succeeds(path: str) -> None:
    with run(path) as process:
        asking = ctl(path, "stop")
        with pytest.raises(subprocess.TimeoutExpired):
            asking.wait(1)
        process.kill()
        assert asking.communicate(timeout=60) == ("state: ended\n", "")


def test_a_stop_of_a_stopped_process_does_not_succeed(path: str) -> None:
    with run(path) as process:
        process.send_signal(signal.SIGSTOP)
        with Connection(path) as connection, pytest.raises(PyvmmError, match="does not answer; is it stopped"):
            connection.ask("stop", patience=0.2)
        process.send_signal(signal.SIGCONT)


def test_a_process_that_cannot_be_seen_has_ended_when_nobody_listens(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_side, "_pidfd", lambda _connection: None)
    with run(path) as process, Connection(path) as connection:
        assert connection.ask("stop") == {"state": "running"}
        assert not connection.wait_for_end(0.2)
        process.kill()
        assert connection.wait_for_end(20)


def test_a_full_queue_of_clients_is_waited_for(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        monkeypatch.setattr(client_side, "connect", lambda path: control.connect(path, 0.3))
        with pytest.raises(PyvmmError, match="too many clients wait to be accepted"):
            Connection(path)
        threading.Timer(0.1, listener.accept).start()
        Connection(path).__exit__()


def test_a_connection_leaves_nothing_behind(path: str) -> None:
    before = os.listdir("/proc/self/fd")
    with Control({"counters": lambda: 1}, path), Connection(path) as connection:
        assert connection.ask("counters") == 1
    with pytest.raises(UsageError, match="nobody listens"):
        Connection(path)
    assert os.listdir("/proc/self/fd") == before
