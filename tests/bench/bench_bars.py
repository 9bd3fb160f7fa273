# SPDX-License-Identifier: Apache-2.0
"""Check the benchmark's own bars: python -m tests.bench.bench_bars

Measures the quick set in two fresh labs where time counts instructions, on the project's kernel, whose hypervisor can
be traced, in the second one from its last point to its first; and the peers in a third one on Debian's. Prints what was
found beside each bar. Exit status 1 where one is missed.

    repeats     every median within 1 % of the other lab's, or within a tick of the counter where that is more
    load        a cold first load under pkvm, within 1 % of a cold first store
    stamps      the same of those made of the hypervisor's stamps, which are cut to 1,000 instructions
    measuring   what the touch of a mapped page costs, at most 2 % of the cheapest fault
    fault-in    memfd, plain protection, per page: at most 1.02 times the kernel's demand_paging_test
    split       the parts of a cold first touch under pkvm, each measured by itself: within 10 % of the whole
    prefault    cuts the guest's first touch under pkvm, and the whole cost with its preparation
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pyvmm.bench import collect
from pyvmm.bench.collect import Plan, Step
from pyvmm.bench.model import Run, Series, read
from pyvmm.bench.split import PARTS, WHOLE
from pyvmm.guest.kernels import OWN

TICK = 1.0
"""Instructions: with icount the lab's counter runs at 1 GHz."""
STAMPED = ("residency", "split")
"""Cases that use the hypervisor's stamps, which have a grain of 1,000 instructions. A loop's period beats with that
grain, and a median does not average it out. These cases are judged apart, so that they hide no other miss."""


def measure(file: Path, *words: str) -> Run:
    """Measure in a separate lab."""
    command = [sys.executable, "-m", "pyvmm", "--lab", "--lab-icount", *words, "--json", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read(str(file))


class Backwards(Plan):
    """A plan whose last point is measured first."""

    def steps(self) -> list[Step]:
        """Return the points in the order of measuring."""
        return Plan.steps(self)[::-1]


def measure_backwards(file: Path) -> Run:
    """Measure the quick set backwards in a separate lab, on the project's kernel."""
    inside = ["python3", "-m", "tests.bench.bench_bars", "--inside"]
    lab = ["lab", "exec", "--icount", "--host-kernel", "own", "--with", OWN, "--", *inside]
    with file.open("w") as output:
        subprocess.run([sys.executable, "-m", "pyvmm", *lab], check=True, stdout=output)
    return read(str(file))


def say(line: str) -> None:
    """Pass a line on as it comes."""
    sys.stdout.write(line)
    sys.stdout.flush()


def medians(run: Run) -> dict[tuple[object, ...], tuple[float, Series]]:
    """Return every series' median by its key."""
    return {each.key: (statistics.median(each.kept), each) for each in run.series if each.kept}


def of(run: Run, case: str, metric: str, **point: object) -> float:
    """Return the median of the only matching series."""
    found = [
        median
        for median, each in medians(run).values()
        if (each.case, each.metric) == (case, metric) and point.items() <= each.point.items()
    ]
    return found[0]


def repeats(one: Run, other: Run, *, stamped: bool = False) -> tuple[float, str]:
    """Return the largest relative difference of two labs' medians, and its series: of stamp cases or of the others."""
    a, b = medians(one), medians(other)
    keys = [key for key in sorted(a.keys() & b.keys(), key=str) if (a[key][1].case in STAMPED) == stamped]
    worst, where = 0.0, "nothing"
    for key in keys:
        (x, series), (y, _) = a[key], b[key]
        if abs(x - y) > TICK:
            apart = abs(x - y) / min(abs(x), abs(y))
            if apart > worst:
                worst, where = apart, f"{series.case}, {series.metric}, {series.point}: {x:g} and {y:g}"
    return worst, f"{len(keys)} medians; the most apart: {where}"


def main(arguments: list[str]) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.bench_bars", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args(arguments).inside:
        collect.measure(Backwards(quick=True), say)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        one = measure(Path(directory) / "a.jsonl", "--host-kernel", "own", "bench", "--quick")
        other = measure_backwards(Path(directory) / "b.jsonl")
        few = ["bench", "exit", "--axis", "kind=hvc", "--axis", "protection=none", "--peers"]
        peers = measure(Path(directory) / "peers.jsonl", *few)
    missed = 0

    def bar(what: str, found: float, most: float, how: str) -> None:
        nonlocal missed
        missed += found > most
        print(f"{what:<10} {found:>8.4f}   at most {most:<6} {'MISSED' if found > most else 'met':<7} {how}")

    bar("repeats", *_with(repeats(one, other), 0.01))
    bar("stamps", *_with(repeats(one, other, stamped=True), 0.01))
    untouched: dict[str, object] = {"protection": "pkvm", "state": "cold"}
    load, store = (of(one, "fault", "touch", **untouched, access=access) for access in ("read", "write"))
    bar("load", abs(load / store - 1), 0.01, f"a first load {load:.0f}, a first store {store:.0f}")
    mapped = of(one, "fault", "whole range", state="mapped", protection="pkvm")
    cheapest = min(
        median
        for median, each in medians(one).values()
        if each.case == "fault" and each.metric == "touch" and each.point["state"] not in ("mapped", "dontneed")
    )
    bar("measuring", mapped / cheapest, 0.02, f"{mapped:.1f} instructions a page; the cheapest fault {cheapest:.0f}")
    [ratio] = [
        value
        for each in peers.series
        for note, value in each.notes.items()
        if each.point.get("beside") == "demand_paging_test" and note.startswith("ratio to ")
    ]
    bar("fault-in", float(str(ratio)), 1.02, "times demand_paging_test, by turns")
    whole = of(one, "split", WHOLE)
    parts = {part: of(one, "split", part) for part in PARTS}
    total = sum(parts.values())
    said = " + ".join(f"{part} {value:.0f}" for part, value in parts.items())
    bar("split", abs(total / whole - 1), 0.10, f"{said} = {total:.0f}; the whole {whole:.0f}")
    cold, ready = (of(one, "prefault", "touch", protection="pkvm", means=means) for means in ("nothing", "--prefault"))
    both = of(one, "prefault", "together", protection="pkvm", means="--prefault")
    bar("prefault", ready / cold, 0.75, f"a first touch {cold:.0f} without, {ready:.0f} with it")
    bar("prefault", both / cold, 0.90, f"prepared and touched {both:.0f}")
    return 1 if missed else 0


def _with(found: tuple[float, str], most: float) -> tuple[float, float, str]:
    return found[0], most, found[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
