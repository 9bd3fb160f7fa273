# SPDX-License-Identifier: Apache-2.0
"""Limits on a process: a run raises its limits, or ends with an error that names the limit. It never hangs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pyvmm import errors
from pyvmm.errors import HostError, UsageError, exhausted, within_limits
from pyvmm.examples.dice import DiceDevice
from pyvmm.machine import layout
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.ending import RunEnd
from pyvmm.machine.plan import Plan
from pyvmm.options.machine import machine_config
from pyvmm.vcpu.outcome import Ending
from tests.unit.test_session_run import parsed

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def started(*words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a command line on a fake host. Raises TimeoutExpired if it hangs."""
    command = [sys.executable, str(HERE / "fake_host.py"), *options, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env=environment, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def devices(tmp_path: Path) -> list[str]:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    return ["-d", f"{disk},queues=2", "--rng", "-c", "2"]


def test_the_fake_host_starts_a_run(devices: list[str]) -> None:
    done = started("run", *devices, "payload:hello")
    assert done.returncode == 1
    assert "ENOTTY" in done.stderr


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_thread_that_cannot_start_ends_the_run(number: int, devices: list[str]) -> None:
    done = started("run", *devices, "payload:hello", options=("--no-thread", str(number)))
    assert done.returncode == 5
    assert "RLIMIT_NPROC" in done.stderr
    assert "bug" not in done.stderr


@pytest.mark.parametrize("files", range(6, 28))
def test_a_run_without_descriptors_ends_and_names_the_limit(files: int, devices: list[str]) -> None:
    # The largest of these limits suffice for the run, but not for its threads when it fails.
    done = started("run", *devices, "payload:hello", options=("--files", str(files)))
    assert done.returncode == 5 or (files > 20 and done.returncode == 1 and "ENOTTY" in done.stderr)
    assert done.returncode == 1 or "RLIMIT_NOFILE is too small" in done.stderr
    assert "bug" not in done.stderr


def test_pyvmm_raises_the_limit_as_far_as_allowed(tmp_path: Path) -> None:
    words = []
    for name in range(8):
        disk = tmp_path / str(name)
        disk.write_bytes(bytes(4096))
        words += ["-d", f"{disk},queues=16"]
    raised = started("run", *words, "payload:hello", options=("--files", "64:4096"))
    assert "ENOTTY" in raised.stderr
    refused = started("run", *words, "payload:hello", options=("--files", "64:96"))
    assert refused.returncode == 5
    assert "about 257 file descriptors are needed, but this process may have only 96" in refused.stderr


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "line",
    [
        "payload:hello",
        "-c {most} payload:hello",
        "-d {disk} -d {disk2},queues=16 payload:hello",
        "--rng --balloon 0 --console none payload:hello",
        "--vsock uds={disk}.v,cid=3 --protection emulated payload:hello",
    ],
)
def test_a_machine_needs_no_more_descriptors_than_it_reports(line: str, tmp_path: Path) -> None:
    disks = [tmp_path / "disk", tmp_path / "disk2"]
    for disk in disks:
        disk.write_bytes(bytes(4096))
    config = machine_config(parsed(line.format(disk=disks[0], disk2=disks[1], most=layout.MAX_VCPUS)))
    before = descriptors()
    with Plan(config) as plan:
        assert descriptors() - before <= plan.machine.descriptors


# ---- what an error says


def raised(error: BaseException, *, handling: BaseException | None = None) -> BaseException:
    try:
        if handling is not None:
            try:
                raise handling
            except BaseException:
                raise error from None
        raise error
    except BaseException as caught:
        return caught


FULL = OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/dev/kvm")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, "RLIMIT_NOFILE"),
        (errors.KvmError("KVM_CREATE_VCPU", "", errno.EMFILE), "RLIMIT_NOFILE"),
        (ImportError("x.so: cannot open shared object file: Too many open files"), "RLIMIT_NOFILE"),
        (OSError(errno.ENFILE, "x"), "fs.file-max"),
        (RuntimeError("can't start new thread"), "RLIMIT_NPROC"),
    ],
)
def test_an_error_of_a_limit_names_it(error: BaseException, said: str) -> None:
    limit = exhausted(error)
    assert limit is not None
    assert limit.exit_status == 5
    assert said in str(limit)


def test_an_error_caused_by_a_limit_error_names_the_limit_too() -> None:
    error = raised(UsageError("disk d cannot be opened: Too many open files"), handling=FULL)
    assert "RLIMIT_NOFILE" in str(exhausted(error))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        RuntimeError("threads can only be started once"),
        ImportError("no module"),
        OSError(errno.EAGAIN, "nothing to read"),
        HostError("said already"),
    ],
)
def test_other_errors_are_unchanged(error: Exception) -> None:
    assert exhausted(raised(error)) is None
    with pytest.raises(type(error)) as caught, within_limits():
        raise error
    assert caught.value is error


def test_the_error_for_a_program_that_cannot_start_names_the_limit_of_processes() -> None:
    # A failing fork() raises this error. Only the raising module distinguishes it from a read that would block.
    there: dict[str, Any] = {}
    exec(compile("def start(): raise BlockingIOError(11, 'again')", "/usr/lib/python3/subprocess.py", "exec"), there)
    with pytest.raises(HostError, match="gives no process more"), within_limits():
        there["start"]()


@pytest.mark.parametrize("error", [FULL, exhausted(FULL)])
def test_a_limit_that_a_thread_meets_ends_the_run_with_its_status(error: Exception) -> None:
    end = RunEnd()
    end.failed(error)
    assert end.outcome is not None
    assert (end.outcome.ending, end.outcome.status) == (Ending.UNABLE, 5)


def test_a_run_ends_even_if_its_end_cannot_be_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise FULL

    monkeypatch.setattr("pyvmm.machine.ending.log.error", refuse)
    end = RunEnd()
    thread = threading.Thread(target=end.failed, args=(ValueError("x"),))
    thread.start()
    thread.join()
    assert end.outcome is not None
    assert end.outcome.reason == "ValueError: x"


def test_the_number_of_descriptors_includes_devices_of_a_script() -> None:
    plan = Plan(MachineConfig("payload:hello"))
    assert Plan(MachineConfig("payload:hello"), devices=[DiceDevice()]).machine.descriptors > plan.machine.descriptors
