# SPDX-License-Identifier: Apache-2.0
"""A signal that is to end the program ends it, whatever Python does at that moment."""

from __future__ import annotations

import signal
import sys
import time
import weakref
from collections.abc import Callable

import pytest

from pyvmm.interrupt import Interrupted, handling, terminable
from pyvmm.session.signals import Signals

PATIENCE = 60.0


class Thing:
    """Something that can be referenced weakly."""


class Finalized:
    """Something that a signal interrupts while it goes away."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def in_a_finalizer() -> None:
    Finalized()


def in_a_callback_of_a_weak_reference() -> None:
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
    del thing
    assert reference() is None


LOSING = pytest.mark.parametrize("lose", [in_a_finalizer, in_a_callback_of_a_weak_reference])


def wait() -> None:
    """Wait as a program does: in one system call, then in Python."""
    time.sleep(PATIENCE)
    raise AssertionError("no exception came")


@LOSING
@pytest.mark.parametrize("once", [False, True])
def test_a_signal_while_python_can_raise_nothing_raises_a_moment_later(lose: Callable[[], None], once: bool) -> None:
    hook = sys.unraisablehook
    with pytest.raises(Interrupted) as caught, terminable(once=once) as received:  # noqa: PT012 - two moments
        lose()
        wait()
    assert caught.value.signal == signal.SIGTERM
    assert received == [signal.SIGTERM]
    assert sys.unraisablehook is hook


@LOSING
def test_a_run_that_cannot_be_stopped_yet_is_interrupted_all_the_same(lose: Callable[[], None]) -> None:
    signals = Signals()
    with pytest.raises(Interrupted) as caught, signals:  # noqa: PT012 - two moments
        lose()
        wait()
    assert caught.value.signal == signals.received == signal.SIGTERM


def test_an_exception_that_is_lost_again_and_again_is_raised_when_it_can_be() -> None:
    with pytest.raises(Interrupted), terminable(once=True):  # noqa: PT012 - several moments
        in_a_finalizer()
        for _ in range(3):
            end = time.monotonic() + 0.05
            weakref.ref(thing := Thing(), lambda _: busy(end))  # noqa: B023 - called in this turn
            del thing
        wait()


def busy(end: float) -> None:
    while time.monotonic() < end:
        pass


def test_exceptions_of_others_go_to_the_hook_that_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: told.append(what.exc_type))

    class Failing:
        def __del__(self) -> None:
            raise ValueError

    with handling(lambda *_: None):
        Failing()
    assert told == [ValueError]
