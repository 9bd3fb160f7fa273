# SPDX-License-Identifier: Apache-2.0
"""`pyvmm run` as a user runs it: stdout, stderr and the exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.finished import finished

pytestmark = pytest.mark.pkvm
PYVMM = (sys.executable, "-m", "pyvmm")


def pyvmm(*args: str) -> subprocess.CompletedProcess[str]:
    return finished("-m", "pyvmm", *args)


def test_hello_puts_the_guest_on_stdout_and_one_line_of_statistics_on_stderr() -> None:
    done = pyvmm("run", "--protection", "pkvm", "payload:hello")
    assert done.returncode == 0, done
    assert done.stdout.startswith("hello from a protected guest\n")
    lines = done.stderr.splitlines()
    assert len(lines) == 1, lines
    assert "exits in" in lines[0]


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (("payload:crash", "-p", "unmapped"), 3, "data abort"),
        (("payload:crash",), 3, "undefined instruction"),
        (("payload:crash", "-p", "loop", "--deadline", "1"), 4, "deadline of 1 s"),
        (("payload:crash", "-p", "reset"), 3, "asked for a reset"),
        (("payload:nosuch",), 2, "no payload 'nosuch'"),
        (("/nonexistent/Image",), 2, "no such file"),
        (("/",), 2, "directory"),
        (("--backing", "guest_memfd", "payload:hello"), 2, "eio on those of a guest_memfd"),
        (("--backing", "hugetlb", "payload:hello"), 2, "eio on hugetlb pages"),
    ],
    ids=["unmapped", "undefined", "loop", "reset", "payload", "missing", "directory", "guest_memfd", "hugetlb"],
)
def test_a_run_that_cannot_work_says_why_and_has_the_matching_exit_status(
    args: tuple[str, ...], status: int, words: str
) -> None:
    done = pyvmm("run", "--protection", "pkvm", *args)
    assert done.returncode == status, done
    assert words in done.stderr.lower(), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_its_status_and_statistics(number: signal.Signals) -> None:
    run = subprocess.Popen(
        [*PYVMM, "run", "--protection", "pkvm", "-c", "2", "payload:crash", "-p", "loop", "--deadline", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert run.stdout is not None
    assert "way=loop" in run.stdout.readline()
    run.send_signal(number)
    _, stderr = run.communicate(timeout=30)
    assert run.returncode == 128 + number, stderr
    assert "exits in" in stderr
    assert "Traceback" not in stderr


def test_a_run_ends_when_its_reader_leaves_and_says_so() -> None:
    run = subprocess.Popen(
        [*PYVMM, "run", "payload:crash", "-p", "way=flood", "-p", "bytes=6000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert run.stdout is not None
    run.stdout.close()
    assert run.stderr is not None
    stderr = run.stderr.read()
    assert run.wait(60) == 1
    assert "Broken pipe" in stderr
    assert "Traceback" not in stderr


WITHOUT_IPC_LOCK = """
import ctypes, resource, sys
class Header(ctypes.Structure): _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]
class Data(ctypes.Structure): _fields_ = [(n, ctypes.c_uint32) for n in ("effective", "permitted", "inheritable")]
libc = ctypes.CDLL(None, use_errno=True)
header, data = Header(0x20080522, 0), (Data * 2)()
assert libc.capget(ctypes.byref(header), data) == 0
for capability in (14, 24):  # CAP_IPC_LOCK; CAP_SYS_RESOURCE may raise any limit
    data[0].effective &= ~(1 << capability)
    data[0].permitted &= ~(1 << capability)
assert libc.capset(ctypes.byref(header), data) == 0
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
from pyvmm.cli import main
sys.exit(main(["run", "--protection", "pkvm", "-m", "32M", "payload:hello"]))
"""


def test_run_refuses_a_memlock_limit_that_is_too_small_and_gives_the_exact_need() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_IPC_LOCK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 5, done
    assert done.stdout == ""
    assert "MEMLOCK" in done.stderr
    assert "33554432" in done.stderr.replace("_", "").replace(",", ""), done.stderr
    assert "ulimit -l" in done.stderr


def test_a_killed_vmm_leaves_the_host_clean() -> None:
    """After SIGKILL during a protected run the kernel takes everything back, and the next run works."""
    before = _mlocked_kib()
    run = subprocess.Popen(
        [*PYVMM, "run", "--protection", "pkvm", "payload:crash", "-p", "loop", "--deadline", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert run.stdout is not None
    assert "way=loop" in run.stdout.readline()
    os.kill(run.pid, signal.SIGKILL)
    run.wait(30)
    deadline = time.monotonic() + 30
    while _mlocked_kib() > before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _mlocked_kib() <= before
    assert pyvmm("run", "--protection", "pkvm", "payload:hello").returncode == 0


def _mlocked_kib() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Mlocked:"):
            return int(line.split()[1])
    return 0


def test_a_payload_that_reports_a_failure_fails_the_run() -> None:
    done = pyvmm("run", "--protection", "pkvm", "payload:crash", "-p", "way=status", "-p", "code=7")
    assert done.returncode == 3, done
    assert "powered off with exit code 7" in done.stderr


def test_output_that_cannot_be_written_ends_the_run_with_status_1() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*PYVMM, "run", "payload:hello"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 1, done
    assert "No space left on device" in done.stderr


def test_run_refuses_two_protections() -> None:
    done = pyvmm("run", "--pkvm", "--protection", "none", "payload:hello")
    assert done.returncode == 2
    assert "not allowed with" in done.stderr


@pytest.mark.parametrize("protection", ["none", "pkvm"])
def test_run_restarts_a_guest_that_resets_in_a_new_vm(protection: str) -> None:
    run = subprocess.Popen(
        [*PYVMM, "run", "--reboot", "--protection", protection, "payload:crash", "-p", "way=reset"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert run.stdout is not None
    for _ in range(3):
        assert "way=reset" in run.stdout.readline()
    run.terminate()
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM, stderr
    assert "Traceback" not in stderr


def test_a_guest_uses_the_device_tree_it_is_given(tmp_path: Path) -> None:
    tree = tmp_path / "machine.dtb"
    assert pyvmm("run", "--dump-dtb", str(tree), "-p", "way=status", "-p", "code=7", "payload:crash").returncode == 3
    done = pyvmm("run", "--dtb", str(tree), "payload:crash")
    assert done.returncode == 3
    assert "exit code 7" in done.stderr
    assert pyvmm("run", "--dtb", str(tree), "-p", "code=8", "payload:crash").returncode == 2
