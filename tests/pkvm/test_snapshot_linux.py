"""Linux goes on from a snapshot: a loop in its shell, two vCPUs, timers, interrupts, and its virtio devices."""

from __future__ import annotations

import os
import re
import select
import time
from pathlib import Path
from typing import Self

import pytest

from pyvmm.machine import snapshot as snapshots
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.devices import Console, Disk, Rng, Vsock
from pyvmm.machine.machine import Machine
from pyvmm.machine.snapshot import Snapshot
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import config
from tests.pkvm.shown import kernel_directory

pytestmark = pytest.mark.pkvm

DEADLINE = 600.0
PARAMS = ("console=ttyAMA0", "quiet", "panic=-1", "audit=0", "mitigations=off")
COUNT = "(n=0; while :; do echo n=$((n += 1)); sleep 0.3; done) &"


class Guest:
    """A machine with its console on pipes; a context manager that ends it."""

    def __init__(self, settings: MachineConfig, snapshot: Snapshot | None = None) -> None:
        self._out, out = os.pipe()
        source, self._keys = os.pipe()
        self._ends = (self._out, out, source, self._keys)
        self._seen = b""
        self.machine = Machine(settings._replace(serial_out=out, serial_in=source), restore=snapshot)

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
        """Read until ``pattern`` comes; what is behind it stays to be read."""
        end = time.monotonic() + DEADLINE
        while (match := re.search(pattern, self._seen)) is None:
            ready, _, _ = select.select([self._out], [], [], max(end - time.monotonic(), 0))
            assert ready, f"no {pattern!r} but {self._seen!r}"
            self._seen += os.read(self._out, 1 << 16)
        self._seen = self._seen[match.end() :]
        return match

    def left(self) -> bytes:
        """What has been printed and not been read."""
        self.machine.console.drain()
        while select.select([self._out], [], [], 0)[0]:
            self._seen += os.read(self._out, 1 << 16)
        return self._seen


def test_linux_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    kernel, disk, path = kernel_directory("own:"), tmp_path / "disk", str(tmp_path / "guest")
    disk.write_bytes(bytes(1 << 20))
    printed = os.memfd_create("hvc0")
    devices = (Rng(), Disk(str(disk)), Console(printed), Vsock(str(tmp_path / "vsock"), 3))
    settings = config(
        str(kernel / "Image"), Protection.NONE, initrd=str(kernel / "shell.cpio"), params=PARAMS, cpus=2,
        memory=128 << 20, devices=devices, deadline=None,
    )  # fmt: skip
    with Guest(settings) as guest:
        guest.expect(b"# ")
        guest.type(COUNT)
        last = int(guest.expect(rb"n=(\d+)\r\n")[1])
        guest.machine.pause()
        snapshots.save(guest.machine, path)
        last = max([last, *map(int, re.findall(rb"n=(\d+)", guest.left()))])
    with Guest(settings, Snapshot(path)) as guest:
        # What was half printed is printed on.
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
