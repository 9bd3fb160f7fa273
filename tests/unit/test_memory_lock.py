# SPDX-License-Identifier: Apache-2.0
"""RLIMIT_MEMLOCK is checked before a protected run, with the exact need in the message."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from pyvmm.errors import HostError
from pyvmm.memory import memlock
from pyvmm.memory.address import MIB
from pyvmm.memory.memlock import LockedMemory, require_memlock


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Fake the process's status, capabilities and limits; returns the values, which a test may change."""

    class Process:
        def __init__(self) -> None:
            self.limits: tuple[int, int] = (8 * MIB, 8 * MIB)
            self.locked_kib = 0
            self.capabilities = 0
            self.may_exceed = False
            self.set_to: list[tuple[int, int]] = []

        def settle(self) -> None:
            lines = "Name:\tx", f"VmLck:\t{self.locked_kib:8} kB", f"CapEff:\t{self.capabilities:016x}", ""
            (tmp_path / "status").write_text("\n".join(lines))

    state = Process()

    def setrlimit(_: int, limits: tuple[int, int]) -> None:
        hard = state.limits[1]
        above = hard != resource.RLIM_INFINITY and (limits[1] == resource.RLIM_INFINITY or limits[1] > hard)
        if above and not state.may_exceed:
            raise ValueError("not allowed to raise maximum limit")
        state.set_to.append(limits)
        state.limits = limits

    monkeypatch.setattr(memlock, "STATUS", tmp_path / "status")
    monkeypatch.setattr(memlock, "_in_initial_user_namespace", lambda: True)
    monkeypatch.setattr(resource, "getrlimit", lambda _: state.limits)
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    return state


def test_a_sufficient_limit_is_not_changed(process: Any) -> None:
    process.locked_kib = 4096
    process.settle()
    assert require_memlock(4 * MIB).soft == 8 * MIB
    assert process.set_to == []


def test_the_soft_limit_is_raised_to_the_need_if_the_hard_limit_allows(process: Any) -> None:
    process.limits = (MIB, resource.RLIM_INFINITY)
    process.locked_kib = 100
    process.settle()
    require_memlock(64 * MIB)
    assert process.set_to == [(64 * MIB + 100 * 1024, resource.RLIM_INFINITY)]


def test_a_limit_that_cannot_be_raised_is_refused_with_the_exact_need(process: Any) -> None:
    process.locked_kib = 20
    process.settle()
    with pytest.raises(HostError) as caught:
        require_memlock(64 * MIB)
    total = 64 * MIB + 20 * 1024
    message = caught.value.message
    assert f"{total} bytes (64.0 MiB)" in message
    assert f"{64 * MIB} of guest memory, {20 * 1024} locked already" in message
    assert f"the limit is {8 * MIB} bytes (8 MiB)" in message
    for way in (f"ulimit -l {total // 1024}", f"LimitMEMLOCK={total}", f"--memlock={total}", "setcap cap_ipc_lock"):
        assert way in (caught.value.hint or "")
    assert caught.value.exit_status == 5


def test_the_soft_limit_was_raised_to_the_hard_limit_before_a_refusal(process: Any) -> None:
    process.limits = (MIB, 8 * MIB)
    process.settle()
    with pytest.raises(HostError, match="hard limit 8388608 bytes"):
        require_memlock(64 * MIB)
    assert process.limits == (8 * MIB, 8 * MIB)


def test_a_privileged_process_raises_the_hard_limit(process: Any) -> None:
    process.may_exceed = True
    process.settle()
    require_memlock(64 * MIB)
    assert process.limits == (64 * MIB, 64 * MIB)


def test_cap_ipc_lock_lifts_the_limit(process: Any) -> None:
    process.capabilities = 1 << 14
    process.settle()
    assert require_memlock(1 << 40).exempt
    assert process.set_to == []


def test_cap_ipc_lock_of_a_container_does_not_count(process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memlock, "_in_initial_user_namespace", lambda: False)
    process.capabilities = 1 << 14
    process.settle()
    with pytest.raises(HostError):
        require_memlock(64 * MIB)


def test_one_page_over_the_limit_is_refused(process: Any) -> None:
    process.settle()
    require_memlock(8 * MIB)
    with pytest.raises(HostError):
        require_memlock(8 * MIB + 1)


def test_unlimited_is_enough_for_anything(process: Any) -> None:
    process.limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    process.settle()
    assert require_memlock(1 << 50).soft is None


def test_the_limits_of_this_process_can_be_read() -> None:
    state = LockedMemory.read()
    assert state.locked % 1024 == 0
    assert f"{state.locked} bytes" in str(state)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert state.soft == (None if soft == resource.RLIM_INFINITY else soft)


def test_another_user_namespace_is_recognised() -> None:
    assert memlock._in_initial_user_namespace() == (os.stat("/proc/self/ns/user").st_ino == 0xEFFFFFFD)
    child = os.fork()
    if child == 0:
        made = ctypes.CDLL(None).unshare(0x1000_0000) == 0  # CLONE_NEWUSER
        os._exit(memlock._in_initial_user_namespace() if made else 9)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 9:
        pytest.skip("no user namespace can be made here")
    assert status == 0
