# SPDX-License-Identifier: Apache-2.0
"""The kernel's trace of faults, line by line, and the reasons if there is none."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pyvmm.kvm import faulttrace
from pyvmm.kvm.faulttrace import FaultTrace, TracedFault, access

LINES = b"""\
         python3-97      [001] .....     6.467611: kvm_guest_fault: ipa 0x80080000, hsr 0x82000004, hxfar 0x0, pc 0x80
CPU:0 [LOST 33 EVENTS]
    pyvmm [1] -8-98      [000] .....     6.476583: kvm_guest_fault: ipa 0x80084000, hsr 0x93c68047, hxfar 0x8, pc 0x80
           <...>-12345   [001] d..1.  1234.000001: kvm_guest_fault: ipa 0, hsr 0x92000007, hxfar 0x8, pc 0x80
CPU:1 [LOST 2 EVENTS]
         python3-97      [001] .....     6.467612: kvm_exit: IRQ: HSR_EC: 0x0000 (UNKNOWN), PC: 0x0
"""


@pytest.fixture
def instances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a directory like tracefs' instances; each new instance has a file for its trace_pipe."""
    root = tmp_path / "tracing"
    (root / "instances").mkdir(parents=True)
    (root / faulttrace.EVENT).mkdir(parents=True)
    make = faulttrace._make

    def make_and_fill(instances: str) -> str:
        path = make(instances)
        for directory in ("options", faulttrace.EVENT):
            Path(path, directory).mkdir(parents=True)
        Path(path, "trace_pipe").write_bytes(LINES)
        return path

    monkeypatch.setattr(faulttrace, "_make", make_and_fill)
    monkeypatch.setattr(faulttrace, "TRACEFS", (str(tmp_path / "none"), str(root)))
    monkeypatch.setattr(faulttrace, "_INITIAL_PID_NAMESPACE", os.stat("/proc/self/ns/pid").st_ino)
    return root / "instances"


@pytest.mark.usefixtures("instances")
def test_faults_are_read_with_time_address_and_kind_and_lost_ones_are_counted() -> None:
    with FaultTrace() as trace:
        assert (trace.available, trace.why_not) == (True, "")
        first = trace.faults()
    assert first == trace.faults()
    assert first == [
        TracedFault(6_467_611_000, 0x8008_0000, False, True, 97),
        TracedFault(6_476_583_000, 0x8008_4000, True, False, 98),
        TracedFault(1234_000_001_000, 0, False, False, 12345),
    ]
    assert trace.lost == 35


@pytest.mark.usefixtures("instances")
def test_a_reader_keeps_the_pipe_open_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, left = threading.Event(), threading.Event()
    sizes: list[int] = []

    def drain(pipe: int) -> None:
        if threading.current_thread() is reader:
            reading.set()
            left.wait(0.3)
            sizes.append(os.fstat(pipe).st_size)

    trace = FaultTrace()
    monkeypatch.setattr(trace, "_drain", drain)
    reader = threading.Thread(target=trace.collect)

    def leave() -> None:
        trace.__exit__()
        left.set()

    with monkeypatch.context() as patched:
        trace.__enter__()
        reader.start()
        assert reading.wait(10)
        patched.setattr(trace, "collect", lambda: None)  # there is nothing to read at the end
        leave()
    reader.join(10)
    assert sizes == [len(LINES)]


def test_the_kernel_gets_the_threads_the_clock_and_the_range(instances: Path) -> None:
    with FaultTrace(range(0x1000, 0x2000)):
        [instance] = instances.iterdir()
        assert (instance / "trace_clock").read_text() == "mono"
        assert (instance / "options/event-fork").read_text() == "1"
        assert str(os.getpid()) in (instance / "set_event_pid").read_text().split()
        assert (instance / faulttrace.EVENT / "filter").read_text() == "ipa >= 4096 && ipa < 8192"
        assert (instance / faulttrace.EVENT / "enable").read_text() == "1"
    assert (instance / faulttrace.EVENT / "enable").read_text() == "0"


def test_instance_names_are_unique_and_those_of_dead_processes_are_removed(instances: Path) -> None:
    for name in ("pyvmm-99999999-0", f"pyvmm-{os.getpid()}-0", "somebody-else", "pyvmm-x-0"):
        (instances / name).mkdir()
    with FaultTrace(), FaultTrace():
        names = {path.name for path in instances.iterdir()}
    pid = os.getpid()
    assert names == {f"pyvmm-{pid}-0", f"pyvmm-{pid}-1", f"pyvmm-{pid}-2", "somebody-else", "pyvmm-x-0"}


def test_a_missing_trace_raises_nothing_and_gives_the_reason(instances: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: str) -> None:
        raise PermissionError(13, "Permission denied", str(instances))

    monkeypatch.setattr(faulttrace, "_make", refuse)
    with FaultTrace() as trace:
        assert (trace.available, trace.faults()) == (False, [])
        assert "Permission denied" in trace.why_not
    monkeypatch.setattr(faulttrace, "_INITIAL_PID_NAMESPACE", 1)
    with FaultTrace() as trace:
        assert "container" in trace.why_not
    monkeypatch.setattr(faulttrace, "TRACEFS", ())
    for user, words in ((0, "mount -t tracefs"), (1000, "only root")):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        with FaultTrace() as trace:
            assert words in trace.why_not
    assert faulttrace.guest_fault(lambda: pytest.fail("not to be called"))[0] is None


@pytest.mark.parametrize(
    ("esr", "kind"),
    [
        (0x8200_0007, (False, True)),
        (0x93C2_8046, (True, False)),
        (0x93C0_8007, (False, False)),
        (0x9200_0147, (False, False)),  # cache maintenance: a write only by its bit
        (0x9200_00C7, (None, None)),  # the access of a page table walk
        (0x5A00_0000, (None, None)),  # an hvc
    ],
)
def test_the_kind_is_write_or_fetch_if_the_syndrome_says_so(esr: int, kind: tuple[bool | None, bool | None]) -> None:
    assert access(esr) == kind
