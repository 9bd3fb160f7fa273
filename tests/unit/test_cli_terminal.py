# SPDX-License-Identifier: Apache-2.0
"""A run changes the terminal's mode and three signal handlers, and restores them."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.interrupt import ENDING, Interrupted, terminable
from pyvmm.session.keys import Keys, raw
from pyvmm.session.signals import Signals
from pyvmm.terminal import in_background, in_foreground


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def read_within(fd: int, seconds: float = 5.0) -> bytes:
    assert select.select([fd], [], [], seconds)[0], "no input arrived"
    return os.read(fd, 100)


def test_keys_reach_the_guest_one_by_one_without_echo(terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    with Keys(theirs, lambda: None) as keys:
        os.write(ours, b"a\x03\r\x04")
        assert read_within(keys.fd) == b"a\x03\r\x04"
        assert not select.select([ours], [], [], 0.05)[0]


def test_ctrl_a_x_quits(terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    quits = threading.Event()
    with Keys(theirs, quits.set):
        os.write(ours, b"\x01x")
        assert quits.wait(5)


def test_ctrl_a_x_quits_even_when_the_guest_takes_no_keys(terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    quits = threading.Event()
    with Keys(theirs, quits.set):
        for _ in range(80):
            os.write(ours, b"k" * 1000)
        os.write(ours, b"\x01x")
        assert quits.wait(5)


def test_the_terminals_mode_is_put_back_even_after_an_error(terminal: tuple[int, int]) -> None:
    _, theirs = terminal
    before = termios.tcgetattr(theirs)
    with contextlib.suppress(ZeroDivisionError), Keys(theirs, lambda: None):
        assert termios.tcgetattr(theirs) != before
        raise ZeroDivisionError
    assert termios.tcgetattr(theirs) == before


def test_no_descriptor_or_thread_is_left(terminal: tuple[int, int]) -> None:
    _, theirs = terminal
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        with Keys(theirs, lambda: None):
            pass
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_output_processing_of_the_terminal_is_unchanged(terminal: tuple[int, int]) -> None:
    _, theirs = terminal
    mode = termios.tcgetattr(theirs)
    changed = raw(mode)
    assert changed[1] == mode[1]
    assert not changed[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


@given(st.lists(st.binary(max_size=5), max_size=8))
def test_the_escape_works_however_keys_arrive(pieces: list[bytes]) -> None:
    """The guest's input, and whether the run quits, depend on the keys and not on how reads split them."""

    def taken(parts: list[bytes]) -> bytes | None:
        keys, out = Keys(-1, lambda: None), b""
        for part in parts:
            if (some := keys.take(part)) is None:
                return None
            out += some
        return out

    whole = b"".join(pieces)
    assert taken(pieces) == taken([whole]) == taken([bytes([key]) for key in whole])


@pytest.mark.parametrize(
    ("typed", "for_guest"),
    [(b"abc", b"abc"), (b"\x01\x01", b"\x01"), (b"\x01b", b"\x01b"), (b"a\x01X", None), (b"x", b"x"), (b"\x01", b"")],
)
def test_ctrl_a_twice_is_ctrl_a_for_the_guest(typed: bytes, for_guest: bytes | None) -> None:
    assert Keys(-1, lambda: None).take(typed) == for_guest


def test_ctrl_a_b_is_a_break_where_the_console_has_one(terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    breaks: list[int] = []
    with Keys(theirs, lambda: None, lambda: breaks.append(1)) as keys:
        os.write(ours, b"a\x01bc\x01\x01\x01B")
        seen = b""
        while seen != b"ac\x01" or len(breaks) < 2:
            ready = select.select([keys.fd], [], [], 60 if seen != b"ac\x01" else 0.01)[0]
            seen += os.read(keys.fd, 100) if ready else b""
            assert b"ac\x01".startswith(seen)
    assert breaks == [1, 1]


def test_a_file_that_is_not_a_terminal_is_not_in_the_foreground(tmp_path: Path, terminal: tuple[int, int]) -> None:
    with open(tmp_path / "file", "w") as file:
        assert not in_foreground(file.fileno())
    assert not in_foreground(terminal[1])


# ---- signals


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)


@pytest.mark.parametrize("number", ENDING)
def test_the_first_signal_stops_the_run_and_the_reason_names_it(number: signal.Signals) -> None:
    stopped = threading.Event()
    reasons: list[str] = []

    def stop(reason: str) -> None:
        reasons.append(reason)
        stopped.set()

    with Signals() as signals:
        signals.stop = stop
        send(number)
        assert stopped.wait(5)
    assert reasons == [number.name]
    assert signals.received == number


