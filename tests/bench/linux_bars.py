# SPDX-License-Identifier: Apache-2.0
"""Check the bars of Linux guests: python -m tests.bench.linux_bars [BAR…]

Boots a lab with QEMU and the project's kernel and measures there by turns: ``boot`` in one that has kvmtool too and
where time counts instructions, the others in one whose time is the emulator's. Prints what was found beside each bar.
Exit status 1 where one is missed.

    boot        exec to the guest's init, plain protection: at most 0.75 times QEMU's with KVM, and 1.0 times kvmtool's
    blk         sequential reads of 1 MiB past the cache, plain protection: at least 0.8 times QEMU's speed
    protection  the same under pkvm, beside plain: no bar
    footprint   PSS of the VMM less guest memory, with every device: at most 25 MiB in every protection
    boots       50 boots in a row in every protection
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator

from pyvmm.bench import linux, peers, transfers
from pyvmm.bench.cases.boot import PHASES
from pyvmm.bench.model import Series
from pyvmm.bench.task import measure_point
from pyvmm.experiment.environment import counts
from pyvmm.guest.kernels import OWN
from pyvmm.memory.address import MIB
from pyvmm.protection import PROTECTIONS

BOOTS = 50
TURNS = 5
"""How many boots to compare with a peer's. Instruction counts repeat, so few are enough."""
PATIENCE = 600.0

Finding = tuple[str, float, float | None, float | None]
"""What was measured, the value, its maximum, its minimum."""


def beside(name: str, **how: int) -> list[Series]:
    """Measure a peer and pyvmm by turns. Raises SystemExit if that is impossible here."""
    found = peers.measure(name, **how)
    for series in found:
        if series.unavailable:
            raise SystemExit(f"{name}: {series.unavailable}")
    return found


def ratios(found: list[Series]) -> dict[str, float]:
    """Return pyvmm's time divided by the peer's, by what was done."""
    return {
        str(series.point["what"]): float(str(value))
        for series in found
        for note, value in series.notes.items()
        if note.startswith("ratio to ")
    }


def median(series: list[Series]) -> float:
    """Return the median of the only series. Raises SystemExit if there is no series."""
    if series[0].unavailable:
        raise SystemExit(series[0].unavailable)
    return statistics.median(series[0].kept)


def boot() -> Iterator[Finding]:
    with linux.files(OWN) as guest:
        boots = [linux.boot(linux.pyvmm(guest, "none", 1), peers.patience()) for _ in range(TURNS)]
    for phase, (begin, end) in PHASES.items():
        took = statistics.median(getattr(each, end) - getattr(each, begin) for each in boots[1:])
        yield f"boot: {phase}, pyvmm, millions of {counts()}", took / 1e6, None, None
    for name, most in {"qemu boot": 0.75, "kvmtool boot": 1.0}.items():
        found = beside(name, turns=TURNS)
        for series in found:
            yield f"{name}: {series.point['peer']}, millions of {series.unit}", median([series]) / 1e6, None, None
        yield f"boot: exec to init, times {name.partition(' ')[0]}'s", ratios(found)["boot"], most, None


def blk() -> Iterator[Finding]:
    for operation, ratio in ratios(beside("qemu virtio")).items():
        yield f"{operation}, QEMU's time over ours", 1 / ratio, None, 0.8 if operation == "blk read" else None


def protection() -> Iterator[Finding]:
    for operation in ("blk read", "net receive", "net send"):
        took = {
            each: median(measure_point("virtio", {"protection": each, "operation": operation}))
            for each in ("none", "pkvm")
        }
        yield f"protection: {operation}, pkvm's time over none's", took["pkvm"] / took["none"], None, None


def footprint() -> Iterator[Finding]:
    for each in PROTECTIONS:
        series = measure_point("footprint", {"protection": each, "kernel": OWN, "memory": linux.MEMORY})
        yield f"footprint: MiB, {each}, every device", median(series) / MIB, 25.0, None


def boots() -> Iterator[Finding]:
    parameters = f"{linux.PARAMETERS} -- dd if=/dev/vda of=/dev/null bs=1M count=1"
    with transfers.host() as here:
        for each in PROTECTIONS:
            argv = linux.pyvmm(here.guest, each, 1, "--disk", here.disk, "--rng", parameters=parameters)
            good = sum(re.search(rb"exit status 0\b", ended(argv)) is not None for _ in range(BOOTS))
            yield f"boots: of {BOOTS} in a row, {each}, a MiB read of a disk each", good, None, BOOTS


def ended(argv: list[str]) -> bytes:
    """Run a guest to its end. Return its console, or an empty string if the VMM failed."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False)
    return done.stdout if not done.returncode else b""


BARS: dict[str, Callable[[], Iterator[Finding]]] = {
    each.__name__: each for each in (boot, blk, protection, footprint, boots)
}

COUNTED = ("boot",)
"""The bars that need a clock of instructions."""


def in_lab(bars: list[str], *options: str) -> int:
    """Measure in a lab, if there is anything to measure. Return the exit status."""
    if not bars:
        return 0
    lab = ["lab", "exec", *options, *("--with", "qemu", "--with", OWN)]
    command = [sys.executable, "-m", "pyvmm", *lab, "--", "python3", "-m", "tests.bench.linux_bars", *bars]
    return subprocess.run(command, check=False).returncode


def main(arguments: list[str]) -> int:
    """Measure, print and judge, in a lab unless this is an arm64 host."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.linux_bars", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("bars", nargs="*", metavar="BAR", help=f"of {', '.join(BARS)} (default: all)")
    wanted = parser.parse_args(arguments).bars or list(BARS)
    if unknown := [each for each in wanted if each not in BARS]:
        parser.error(f"no bar is called {', '.join(unknown)}; there are {', '.join(BARS)}")
    if platform.machine() != "aarch64":
        counted = in_lab([each for each in wanted if each in COUNTED], "--icount", "--with", "kvmtool")
        return max(counted, in_lab([each for each in wanted if each not in COUNTED]))
    missed = 0
    for name in wanted:
        for what, found, most, least in BARS[name]():
            bad = (most is not None and found > most) or (least is not None and found < least)
            missed += bad
            limit = f"at most {most}" if most is not None else f"at least {least}" if least is not None else ""
            print(f"{what:<60} {found:>8.3f}   {limit:<14} {'MISSED' if bad else 'met' if limit else ''}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
