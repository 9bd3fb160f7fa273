# SPDX-License-Identifier: Apache-2.0
"""Linux with a shell on its virtio console and sockets to the host, in every protection. One boot tests all of it."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from pyvmm.devices.kinds.vsock import Vsock
from pyvmm.devices.roles import Terminal
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import ALL
from tests.pkvm.linux_guest import DEADLINE, SIZE, Linux, initrd

pytestmark = pytest.mark.pkvm

BYTES = 300 << 10
"""More than the credit of either side."""


def echo_once(listener: socket.socket) -> None:
    """Echo what arrives on one connection, until it ends."""
    with listener, listener.accept()[0] as peer:
        while data := peer.recv(1 << 16):
            peer.sendall(data)


def call(path: Path, port: int) -> socket.socket:
    """Connect to a port of the guest as soon as something listens there."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(DEADLINE)
        client.connect(str(path))
        client.sendall(b"CONNECT %d\n" % port)
        answer = b""
        while not answer.endswith(b"\n") and (byte := client.recv(1)):
            answer += byte
        if answer.startswith(b"OK "):
            return client
        client.close()
        time.sleep(0.1)
    raise AssertionError(f"nothing listens at port {port} of the guest")


@pytest.mark.parametrize("protection", ALL, ids=lambda p: p.value)
def test_linux_has_a_shell_on_hvc0_and_echoes_over_sockets_both_ways(protection: Protection, tmp_path: Path) -> None:
    path = tmp_path / "v"
    files = initrd(tmp_path / "initrd", "vsock")
    with Linux(protection, files, Vsock(str(path), 3)) as guest:
        assert guest.sh("cat /sys/class/tty/console/active") == "hvc0\n"
        assert guest.sh("stty size") == f"{SIZE[1]} {SIZE[0]}\n"
        [terminal] = guest.machine.role(Terminal)
        terminal.resize(132, 43)
        guest.sh("until stty size | grep '43 132'; do sleep 0.1; done")

        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{path}_5000")
        listener.listen()
        host = threading.Thread(target=echo_once, args=[listener])
        host.start()
        guest.sh(f"dd if=/dev/urandom of=/a bs=1k count={BYTES >> 10} && vsock call 2 5000 </a >/b && cmp /a /b")
        assert guest.sh("wc -c </b") == f"{BYTES}\n"
        host.join(DEADLINE)
        guest.sh("vsock refused 2 5001")

        guest.sh("{ vsock echo 7 & }")
        data = os.urandom(BYTES)
        with call(path, 7) as client:

            def send() -> None:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)

            writer = threading.Thread(target=send)
            writer.start()
            got = b""
            while part := client.recv(1 << 16):
                got += part
            writer.join(DEADLINE)
        assert got == data
        outcome = guest.poweroff()
    assert outcome.ending is Ending.POWEROFF
    assert not path.exists()
