# SPDX-License-Identifier: Apache-2.0
"""What a running Linux guest and its user see when the host's side is lost: passt, a tap, a part of a disk, the VMM."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.devices.virtio.disk import DiskFile
from pyvmm.memory.address import MIB
from tests.pkvm.required import kernel_directory, program
from tests.pkvm.test_net import uplink

pytestmark = pytest.mark.pkvm

DEADLINE = 600.0
TAP = "pvlost0"


class Run:
    """A ``pyvmm run`` with the guest's console on its stdin and stdout, and its messages in a file."""

    def __init__(self, directory: Path, *words: str) -> None:
        self._messages = directory / "messages"
        with self._messages.open("w") as messages:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pyvmm", "run", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                cwd=directory,
            )
        self._seen = b""

    def expect(self, pattern: bytes) -> re.Match[bytes]:
        """Read up to ``pattern``. What follows it is left for the next read."""
        out = self.process.stdout
        assert out is not None
        end = time.monotonic() + DEADLINE
        while (match := re.search(pattern, self._seen)) is None:
            ready, _, _ = select.select([out], [], [], max(end - time.monotonic(), 0))
            data = os.read(out.fileno(), 1 << 16) if ready else b""
            assert data, f"no {pattern!r} but {self._seen!r}; the user sees {self._messages.read_text()!r}"
            self._seen += data
        self._seen = self._seen[match.end() :]
        return match

    def sh(self, command: str) -> tuple[str, int]:
        """Run a command in the guest's shell. Returns its output and its exit status."""
        assert self.process.stdin is not None
        # The echo of the typed line has no such digits.
        self.process.stdin.write(f"printf '[%s]' begin; {command}; printf '[%s %d]' end $?\n".encode())
        self.process.stdin.flush()
        match = self.expect(rb"(?s)\[begin\](.*?)\[end (\d+)\]")
        return match[1].decode(errors="replace").replace("\r", ""), int(match[2])

    def user_sees(self, *words: str) -> None:
        """Wait until one line of the messages has these words."""

        def told() -> bool:
            return any(all(word in line for word in words) for line in self._messages.read_text().splitlines())

        eventually(told, f"{words} in {self._messages.read_text()!r}")

    def children(self) -> list[int]:
        """Return the processes that the VMM has started."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sorted(int(pid) for task in tasks for pid in (task / "children").read_text().split())


def eventually(happened: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        return "(zombie)" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def carrier(card: str, state: int) -> str:
    """Return a command that waits until the guest's card has a carrier, or has none."""
    return f"until [ $(cat /sys/class/net/{card}/carrier) = {state} ]; do sleep 0.1; done"


@pytest.mark.skipif(os.geteuid() != 0, reason="a tap needs root")
def test_guest_and_user_see_what_is_lost_and_a_killed_vmm_leaves_nothing_behind(tmp_path: Path) -> None:
    program("passt", "passt")
    subprocess.run(["modprobe", "tun"], check=False)
    files, disk = kernel_directory("own:"), tmp_path / "disk"
    disk.write_bytes(b"x" * 2 * MIB)
    words = [
        *("--protection", "pkvm", "-m", "192M", "-d", "disk", "--serial", "file=uart", "--console", "stdio"),
        *("--net", "passt", "--net", "passt", "--net", f"tap={TAP},host=10.219.82.1/30"),
        *("-p", "console=hvc0 quiet panic=-1 audit=0", "-i", str(files / "shell.cpio"), str(files / "Image")),
    ]
    with uplink():
        guest = Run(tmp_path, *words)
        try:
            guest.expect(b"# ")
            for card in ("eth0", "eth1", "eth2"):
                assert guest.sh(f"ip link set {card} up; {carrier(card, 1)}") == ("", 0)
            first, second = guest.children()

            os.kill(first, signal.SIGKILL)
            assert guest.sh(carrier("eth0", 0)) == ("", 0)
            guest.user_sees("link_down", "passt")
            assert guest.sh("cat /sys/class/net/eth1/carrier") == ("1\n", 0), "the other card goes on"

            subprocess.run(["ip", "link", "delete", TAP], check=True)
            assert guest.sh(carrier("eth2", 0)) == ("", 0)
            guest.user_sees("link_down", TAP)

            os.truncate(disk, MIB)
            read = "dd if=/dev/vda of=/dev/null bs=4096 count=1 iflag=direct skip={} 2>&1"
            assert guest.sh(read.format(0))[1] == 0
            said, status = guest.sh(read.format(300))
            assert status != 0
            assert "I/O error" in said
            assert guest.sh("dd if=/dev/zero of=/dev/vda bs=4096 count=1 oflag=direct seek=300 2>&1")[1] != 0
            guest.user_sees("disk_failed", "truncated below")
            assert disk.stat().st_size == MIB, "the file must not grow again, with zeros in place of what is lost"
            assert guest.sh("echo alive")[0] == "alive\n"

            guest.process.kill()
            assert guest.process.wait(DEADLINE) == -signal.SIGKILL
            eventually(lambda: is_gone(second), "passt ends with the VMM that it served")
            DiskFile(str(disk)).close()  # its lock is free
        finally:
            guest.process.kill()
            guest.process.communicate()
