# SPDX-License-Identifier: Apache-2.0
"""A guest that faults at one address for ever, and kernels whose pages do not fit the host or the CPU."""

from __future__ import annotations

import errno
import itertools
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from pyvmm.errors import HostError, KvmError
from pyvmm.kvm.faulttrace import TracedFault
from pyvmm.kvm.vcpu import ID_AA64MMFR0_EL1
from pyvmm.machine import boot, granule, livelock
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.granule import granules, require_granule, require_resolved_faults
from pyvmm.machine.livelock import PROOF, RATE, STREAK, Sample, Streak, Watchdog, repeated
from pyvmm.machine.plan import Plan
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending, Outcome

A72, A35, ONLY_16K = 0x1124, 0x101122, 0xFF10_0000
"""ID_AA64MMFR0_EL1 of QEMU's CPUs, and of one with pages of 16 KiB alone."""


def image(folder: Path, flags: int) -> str:
    path = folder / "Image"
    path.write_bytes(struct.pack("<2I3Q24x4sI", 0x91005A4D, 0, 0, 1 << 16, flags, b"ARM\x64", 0) + bytes(4096))
    return str(path)


@contextmanager
def opened(path: str) -> Iterator[boot.BootImage]:
    kernel = boot.read(path)
    yield kernel
    kernel.close()


# ---- the watchdog


def run(*samples: tuple[int, int]) -> list[bool]:
    streak = Streak()
    return [streak.add(Sample(*sample)) for sample in samples]


def test_a_vcpu_that_only_exits_is_suspected_after_a_streak() -> None:
    assert run(*((n * RATE, 7) for n in range(STREAK + 2))) == [False] * STREAK + [True] * 2


