# SPDX-License-Identifier: Apache-2.0
"""How a run ends: the first reason counts, every waiting thread hears it, and lost output outranks a power-off."""

from __future__ import annotations

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyvmm import log
from pyvmm.errors import HostError
from pyvmm.machine.ending import RunEnd
from pyvmm.vcpu.outcome import Ending, Outcome

OFF = Outcome(Ending.POWEROFF, "the guest powered off", 1)
STOPPED = Outcome(Ending.INTERRUPTED, "stopped")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_first_reason_counts_for_every_caller() -> None:
    end = RunEnd()
    assert end.wait(0.01) is None
    assert end.finish(OFF) == OFF
    assert end.finish(STOPPED) == OFF
    assert end.wait(0) == end.outcome == OFF


def test_every_waiting_thread_hears_the_end() -> None:
    end = RunEnd()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(end.wait, 10) for _ in range(3)]
        threading.Timer(0.05, end.finish, (STOPPED,)).start()
        assert [each.result(10) for each in waiting] == [STOPPED] * 3


def test_many_threads_that_end_a_run_agree_on_one_reason() -> None:
    end = RunEnd()
    reasons = [Outcome(Ending.CRASH, str(number), number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        believed = set(pool.map(end.finish, reasons))
    assert believed == {end.outcome}


def test_time_is_counted_from_the_start_to_the_end() -> None:
    end = RunEnd()
    assert (end.started_ns, end.ended_ns, end.elapsed_ns) == (0, 0, 0)
    before = time.monotonic_ns()
    end.begin()
    assert before <= end.started_ns <= time.monotonic_ns()
    time.sleep(0.002)
    assert end.elapsed_ns >= 2_000_000
    end.finish(OFF)
    assert end.elapsed_ns == end.ended_ns - end.started_ns
    end.finish(STOPPED)
    assert end.elapsed_ns == end.ended_ns - end.started_ns


def test_a_run_that_ended_before_its_start_took_no_time() -> None:
    end = RunEnd()
    end.finish(STOPPED)
    assert end.elapsed_ns == 0


@pytest.mark.parametrize(("before", "after"), [(None, Ending.FAILED), (OFF, Ending.FAILED), (STOPPED, STOPPED.ending)])
def test_lost_output_is_a_failure_unless_the_run_failed_otherwise(before: Outcome | None, after: Ending) -> None:
    end = RunEnd()
    if before is not None:
        end.finish(before)
    end.unheard(FULL)
    assert end.outcome is not None
    assert end.outcome.ending is after
    assert ("No space left on device" in end.outcome.reason) is (after is Ending.FAILED)


def test_the_exception_of_a_thread_becomes_the_reason_with_its_hint(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    end = RunEnd()
    end.failed(HostError("no more memory", hint="free some"))
    assert end.outcome == Outcome(Ending.FAILED, "no more memory", hint="free some")
    other = RunEnd()
    other.failed(ZeroDivisionError("by zero"))
    assert other.outcome == Outcome(Ending.FAILED, "ZeroDivisionError: by zero")
    assert capsys.readouterr().err.count("vcpu_thread_failed") == 2


def test_the_end_is_logged_once(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(1)
    end = RunEnd()
    for _ in range(2):
        end.say(end.finish(OFF))
    log.configure()
    assert capsys.readouterr().err.count("the guest powered off") == 1
