# SPDX-License-Identifier: Apache-2.0
"""What Linux guests read and write, receive and send through their devices, and what it takes by their own clocks.

A guest of the project's kernel does one operation a number of times and says its uptime between; The disk is a file in
host memory, and the card's other end is a server on this host. So no medium and no network is involved.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import socketserver
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Final, NamedTuple

from pyvmm.bench import linux
from pyvmm.devices.virtio.tap import Tap
from pyvmm.errors import PyvmmError
from pyvmm.guest.kernels import OWN, SHELL, resolve
from pyvmm.memory.address import MIB

SIZE: Final = 64
"""MiB of a pass."""
SMALL: Final = 4096
"""Requests of a pass where each is 4 KiB, and packets there and back."""
LINE: Final = b"\n"
TAP: Final = "pvbench0"
NETWORK: Final = IPv4Interface("10.219.80.1/30")
GUEST: Final = NETWORK.ip + 1
CONNECT: Final = f"nc {NETWORK.ip} {{port}} -e sh -c"
"""Runs a line of shell whose stdin and stdout are a connection: no program between copies by the KiB."""

_UP: Final = re.compile(r"^up (\d+\.\d+)\r?$", re.MULTILINE)
_TAIL: Final = 400


@dataclass(frozen=True, slots=True)
class Operation:
    """A line of shell that moves ``count`` of ``per``; ``{port}`` in it is where the host serves and takes."""

    device: str
    shell: str
    count: int
    per: str


OPERATIONS: Final = {
    "blk read": Operation("blk", f"dd if=/dev/vda of=/dev/null bs=1M count={SIZE} iflag=direct", SIZE, "MiB"),
    "blk write": Operation("blk", f"dd if=/dev/zero of=/dev/vda bs=1M count={SIZE} oflag=direct", SIZE, "MiB"),
    "blk 4 KiB read": Operation("blk", f"dd if=/dev/vda of=/dev/null bs=4k count={SMALL} iflag=direct", SMALL, "read"),
    "net receive": Operation("net", f"{CONNECT} 'echo; dd of=/dev/null bs=1M'", SIZE, "MiB"),
    "net send": Operation("net", f"{CONNECT} 'dd if=/dev/zero bs=1M count={SIZE}; read taken'", SIZE, "MiB"),
    "net round trip": Operation("net", f"ping -A -q -c {SMALL} {NETWORK.ip} >/dev/null", SMALL, "packet"),
}


class _Server(socketserver.ThreadingTCPServer):
    """Sends a pass of bytes to who sends a line, and a line to who sends a pass."""

    daemon_threads = True
    allow_reuse_address = True


class _Sender(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the guest is free to go
            left = SIZE * MIB
            while left and (data := self.request.recv(MIB)):
                if data == LINE:
                    for each in itertools.repeat(bytes(MIB), SIZE):
                        self.request.sendall(each)
                    return
                left -= len(data)
            if not left:
                self.request.sendall(LINE)


class Host:
    """This host's side: a disk of zeros, a tap with an address, a server behind it; and the guest's files."""

    def __init__(self, folder: str, stack: contextlib.ExitStack, lacking: str) -> None:
        kernel, initrd = resolve(OWN, SHELL, None)
        assert initrd is not None
        # A file system that the lab is shown cannot map files, which QEMU does with the kernel.
        self.guest = linux.Files(
            shutil.copy(kernel, folder), shutil.copy(initrd, folder), linux.install(folder, lacking=lacking)
        )
        self.disk = str(Path(folder, "disk"))
        Path(self.disk).write_bytes(bytes(MIB) * SIZE)
        self._stack = stack
        self.port = 0

    def serve(self) -> None:
        """Have a tap that outlives who opens it, and a server; HostError where the host makes none."""
        if self.port:
            return
        subprocess.run(["modprobe", "-q", "tun"], check=False)
        with contextlib.closing(Tap(TAP, NETWORK)) as tap:
            tap.persist(True)
        self._stack.callback(_forget_tap)
        server = self._stack.enter_context(_Server((str(NETWORK.ip), 0), _Sender))
        threading.Thread(target=server.serve_forever, name="pyvmm-bench-server", daemon=True).start()
        self._stack.callback(server.shutdown)
        self.port = server.socket.getsockname()[1]

    def parameters(self, operation: Operation, passes: int) -> str:
        """Return the guest's command line."""
        line = operation.shell.format(port=self.port)
        up = "read a b </proc/uptime; echo up $a"
        net = f"ifconfig eth0 {GUEST} netmask {NETWORK.netmask}; " if operation.device == "net" else ""
        loop = f"for n in {' '.join('x' * passes)}; do {line} 2>/dev/null || echo failed; {up}; done"
        return f'{linux.PARAMETERS} pyvmm.run="{net}{up}; {loop}"'


def _forget_tap() -> None:
    with contextlib.suppress(PyvmmError), contextlib.closing(Tap(TAP)) as tap:
        tap.persist(False)


@contextlib.contextmanager
def host(*, lacking: str = "") -> Iterator[Host]:
    """Make this host's side, for a while. HostError where there is no kernel for guests.

    ``lacking`` names a capability (KVM_CAP_*) that pyvmm is to find missing.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pyvmm-bench-"))
        yield Host(folder, stack, lacking)


def pyvmm(here: Host, operation: Operation, protection: str, passes: int) -> list[str]:
    """Return pyvmm's command for a guest that does the operation."""
    device = ["--disk", here.disk] if operation.device == "blk" else ["--net", f"tap={TAP}"]
    return linux.pyvmm(here.guest, protection, 1, *device, parameters=here.parameters(operation, passes))


def qemu(program: Sequence[str], here: Host, operation: Operation, passes: int) -> list[str]:
    """Return QEMU's."""
    device = (
        [
            "-drive",
            f"file={here.disk},if=none,format=raw,id=disk",
            "-device",
            "virtio-blk-device,drive=disk",
        ]
        if operation.device == "blk"
        else [
            "-netdev",
            f"tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off",
            "-device",
            "virtio-net-device,netdev=net",
        ]
    )
    modern = ["-global", "virtio-mmio.force-legacy=false"]
    return linux.qemu(program, here.guest, 1, *modern, *device, parameters=here.parameters(operation, passes))


class Passes(NamedTuple):
    """What a guest took for each pass, in ns, divided by its count; and of pyvmm's, its kicks of the whole run."""

    took: list[float]
    kicks: int
    """Of which there was no exit: the kernel took them."""
    rings: int
    """Exits to the loop's doorbells."""


def passes(argv: Sequence[str], operation: Operation, seconds: float | None) -> Passes:
    """Run a VMM. PyvmmError where the guest does not do it."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise PyvmmError(f"{' '.join(argv)} did not end within {seconds:.0f} s") from None
    ups = [float(text) for text in _UP.findall(done.stdout)]
    if done.returncode or len(ups) < 2 or "failed" in done.stdout:
        said = (done.stdout[-_TAIL:] + done.stderr[-_TAIL:]).strip()
        raise PyvmmError(f"{' '.join(argv)} ended with status {done.returncode}: {said}")
    ended = linux.run_ended(done.stderr.encode())
    took = [(after - before) * 1e9 / operation.count for before, after in itertools.pairwise(ups)]
    return Passes(took, ended.get("kicks", 0), ended.get("exits", {}).get("mmio-doorbell", 0))
