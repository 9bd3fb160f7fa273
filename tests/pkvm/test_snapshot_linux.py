# SPDX-License-Identifier: Apache-2.0
"""Linux continues from a snapshot: a loop in its shell, two vCPUs, timers, interrupts, and its virtio devices.

One test restores in this process, page by page. The other uses the commands that a user has.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from pyvmm.devices import pl031
from pyvmm.devices.kinds.console import Console
from pyvmm.devices.kinds.disk import Disk
from pyvmm.devices.kinds.rng import Rng
from pyvmm.devices.kinds.vsock import Vsock
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine
from pyvmm.machine.saving import save
from pyvmm.machine.snapshot import Snapshot
from pyvmm.memory.address import MIB
from pyvmm.protection import Protection
from pyvmm.session.connection import Connection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import config
from tests.pkvm.required import kernel_directory

pytestmark = pytest.mark.pkvm

DEADLINE = 600.0
HOUR = 3600
OFF = 2
"""Seconds between the guest's clock and the host's: the guest reads whole ones."""
PARAMS = ("console=ttyAMA0", "quiet", "panic=-1", "audit=0", "mitigations=off")
COUNT = "(n=0; while :; do echo n=$((n += 1)); sleep 0.3; done) &"


class Guest:
    """A machine with its console on pipes; a context manager that ends it."""

    def __init__(self, settings: MachineConfig, snapshot: Snapshot | None = None) -> None:
        self._out, out = os.pipe()
        source, self._keys = os.pipe()
        self._ends = (self._out, out, source, self._keys)
        self._seen = b""
        self.machine = Machine(settings._replace(serial_out=out, serial_in=source), start=snapshot)

    def __enter__(self) -> Self:
        self.machine.__enter__()
        self.machine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.__exit__()
        for fd in self._ends:
            os.close(fd)

    def type(self, line: str) -> None:
        os.write(self._keys, line.encode() + b"\n")

    def expect(self, pattern: bytes) -> re.Match[bytes]:
        """Read up to ``pattern``. What follows it is left for the next read."""
        end = time.monotonic() + DEADLINE
        while (match := re.search(pattern, self._seen)) is None:
            ready, _, _ = select.select([self._out], [], [], max(end - time.monotonic(), 0))
            assert ready, f"no {pattern!r} but {self._seen!r}"
            self._seen += os.read(self._out, 1 << 16)
        self._seen = self._seen[match.end() :]
        return match

    def left(self) -> bytes:
        """Return the output that was printed and not yet read."""
        self.machine.uart.drain()
        while select.select([self._out], [], [], 0)[0]:
            self._seen += os.read(self._out, 1 << 16)
        return self._seen


def test_a_restored_linux_continues_where_it_was_saved(tmp_path: Path) -> None:
    kernel, disk, path = kernel_directory("own:"), tmp_path / "disk", str(tmp_path / "guest")
    disk.write_bytes(bytes(1 << 20))
    printed = os.memfd_create("hvc0")
    devices = (Rng(), Disk(str(disk)), Console(printed), Vsock(str(tmp_path / "vsock"), 3))
    settings = config(
        str(kernel / "Image"),
        Protection.NONE,
        initrd=str(kernel / "shell.cpio"),
        params=PARAMS,
        cpus=2,
        memory=128 << 20,
        devices=devices,
        deadline=None,
    )
    with Guest(settings) as guest:
        guest.expect(b"# ")
        guest.type(COUNT)
        last = int(guest.expect(rb"n=(\d+)\r\n")[1])
        guest.machine.pause()
        save(guest.machine, path)
        last = max([last, *map(int, re.findall(rb"n=(\d+)", guest.left()))])
    with Guest(settings, Snapshot(path)) as guest:
        # A line that was half printed is completed.
        assert int(guest.expect(rb"n=(\d+)\r\n")[1]) in range(last, last + 3)
        guest.type("taskset 2 sh -c 'echo on $(nproc): $((6 * 7))'")
        guest.expect(rb"on 1: 42|on 2: 42")
        guest.type("dd if=/dev/hwrng of=/dev/vda bs=512 count=8 && sync && echo written $((6 * 7))")
        guest.expect(rb"written 42")
        guest.type("echo to the other console >/dev/hvc0; poweroff")
        assert guest.machine.wait(DEADLINE).ending is Ending.POWEROFF
    assert any(disk.read_bytes()[:4096])
    assert os.pread(printed, 100, 0) == b"to the other console\r\n"
    os.close(printed)


@pytest.mark.parametrize("name", ["own:", "debian:"])
def test_a_linux_restored_an_hour_later_gets_the_right_time_and_a_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kernel, path = kernel_directory(name), str(tmp_path / "guest")
    settings = config(
        str(kernel / "Image"),
        Protection.NONE,
        initrd=str(kernel / "shell.cpio"),
        params=PARAMS,
        memory=256 << 20,
        deadline=None,
    )
    with Guest(settings) as guest:
        guest.expect(b"# ")
        right_time(guest, "date")
        save(guest.machine, path)
    monkeypatch.setattr(pl031, "time", SimpleNamespace(time=lambda: time.time() + HOUR))
    with Guest(settings, Snapshot(path)) as guest:
        right_time(guest, "hwclock -s && date", ahead=HOUR)
        assert guest.machine.uart.send_break(b"h")
        guest.expect(rb"sysrq: HELP")
        guest.type("poweroff")
        assert guest.machine.wait(DEADLINE).ending is Ending.POWEROFF


def right_time(guest: Guest, command: str, *, ahead: int = 0) -> None:
    """Check that ``command`` prints the time, ``ahead`` seconds from this host's."""
    asked = time.time() + ahead
    guest.type(f"{command} +time=%s")
    said = int(guest.expect(rb"time=(\d+)\r")[1])
    assert asked - OFF <= said <= time.time() + ahead + OFF


