"""How fast Linux receives and sends over a tap, beside QEMU's virtio-net-device on the same tap and host.

    pyvmm lab exec --icount --with qemu --with own: -- python3 tests/bench/virtio_net.py

Each run boots the project's kernel, which fetches a file several times and then serves one that is fetched from it. The
host's end takes the time. With --icount a second is 1e9 instructions of everything together, guest, VMM and host:
what is compared is what a byte costs. Sides take turns. QEMU has no vhost: that would be the host's kernel's work.
"""

from __future__ import annotations

import argparse
import fcntl
import http.client
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Interface
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from pyvmm.bench.peers.qemu import qemu
from pyvmm.devices.virtio.tap import Tap
from pyvmm.guest.kernels import OWN, SHELL, resolve
from pyvmm.lab.guests import made

MIB = 1 << 20
PASSES = 4
"""Of each direction, in a run; the first is not counted."""
MEMORY = "256"
PATIENCE = 900.0
SIDES = ("qemu", "none", "emulated", "pkvm")
TAP, HOST, GUEST = "pvbench0", "10.219.80.1", "10.219.80.2"
PARAMS = "console=ttyAMA0 quiet panic=-1 audit=0 mitigations=off"
TUNSETPERSIST = 0x400454CB


class Handler(BaseHTTPRequestHandler):
    """Serves the file, and lets the guest wait until it has been fetched from."""

    server: Server

    def do_GET(self) -> None:
        match self.path:
            case "/ready":
                self.server.ready.set()
                self._answer(b"")
            case "/wait":
                self.server.fetched.wait(PATIENCE)
                self._answer(b"")
            case _:
                begin = time.monotonic()
                self._answer(self.server.data)
                self.connection.shutdown(1)
                self.connection.recv(1)  # its end, once the guest has read everything
                self.server.rates.append(len(self.server.data) / MIB / (time.monotonic() - begin))

    def _answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """The host's end, for one run."""

    def __init__(self, size: int) -> None:
        super().__init__((HOST, 0), Handler)
        self.data = bytes(size)
        self.rates: list[float] = []
        self.ready, self.fetched = threading.Event(), threading.Event()


def fetch(size: int) -> float:
    """Fetch the guest's file; return MiB/s."""
    connection = http.client.HTTPConnection(GUEST, timeout=PATIENCE)
    begin = time.monotonic()
    connection.request("GET", "/file")
    answer, got, room = connection.getresponse(), 0, bytearray(MIB)
    while n := answer.readinto(room):
        got += n
    took = time.monotonic() - begin
    connection.close()
    assert got == size, got
    return size / MIB / took


def command(side: str, words: str, kernel: str, initrd: str) -> list[str]:
    """Return what boots the guest with a card before the tap."""
    append = f'{PARAMS} pyvmm.run="{words}"'
    if side == "qemu":
        return [
            *qemu(), "-M", "virt,gic-version=host", "-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", MEMORY,
            "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
            "-global", "virtio-mmio.force-legacy=false", "-kernel", kernel, "-initrd", initrd,
            "-netdev", f"tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off",
            "-device", "virtio-net-device,netdev=net", "-append", append,
        ]  # fmt: skip
    return [
        sys.executable, "-P", "-m", "pyvmm", "run", "--protection", side, "-m", MEMORY, "-i", initrd,
        "--net", f"tap={TAP}", "-p", append, kernel,
    ]  # fmt: skip


def measure(side: str, size: int, kernel: str, initrd: str) -> tuple[list[float], list[float]]:
    """Run a guest; return MiB/s to it and from it, of each pass but the first."""
    with Server(size) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://{HOST}:{server.server_port}"
        words = (
            f"ifconfig eth0 {GUEST} netmask 255.255.255.252; "
            f"for n in {' '.join('x' * PASSES)}; do wget -q -O /dev/null {url}/; done; "
            f"dd if=/dev/zero of=/tmp/file bs=1M count={size // MIB} 2>/dev/null; httpd -p 80 -h /tmp; "
            f"wget -q -O - {url}/ready; wget -q -O - {url}/wait"
        )
        argv = command(side, words, kernel, initrd)
        guest = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            if not server.ready.wait(PATIENCE):
                raise SystemExit(f"{' '.join(argv)}: no guest")
            sent = [fetch(size) for _ in range(PASSES)]
            server.fetched.set()
            said, _ = guest.communicate(timeout=PATIENCE)
        finally:
            guest.kill()
        server.shutdown()
        if guest.returncode or len(server.rates) != PASSES:
            raise SystemExit(f"{' '.join(argv)} ended with {guest.returncode}: {said.decode()[-2000:]}")
        return server.rates[1:], sent[1:]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="*", default=SIDES, help=f"of {', '.join(SIDES)} (default: all)")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--mib", type=int, default=32, help="of a file (default 32)")
    args = parser.parse_args()
    subprocess.run(["modprobe", "tun"], check=False)
    tap = Tap(TAP, IPv4Interface(f"{HOST}/30"))
    fcntl.ioctl(tap.fd, TUNSETPERSIST, 1)
    tap.close()
    kernel, initrd = resolve(OWN, SHELL, made)
    assert initrd is not None
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        # QEMU maps the kernel, which a file system that the lab is shown cannot do.
        kernel, initrd = (shutil.copy(path, folder) for path in (kernel, initrd))
        for turn in range(args.turns):
            for side in args.sides if turn % 2 else reversed(args.sides):
                both = measure(side, args.mib * MIB, kernel, initrd)
                for way, rates in zip(("receives", "sends"), both, strict=True):
                    found.setdefault((way, side), []).extend(rates)
                    print(f"{side:<10}{way:<10}{', '.join(f'{rate:7.1f}' for rate in rates)} MiB/s", flush=True)
    medians = {key: statistics.median(each) for key, each in found.items()}
    for (way, side), median in sorted(medians.items()):
        print(f"{side:<10}{way:<10}median {median:7.1f} MiB/s of {len(found[way, side])} passes over {args.mib} MiB")
    for way in ("receives", "sends"):
        for a, b in (("none", "qemu"), ("pkvm", "none"), ("emulated", "none")):
            if (way, a) in medians and (way, b) in medians:
                print(f"{way}: {a} / {b}: {medians[way, a] / medians[way, b]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
