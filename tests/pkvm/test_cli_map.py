# SPDX-License-Identifier: Apache-2.0
"""`pyvmm map`, `run --map`, and the kernel's trace of faults, with real guests."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pyvmm.kvm import faulttrace
from pyvmm.kvm.faulttrace import FaultTrace
from pyvmm.machine import layout
from pyvmm.machine.machine import Machine
from pyvmm.memory.ledger import ASSUMED, PageState
from pyvmm.observe.pagemap import PageMap
from pyvmm.observe.timeline import Event, Timeline
from pyvmm.protection import Protection
from tests.finished import finished
from tests.pkvm.harness import ALL, config, puppet

pytestmark = pytest.mark.pkvm
PYVMM = (sys.executable, "-m", "pyvmm")
PAGE = 0x8080_0000
SIZE = 4096
INSTANCES = Path("/sys/kernel/tracing/instances")


def pyvmm(*args: str) -> subprocess.CompletedProcess[str]:
    return finished("-m", "pyvmm", *args)


def instances() -> list[str]:
    return [name for name in os.listdir(INSTANCES) if name.startswith("pyvmm-")]


# -- faults


@pytest.mark.parametrize("protection", ALL)
def test_a_fresh_page_faults_once_and_the_trace_has_time_address_and_kind(protection: Protection) -> None:
    with FaultTrace() as trace, puppet(protection) as (_, guest):
        assert trace.available, trace.why_not
        guest.ping()
        before = time.monotonic_ns()
        guest.write64(PAGE, 1)
        between = time.monotonic_ns()
        guest.touch(PAGE + SIZE, 100)
        guest.write64(PAGE, 2)
        found = [fault for fault in trace.faults() if PAGE <= fault.gpa < PAGE + 101 * SIZE]
        first, *others = found
        assert (first.gpa, first.write, first.fetch) == (PAGE, True, False)
        # The kernel prints truncated microseconds.
        assert before - 1000 <= first.ns <= between
        assert [fault.gpa for fault in others] == [PAGE + number * SIZE for number in range(1, 101)]
        assert trace.lost == 0
        assert {fault.gpa for fault in trace.faults() if fault.fetch} >= {layout.RAM_BASE + layout.FLAT_OFFSET}
        assert any(fault.gpa == layout.MAILBOX.start for fault in trace.faults())
    assert found == [fault for fault in trace.faults() if PAGE <= fault.gpa < PAGE + 101 * SIZE]
    assert instances() == []


def test_the_trace_records_only_the_requested_range() -> None:
    with FaultTrace(range(PAGE, PAGE + SIZE)) as trace, puppet(Protection.NONE) as (_, guest):
        guest.touch(PAGE, 3)
        assert [fault.gpa for fault in trace.faults()] == [PAGE]


def test_the_trace_counts_faults_that_found_no_room() -> None:
    pages = 1000
    with FaultTrace(range(PAGE, PAGE + pages * SIZE)) as trace, puppet(Protection.PKVM) as (_, guest):
        (Path(str(trace._instance)) / "buffer_size_kb").write_text("8")
        guest.touch(PAGE, pages)
        found = trace.faults()
        assert 0 < len(found) < pages
        assert len(found) + trace.lost == pages
        assert found[-1].gpa == PAGE + (pages - 1) * SIZE


def test_a_failed_block_removes_its_trace_instance_and_two_instances_are_separate() -> None:
    with pytest.raises(FileNotFoundError), FaultTrace(), FaultTrace():
        os.stat(f"/nonexistent/{len(instances())}")
    assert instances() == []
    with FaultTrace(), FaultTrace():
        assert len(instances()) == 2


def test_the_trace_records_a_vcpu_thread_started_by_another_thread() -> None:
    with FaultTrace(range(PAGE, PAGE + SIZE)) as trace, Machine(config("payload:puppet", Protection.NONE)) as machine:
        starter = threading.Thread(target=machine.start)
        starter.start()
        starter.join()
        from pyvmm.guest.puppet import Puppet

        Puppet(machine.mailboxes).write64(PAGE, 1)
        assert [fault.gpa for fault in trace.faults()] == [PAGE]


def test_a_new_trace_removes_the_instance_that_a_killed_process_left() -> None:
    code = "from pyvmm.kvm.faulttrace import FaultTrace\nwith FaultTrace(): print(flush=True); input()"
    killed = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert killed.stdout is not None
    killed.stdout.readline()
    killed.kill()
    killed.communicate()
    assert len(instances()) == 1
    with FaultTrace():
        assert len(instances()) == 1
    assert instances() == []


def test_the_trace_gives_no_address_when_this_thread_repeats_no_fault() -> None:
    assert faulttrace.guest_fault(lambda: None) == (None, "whose address is unknown: the kernel traced no fault")


# -- maps and timelines of live guests


@pytest.mark.parametrize("protection", [Protection.EMULATED, Protection.PKVM])
def test_a_shared_page_is_one_page_in_the_map_and_two_events_in_the_timeline(protection: Protection) -> None:
    with FaultTrace(range(PAGE, PAGE + SIZE)) as trace, puppet(protection) as (machine, guest):
        recorder = Timeline(trace)
        recorder.watch(machine.memory, machine.natives)
        guest.write64(PAGE, 1)
        before = PageMap.of(machine.memory.ledger)
        guest.share(PAGE)
        shared = PageMap.of(machine.memory.ledger)
        [change] = shared.diff(before)
        assert change[:2] == (PAGE, 1)
        assert (change.before & ~ASSUMED, change.after) == (PageState.PRIVATE, PageState.SHARED)
        assert bool(change.before & ASSUMED) == (protection is Protection.PKVM)
        guest.unshare(PAGE)
        events = recorder.events()
    kinds = [event.kind for event in events]
    assert [kind for kind in kinds if kind != "fault"] == ["share", "unshare"]
    assert kinds[0] == "fault"
    assert {(event.gpa, event.pages) for event in events} == {(PAGE, 1)}


def test_the_timeline_has_holes_and_moves_as_events() -> None:
    from pyvmm.memory.choices import ConversionPolicy

    with puppet(Protection.EMULATED, conversion=ConversionPolicy.COPY) as (machine, guest):
        recorder = Timeline()
        recorder.watch(machine.memory, machine.natives)
        guest.share(PAGE)
        machine.memory.punch(PAGE + SIZE, 2 * SIZE)
        assert [event[1:] for event in recorder.events()] == [
            ("convert", PAGE, 1),
            ("share", PAGE, 1),
            ("punch", PAGE + SIZE, 2),
        ]
        assert PageMap.of(machine.memory.ledger).counts()[PageState.HOLE].pages == 2
        assert recorder.notes == ["faults were not recorded: nobody asked for them"]
        assert isinstance(recorder.events()[0], Event)


# -- the verb


def test_map_puts_the_map_on_stdout_and_the_guest_on_stderr() -> None:
    done = pyvmm("map", "--protection", "pkvm", "-m", "16M", "payload:hello")
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    assert lines[0] == f"0x8000_0000 {'p' * 64}"
    assert lines[-3:] == [
        "p private, assumed 4,096",
        "1 cell = 2 pages (8 KiB); the most telling state in a cell is shown",
        "lower case = assumed: the kernel does not tell",
    ]
    assert done.stderr.startswith("hello from a protected guest\n")
    assert "exits in" in done.stderr.splitlines()[-1]
    assert "\x1b" not in done.stdout


def test_map_as_json_prints_only_runs_and_counts_on_stdout() -> None:
    done = pyvmm("map", "--json", "--protection", "none", "payload:touch")
    assert done.returncode == 0, done
    data = json.loads(done.stdout)
    page_map = PageMap.from_runs(data["runs"])
    assert page_map.pages == data["pages"] == 16384
    assert data["counts"]["shared"] == {"pages": 1, "assumed": 0}
    assert (data["protection"], data["ending"]) == ("none", "poweroff")


def test_map_shows_a_crashed_guest_and_keeps_its_exit_status() -> None:
    done = pyvmm("map", "--protection", "pkvm", "payload:crash", "-p", "unmapped")
    assert done.returncode == 3, done
    assert "p private, assumed 16,384" in done.stdout
    assert "data abort" in done.stderr


@pytest.mark.parametrize("verb", ["run", "map"])
def test_the_picture_has_the_map_and_the_timeline(verb: str, tmp_path: Path) -> None:
    file = tmp_path / "run.svg"
    done = pyvmm(
        verb, "--map", str(file), "--protection", "emulated", "--conversion", "copy", "-c", "2", "payload:echo"
    )
    assert done.returncode == 0, done
    root = ET.fromstring(file.read_bytes())
    text = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "payload:echo: protection emulated, 2 vCPUs, 64 MiB of memfd" in text
    assert {"private 16,384", "share 2", "unshare 2", "convert 4", "the end: the guest powered off"} <= set(text)
    assert any(re.fullmatch(r"fault \d+", line) for line in text)
    assert any(re.fullmatch(r"outlined = \d+ pages that the guest faulted in", line) for line in text)
    assert not any("not recorded" in line for line in text)
    guest = done.stdout if verb == "run" else done.stderr
    assert "2 vCPUs" in guest or "requests answered" in guest
    assert instances() == []


@pytest.mark.parametrize("verb", ["run", "map"])
def test_map_refuses_a_picture_it_cannot_write_before_the_guest_runs(verb: str) -> None:
    done = pyvmm(verb, "--map", "/nonexistent/map.svg", "payload:hello")
    assert done.returncode == 2, done
    assert "'/nonexistent/map.svg' cannot be written: No such file or directory" in done.stderr
    assert "hello" not in done.stdout + done.stderr.replace("payload:hello", "")


def test_a_signal_ends_a_watched_run_with_its_map(tmp_path: Path) -> None:
    file = tmp_path / "run.svg"
    run = subprocess.Popen(
        [*PYVMM, "map", "--map", str(file), "payload:crash", "-p", "loop", "--deadline", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert run.stderr is not None
    assert "way=loop" in run.stderr.readline()
    run.send_signal(signal.SIGTERM)
    stdout, stderr = run.communicate(timeout=30)
    assert run.returncode == 128 + signal.SIGTERM, stderr
    assert "H host 16,384" in stdout
    assert "exits in" in stderr.splitlines()[-1]
    assert file.stat().st_size > 1000


def test_a_terminal_shows_a_live_map_and_keeps_the_guests_lines_whole() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [*PYVMM, "map", "--protection", "emulated", "-c", "2", "payload:echo"])
    data = b""
    while True:
        try:
            got = os.read(terminal, 1 << 16)
        except OSError:  # EIO: the other end is closed
            break
        if not got:
            break
        data += got
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = data.decode()
    assert text.count("0x8000_0000 ") >= 2, "it was drawn once only"
    assert "\x1b[38;5;32m" in text
    lines = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).strip("\r") for line in text.split("\n")]
    for line in ("  hello, host -> HELLO, HOST", "  answered 3, wrong 0", "6 requests answered, 0 vCPUs failed"):
        assert line in lines
    # The last map stands below everything the guest printed, and only the statistics below that.
    assert lines.index("6 requests answered, 0 vCPUs failed") < len(lines) - 5
    assert any("exits in" in line for line in lines[-3:])
