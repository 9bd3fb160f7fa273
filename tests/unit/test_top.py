# SPDX-License-Identifier: Apache-2.0
"""How busy a guest is: the report of two readings, its display, and the socket for other processes."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm._native import ffi, lib
from pyvmm.errors import PyvmmError, UsageError
from pyvmm.labenv import TCG_NOTE
from pyvmm.machine.config import MachineConfig
from pyvmm.observe.rates import lines, report, since_start, take_reading
from pyvmm.session import connection, control
from pyvmm.session.connection import Connection, running
from pyvmm.session.control import Control

S = 1_000_000_000


def taken(ns: int, *vcpus: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "pyvmm": "0",
        "pid": 7,
        "kernel": "payload:smp",
        "protection": "none",
        "backing": "memfd",
        "memory": 64 << 20,
        "tcg": False,
        "ns": ns,
        "elapsed_ns": ns - 100 * S,
        "pages": {"host": 16384, "private": 0, "shared": 0},
        "donated": None,
        "kicks": 0,
        "shares": 0,
        "unshares": 0,
        "refused": 0,
        "vcpus": list(vcpus),
        **more,
    }


def vcpu(exits: dict[str, list[int]], vmm: float, guest: float | None, kernel: float | None) -> dict[str, Any]:
    def ns(seconds: float | None) -> int | None:
        return None if seconds is None else round(seconds * S)

    return {
        "exits": exits,
        "kvm_run_ns": 0,
        "vmm_ns": ns(vmm),
        "guest_cpu_ns": ns(guest),
        "kernel_cpu_ns": ns(kernel),
    }


def test_a_report_covers_the_time_between_two_readings() -> None:
    before = taken(101 * S, vcpu({"uart": [100, 5, 5]}, 0.1, 0.5, 0.2), vcpu({}, 0, 0, 0), shares=5)
    now = taken(
        103 * S,
        vcpu({"uart": [300, 4_000_005, 400_005], "system": [1, 9000, 0]}, 0.3, 1.5, 0.6),
        vcpu({}, 0, 0, 0),
        shares=9,
    )
    found = report(before, now)
    assert (found["seconds"], found["exits_per_second"], found["shares_per_second"]) == (2, 100.5, 2)
    assert found["exits"] == {
        "uart": {"per_second": 100, "kvm_run_us": 20, "vmm_us": 2},
        "system": {"per_second": 0.5, "kvm_run_us": 9, "vmm_us": 0},
    }
    first, second = (each["time"] for each in found["vcpus"])
    assert first == {"guest": 0.5, "kernel": 0.2, "vmm": 0.1, "waiting": 0.2}
    assert second == {"guest": 0, "kernel": 0, "vmm": 0, "waiting": 1}
    assert found["time"] == {"guest": 0.25, "kernel": 0.1, "vmm": 0.05, "waiting": 0.6}
    assert since_start(now)["seconds"] == 3


def test_kicks_without_an_exit_are_not_counted_as_exits_and_are_shown_if_any() -> None:
    one = vcpu({}, 0, 0, 0)
    found = report(taken(101 * S, one, kicks=10), taken(103 * S, one, kicks=30))
    assert (found["kicks_per_second"], found["exits_per_second"]) == (10, 0)
    assert any(line.endswith(", 10 kicks without an exit") for line in lines(found))
    assert since_start(taken(102 * S, one, kicks=8))["kicks_per_second"] == 4
    assert not any("kicks" in line for line in lines(report(taken(101 * S, one), taken(103 * S, one))))


def test_values_that_the_kernel_does_not_report_for_a_thread_are_left_open() -> None:
    unknown = vcpu({}, 0.5, None, None)
    ended = report(taken(101 * S, vcpu({}, 0, 0.1, 0.1)), taken(102 * S, unknown))
    assert ended["time"] == {"guest": None, "kernel": None, "vmm": 0.5, "waiting": None}
    assert any(line.split() == ["all", "0", "-", "-", "50.0%", "-"] for line in lines(ended))
    not_yet = report(taken(101 * S, vcpu({}, 0, None, None)), taken(102 * S, vcpu({}, 0, 0.5, 0)))
    assert not_yet["time"]["guest"] == 0.5


SECONDS = st.floats(0, 3, allow_nan=False)


@given(SECONDS, SECONDS, SECONDS, st.integers(1, 600), st.integers(20, 200), st.integers(1, 60))
def test_shares_of_time_add_up_to_one_and_lines_fit(
    vmm: float, guest: float, kernel: float, cpus: int, width: int, height: int
) -> None:
    one = vcpu({"uart": [1, 1, 1]}, vmm, guest, kernel)
    found = since_start(taken(102 * S, *[one] * cpus))
    assert sum(found["time"].values()) == pytest.approx(1, abs=0.001)
    assert all(0 <= share <= 1 for share in found["time"].values())
    written = lines(found, width=width, height=height)
    assert len(written) <= height
    assert max(map(len, written)) <= width


@pytest.mark.parametrize("tcg", [True, False])
def test_times_of_the_lab_are_marked(tcg: bool) -> None:
    ended = since_start(taken(102 * S, vcpu({}, 1, None, None), tcg=tcg))
    assert (TCG_NOTE in lines(ended)) is tcg


def test_a_reading_counts_unfinished_time_for_the_current_state_of_the_vcpu() -> None:
    config = MachineConfig("payload:smp", backing="memfd", memory=64 << 20)
    vm = ffi.new("struct pv_vm *")
    vm.pages[lib.PV_PAGE_HOST] = 16384
    inside, outside = (ffi.new("struct pv_vcpu *", {"index": n, "vm": vm, "tid": tid}) for n, tid in enumerate((5, 0)))
    for native in (inside, outside):
        stats = native.stats[lib.PV_EXIT_MMIO_PL011]
        stats.count, stats.guest_ns, stats.vmm_ns = 3, 2 * S, S
    machine = SimpleNamespace(config=config, native=vm, natives=(inside, outside), elapsed_ns=10 * S, kicks=3)
    found = json.loads(json.dumps(take_reading(machine)))  # type: ignore[arg-type]
    assert [(v["kvm_run_ns"], v["vmm_ns"]) for v in found["vcpus"]] == [(9 * S, S), (2 * S, 8 * S)]
    assert found["vcpus"][0]["exits"] == {"uart": [3, 2 * S, S]}
    assert (found["pages"]["host"], found["kicks"]) == (16384, 3)


# -- the socket


@pytest.fixture
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory for the user's sockets, which does not exist yet. Each run gets a socket at once."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(control, "SETTLED", 0)
    return tmp_path / "pyvmm"


def wait_for(path: Path) -> Path:
    deadline = time.monotonic() + 20
    while not running() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()
    return path


def test_a_run_answers_its_own_user_line_by_line_and_removes_its_socket(sockets: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Control({"counters": lambda: {"exits": 3}}):
        path = wait_for(sockets / f"{os.getpid()}.sock")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        assert running() == [os.getpid()]
        with Connection(os.getpid()) as first, Connection(os.getpid()) as second:
            assert [first.ask("counters"), second.ask("counters"), first.ask("counters")] == [{"exits": 3}] * 3
            with pytest.raises(PyvmmError, match="does not do 'pause'"):
                first.ask("pause")
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(20)
            raw.connect(str(path))
            raw.sendall(b'nonsense\n[]\n{"do": ["counters"]}\n{"do": "cou')
            time.sleep(0.05)
            raw.sendall(b'nters"}\n')
            with raw.makefile() as file:
                answers = [json.loads(file.readline()) for _ in range(4)]
            assert ["error" in answer for answer in answers] == [True, True, True, False]
        with socket.socket(socket.AF_UNIX) as endless:
            endless.settimeout(20)
            endless.connect(str(path))
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                endless.sendall(b"x" * (1 << 22))
        with Connection(os.getpid()) as last:
            assert last.ask("counters") == {"exits": 3}
    assert not path.exists()
    assert "pyvmm-control" not in {thread.name for thread in threading.enumerate()}
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_client_gets_no_more_answers_when_the_run_ends(sockets: Path) -> None:
    with Control({"counters": dict}):
        wait_for(sockets / f"{os.getpid()}.sock")
        connection = Connection(os.getpid())
        assert connection.ask("counters") == {}
    with connection:
        assert connection.ask("counters") is None
    with pytest.raises(UsageError, match="runs no guest that can be controlled"):
        Connection(os.getpid())


def test_a_short_run_makes_no_socket(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "SETTLED", 60)
    with Control({}):
        pass
    assert not sockets.exists()


def test_the_socket_of_a_killed_run_is_removed_and_its_name_reused(sockets: Path) -> None:
    sockets.mkdir(0o700)
    for pid in (os.getpid(), 1234):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(sockets / f"{pid}.sock"))
    with Control({"counters": dict}):
        wait_for(sockets / f"{os.getpid()}.sock")
        assert [path.name for path in sockets.iterdir()] == [f"{os.getpid()}.sock"]


def test_a_run_that_takes_a_killed_runs_name_meanwhile_keeps_its_socket(
    sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sockets.mkdir(0o700)
    path = sockets / "1234.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with socket.socket(socket.AF_UNIX) as young:

        def connect(at: str) -> socket.socket:
            try:
                return control.connect(at)
            except control.Gone:
                young.bind(f"{path}.new")
                young.listen()
                os.rename(f"{path}.new", path)
                raise

        monkeypatch.setattr(connection, "connect", connect)
        assert running() == []
        assert running() == [1234]
        assert [each.name for each in sockets.iterdir()] == ["1234.sock"]


def test_a_run_continues_if_it_cannot_have_a_socket(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(control.log, "info", lambda _event, reason: told.append(reason))
    sockets.mkdir(0o777)
    sockets.chmod(0o777)
    with Control({}) as here:
        here._thread.join()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(sockets / "missing"))
    with Control({}) as here:
        here._thread.join()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(sockets.parent))
    sockets.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(sockets / f"{os.getpid()}.sock"))
        other.listen()
        with Control({}) as here:
            here._thread.join()
    unsafe, missing, taken_already = told
    assert "must be a directory that only this user can write to" in unsafe
    assert "No such file" in missing
    assert "another pid namespace" in taken_already


# -- the verb


def top(*words: str, runtime: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
    command = [sys.executable, "-m", "pyvmm", "top", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_top_watches_the_only_run_or_the_named_one(sockets: Path) -> None:
    clock = iter(range(101, 200))
    with Control({"counters": lambda: taken(next(clock) * S, vcpu({"uart": [3, 1, 1]}, 0, 0, 0))}):
        wait_for(sockets / f"{os.getpid()}.sock")
        once = ("--once", "--interval", "0.01")
        done = [top(*once, *words, runtime=sockets.parent) for words in (("--json",), (str(os.getpid()),))]
    assert [one.returncode for one in done] == [0, 0], done
    assert json.loads(done[0].stdout)["vcpus"] == [
        {"exits_per_second": 0, "time": {"guest": 0, "kernel": 0, "vmm": 0, "waiting": 1}}
    ]
    assert done[1].stdout.startswith("payload:smp: protection none, 1 vCPU, 64 MiB of memfd\n")


def test_top_says_what_is_missing(sockets: Path) -> None:
    none, stranger = top(runtime=sockets.parent), top("1", runtime=sockets.parent)
    pointless = top("-c", "4", "--trace", "x", "1", runtime=sockets.parent)
    assert (none.returncode, stranger.returncode, pointless.returncode) == (2, 2, 2)
    assert "--cpus, --trace: these options start a guest" in pointless.stderr
    assert f"no socket in {sockets}" in none.stderr
    assert "process 1 runs no guest that can be controlled" in stranger.stderr
    sockets.mkdir(0o700)
    listeners = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for pid, listener in zip((21, 22), listeners, strict=True):
        listener.bind(str(sockets / f"{pid}.sock"))
        listener.listen()
    several = top(runtime=sockets.parent)
    for listener in listeners:
        listener.close()
    assert several.returncode == 2
    assert "2 guests run, in processes 21, 22" in several.stderr
