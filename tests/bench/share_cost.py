# SPDX-License-Identifier: Apache-2.0
"""Measure a forwarded share in the native loop against the bare ioctls that it needs: python -m tests.bench.share_cost

In the lab, where time counts instructions. One guest binary shares a page and takes it back; it runs under a C program
that does nothing but what the call needs (KVM_RUN, the three arguments, one mprotect, the answer), and in the emulated
protection with no device listening. Each takes turns; the guest's own counter is the clock. Exit status 1 when the bar
is missed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from pyvmm.machine import Machine, MachineConfig
from pyvmm.protection import Protection

HERE = Path(__file__).parent
BUILT = HERE.parents[1] / ".bench"
ROUNDS = 2000
BAR = 1.10
NS_PER_TICK = 1  # with icount the lab's counter runs at 1 GHz; an instruction is a nanosecond of its time


def build() -> None:
    """Compile the bare program and the guest, both for arm64."""
    BUILT.mkdir(exist_ok=True)
    gcc, elf = "aarch64-linux-gnu-gcc", BUILT / "share_guest.elf"
    subprocess.run(
        [gcc, "-O2", "-Wall", "-Wextra", "-static", "-o", BUILT / "bare_share", HERE / "bare_share.c"], check=True
    )
    flags = ["-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0x80080000", "-Wl,--build-id=none", f"-DROUNDS={ROUNDS}"]
    subprocess.run([gcc, *flags, "-o", elf, HERE / "share_guest.S"], check=True)
    subprocess.run(["aarch64-linux-gnu-objcopy", "-O", "binary", elf, BUILT / "share_guest.bin"], check=True)


def bare(guest: Path) -> float:
    """Return the instructions a call of the bare program."""
    done = subprocess.run([BUILT / "bare_share", guest], check=True, capture_output=True, text=True)
    return _per_call(*map(int, done.stdout.split()))


def own(guest: Path) -> float:
    """Return the instructions a call of pyvmm."""
    config = MachineConfig(str(guest), Protection.EMULATED, memory=16 << 20, deadline=600, serial_out=None)
    with Machine(config) as machine:
        machine.run()
        words = machine.exit_targets.registers
    return _per_call(int.from_bytes(words[:8], "little"), int.from_bytes(words[8:16], "little"))


def _per_call(refused: int, ticks: int) -> float:
    if refused or not ticks:
        raise RuntimeError(f"the guest's calls were refused ({refused:#x}) or never made ({ticks} ticks)")
    return ticks * NS_PER_TICK / (2 * ROUNDS)


def main(arguments: list[str]) -> int:
    """Outside the lab, build and go there. Inside, measure, print and judge."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.share_cost", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    if not parser.parse_args(arguments).inside:
        build()
        inside = ["python3", "-m", "tests.bench.share_cost", "--inside"]
        command = [sys.executable, "-m", "pyvmm", "lab", "exec", "--icount", "--", *inside]
        return subprocess.run(command, check=False).returncode
    guest = BUILT / "share_guest.bin"
    pairs = [(bare(guest), own(guest)) for _ in range(3)]
    ratio = statistics.median(b / a for a, b in pairs)
    least, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{'forwarded share':24} {'instructions a call':>20} {'ratio':>7} {'bar':>6}")
    print(f"{'bare ioctls in C':24} {least:20.0f} {1:7.3f}")
    print(f"{'pyvmm, nobody listens':24} {ours:20.0f} {ratio:7.3f} {BAR:6.2f}{'' if ratio <= BAR else '  MISSED'}")
    return ratio > BAR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
