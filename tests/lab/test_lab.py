# SPDX-License-Identifier: Apache-2.0
"""The lab from a workstation: exit statuses, streams, signals, modes, two labs at once. It leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.errors import PyvmmError
from pyvmm.lab import Lab, LabError, LabOptions, build_image
from pyvmm.lab.cache import Image
from pyvmm.lab.shares import PACKAGE

pytestmark = pytest.mark.lab

TREE = PACKAGE.parent
PYVMM = [sys.executable, "-m", "pyvmm"]
PATIENCE = 120.0


@pytest.fixture(scope="module")
def image() -> Image:
    return build_image()


@pytest.fixture(scope="module")
def lab(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(LabOptions(mode="protected"), image=image, cwd=tmp_path_factory.mktemp("cwd")) as lab:
        yield lab


def shell(lab: Lab, script: str, **options: object) -> bytes:
    done = lab.capture(["sh", "-c", script], **options)
    assert done.status == 0, done
    return done.stdout


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not in {PATIENCE:.0f} s: {what}"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# ---- one lab, many commands


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_a_command_keeps_its_exit_status(lab: Lab, status: int) -> None:
    assert lab.capture(["sh", "-c", f"exit {status}"]).status == status


def test_a_command_killed_by_a_signal_has_status_128_plus_its_number(lab: Lab) -> None:
    assert lab.capture(["sh", "-c", "kill -9 $$"]).status == 128 + signal.SIGKILL


def test_a_missing_command_has_status_127_and_one_that_cannot_run_126(lab: Lab) -> None:
    missing = lab.capture(["no-such-command"])
    assert (missing.status, missing.stderr) == (127, b"no-such-command: No such file or directory\n")
    assert lab.capture(["/etc/passwd"]).status == 126


@pytest.mark.parametrize("redirect", ["", ">&2"])
def test_a_mebibyte_of_every_byte_value_passes_in_and_out_unchanged(lab: Lab, redirect: str) -> None:
    blob = os.urandom(1 << 20)
    done = lab.capture(["sh", "-c", f"cat {redirect}"], stdin=blob)
    assert done.status == 0
    assert (done.stderr if redirect else done.stdout) == blob
    assert (done.stdout if redirect else done.stderr) == b""


def test_the_next_command_does_not_see_input_that_the_last_one_ignored(lab: Lab) -> None:
    assert lab.capture(["true"], stdin=bytes(4 << 20)).status == 0
    assert shell(lab, "cat", stdin=b"mine") == b"mine"


def test_a_command_leaves_no_process_behind(lab: Lab) -> None:
    pid = int(shell(lab, "sleep 1000 >/dev/null & setsid sleep 1000 >/dev/null & echo $!"))
    assert lab.capture(["sh", "-c", f"kill -0 {pid}"]).status != 0
    assert b"sleep" not in shell(lab, "ps")


def test_a_command_ends_when_nobody_reads_its_output(lab: Lab) -> None:
    def gone(_data: bytes) -> None:
        raise BrokenPipeError

    assert lab.run(["yes"], stdout=gone) == 128 + signal.SIGPIPE


def test_the_lab_is_a_pkvm_host(lab: Lab) -> None:
    assert re.search(rb"Protected [nh]VHE mode initialized successfully", shell(lab, "dmesg; ls /dev/kvm"))


def test_the_lab_has_the_same_current_directory(lab: Lab) -> None:
    assert shell(lab, "pwd").decode().strip() == str(lab.cwd)
    shell(lab, "echo written inside > file")
    assert (lab.cwd / "file").read_text() == "written inside\n"


def test_the_lab_imports_pyvmm_from_the_same_path(lab: Lab) -> None:
    assert shell(lab, "python3 -c 'import pyvmm; print(pyvmm.__file__)'").decode().strip() == str(
        PACKAGE / "__init__.py"
    )


def test_the_lab_uses_the_native_loop_for_arm64(lab: Lab) -> None:
    done = lab.capture(["python3", "-c", "from pyvmm._native import lib; print(lib.pv_kick_signal())"])
    assert (done.status, int(done.stdout) > 0) == (0, True), done.stderr


def test_the_environment_identifies_the_lab(lab: Lab) -> None:
    assert shell(lab, "echo $PYVMM_IN_LAB $MINE", env={"MINE": "too"}) == b"1 too\n"


def test_a_terminal_passes_its_size_and_keys_to_the_lab(lab: Lab) -> None:
    ours, theirs = os.openpty()
    screen = bytearray()
    try:
        import termios

        termios.tcsetwinsize(theirs, (33, 77))
        threading.Timer(1.0, os.write, (ours, b"typed\r")).start()
        status = lab.run(
            ["sh", "-c", "tty && stty size && read line && echo got $line"],
            stdin=theirs,
            stdout=screen.extend,
            is_tty=True,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert status == 0
    assert b"/dev/pts/0" in screen
    assert b"33 77" in screen
    assert b"got typed" in screen


# ---- each with another lab


def test_two_labs_run_at_once_in_the_other_two_modes(image: Image) -> None:
    with (
        Lab(LabOptions(mode="vhe"), image=image, bare=True) as vhe,
        Lab(LabOptions(mode="nvhe", cpus=1), image=image, bare=True) as nvhe,
    ):
        assert b"VHE mode initialized successfully" in shell(vhe, "dmesg | grep -v hVHE")
        assert b"Hyp nVHE mode initialized successfully" in shell(nvhe, "dmesg")
        assert shell(nvhe, "nproc") == b"1\n"
        assert shell(vhe, "nproc") == b"2\n"


def test_a_host_without_pkvm_refuses_a_protected_guest_and_runs_the_others(image: Image) -> None:
    with Lab(LabOptions(mode="nvhe"), image=image) as nvhe:
        refused = nvhe.capture(["python3", "-m", "pyvmm", "run", "--protection", "pkvm", "payload:hello"])
        assert refused.status == 5, refused
        assert b"does not run pKVM" in refused.stderr
        for protection in ("none", "emulated"):
            done = nvhe.capture(["python3", "-m", "pyvmm", "run", "--protection", protection, "payload:echo"])
            assert done.status == 0, done
            assert b"HELLO, HOST" in done.stdout


def test_a_killed_lab_says_how_it_was_started_and_leaves_no_process(image: Image) -> None:
    with Lab(image=image, bare=True) as lab:
        pid = lab.pid
        threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
        with pytest.raises(LabError, match="the lab ended while it ran sleep") as caught:
            lab.run(["sleep", "1000"])
    assert "killed by signal 9" in caught.value.message
    assert "qemu-system-aarch64 -M virt" in caught.value.message
    assert not is_alive(pid)


def test_a_command_that_takes_too_long_ends_with_its_lab(image: Image) -> None:
    with Lab(image=image, bare=True) as lab:
        pid = lab.pid
        with pytest.raises(PyvmmError, match="sleep did not end in 1 s"):
            lab.run(["sleep", "1000"], timeout=1.0)
        assert not is_alive(pid)


def test_icount_gives_the_same_time_again(image: Image) -> None:
    # Counts of instructions vary far less between two runs of a loop than any machine's clock does.
    # The addresses of Python's objects decide 4 of about 190 instructions a turn. Of 14 processes in one lab one took
    # 3,796,000 in all, the others 3,875,000. With the same addresses all take the same number.
    script = """
