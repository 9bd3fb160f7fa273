# SPDX-License-Identifier: Apache-2.0
"""A block device in memory, made for one experiment: something to do O_DIRECT against, or to swap to.

Owns the device while it is open. OSError where the kernel has no zram, this user may not make one, or
this is not the lab: the device, its module and swap are the whole host's.
"""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from pyvmm.experiment.host.syscalls import NR_SWAPOFF, NR_SWAPON, call
from pyvmm.labenv import in_lab
from pyvmm.memory.address import PAGE_SIZE

CONTROL = Path("/sys/class/zram-control")
SIGNATURE = b"SWAPSPACE2"
PATIENCE = 5.0


class Zram:
    """A zram device of ``size`` bytes; a context manager. ``path`` is its node in /dev."""

    def __init__(self, size: int) -> None:
        if not in_lab():
            raise OSError(errno.EPERM, "block devices are made in the lab only")
        if not CONTROL.exists():
            _load_module()
        self.number = int((CONTROL / "hot_add").read_text())
        self.path = Path(f"/dev/zram{self.number}")
        try:
            Path(f"/sys/block/zram{self.number}/disksize").write_text(str(size))
            self._size = size
            _wait_for(self.path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def swap(self) -> None:
        """Swap to it until it is closed, as all of the host then does."""
        header = bytearray(PAGE_SIZE)
        header[1024:1032] = (1).to_bytes(4, "little") + (self._size // PAGE_SIZE - 1).to_bytes(4, "little")
        header[-len(SIGNATURE) :] = SIGNATURE
        self.path.write_bytes(header)
        answer = call(NR_SWAPON, os.fsencode(self.path), 0)
        if not answer.ok:
            raise OSError(answer.errno, f"swapon: {os.strerror(answer.errno)}")

    def close(self) -> None:
        """Swap in again what is there, and remove the device. Idempotent."""
        number, self.number = self.number, -1
        if number < 0:
            return
        remove(number)


def devices() -> set[int]:
    """Return the numbers of all zram devices there are."""
    return {int(path.name.removeprefix("zram")) for path in Path("/sys/block").glob("zram*")}


def remove(number: int) -> None:
    """Swap in again what is on a device, if it is swapped to, and remove it."""
    call(NR_SWAPOFF, f"/dev/zram{number}".encode())
    _retried(lambda: Path(f"/sys/block/zram{number}/reset").write_text("1"))
    _retried(lambda: (CONTROL / "hot_remove").write_text(str(number)))


def _load_module() -> None:
    done = subprocess.run(["modprobe", "zram", "num_devices=0"], capture_output=True, text=True)
    if done.returncode or not CONTROL.exists():
        raise OSError(errno.ENODEV, "this kernel has no zram module")


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise OSError(errno.ENOENT, f"{path} does not appear")
        time.sleep(0.01)


def _retried(work: Callable[[], object]) -> None:
    """Do what says EBUSY while somebody else, such as udev, still has the device open."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            work()
            return
        except OSError:
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
