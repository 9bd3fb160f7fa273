# SPDX-License-Identifier: Apache-2.0
"""The vCPU thread's states, without KVM: the descriptor is not a vCPU, so every run stops as failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm._native import ffi, lib
from pyvmm.errors import PyvmmError
from pyvmm.machine.threads import Threads
from pyvmm.vcpu.thread import VcpuThread


@pytest.fixture(autouse=True)
def _signals() -> None:
    assert lib.pv_install_signals() == 0


class Vcpu:
    """A vCPU whose every entry fails at once, so that the handler runs over and over."""

    def __init__(self, handle: Callable[[int], bool]) -> None:
        self.vm = ffi.new("struct pv_vm *")
        self.run = ffi.new("uint8_t[]", 4096)
        self.native = ffi.new("struct pv_vcpu *", {"fd": -1, "vm": self.vm})
        self.native.run = self.run
        self.errors: list[BaseException] = []
        self.thread = VcpuThread(self.native, handle, self.errors.append, lambda: None)


def test_the_handler_sees_every_stop_and_ends_the_thread() -> None:
    stops: list[int] = []

    def handle(stop: int) -> bool:
        stops.append(stop)
        return len(stops) < 3

    vcpu = Vcpu(handle)
    vcpu.thread.start()
    assert vcpu.thread.join(5)
    assert stops == [lib.PV_STOP_FAILED] * 3


def test_a_pause_holds_until_resume() -> None:
    count = [0]

    def handle(_: int) -> bool:
        count[0] += 1
        return True

    vcpu = Vcpu(handle)
    vcpu.thread.start()
    vcpu.thread.pause()
    assert vcpu.thread.wait_paused(5)
    held = count[0]
    time.sleep(0.05)
    assert count[0] == held
    vcpu.thread.resume()
    deadline = time.monotonic() + 5
    while count[0] == held and time.monotonic() < deadline:
        time.sleep(0.001)
    assert count[0] > held
    vcpu.thread.stop()
    assert vcpu.thread.join(5)


def test_stop_ends_a_paused_vcpu() -> None:
    vcpu = Vcpu(lambda _: True)
    vcpu.thread.start()
    vcpu.thread.pause()
    assert vcpu.thread.wait_paused(5)
    vcpu.thread.stop()
    assert vcpu.thread.join(5)


def test_stop_before_the_first_run_is_not_lost() -> None:
    vcpu = Vcpu(lambda _: True)
    vcpu.thread.stop()
    vcpu.thread.start()
    assert vcpu.thread.join(5)


def test_an_exception_of_the_handler_is_reported_and_ends_the_thread() -> None:
    def handle(_: int) -> bool:
        raise RuntimeError("broken handler")

    vcpu = Vcpu(handle)
    vcpu.thread.start()
    assert vcpu.thread.join(5)
    assert [str(e) for e in vcpu.errors] == ["broken handler"]


def test_hundreds_of_requests_from_other_threads_lose_none() -> None:
    vcpu = Vcpu(lambda _: True)
    vcpu.thread.start()

    def pester() -> None:
        for _ in range(100):
            vcpu.thread.pause()
            assert vcpu.thread.wait_paused(5)
            vcpu.thread.resume()

    pesterer = threading.Thread(target=pester)
    pesterer.start()
    pesterer.join(30)
    assert not pesterer.is_alive()
    vcpu.thread.stop()
    assert vcpu.thread.join(5)


def test_a_resume_without_a_pause_is_refused() -> None:
    vcpu = Vcpu(lambda _: True)
    vcpu.thread.start()
    with pytest.raises(PyvmmError, match="not paused"):
        vcpu.thread.resume()
    vcpu.thread.pause()
    assert vcpu.thread.wait_paused(5)
    vcpu.thread.resume()
    vcpu.thread.stop()
    assert vcpu.thread.join(5)


def test_one_of_two_threads_that_resume_a_vcpu_paused_once_is_refused() -> None:
    vcpu = Vcpu(lambda _: True)
    vcpu.thread.start()
    vcpu.thread.pause()
    assert vcpu.thread.wait_paused(5)
    refused: list[PyvmmError] = []

    def resume() -> None:
        try:
            vcpu.thread.resume()
        except PyvmmError as error:
            refused.append(error)

    both = [threading.Thread(target=resume) for _ in range(2)]
    with vcpu.thread._changed:
        for each in both:
            each.start()
        for each in both:
            each.join(0.1)  # until it waits for the condition, whatever it has read by then
    for each in both:
        each.join(5)
    assert len(refused) == 1
    # A pause still holds: after one resume too many, two pauses would be needed.
    vcpu.thread.pause()
    assert vcpu.thread.wanted
    assert vcpu.thread.wait_paused(5)
    vcpu.thread.stop()
    assert vcpu.thread.join(5)


def test_a_vcpu_in_a_handler_is_outside_the_guest_but_not_paused() -> None:
    entered, leave = threading.Event(), threading.Event()

    def handle(_: int) -> bool:
        entered.set()
        return not leave.wait(5)

    vcpu = Vcpu(handle)
    vcpu.thread.start()
    assert entered.wait(5)
    vcpu.thread.pause()
    vcpu.thread.wait_outside()
    assert not vcpu.thread.wait_paused(0.05)
    leave.set()
    assert vcpu.thread.join(5)


class Part:
    """A device that records the calls to it; ``stuck`` makes it refuse to rest."""

    def __init__(self, told: list[str], name: str, *, stuck: bool = False) -> None:
        self.told, self.name, self.stuck = told, name, stuck

    def pause(self) -> None:
        if self.stuck:
            raise PyvmmError("it does not rest")
        self.told.append(f"{self.name} rests")

    def resume(self) -> None:
        self.told.append(f"{self.name} goes on")


def test_one_device_that_does_not_rest_keeps_the_others_and_the_vcpus_running() -> None:
    told: list[str] = []
    parts: list[Any] = [Part(told, "a"), Part(told, "b", stuck=True)]
    clock: Any = SimpleNamespace(stop=lambda: told.append("time stands"), go=lambda: told.append("time goes on"))
    threads = Threads(lambda: parts, lambda: clock)
    vcpu = Vcpu(lambda _: True)
    threads.add(vcpu.thread)
    threads.start()
    with pytest.raises(PyvmmError, match="does not rest"):
        threads.pause()
    assert told == ["time stands", "a rests", "a goes on", "time goes on"]
    assert not threads.paused
    assert not vcpu.thread.wanted
    with pytest.raises(PyvmmError, match="nothing to resume"):
        threads.resume()
    threads.stop()
