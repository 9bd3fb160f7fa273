# SPDX-License-Identifier: Apache-2.0
"""A run from start to end: the lives of its guest, what each life gets, and what is left at the end."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm.cli import make_parser
from pyvmm.cli.run import TABLE
from pyvmm.machine.config import MachineConfig
from pyvmm.session import run
from pyvmm.vcpu.counters import Counters
from pyvmm.vcpu.outcome import Ending, Outcome


class Machines:
    """Replaces the class of machines: each machine lives for ``seconds``, and ends with the next scripted reason."""

    def __init__(self, *endings: Ending, seconds: float = 1.0, meanwhile: Callable[[], object] = int) -> None:
        self.endings, self.seconds, self.meanwhile = list(endings), seconds, meanwhile
        self.configs: list[MachineConfig] = []
        self.stopped: list[str] = []
        self.alive: weakref.WeakSet[Machine] = weakref.WeakSet()
        self.most_alive = 0
        self.clock: Clock | None = None
        self.spent: list[float] = []

    def __call__(self, config: MachineConfig, **_: object) -> Machine:
        self.configs.append(config)
        machine = Machine(self)
        self.alive.add(machine)
        self.most_alive = max(self.most_alive, len(self.alive))
        return machine


class Machine:
    """A machine with one life. It is part of a reference cycle, as a real one is."""

    counters = Counters((), 0, 0, 0, 0)
    entry = SimpleNamespace(described=lambda: b"tree")

    def __init__(self, made: Machines) -> None:
        self.made, self.itself = made, self
        self.elapsed_ns = int(made.seconds * 1e9)
        self.started_ns = 1 if made.clock is None else made.clock.monotonic_ns()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def failed(self, error: BaseException) -> None:
        assert isinstance(self.made, Stray)
        self.made.heard.append(error)

    def stop(self, reason: str) -> None:
        self.made.stopped.append(reason)

    def run(self, *, spent: float = 0.0) -> Outcome:
        self.made.spent.append(spent)
        self.made.meanwhile()
        return Outcome(self.made.endings.pop(0), "enough")


def parsed(line: str) -> argparse.Namespace:
    words = ["run", *line.split()]
    return make_parser(words).parse_args(words)


def to_end(monkeypatch: pytest.MonkeyPatch, machines: Machines, *words: str) -> int:
    monkeypatch.setattr(run, "Machine", machines)
    return run.GuestRun(parsed(f"--serial none {' '.join(words)} payload:hello"), TABLE).to_end()


class Stray(Machines):
    """Machines of a run in which a thread without a handler dies."""

    def __init__(self) -> None:
        super().__init__(Ending.RESET, meanwhile=self.die)
        self.heard: list[BaseException] = []

    def die(self) -> None:
        thread = threading.Thread(target=lambda: [][0])
        thread.start()
        thread.join()


def test_a_thread_that_dies_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    machines, before = Stray(), threading.excepthook
    to_end(monkeypatch, machines)
    assert [type(error) for error in machines.heard] == [IndexError]
    assert threading.excepthook is before


def test_a_reset_ends_the_run_unless_a_reboot_was_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(Ending.RESET, Ending.POWEROFF)
    assert to_end(monkeypatch, machines) == Ending.RESET.status
    assert len(machines.configs) == 1


class Clock:
    """A fake clock: time passes only during sleeps and lives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slept = 100.0, 0.0
        monkeypatch.setattr("pyvmm.session.lives.time", self)

    def monotonic(self) -> float:
        return self.now

    def monotonic_ns(self) -> int:
        return int(self.now * 1e9)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def living(clock: Clock, *endings: Ending, seconds: float) -> Machines:
    """Return machines that live for ``seconds`` each, by this clock."""

    def live() -> None:
        clock.now += seconds

    machines = Machines(*endings, seconds=seconds, meanwhile=live)
    machines.clock = clock
    return machines


def test_lives_share_one_deadline_and_no_old_machine_is_kept(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    gc.disable()
    try:
        machines = living(clock, *[Ending.RESET] * 2, Ending.POWEROFF, seconds=3.0)
        assert to_end(monkeypatch, machines, "--reboot", "--deadline", "10") == 0
    finally:
        gc.enable()
    assert [config.deadline for config in machines.configs] == [10.0] * 3
    # The deadline includes the pauses between lives.
    assert machines.spent == pytest.approx([0.0, 3.1, 6.3])
    # Only two exist: the one that signals would stop, and the new one.
    assert machines.most_alive <= 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("seconds", [0.0, 1e-4, 0.4, 4.99])
def test_a_guest_that_only_resets_ends_at_its_deadline(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture[str], seconds: float
) -> None:
    machines = living(clock, *[Ending.RESET] * 1000, seconds=seconds)
    assert to_end(monkeypatch, machines, "--reboot", "--deadline", "5") == Ending.DEADLINE.status
    assert clock.now == pytest.approx(105.0)
    assert len(machines.configs) <= 7  # each waits longer
    assert "until its deadline of 5 s" in capsys.readouterr().err


def test_the_run_waits_longer_each_time_a_guest_resets_at_once(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    machines = living(clock, *[Ending.RESET] * 9, Ending.POWEROFF, seconds=0.0)
    assert to_end(monkeypatch, machines, "--reboot") == 0
    assert clock.slept == pytest.approx(0.1 + 0.2 + 0.4 + 0.8 + 1.6 + 3.2 + 6.4 + 10 + 10)


def test_a_guest_that_ran_long_restarts_soon(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    machines = living(clock, *[Ending.RESET] * 4, Ending.POWEROFF, seconds=3600.0)
    assert to_end(monkeypatch, machines, "--reboot") == 0
    assert clock.slept == pytest.approx(0.4)


def test_a_signal_ends_the_wait_between_two_lives(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    machines = living(clock, *[Ending.RESET] * 4, Ending.INTERRUPTED, seconds=0.0)
    sleep = clock.sleep

    def sleeping(seconds: float) -> None:
        sleep(seconds)
        if clock.slept > 0.5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(clock, "sleep", sleeping)
    assert to_end(monkeypatch, machines, "--reboot") == 128 + signal.SIGTERM
    assert clock.slept < 0.7
    assert machines.stopped[-1] == "SIGTERM"


def test_a_signal_ends_a_run_of_resets_with_the_status_of_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(Ending.RESET, Ending.RESET, meanwhile=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert to_end(monkeypatch, machines, "--reboot") == 128 + signal.SIGTERM
    assert len(machines.configs) == 1


def test_the_device_tree_is_written_before_the_guest_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    seen: list[bytes] = []
    machines = Machines(Ending.POWEROFF, meanwhile=lambda: seen.append((tmp_path / "dtb").read_bytes()))
    assert to_end(monkeypatch, machines, "--dump-dtb", str(tmp_path / "dtb")) == 0
    assert seen == [b"tree"]