# ---- by commands

PYVMM = (sys.executable, "-m", "pyvmm")
HOST, CARD = "10.219.80.1", "10.219.80.2"
NET = f"tap=pvsnap0,host={HOST}/30"
HELD = 24 * MIB


class Run:
    """A ``pyvmm run`` with the guest's console on its stdin and stdout; a context manager that kills it."""

    def __init__(self, directory: Path | str, *words: str) -> None:
        self._process = subprocess.Popen(
            [*PYVMM, "run", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=directory
        )
        self._seen = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def expect(self, pattern: bytes) -> re.Match[bytes]:
        """Read up to ``pattern``. What follows it is left for the next read."""
        out = self._process.stdout
        assert out is not None
        end = time.monotonic() + DEADLINE
        while (match := re.search(pattern, self._seen)) is None:
            ready, _, _ = select.select([out], [], [], max(end - time.monotonic(), 0))
            data = os.read(out.fileno(), 1 << 16) if ready else b""
            assert data, f"no {pattern!r} but {self._seen!r}"
            self._seen += data
        self._seen = self._seen[match.end() :]
        return match

    def begin(self, command: str) -> None:
        """Start ``command`` in the shell."""
        assert self._process.stdin is not None
        # The echo of the typed line has no such digits.
        self._process.stdin.write(f"printf '[%s]' begin; {command}; printf '[%s %d]' end $?\n".encode())
        self._process.stdin.flush()

    def done(self) -> str:
        """Wait until the command ends and return its output. Fails if its status is not 0."""
        match = self.expect(rb"(?s)\[begin\](.*?)\[end (\d+)\]")
        assert match[2] == b"0", match
        return match[1].decode().replace("\r", "")

    def sh(self, command: str) -> str:
        """Run a command to its end, and return its output."""
        self.begin(command)
        return self.done()

    def wait(self) -> int:
        return self._process.wait(DEADLINE)


def ctl(directory: Path, *words: str) -> Any:
    """Give an order to the run whose socket is ``vm.sock`` in ``directory``, and return the answer."""
    command = [*PYVMM, "ctl", "--json", "./vm.sock", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, cwd=directory)
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def until_held(directory: Path, size: int) -> None:
    """Wait until the balloon of that run has this size."""
    end = time.monotonic() + DEADLINE
    with Connection(str(directory / "vm.sock")) as run:
        while (balloon := run.ask("balloon", patience=DEADLINE))["actual"] != size:  # type: ignore[index]
            assert time.monotonic() < end, balloon
            time.sleep(0.1)


def greeted(guest: Run) -> bytes:
    """Return what arrives on a connection that the guest makes through its network card."""
    with socket.create_server((HOST, 0)) as listener:
        listener.settimeout(DEADLINE)
        guest.begin(f"echo hello | nc {HOST} {listener.getsockname()[1]}")
        with listener.accept()[0] as peer:
            said = peer.recv(64)
        guest.done()
        return said


def clone_beside(directory: Path, snapshot: Path) -> None:
    """Restore ``snapshot`` once more while its first guest runs: refused until it has its own disk and tap."""
    copy = directory / "copy"
    copy.write_bytes((directory / "disk").read_bytes())
    words = ["--restore", str(snapshot), "--trust-snapshot"]
    for in_use, own in (("disk", ("-d", str(copy))), ("tap", ("--net", "tap=pvsnap1"))):
        command = [*PYVMM, "run", *words]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        assert refused.returncode != 0, refused
        assert in_use in refused.stderr, refused
        assert "is in use" in refused.stderr, refused
        assert own[0] in refused.stderr, refused  # the hint names the option
        words += own
    with Run(directory, *words) as clone:
        assert clone.sh("echo $((n + 1))") == "42\n"
        clone.sh("echo cloned | dd of=/dev/vda bs=512 conv=sync && sync")
        clone.begin("poweroff")
        assert clone.wait() == 0
    assert copy.read_bytes().startswith(b"cloned\n")


def test_commands_save_a_run_and_restore_it_from_another_directory(tmp_path: Path) -> None:
    kernel, snapshot = kernel_directory("own:"), tmp_path / "saved" / "guest"
    snapshot.parent.mkdir()
    (tmp_path / "disk").write_bytes(bytes(MIB))
    subprocess.run(["modprobe", "tun"], check=False)
    options = (
        "-c",
        "2",
        "-m",
        "128M",
        "-i",
        str(kernel / "shell.cpio"),
        "-p",
        " ".join(("console=hvc0", *PARAMS[1:])),
        "-d",
        "disk",
        "--net",
        NET,
        "--balloon",
        "0",
        "--vmgenid",
        "--serial",
        "file=uart",
        "--console",
        "stdio",
    )
    with Run(tmp_path, "--socket", "vm.sock", *options, str(kernel / "Image")) as guest:
        guest.expect(b"# ")
        ctl(tmp_path, "kick", "echo kicked $((6 * 7))")
        guest.expect(b"kicked 42")
        guest.sh(f"ifconfig eth0 {CARD} netmask 255.255.255.252; n=41")
        assert greeted(guest) == b"hello\n"
        ctl(tmp_path, "balloon", str(HELD // MIB))
        until_held(tmp_path, HELD)
        about = ctl(tmp_path, "snapshot", "saved/guest")
        assert about["bytes"] == snapshot.stat().st_size > about["pages"] * 4096 > MIB
        # The saved run continues until the restored one needs the same devices.
        guest.sh("n=0; true")
        assert ctl(tmp_path, "stop") == {"state": "ended"}
        assert guest.wait() == 130
    words = ("--socket", str(tmp_path / "vm.sock"), "--restore", str(snapshot))
    untrusted = subprocess.run([*PYVMM, "run", *words], capture_output=True, text=True, timeout=DEADLINE)
    assert untrusted.returncode == 2, untrusted
    assert f"'{tmp_path}/disk' to read and write; the tap 'pvsnap0'" in untrusted.stderr, untrusted
    with Run("/", *words, "--trust-snapshot", "--verify") as guest:
        assert guest.sh("echo $((n + 1))") == "42\n"
        assert "reseeded due to virtual machine fork" in guest.sh("dmesg | grep reseeded")
        assert greeted(guest) == b"hello\n"
        clone_beside(tmp_path, snapshot)
        guest.sh("dd if=/dev/zero bs=512 count=8 | tr '\\0' x | dd of=/dev/vda bs=512 && sync")
        with Connection(str(tmp_path / "vm.sock")) as run:
            assert run.ask("balloon") == {"target": HELD, "actual": HELD, "given_back": 0}
            run.ask("balloon", size=0)
        until_held(tmp_path, 0)
        guest.begin("poweroff")
        assert guest.wait() == 0
    assert (tmp_path / "disk").read_bytes() == b"x" * 4096 + bytes(MIB - 4096)
