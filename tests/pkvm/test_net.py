# SPDX-License-Identifier: Apache-2.0
"""Linux with a network card, in every protection: what it fetches and sends arrives unchanged."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Interface
from pathlib import Path

import pytest

from pyvmm.devices.kinds.net import Net
from pyvmm.devices.virtio.tap import Tap
from pyvmm.memory.address import MIB
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import ALL, run
from tests.pkvm.required import kernel_directory, program

pytestmark = pytest.mark.pkvm

DEADLINE = 600.0
FETCHED = 16 * MIB
PARAMS = ("console=ttyAMA0", "quiet", "panic=-1", "audit=0", "mitigations=off")
NOBODY = 65534
TAP, HOST, GUEST = "pvnet0", "10.219.78.1", "10.219.78.2"


class Server(ThreadingHTTPServer):
    """Serves bytes, and keeps what it receives."""

    def __init__(self) -> None:
        super().__init__(("0.0.0.0", 0), Handler)
        self.data = os.urandom(FETCHED)
        self.sent = b""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self._answer(self.server.data)

    def do_POST(self) -> None:
        assert isinstance(self.server, Server)
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


def orders(server: Server, setup: str, host: str) -> tuple[str, ...]:
    """Return a command line: the guest fetches the server's bytes, sends bytes back, and powers off."""
    # busybox's wget sends a file only up to its first zero byte.
    # Do not use double quotes or separate words for init: it takes at most 32 words.
    head = f"POST / HTTP/1.0\\r\\nContent-Length: {len(busybox())}\\r\\n\\r\\n"
    command = (
        f"{setup}; wget -q -O - http://{host}:{server.server_port}/ | md5sum; "
        f"{{ printf '{head}'; cat /bin/busybox; }} | nc {host} {server.server_port}; "
        "cat /proc/interrupts; dmesg | grep swiotlb"
    )
    return (*PARAMS, f'pyvmm.run="{command}"')


def busybox() -> bytes:
    return (kernel_directory("own:") / "busybox").read_bytes()


def check(server: Server, said: str) -> None:
    """Fail if the guest or the server received something else."""
    assert hashlib.md5(server.data, usedforsecurity=False).hexdigest() in said, said
    assert server.sent == busybox(), said
    assert "swiotlb buffer is full" not in said


@pytest.mark.parametrize("protection", ALL, ids=lambda p: p.value)
def test_linux_fetches_and_sends_a_file_through_a_tap(protection: Protection, server: Server) -> None:
    subprocess.run(["modprobe", "tun"], check=False)
    files = kernel_directory("own:")
    ended = run(
        str(files / "Image"),
        protection,
        initrd=str(files / "shell.cpio"),
        memory=192 * MIB,
        devices=(Net(tap=TAP, address=f"{HOST}/30"),),
        deadline=DEADLINE,
        params=orders(server, f"ifconfig eth0 {GUEST} netmask 255.255.255.252", HOST),
    )
    said = ended.output.decode(errors="replace")
    assert ended.outcome.ending is Ending.POWEROFF, said
    check(server, said)
    assert not Path("/sys/class/net", TAP).exists()


@contextmanager
def uplink() -> Iterator[None]:
    """Add an interface with a default route, which passt shows its guest, if this host (a lab) has none."""
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


@contextmanager
def for_everybody(device: Path) -> Iterator[None]:
    """Let every user open the device."""
    mode = device.stat().st_mode
    device.chmod(0o666)
    try:
        yield
    finally:
        device.chmod(mode)


@contextmanager
def unlimited_pins() -> Iterator[None]:
    """Let processes started here pin any amount of memory: a protected guest's memory is pinned."""
    limits = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, limits)


def fetch(port: int, run: subprocess.Popen[str]) -> str:
    """Read from a server in the guest through a port of the host, as soon as the server listens."""
    while run.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            if data := connection.makefile("rb").read():
                return data.decode()
        time.sleep(0.1)
    raise AssertionError("the run has ended")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_linux_gets_its_network_from_passt_run_by_an_unprivileged_user(server: Server) -> None:
    program("passt", "passt")
    files = kernel_directory("own:")
    port = free_port()
    setup = (
        "udhcpc -q -n -i eth0; gateway=$(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'); "
        "md5sum /bin/busybox | nc -l -p 80"
    )
    command = [
        sys.executable,
        "-m",
        "pyvmm",
        "run",
        "--protection",
        "pkvm",
        "-m",
        "192M",
        "--deadline",
        f"{DEADLINE:.0f}",
        "--net",
        f"passt,fwd={port}:80,loopback",
        "-i",
        str(files / "shell.cpio"),
        str(files / "Image"),
    ]
    for word in orders(server, setup, "$gateway"):
        command += ["-p", word]
    with (
        uplink(),
        for_everybody(Path("/dev/kvm")),
        unlimited_pins(),
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
        ) as vmm,
    ):
        forwarded: list[str] = []
        reader = threading.Thread(target=lambda: forwarded.append(fetch(port, vmm)))
        reader.start()
        said, _ = vmm.communicate(timeout=2 * DEADLINE)
        reader.join()
    assert vmm.returncode == 0, said
    check(server, said)
    assert "lease of" in said
    assert hashlib.md5(busybox(), usedforsecurity=False).hexdigest() in "".join(forwarded), said
