# SPDX-License-Identifier: Apache-2.0
"""Whether what a guest was told is on its disk is there, after its VMM was killed while it wrote.

The guest appends numbers to a file in ext4, each with fsync, and prints each afterwards. One file system goes through
all kills, so its journal is replayed each time by the kernel of the next guest, or by e2fsck.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyvmm.protection import Protection
from tests.pkvm.disks import check, read_file
from tests.pkvm.required import kernel_directory, program
from tests.soak.endings import PATIENCE
from tests.soak.guests import CONSOLE

SIZE: Final = 16 << 20
RECORD: Final = 16
"""Bytes of a number in the file."""
LATE: Final = 3.0
"""Seconds from the first number to the kill, at most."""
WRITE: Final = (
    f"mount /dev/vda /mnt; n=$(($(stat -c %s /mnt/log) / {RECORD})); while :; do "
    f"printf '%0{RECORD - 1}d\\n' $n | dd of=/mnt/log bs={RECORD} seek=$n count=1 conv=fsync,notrunc 2>/dev/null "
    "&& echo told $n; n=$((n + 1)); done"
)


@dataclass(slots=True)
class Disk:
    """A disk in ``directory`` with a file of numbers, and how many of them a guest was told are durable."""

    directory: Path
    told: int = 0

    @property
    def path(self) -> Path:
        """The disk's image."""
        return self.directory / "written"

    def make(self) -> None:
        """Write an empty file system with an empty file."""
        source = self.path.with_suffix(".d")
        source.mkdir()
        (source / "log").touch()
        with self.path.open("wb") as file:
            file.truncate(SIZE)
        command = [program("mke2fs", "e2fsprogs"), "-q", "-F", "-t", "ext4", "-d", str(source), str(self.path)]
        subprocess.run(command, check=True, timeout=PATIENCE)

    def kill_a_writer(self, protection: Protection, chance: random.Random) -> None:
        """Start a guest that writes, and kill its VMM at a random time after the first number."""
        files = kernel_directory("own:")
        params = f"{CONSOLE} {WRITE}"
        words = ["--protection", protection.value, "-m", "128M", "-d", str(self.path), "-p", params]
        process = subprocess.Popen(
            [sys.executable, "-m", "pyvmm", "run", *words, "-i", str(files / "shell.cpio"), str(files / "Image")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "XDG_RUNTIME_DIR": str(self.directory)},  # it leaves its control socket there
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            seen = b""
            while b"told" not in seen and (data := process.stdout.read1(4096)):  # type: ignore[attr-defined]
                seen += data
            time.sleep(chance.uniform(0, LATE))
        finally:
            process.kill()
        out, err = process.communicate()
        numbers = [int(number) for number in re.findall(rb"told (\d+)\r", seen + out)]
        assert numbers, f"the guest wrote nothing: {(seen + out)[-500:]!r} {err[-500:]!r}"
        assert numbers[0] >= self.told, f"{self.told} numbers were told, but the next guest found {numbers[0]}"
        self.told = numbers[-1] + 1

    def verify(self) -> None:
        """Fail unless the file system is clean once its journal is played, and has all that was told."""
        replay = [program("e2fsck", "e2fsprogs"), "-y", "-E", "journal_only", str(self.path)]
        subprocess.run(replay, capture_output=True, timeout=PATIENCE, check=False)
        check(self.path)
        numbers = read_file(self.path, "log").split()
        assert len(numbers) >= self.told, f"{len(numbers)} of {self.told} numbers are there"
        assert [int(number) for number in numbers] == list(range(len(numbers)))
