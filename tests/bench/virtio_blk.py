"""How fast a guest reads a disk, a MiB at a time and past its cache, beside QEMU's virtio-blk-device on the same host.

    pyvmm lab exec --with qemu --with own: -- python3 tests/bench/virtio_blk.py

Each run boots the project's kernel, which times itself reading the whole disk several times over. The disk is a file
that the host has in memory, so no medium has a part in it. Sides take turns. Exit status 1 below 0.8 of QEMU.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from pyvmm.bench.peers.qemu import qemu
from pyvmm.guest.kernels import OWN, SHELL, resolve
from pyvmm.lab.guests import made

MIB = 1 << 20
DISK = 256
"""MiB."""
PASSES = 3
"""Over the disk, in a run; the first is not counted."""
BAR = 0.8
MEMORY = "256"
PATIENCE = 600.0
SIDES = ("qemu", "none", "pool", "emulated", "pkvm")
"""pool: a plain guest that copies through a pool all the same, which is what protection costs but for the sharing."""

PARAMS = "console=ttyAMA0 quiet panic=-1 audit=0 mitigations=off"
READ = "dd if=/dev/vda of=/dev/null bs=1M iflag=direct"
"""What is measured; what it says of itself differs among versions, so the guest's uptime is what counts."""
COMMAND = (
    "read a b </proc/uptime; echo up $a; "
    f"for n in {' '.join('x' * PASSES)}; do {READ} 2>/dev/null || echo failed; read a b </proc/uptime; echo up $a; done"
)
_UP = re.compile(r"^up (\d+\.\d+)\r?$", re.MULTILINE)


def command(side: str, disk: str, kernel: str, initrd: str) -> list[str]:
    """Return what boots the guest with the disk."""
    if side == "qemu":
        return [
            *qemu(), "-M", "virt,gic-version=host", "-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", MEMORY,
            "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
            "-global", "virtio-mmio.force-legacy=false", "-kernel", kernel, "-initrd", initrd,
            "-drive", f"file={disk},if=none,format=raw,id=disk", "-device", "virtio-blk-device,drive=disk",
            "-append", f"{PARAMS} -- {COMMAND}",
        ]  # fmt: skip
    how = ["--swiotlb", "16"] if side == "pool" else ["--protection", side]
    return [
        sys.executable, "-P", "-m", "pyvmm", "run", *how, "-m", MEMORY, "-i", initrd, "-d", disk,
        "-p", f"{PARAMS} -- {COMMAND}", kernel,
    ]  # fmt: skip


def rates(argv: list[str]) -> list[float]:
    """Run a guest; return the MiB/s of each pass but the first."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False)
    ups = [float(text) for text in _UP.findall(done.stdout)]
    if len(ups) != PASSES + 1 or "failed" in done.stdout:
        raise SystemExit(f"{' '.join(argv)}\nended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-1000:]}")
    return [DISK / (after - before) for before, after in itertools.pairwise(ups[1:])]


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="*", default=SIDES, help=f"of {', '.join(SIDES)} (default: all)")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    kernel, initrd = resolve(OWN, SHELL, made)
    assert initrd is not None
    found: dict[str, list[float]] = {side: [] for side in args.sides}
    with tempfile.TemporaryDirectory() as folder:
        # QEMU maps the kernel, which a file system that the lab is shown cannot do.
        kernel, initrd = (shutil.copy(path, folder) for path in (kernel, initrd))
        disk = Path(folder) / "disk.img"
        disk.write_bytes(os.urandom(MIB) * DISK)
        for turn in range(args.turns):
            for side in args.sides if turn % 2 else reversed(args.sides):
                found[side] += (measured := rates(command(side, str(disk), kernel, initrd)))
                print(f"{side:<10}{', '.join(f'{rate:7.1f}' for rate in measured)} MiB/s", flush=True)
    medians = {side: statistics.median(each) for side, each in found.items()}
    for side, median in medians.items():
        print(f"{side:<10}median {median:7.1f} MiB/s of {len(found[side])} passes over {DISK} MiB")
    for a, b in (("none", "qemu"), ("pool", "none"), ("pkvm", "none"), ("emulated", "none")):
        if a in medians and b in medians:
            print(f"{a} / {b}: {medians[a] / medians[b]:.2f}")
    if "qemu" in medians and "none" in medians:
        return 0 if medians["none"] / medians["qemu"] >= BAR else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