@pytest.mark.parametrize(
    "samples",
    [
        [(n * RATE, n) for n in range(9)],
        [(n * (RATE - 1), 0) for n in range(9)],
        [(0, 0)] * 9,
        [(n * RATE, n // STREAK) for n in range(9)],
    ],
    ids=["it is at work", "it exits little", "it sleeps", "it works now and then"],
)
def test_a_vcpu_that_gets_further_is_not_suspected(samples: list[tuple[int, int]]) -> None:
    assert not any(run(*samples))


def faults(count: int, gpa: int, tid: int) -> list[TracedFault]:
    return [TracedFault(n, gpa, False, True, tid) for n in range(count)]


def test_only_a_vcpu_with_one_address_and_many_faults_is_proven_stuck() -> None:
    assert repeated(faults(PROOF, 0x8000_5000, 1)) == faults(PROOF, 0x8000_5000, 1)[-1]
    assert repeated(faults(PROOF, 0x8000_5000, 1) + faults(3, 0x9000, 2)) is not None
    assert repeated(faults(PROOF - 1, 0x8000_5000, 1)) is None
    assert repeated(faults(PROOF, 0x8000_5000, 1) + faults(1, 0x8000_6000, 1)) is None
    assert repeated([]) is None


class Trace:
    """Replaces the kernel's trace."""

    def __init__(self, found: list[TracedFault] | None = None, why_not: str = "") -> None:
        self.found, self.why_not = found or [], why_not

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def available(self) -> bool:
        return not self.why_not

    def faults(self) -> list[TracedFault]:
        return self.found


class Counting:
    """A vCPU whose exits grow and whose events do not."""

    def __init__(self) -> None:
        self.exits = 0

    def stats(self) -> dict[str, int]:
        self.exits += RATE
        return {"exits": self.exits, "wfi_exit_stat": 3}


def watched(monkeypatch: pytest.MonkeyPatch, trace: Callable[[], Any]) -> list[Outcome]:
    """Run a watchdog over a vCPU in the thread 9 until it has asked the trace twice or ended the run."""
    monkeypatch.setattr(livelock, "INTERVAL", 0.001)
    monkeypatch.setattr(livelock, "RATE", RATE)
    monkeypatch.setattr(livelock, "TRACED", 0.001)
    ended, told = threading.Event(), list[Outcome]()
    times = itertools.count(1)

    def traced() -> Any:
        if next(times) == 2:
            ended.set()
        return trace()

    def finish(outcome: Outcome) -> None:
        told.append(outcome)
        ended.set()

    monkeypatch.setattr(livelock, "FaultTrace", traced)
    own = [SimpleNamespace(stats=[SimpleNamespace(count=4)] * 64, tid=9)]
    with Watchdog([Counting()], own, finish) as watchdog:  # type: ignore[list-item,arg-type]
        ended.wait(2.0)
        watchdog._thread.join(0.1)
    return told


def test_the_run_ends_with_the_address_that_the_trace_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(faults(PROOF, 0x8000_5000, 9))
    [outcome] = watched(monkeypatch, lambda: trace)
    assert (outcome.ending, outcome.vcpu) == (Ending.FAILED, 0)
    assert outcome.reason.startswith("the guest faults on an instruction at gpa 0x8000_5000 for ever: ")
    assert "4 KiB" in (outcome.hint or "")


def test_a_suspicion_that_the_trace_does_not_prove_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, Trace) == []


def test_without_the_trace_a_warning_is_logged_and_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(why_not="only root can read it")
    said: list[dict[str, object]] = []
    monkeypatch.setattr(livelock, "log", SimpleNamespace(warning=lambda name, **more: said.append({name: more})))
    assert watched(monkeypatch, lambda: trace) == []
    [warning] = said
    assert warning["a_vcpu_may_fault_for_ever"]["why_not_sure"] == "only root can read it"  # type: ignore[index]


# ---- a protected Linux on a host with larger pages


def asked(kernel: str, protection: Protection) -> MachineConfig:
    return MachineConfig(kernel, protection, memory=64 << 20)


@pytest.mark.parametrize("page", [16384, 65536])
def test_a_protected_linux_is_refused_on_a_host_with_larger_pages(
    page: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(granule, "HOST_PAGE", page)
    with pytest.raises(HostError, match="behind the first 4 KiB of a page") as caught:
        require_resolved_faults(asked(image(tmp_path, 0xA), Protection.PKVM))
    assert "--force" in (caught.value.hint or "")
    for protection in (Protection.NONE, Protection.EMULATED):
        require_resolved_faults(asked(image(tmp_path, 0xA), protection))
    require_resolved_faults(asked("payload:hello", Protection.PKVM))


def test_a_protected_linux_may_start_on_a_host_with_pages_of_4_kib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(granule, "HOST_PAGE", 4096)
    require_resolved_faults(asked(image(tmp_path, 0xA), Protection.PKVM))


# ---- a kernel whose pages the CPU lacks


@pytest.mark.parametrize(
    ("features", "pages"),
    [
        (A72, [4096, 65536]),
        (A35, [4096, 16384, 65536]),
        (ONLY_16K, [16384]),
        (0x1F20_0000, [4096, 16384]),
        (0xF000_0000, [65536]),
    ],
)
def test_the_granules_of_a_cpu_are_read_from_its_features(features: int, pages: list[int]) -> None:
    assert granules(features) == pages


def vcpu(features: int) -> Any:
    def get_reg(number: int) -> int:
        assert number == ID_AA64MMFR0_EL1
        return features

    return SimpleNamespace(get_reg=get_reg)


@pytest.mark.parametrize(
    ("flags", "features", "said"),
    [
        (0xC, A72, ("pages of 16 KiB", "4 KiB or 64 KiB")),
        (0xA, ONLY_16K, ("pages of 4 KiB", "16 KiB")),
        (0xE, ONLY_16K, ("pages of 64 KiB", "16 KiB")),
    ],
)
def test_a_kernel_whose_pages_the_cpu_lacks_is_refused(
    flags: int, features: int, said: tuple[str, str], tmp_path: Path
) -> None:
    with opened(image(tmp_path, flags)) as kernel, pytest.raises(HostError) as caught:
        require_granule(kernel, vcpu(features))
    assert said[0] in caught.value.message
    assert caught.value.hint == f"use a kernel with pages of {said[1]}"


@pytest.mark.parametrize("flags", [0xA, 0xC, 0xE])
def test_a_kernel_whose_pages_the_cpu_has_may_start(flags: int, tmp_path: Path) -> None:
    with opened(image(tmp_path, flags)) as kernel:
        require_granule(kernel, vcpu(A35))


def test_a_kernel_may_start_where_no_register_is_told(tmp_path: Path) -> None:
    def get_reg(_number: int) -> int:
        raise KvmError("KVM_GET_ONE_REG", "", errno.EPERM)

    with opened(image(tmp_path, 0xC)) as kernel:
        require_granule(kernel, SimpleNamespace(get_reg=get_reg))  # type: ignore[arg-type]


def test_a_plan_has_a_cpu_with_every_granule(tmp_path: Path) -> None:
    with Plan(MachineConfig(image(tmp_path, 0xC), memory=64 << 20)) as plan:
        assert any(call.name == "KVM_GET_ONE_REG" for call in plan.calls)