import time
def loop():
    start = time.perf_counter_ns()
    for _ in range(20000): pass
    return time.perf_counter_ns() - start
loop()
print(*sorted(loop() for _ in range(9)))
"""
    with Lab(LabOptions(icount=True, cpus=1), image=image, bare=True) as lab:
        shell(lab, "echo 0 > /proc/sys/kernel/randomize_va_space")
        runs = [[int(t) for t in shell(lab, f"python3 -I -S -c '{script}'").split()] for _ in range(4)]
    medians = [run[4] for run in runs]
    assert max(medians) / min(medians) < 1.01, runs


def test_the_lab_refuses_by_name_to_run_in_a_directory_that_it_has_itself(image: Image) -> None:
    directory = Path("/usr/lib/python3")
    with pytest.raises(PyvmmError, match=f"{directory} cannot be made visible"), Lab(image=image, cwd=directory):
        pass


# ---- the command


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run ``pyvmm lab exec`` until it prints something; give its process and its QEMU."""
    with subprocess.Popen([*PYVMM, "lab", "exec", "--", *arguments], cwd=TREE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            (qemu,) = children(process.pid)
            assert "qemu" in Path(f"/proc/{qemu}/cmdline").read_text()
            yield process, qemu
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_command_in_the_lab_and_its_status_comes_back(number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    with running("sh", "-c", f'trap "echo caught; exit 9" {name}; echo ready; while :; do sleep 0.1; done') as (
        it,
        qemu,
    ):
        it.send_signal(number)
        assert it.wait(PATIENCE) == 9
        assert it.stdout is not None
        assert it.stdout.read() == b"caught\n"
        assert not is_alive(qemu)


def test_a_killed_pyvmm_leaves_no_qemu_running() -> None:
    with running("sh", "-c", "echo ready; sleep 1000") as (it, qemu):
        it.kill()
        it.wait()
        wait_until(lambda: not is_alive(qemu), "QEMU ends with its parent")


def test_a_verb_runs_in_the_lab_with_its_arguments_and_status(tmp_path: Path) -> None:
    # The guest's kernel is outside the tree and outside the current directory.
    (tmp_path / "empty.bin").write_bytes(b"")
    run = [*PYVMM, "--lab", "run", str(tmp_path / "empty.bin")]
    done = subprocess.run(run, cwd=TREE, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 2
    assert re.search(r"empty\.bin.*empty", done.stderr), done.stderr


def test_a_lab_leaves_no_file_behind(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([*PYVMM, "lab", "exec", "--", "true"], cwd=TREE, env=environment, check=False)
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []
