# SPDX-License-Identifier: Apache-2.0
"""The hypervisor's trace buffer: how it is read, set up and restored, and the errors if it is missing."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from pyvmm.observe import hyptrace
from pyvmm.observe.hyptrace import HypEvent, HypTrace

CPU0 = (
    b"""\
CPU:0 [LOST 33 EVENTS]
[000]\t    6.467611: hyp_enter reason=hvc vcpu=0
[000]\t    6.467615: hyp_exit reason=eret_guest vcpu=97
[000]\t    6.467702: selftest id=12
[000]\t    6.467703: hyp_enter reason=guest_exit vcpu=97
[000]\t    6.467709: selftest id=%d
[000]\t    6.467999: hyp_exit reason=eret_host vcpu=0
"""
    % hyptrace._MARK
)
CPU1 = (
    b"""\
[001]\t    6.467610: hyp_enter reason=host_abort vcpu=0
[001]\t    6.467612: hyp_exit reason=eret_host vcpu=0
[001]\t 1234.000001: selftest id=%d
"""
    % hyptrace._MARK
)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a directory like tracefs' remotes/hypervisor of a host with two CPUs and a third that is offline."""
    root = tmp_path / "tracing"
    (root / "instances").mkdir(parents=True)
    remote = root / hyptrace.REMOTE
    for name in ("hyp_enter", "hyp_exit", "selftest"):
        (remote / "events/hypervisor" / name).mkdir(parents=True)
        (remote / "events/hypervisor" / name / "enable").write_text("1\n" if name == "hyp_exit" else "0\n")
    for cpu, events in enumerate((CPU0, CPU1, b"")):
        (remote / f"per_cpu/cpu{cpu}").mkdir(parents=True)
        (remote / f"per_cpu/cpu{cpu}/trace_pipe").write_bytes(events)
    for name, text in {"tracing_on": "0\n", "buffer_size_kb": "7 (unloaded)\n", "trace": "", "write_event": ""}.items():
        (remote / name).write_text(text)
    monkeypatch.setattr(hyptrace, "TRACEFS", (str(tmp_path / "none"), str(root)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})

    def pin(_: int, cpus: set[int]) -> None:
        if cpus == {2}:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "sched_setaffinity", pin)
    monkeypatch.setattr(hyptrace, "now", lambda: 6_467_000_000)
    return remote


def settings(remote: Path) -> dict[str, str]:
    return {
        str(path.relative_to(remote)): path.read_text().strip()
        for path in [remote / "tracing_on", remote / "buffer_size_kb", *remote.glob("events/*/*/enable")]
    }


def test_events_of_every_cpu_are_read_up_to_its_mark_and_lost_ones_are_counted(remote: Path) -> None:
    with HypTrace() as trace:
        assert (trace.available, trace.why_not, trace.events()) == (True, "", [])
    assert trace.available
    assert trace.events() == [
        HypEvent(6_467_610_000, 1, True, "host_abort", 0),
        HypEvent(6_467_611_000, 0, True, "hvc", 0),
        HypEvent(6_467_612_000, 1, False, "eret_host", 0),
        HypEvent(6_467_615_000, 0, False, "eret_guest", 97),
        HypEvent(6_467_703_000, 0, True, "guest_exit", 97),
    ]
    assert (trace.lost, trace.whole_since) == (33, 6_467_611_000)
    assert (remote / "write_event").read_text() == str(hyptrace._MARK)


def test_timestamps_of_another_clock_are_refused(remote: Path) -> None:
    pipe = remote / "per_cpu/cpu1/trace_pipe"
    pipe.write_bytes(pipe.read_bytes().replace(b"    6.467612", b"576460758.467612"))
    with HypTrace() as trace:
        assert trace.available
    assert "KVM_ARM_SET_COUNTER_OFFSET" in trace.why_not
    assert trace.events() == []


def test_changed_settings_are_restored(remote: Path) -> None:
    before = settings(remote)
    with HypTrace(512):
        during = settings(remote)
    assert during["tracing_on"] == "1"
    assert during["buffer_size_kb"] == "512"
    assert set(during.values()) == {"1", "512"}
    assert settings(remote) == before | {"buffer_size_kb": "7"}


def test_a_buffer_in_use_is_not_changed(remote: Path) -> None:
    (remote / "tracing_on").write_text("1\n")
    before = settings(remote)
    with HypTrace() as trace:
        assert "tracing_on is not 0" in trace.why_not
    assert settings(remote) == before
    (remote / "tracing_on").write_text("0\n")
    (remote / "buffer_size_kb").write_text("4096 (loaded)\n")
    with HypTrace() as trace:
        assert "another process reads it" in trace.why_not
    other = os.open(remote, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with HypTrace() as trace:
            assert "another pyvmm" in trace.why_not
        assert trace.events() == []
    finally:
        os.close(other)


def test_the_error_says_why_nothing_can_be_recorded(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (remote / "tracing_on").unlink()
    with HypTrace() as trace:
        assert trace.why_not == f"{remote}/tracing_on: No such file or directory"
    remote.rename(tmp_path / "elsewhere")
    with HypTrace() as trace:
        assert "CONFIG_NVHE_EL2_TRACING" in trace.why_not
    monkeypatch.setattr(hyptrace, "TRACEFS", ())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with HypTrace() as trace:
        assert (trace.available, trace.why_not) == (False, "only root can read the kernel's trace (tracefs)")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with HypTrace() as trace:
        assert "not mounted" in trace.why_not
