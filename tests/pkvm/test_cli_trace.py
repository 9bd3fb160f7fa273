# SPDX-License-Identifier: Apache-2.0
"""`pyvmm trace`, `run --trace` and `pyvmm top`, with real guests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.machine import layout
from pyvmm.protection import Protection
from tests.finished import finished
from tests.perfetto_reader import Trace
from tests.pkvm.harness import ALL

pytestmark = pytest.mark.pkvm
PYVMM = (sys.executable, "-m", "pyvmm")


def pyvmm(*args: str) -> subprocess.CompletedProcess[str]:
    return finished("-m", "pyvmm", *args)


@pytest.mark.parametrize("protection", ALL)
def test_a_trace_has_every_exit_and_follows_pages_to_the_device(protection: Protection, tmp_path: Path) -> None:
    file = tmp_path / "echo.pftrace"
    done = pyvmm("trace", "-o", str(file), "--protection", protection.value, "-c", "2", "payload:echo")
    assert done.returncode == 0, done.stderr
    counted = re.search(r"^pyvmm: (\d+) exits", done.stderr, re.MULTILINE)
    assert counted is not None
    trace = Trace(file.read_bytes())
    cpus = [trace.track(f"vCPU {cpu}") for cpu in range(2)]
    exits = [s for cpu in cpus for s in cpu.slices if s.name != "guest"]
    assert len(exits) == int(counted[1])
    assert sum(s.name == "guest" for cpu in cpus for s in cpu.slices) == len(exits)
    # The device's first register is where the guest names the page.
    named = [s.notes for s in exits if s.name == "exit: MMIO echo+0x0"]
    assert {"gpa": layout.ECHO.start, "size": 8, "write": True, "class": "mmio-python"} in named
    members = [[where for where, _ in flow] for flow in trace.flows().values()]
    for cpu in range(2):
        assert [f"vCPU {cpu}", "device echo"] in members
        assert any(f"vCPU {cpu}" in flow and "share relay" in flow and "device echo" in flow for flow in members)
    assert f"protection {protection.value}" in trace.labels
    shared = [value.value for value in trace.track("shared pages").values]
    assert max(filter(None, shared)) in (1, 2)
    assert shared[-1] == 0


def test_a_trace_with_faults_and_a_map_picture_can_show_the_same_run(tmp_path: Path) -> None:
    file, picture = tmp_path / "touch.pftrace", tmp_path / "touch.svg"
    more = ("--trace", str(file), "--trace-faults", "--map", str(picture))
    done = pyvmm("run", *more, "--protection", "pkvm", "payload:touch")
    assert done.returncode == 0, done.stderr
    trace = Trace(file.read_bytes())
    faults = [i for i in trace.track("vCPU 0").instants if i.name.startswith("fault")]
    assert len({i.notes["gpa"] for i in faults}) > 256
    assert all(i.depth == 1 for i in faults)
    donated = [value.value or 0 for value in trace.track("donated pages").values]
    assert max(donated) > 256
    assert "fault" in picture.read_text()


def test_a_trace_that_cannot_be_written_does_not_disturb_the_guest(tmp_path: Path) -> None:
    nowhere = pyvmm("run", "--trace", str(tmp_path / "no" / "x"), "payload:hello")
    assert (nowhere.returncode, nowhere.stdout) == (2, "")
    assert "cannot be written: No such file or directory" in nowhere.stderr
    full = pyvmm("run", "--trace", "/dev/full", "payload:hello")
    assert full.returncode == 1
    assert "hello" in full.stdout
    assert re.search(r"^pyvmm: \d+ exits", full.stderr, re.MULTILINE)
    assert "'/dev/full' cannot be written: No space left on device" in full.stderr
    pointless = pyvmm("run", "--trace-faults", "payload:hello")
    assert (pointless.returncode, pointless.stdout) == (2, "")


def test_top_runs_a_guest_and_reports_on_all_of_it() -> None:
    done = pyvmm("top", "--once", "--json", "-c", "2", "payload:smp")
    assert done.returncode == 0, done.stderr
    (found,) = map(json.loads, done.stdout.splitlines())
    assert found["exits"]["uart"]["per_second"] > 0
    assert len(found["vcpus"]) == 2
    counted = re.search(r"^pyvmm: (\d+) exits", done.stderr, re.MULTILINE)
    assert counted is not None
    assert round(found["exits_per_second"] * found["seconds"]) == int(counted[1])


def test_top_watches_the_guest_of_another_process() -> None:
    command = [*PYVMM, "run", "--protection", "pkvm", "-c", "2", "payload:crash", "-p", "loop"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as guest:
        try:
            for _ in range(30):
                done = pyvmm("top", "--once", "--json", "--interval", "0.5", str(guest.pid))
                if done.returncode == 0 and done.stdout:
                    break
            else:
                pytest.fail("top never shows the guest")
            found = json.loads(done.stdout)
            assert found["pid"] == guest.pid
            assert found["donated"] > 0
            # One vCPU loops without an exit. The other was never started.
            assert found["vcpus"][0]["time"]["guest"] > 0.2
            assert found["vcpus"][1]["time"]["waiting"] > 0.9
        finally:
            os.kill(guest.pid, signal.SIGINT)
            assert guest.wait(30) == 128 + signal.SIGINT
