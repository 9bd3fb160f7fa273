# SPDX-License-Identifier: Apache-2.0
"""Debian's stock arm64 kernel boots to a shell on its serial console, uses devices by its modules, and powers off."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyvmm.kvm.system import System
from pyvmm.uapi.kvm_cap import KVM_CAP_ARM_PMU_V3
from tests.pkvm import disks

pytestmark = pytest.mark.pkvm

DEADLINE = 600.0
"""Seconds; an idle lab needs about 15."""
QUICKER = "console=ttyAMA0 quiet audit=0 lsm= mitigations=off panic=-1"
"""A serial console, and less of what takes an emulator long and says nothing about a VMM."""
OFF = 2
"""Seconds between the guest's clock and the host's: a guest reads whole seconds, and takes the middle of one."""
TAP, HOST, GUEST = "pvdeb0", "10.219.82.1", "10.219.82.2"
DRIVERS = ["virtio_balloon", "virtio_blk", "virtio_net", "virtio_rng", "vmw_vsock_virtio_transport"]


class Console:
    """A guest's serial console, on pipes."""

    def __init__(self, *options: str) -> None:
        self.run = subprocess.Popen(
            [sys.executable, "-m", "pyvmm", "run", "--deadline", str(DEADLINE), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.seen = b""

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.run.kill()
        self.run.communicate()

    def expect(self, text: bytes) -> bytes:
        """Read until ``text`` comes, and return what came before it."""
        assert self.run.stdout is not None
        end = time.monotonic() + DEADLINE
        while text not in self.seen:
            ready, _, _ = select.select([self.run.stdout], [], [], max(end - time.monotonic(), 0))
            more = os.read(self.run.stdout.fileno(), 1 << 16) if ready else b""
            assert more, f"no {text!r} but {self.seen!r}"
            self.seen += more
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, line: str) -> None:
        assert self.run.stdin is not None
        self.run.stdin.write(line.encode() + b"\n")
        self.run.stdin.flush()

    def end(self) -> tuple[int, str]:
        """Wait until the VMM ends; returns its exit status and its messages."""
        _, said = self.run.communicate(timeout=DEADLINE)
        return self.run.returncode, said.decode()

    def sh(self, command: str) -> str:
        """Run a command at the prompt, and return its output. Fails if its exit status is not 0."""
        # The terminal echoes the line as typed. In the echo the two words are apart.
        self.type(f"printf '[%s]' begin; {command}; printf '[%s %d]' end $?")
        self.expect(b"[begin]")
        said = self.expect(b"[end ").decode(errors="replace").replace("\r", "")
        status = self.expect(b"]")
        self.expect(b" # ")
        assert status == b"0", f"{command!r} ended with {status.decode()}: {said}"
        return said


@pytest.mark.parametrize("cpus", [1, 4])
@pytest.mark.parametrize("protection", ["none", "pkvm"])
def test_debians_kernel_boots_to_a_shell_and_powers_off(protection: str, cpus: int, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    # Only a plain guest can use the devices: this kernel shares no pages.
    devices = devices_in(tmp_path, image) if protection == "none" else []
    options = ["--protection", protection, "-c", str(cpus), *devices, "-i", "shell:", "-p", QUICKER, "debian:"]
    with Console(*options) as console:
        said_by_init = console.expect(b" # ")
        assert console.sh("echo cpus=$(nproc) product=$((6 * 7))") == f"cpus={cpus} product=42\n"
        asked = time.time()
        assert asked - OFF <= int(console.sh("date +%s")) <= time.time() + OFF
        if devices:
            assert b"modprobe" not in said_by_init
            use_devices(console)
        console.type("poweroff")
        status, said = console.end()
    assert status == 0, said
    if devices:
        disks.check(image)
        assert disks.read_file(image, "/answer") == b"written by the guest\n"


def devices_in(directory: Path, image: Path) -> list[str]:
    """Return options for one of each device that Debian's kernel has a module for; the disk is a new ``image``."""
    subprocess.run(["modprobe", "tun"], check=False)
    disks.make_root(image, 16 << 20, "", {"question": b"written by the host\n"})
    blocks = directory / "blocks"
    blocks.write_bytes(b"in large blocks\n".ljust(1 << 20, b"\0"))
    return [
        *(["--pmu"] if has_pmu() else []),
        "-d",
        str(image),
        "-d",
        f"{blocks},block=4096",
        "--net",
        f"tap={TAP},host={HOST}/30",
        "--rng",
        "--balloon",
        "0",
        "--vsock",
        f"uds={directory / 'vsock'},cid=3",
    ]


def has_pmu() -> bool:
    """Return whether this host's KVM has a PMU for plain guests."""
    with System.open() as system:
        return bool(system.check(KVM_CAP_ARM_PMU_V3))


def use_devices(console: Console) -> None:
    """Have the guest use the devices of :func:`devices_in`."""
    drivers = console.sh("for each in /sys/bus/virtio/devices/*/driver; do basename $(readlink $each); done")
    assert sorted(set(drivers.split())) == DRIVERS
    assert ("pmu" in console.sh("ls /sys/bus/event_source/devices")) == has_pmu()
    assert (
        console.sh("cat /sys/block/vd?/queue/logical_block_size; head -n 1 /dev/vdb") == "512\n4096\nin large blocks\n"
    )
    assert console.sh("mount -t ext4 /dev/vda /mnt && cat /mnt/question") == "written by the host\n"
    console.sh("echo written by the guest >/mnt/answer")
    console.sh(f"ifconfig eth0 {GUEST} netmask 255.255.255.252 && ping -c 1 -W {DEADLINE:.0f} {HOST}")
    assert console.sh("head -c 16 /dev/hwrng | wc -c") == "16\n"
    console.sh("[ -c /dev/vsock ]")
