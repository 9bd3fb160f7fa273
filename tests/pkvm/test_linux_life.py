# SPDX-License-Identifier: Apache-2.0
"""The project's Linux in the least memory allowed, and a Linux that resets itself and its devices."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from io import BytesIO
from pathlib import Path

import pytest

from pyvmm.cpio import CpioWriter
from pyvmm.memory.address import MIB
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import run
from tests.pkvm.linux_guest import initrd
from tests.pkvm.required import kernel_directory

pytestmark = pytest.mark.pkvm

DEADLINE = 600.0
LEAST = 32
"""MiB."""
PARAMS = ("console=ttyAMA0", "quiet", "panic=-1", "audit=0", "mitigations=off")
TAP, HOST, GUEST = "pvboot0", "10.219.83.1", "10.219.83.2"
TWICE = f"""\
#!/bin/sh
read -r mark </dev/vda
echo "the disk says: $mark."
ifconfig eth0 {GUEST} netmask 255.255.255.252
ping -c 1 -W {DEADLINE:.0f} {HOST} >/dev/null && echo the host answers.
echo "after $mark" | vsock call 2 5000
[ "$mark" = "one boot" ] && exit
echo "one boot" | dd of=/dev/vda conv=fsync 2>/dev/null
reboot -f
"""


def test_linux_boots_in_thirty_two_mib() -> None:
    files = kernel_directory("own:")
    ended = run(
        str(files / "Image"),
        Protection.NONE,
        initrd=str(files / "shell.cpio"),
        memory=LEAST * MIB,
        params=(*PARAMS, "-- true"),
        deadline=DEADLINE,
    )
    assert ended.outcome.ending is Ending.POWEROFF, ended
    assert b"pyvmm: exit status 0" in ended.output


def answer_twice(listener: socket.socket, heard: list[bytes], guest: Path) -> None:
    """Accept two connections, keep what arrives, and send thanks. Each time the guest's socket path must exist."""
    for _ in range(2):
        with listener.accept()[0] as peer, peer.makefile("rb") as file:
            heard.append(file.read())
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect(str(guest))
            peer.sendall(b"the host heard.\n")


def test_a_guest_that_resets_can_use_its_disk_network_card_and_sockets_again(tmp_path: Path) -> None:
    subprocess.run(["modprobe", "tun"], check=False)
    disk, sockets = tmp_path / "disk", tmp_path / "v"
    disk.write_bytes(b"nothing\n".ljust(1 << 20, b"\0"))
    files = initrd(tmp_path / "initrd", "vsock")
    more = BytesIO()
    archive = CpioWriter(more)
    archive.file("bin/twice", TWICE.encode(), mode=0o755)
    archive.finish()
    with open(files, "ab") as file:
        file.write(more.getvalue())
    heard: list[bytes] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{sockets}_5000")
    listener.listen()
    host = threading.Thread(target=answer_twice, args=[listener, heard, sockets], daemon=True)
    host.start()
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "pyvmm",
            "run",
            "--protection",
            "pkvm",
            "-m",
            str(LEAST),
            "--reboot",
            "--deadline",
            str(DEADLINE),
            "-d",
            str(disk),
            "--net",
            f"tap={TAP},host={HOST}/30",
            "--vsock",
            f"uds={sockets},cid=3",
            "-i",
            files,
            "-p",
            " ".join((*PARAMS, "-- twice")),
            "own:",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * DEADLINE,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said
    first, _, second = ended.stdout.partition("the disk says: one boot.")
    assert "the disk says: nothing." in first, said
    for boot in (first, second):
        assert "the host answers." in boot, said
        assert "the host heard." in boot, said
    assert "pyvmm: exit status 0" in second, said
    host.join(DEADLINE)
    listener.close()
    assert heard == [b"after nothing\n", b"after one boot\n"]
    assert disk.read_bytes().startswith(b"one boot\n")
    assert not sockets.exists()
    assert not Path("/sys/class/net", TAP).exists()
