"""Linux with a network card, in every protection: what it fetches and what it sends arrives as it was."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Interface
from pathlib import Path

import pytest

from pyvmm.devices.virtio.tap import Tap
from pyvmm.machine.devices import Net
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import ALL, run
from tests.pkvm.shown import kernel_directory, program

pytestmark = pytest.mark.pkvm

DEADLINE = 600.0
MIB = 1 << 20
FETCHED = 16 * MIB
PARAMS = ("console=ttyAMA0", "quiet", "panic=-1", "audit=0", "mitigations=off")
TAP, HOST, GUEST = "pvnet0", "10.219.78.1", "10.219.78.2"


class Server(ThreadingHTTPServer):
    """Gives out bytes, and keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("0.0.0.0", 0), Handler)
        self.data = os.urandom(FETCHED)
        self.sent = b""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._answer(self.server.data)

    def do_POST(self) -> None:
        self.server.sent = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(b"thanks")

    def _answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def exchange(server: Server, protection: Protection, card: Net, setup: str, host: str) -> str:
    """Boot, fetch the server's bytes, send some of them back, power off; returns what was said on the console."""
    files = kernel_directory("own:")
    sent = (files / "busybox").read_bytes()
    # busybox's wget sends a file up to its first zero.
    # No double quotes, and no word of its own for init: it takes 32 at most.
    head = f"POST / HTTP/1.0\\r\\nContent-Length: {len(sent)}\\r\\n\\r\\n"
    command = (
        f"{setup}; wget -q -O - http://{host}:{server.server_port}/ | md5sum; "
        f"{{ printf '{head}'; cat /bin/busybox; }} | nc {host} {server.server_port}; cat /proc/interrupts"
    )
    ended = run(
        str(files / "Image"), protection, initrd=str(files / "shell.cpio"), memory=192 * MIB, devices=(card,),
        params=(*PARAMS, f'pyvmm.run="{command}"'), deadline=DEADLINE,
    )  # fmt: skip
    said = ended.output.decode(errors="replace")
    assert ended.outcome.ending is Ending.POWEROFF, said
    assert hashlib.md5(server.data, usedforsecurity=False).hexdigest() in said, said
    assert server.sent == sent, said
    assert "swiotlb buffer is full" not in said
    return said


@pytest.mark.parametrize("protection", ALL, ids=lambda p: p.value)
def test_linux_fetches_and_sends_a_file_through_a_tap(protection: Protection, server: Server) -> None:
    subprocess.run(["modprobe", "tun"], check=False)
    card = Net(tap=TAP, address=f"{HOST}/30")
    exchange(server, protection, card, f"ifconfig eth0 {GUEST} netmask 255.255.255.252", HOST)
    assert not Path("/sys/class/net", TAP).exists()


@contextmanager
def uplink() -> Iterator[None]:
    """An interface with a default route, which passt shows its guest, where this host has none: a lab."""
    if Path("/proc/net/route").read_text().count("\t00000000\t"):
        yield
        return
    subprocess.run(["modprobe", "tun"], check=False)
    tap = Tap("pvup0", IPv4Interface("10.219.79.2/24"))
    try:
        subprocess.run(["ip", "route", "add", "default", "via", "10.219.79.1", "dev", "pvup0"], check=True)
        yield
    finally:
        tap.close()


@pytest.mark.parametrize("protection", [Protection.PKVM], ids=lambda p: p.value)
def test_linux_gets_its_network_from_passt_without_any_privilege_of_ours(
    protection: Protection, server: Server
) -> None:
    passt = program("passt", "passt")
    with uplink():
        setup = "udhcpc -q -n -i eth0; gateway=$(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p')"
        said = exchange(server, protection, Net(passt=passt, loopback=True), setup, "$gateway")
    assert "lease of" in said
