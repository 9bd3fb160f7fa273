# SPDX-License-Identifier: Apache-2.0
"""A block device in memory for one experiment, for O_DIRECT or as swap.

Owns the device while it is open. Raises OSError if the kernel has no zram, this user may not make one, or this is not
the lab: device, module and swap are host-wide.
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
from pyvmm.pages import HOST_PAGE

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
        """Use it as swap until it is closed, for the whole host."""
        header = bytearray(HOST_PAGE)
        header[1024:1032] = (1).to_bytes(4, "little") + (self._size // HOST_PAGE - 1).to_bytes(4, "little")
        header[-len(SIGNATURE) :] = SIGNATURE
        self.path.write_bytes(header)
        answer = call(NR_SWAPON, os.fsencode(self.path), 0)
        if not answer.ok:
            raise OSError(answer.errno, f"swapon: {os.strerror(answer.errno)}")

    def close(self) -> None:
        """Turn off swap on it, and remove the device. Idempotent."""
        number, self.number = self.number, -1
        if number < 0:
            return
        remove(number)


def devices() -> set[int]:
    """Return the numbers of all zram devices there are."""
    return {int(path.name.removeprefix("zram")) for path in Path("/sys/block").glob("zram*")}


def remove(number: int) -> None:
    """Turn off swap on a device if it is in use, and remove it."""
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
    """Repeat an action while it fails with EBUSY, because another process such as udev has the device open."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            work()
            return
        except OSError:
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
