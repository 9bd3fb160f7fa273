# SPDX-License-Identifier: Apache-2.0
"""Confined runs: from inside each forbidden act is refused, and what a run needs works."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from pyvmm.confine import landlock
from pyvmm.session.connection import Connection
from tests.finished import finished
from tests.nightly import NIGHTLY
from tests.pkvm.gdb_client import Client
from tests.pkvm.linux_guest import DEADLINE, initrd
from tests.pkvm.required import kernel_directory, program
from tests.pkvm.test_lost import Run

pytestmark = pytest.mark.pkvm

PYVMM = (sys.executable, "-m", "pyvmm")
HERE = Path(__file__).resolve().parent
PATIENCE = 120.0
IPC_LOCK = 1 << 14


@pytest.fixture
def place() -> Iterator[Path]:
    """Give a directory that everybody may use, with what the acts need."""
    with TemporaryDirectory(prefix="pyvmm-confined-") as name:
        directory = Path(name)
        directory.chmod(0o777)
        for name in ("secret", "open"):
            (directory / name).write_text("text")
            (directory / name).chmod(0o666)
        yield directory


@contextlib.contextmanager
def kvm_for_everybody() -> Iterator[None]:
    mode = os.stat("/dev/kvm").st_mode & 0o777
    os.chmod("/dev/kvm", 0o666)
    try:
        yield
    finally:
        os.chmod("/dev/kvm", mode)


def from_inside(user: str, place: Path, *words: str) -> dict[str, Any]:
    done = finished(str(HERE / "confined_run.py"), user, str(place), "run", "--confine", "on", *words)
    assert done.returncode == 0, done
    report: dict[str, Any] = json.loads((place / "report.json").read_text())
    report["fields"] = dict(line.split(":\t", 1) for line in report["status"].splitlines() if ":\t" in line)
    return report


def check(report: dict[str, Any], capabilities: int) -> None:
    assert {name: code for name, code in report["forbidden"].items() if code != errno.EPERM} == {}
    assert len(report["forbidden"]) > 50
    assert {name: code for name, code in report["allowed"].items() if code} == {}
    fields = report["fields"]
    assert (fields["Seccomp"], fields["NoNewPrivs"]) == ("2", "1")
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == capabilities


def test_code_in_a_protected_run_of_root_can_do_nothing_forbidden(place: Path) -> None:
    check(from_inside("root", place, "--pkvm", "payload:hello"), IPC_LOCK)


def test_a_confined_run_answers_all_words_of_ctl_and_removes_its_sockets(tmp_path: Path) -> None:
    path, disk = tmp_path / "vm.sock", tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    words = ["-d", str(disk), "--rng", "--balloon", "0", "--vsock", f"uds={tmp_path}/vsock,cid=3"]
    command = [*PYVMM, "run", "--confine", "on", *words, "--socket", str(path), "payload:crash", "-p", "loop"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    try:
        assert run.stdout is not None
        assert "way=loop" in run.stdout.readline()
        with Connection(str(path)) as connection:

            def ask(word: str, **members: object) -> Any:
                return connection.ask(word, patience=PATIENCE, **members)

            assert ask("info")["state"] == "running"
            before = ask("counters")
            assert before["pages"]
            assert ask("kick", text="hello") == {"typed": 6}
            assert ask("break", key="h")
            assert ask("balloon")["target"] == 0
            assert ask("pause")["state"] == "paused"
            assert ask("resume") == {"state": "running"}
            with pytest.raises(Exception, match="confined, and opens no file"):
                ask("snapshot", file=str(tmp_path / "file"))
            with open(f"/proc/{run.pid}/status") as status:
                fields = dict(line.split(":\t", 1) for line in status.read().splitlines() if ":\t" in line)
            assert (fields["Seccomp"], fields["NoNewPrivs"], int(fields["CapEff"], 16)) == ("2", "1", 0)
            threads = Path(f"/proc/{run.pid}/task")
            assert {"2"} == {
                line.split()[1]
                for thread in threads.iterdir()
                for line in (thread / "status").read_text().splitlines()
                if line.startswith("Seccomp:")
            }
            assert ask("stop")["state"] == "ended"
        _, stderr = run.communicate(timeout=PATIENCE)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 130, stderr
    assert "pyvmm ctl stop" in stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == ["disk"]


def test_a_confined_linux_uses_its_disk_its_card_and_its_vsock(tmp_path: Path) -> None:
    program("passt", "passt")
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    words = [
        *("--confine", "on", "--protection", "pkvm", "-c", "2", "-m", "192M", "--rng", "--console", "stdio"),
        *("-d", "disk,queues=2", "--net", "passt", "--vsock", "uds=vsock,cid=3", "--serial", "file=uart"),
        *("-p", "console=hvc0 quiet panic=-1 audit=0", "-i", initrd(tmp_path / "initrd", "vsock")),
        str(kernel_directory("own:") / "Image"),
    ]
    guest = Run(tmp_path, *words)
    try:
        guest.expect(b"# ")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "vsock_5000"))
            listener.listen()
            assert guest.sh("echo to the host | vsock call 2 5000 >/said & sleep 0")[1] == 0
            with listener.accept()[0] as peer:
                assert peer.recv(100) == b"to the host\n"
        assert guest.sh("head -c 4k /dev/hwrng >/a && head -c 508k /dev/urandom >>/a") == ("", 0)
        assert guest.sh("dd if=/a of=/dev/vda bs=64k conv=fsync 2>/dev/null") == ("", 0)
        assert guest.sh("dd if=/dev/vda of=/b bs=64k count=8 iflag=direct 2>/dev/null && cmp /a /b") == ("", 0)
        assert guest.sh("ip link set eth0 up && udhcpc -n -q -t 10 -i eth0 >/dev/null 2>&1") == ("", 0)
        assert guest.process.stdin is not None
        guest.process.stdin.write(b"poweroff\n")
        guest.process.stdin.flush()
        assert guest.process.wait(DEADLINE) == 0
    finally:
        guest.process.kill()
        guest.process.communicate()
    assert not (tmp_path / "vsock").exists()


def test_the_lab_has_landlock() -> None:
    assert landlock.version() >= landlock.FIRST_WITH_UNIX


if NIGHTLY:

    def test_code_in_a_run_of_an_ordinary_user_can_do_nothing_forbidden(place: Path) -> None:
        with kvm_for_everybody():
            check(from_inside("nobody", place, "payload:hello"), 0)

    def test_a_signal_ends_a_confined_run() -> None:
        command = [*PYVMM, "run", "--confine", "on", "--pkvm", "-c", "2", "payload:crash", "-p", "loop"]
        run = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
        )
        assert run.stdout is not None
        assert "way=loop" in run.stdout.readline()
        run.send_signal(signal.SIGTERM)
        _, stderr = run.communicate(timeout=PATIENCE)
        assert run.returncode == 128 + signal.SIGTERM, stderr
        assert "SIGTERM" in stderr

    def test_a_debugger_stops_a_confined_guest(tmp_path: Path) -> None:
        path = tmp_path / "gdb"
        command = [*PYVMM, "run", "--confine", "on", "--gdb", str(path), "payload:hello"]
        run = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
        )
        assert run.stderr is not None
        while "waiting_for_debugger" not in run.stderr.readline():
            assert run.poll() is None
        with Client(str(path)) as debugger:
            assert debugger.ask("?").startswith("T")
            assert debugger.ask("s").startswith("T")
            assert debugger.ask("Z1,80080040,4") == "OK"
            assert debugger.ask("z1,80080040,4") == "OK"
            debugger.send("c")
            stdout, stderr = run.communicate(timeout=PATIENCE)
        assert run.returncode == 0, stderr
        assert "hello from a plain guest" in stdout
        assert not path.exists()

    def test_a_run_that_crashes_or_passes_its_deadline_says_so_confined() -> None:
        crashed = finished("-m", "pyvmm", "run", "--confine", "on", "--pkvm", "--log-json", "payload:crash")
        assert crashed.returncode == 3, crashed
        assert "undefined instruction" in crashed.stderr
        late = finished("-m", "pyvmm", "run", "--confine", "on", "--deadline", "1", "payload:crash", "-p", "loop")
        assert late.returncode == 4, late
        assert " at pc 0x" in late.stderr

    def test_nothing_would_be_refused_to_echo() -> None:
        done = finished("-m", "pyvmm", "run", "--confine", "log", "--pkvm", "-c", "2", "payload:echo")
        assert done.returncode == 0, done
        assert "would_refuse" not in done.stderr