def test_a_second_signal_ends_pyvmm_at_once() -> None:
    with Signals() as signals:
        signals.stop = lambda _reason: None
        send(signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            send(signal.SIGINT)
    assert caught.value.signal == signal.SIGTERM


def test_a_third_signal_does_not_interrupt_the_cleanup_after_a_second() -> None:
    with Signals() as signals:
        signals.stop = lambda _reason: None
        send(signal.SIGTERM)
        with pytest.raises(Interrupted):
            send(signal.SIGINT)
        send(signal.SIGINT)
    assert signals.received == signal.SIGTERM


def test_a_quit_before_the_machine_exists_takes_effect_later() -> None:
    with Signals() as signals:
        before = signals.asked
        signals.end("Ctrl-A x")
        signals.end("again")
    assert before is None
    assert (signals.asked, signals.received) == ("Ctrl-A x", None)


def test_a_signal_without_a_run_to_stop_raises() -> None:
    with Signals(), pytest.raises(Interrupted) as caught:
        send(signal.SIGTERM)
    assert caught.value.signal == signal.SIGTERM


def test_stopping_works_while_the_main_thread_holds_a_lock() -> None:
    lock, stopped = threading.Lock(), threading.Event()
    with Signals() as signals:

        def stop(_reason: str) -> None:
            with lock:
                stopped.set()

        signals.stop = stop
        with lock:
            send(signal.SIGTERM)
        assert stopped.wait(5)


def test_signal_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in ENDING]
    with Signals():
        assert [signal.getsignal(number) for number in ENDING] != before
    assert [signal.getsignal(number) for number in ENDING] == before


Catching = Callable[[], AbstractContextManager[object]]


@pytest.mark.parametrize("catching", [Signals, terminable])
def test_a_signal_that_was_ignored_stays_ignored(catching: Catching) -> None:
    # This is the case under nohup, and in background jobs of a shell without job control.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catching():
            send(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(Interrupted):
                send(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("catching", [Signals, terminable])
def test_a_signal_that_was_blocked_takes_effect(catching: Catching) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        with catching(), pytest.raises(Interrupted):
            send(signal.SIGTERM)
        assert set(ENDING) <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- jobs of a shell


OVER = b"[the job is over]"


def job(code: str, *, foreground: bool) -> tuple[bytes, int]:
    """Run Python as a job on an interactive shell's terminal. Returns its output and how it ended or was stopped.

    A new session's leader plays the shell: it has the terminal, and the job has a separate process group.
    """
    # When the leader ends, the terminal and its unread output are lost. So the leader stays until all is read.
    wait, go = os.pipe()
    leader, ours = pty.fork()
    if leader == 0:
        status = 1
        try:
            status = _lead(code, foreground=foreground)
            os.write(1, OVER)
            os.read(wait, 1)
        finally:
            os._exit(status)
    said = b""
    with contextlib.suppress(OSError):  # the terminal's other side has closed
        while data := os.read(ours, 1000):
            said += data
            if b"ready" in data:
                os.write(ours, b"typed\n")
            if OVER in said:
                os.write(go, b".")
    for fd in (ours, wait, go):
        os.close(fd)
    return said.replace(OVER, b""), os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1])


def _lead(code: str, *, foreground: bool) -> int:
    """Play the shell; returns the signal that stopped the job, or 100 and its status."""
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        if foreground:
            os.tcsetpgrp(0, os.getpgrp())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "-c", code])
    _, status = os.waitpid(child, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        return 100 + os.waitstatus_to_exitcode(status)
    os.kill(child, signal.SIGKILL)
    return os.WSTOPSIG(status)


LAB = """
import os, sys
from pyvmm import cli, lab
from pyvmm.lab import needs, image
sys.path.insert(0, os.environ["PYVMM_ROOT"])
from tests.unit.test_lab_cli import FakeLab
from pyvmm.lab.cache import Image, Manifest
from pathlib import Path
from pyvmm.lab.stream import Pump

class Lab(FakeLab):
    def run(self, command, **how):
        with Pump(None, how["stdin"], None, None, is_tty=how["is_tty"])._raw_terminal():
            print("ready", flush=True)
            if isinstance(how["stdin"], int):
                os.read(how["stdin"], 100)
        print("is_tty", how["is_tty"], flush=True)
        return 42

lab.Lab = Lab
needs.require = lambda **_: None
image.usable_image = lambda *_, **__: Image(Path("/tmp"), Manifest("9.9", "2026-01-02T03:04:05+00:00", "", "r", [], {}))
sys.exit(cli.main({words}))
"""
"""A command line whose lab only sets the terminal's mode and reads its input, as a lab's stream does."""


@pytest.mark.parametrize("foreground", [True, False])
def test_a_lab_in_the_background_runs_on_without_the_terminal(
    foreground: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYVMM_ROOT", str(Path(__file__).resolve().parents[2]))
    monkeypatch.delenv("PYVMM_IN_LAB", raising=False)
    words = ["--lab", "run", "payload:hello"]
    said, status = job(LAB.replace("{words}", str(words)), foreground=foreground)
    assert (status, f"is_tty {foreground}".encode() in said) == (142, True), said


def test_a_lab_that_needs_a_terminal_in_the_background_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYVMM_ROOT", str(Path(__file__).resolve().parents[2]))
    said, status = job(LAB.replace("{words}", str(["lab", "exec", "-t", "true"])), foreground=False)
    assert status == 102
    assert b"the terminal is another job's" in said


def test_a_job_knows_whether_it_owns_the_terminal() -> None:
    code = "from pyvmm.terminal import in_background as b, in_foreground as f; print(b(0), f(0))"
    assert job(code, foreground=True)[0].splitlines()[-1] == b"False True"
    assert job(code, foreground=False)[0].splitlines()[-1] == b"True False"


def test_pyvmm_does_not_restore_a_terminal_that_another_job_now_owns() -> None:
    code = """
import os, signal
from pyvmm.session.keys import Keys
with Keys(0, int):
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(0, os.getppid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
"""
    assert job(code, foreground=True)[1] == 100


def test_nobody_owns_a_file_that_is_not_a_terminal(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        assert not in_background(file.fileno())
