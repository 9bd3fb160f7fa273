"""Debian's stock arm64 kernel to a shell on its serial console, and off again."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.pkvm

DEADLINE = 600.0
"""Seconds; an idle lab needs about 15."""
QUICKER = "console=ttyAMA0 quiet audit=0 lsm= mitigations=off panic=-1"
"""A serial console, and less of what takes an emulator long and says nothing about a VMM."""

class Console:
    """A guest's serial console, on pipes."""

    def __init__(self, *options: str) -> None:
        self.run = subprocess.Popen(
            [sys.executable, "-m", "pyvmm", "run", "--deadline", str(DEADLINE), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
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
        """Wait for the VMM's end: its exit status, and what it said."""
        _, said = self.run.communicate(timeout=DEADLINE)
        return self.run.returncode, said.decode()


@pytest.mark.parametrize("cpus", [1, 4])
@pytest.mark.parametrize("protection", ["none", "pkvm"])
def test_debians_kernel_gets_to_a_shell_and_powers_off(protection: str, cpus: int) -> None:
    with Console("--protection", protection, "-c", str(cpus), "-i", "shell:", "-p", QUICKER, "debian:") as console:
        console.expect(b" # ")
        console.type("echo cpus=$(nproc) product=$((6 * 7))")
        console.expect(f"cpus={cpus} product=42".encode())
        console.expect(b" # ")
        console.type("poweroff")
        status, said = console.end()
    assert status == 0, said
