# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.soak``: see the package."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path

from pyvmm.errors import PyvmmError
from pyvmm.protection import Protection
from tests.labtier import SHOWN
from tests.soak import __doc__ as usage
from tests.soak import host
from tests.soak.kills import Disk
from tests.soak.runs import Done, drawn, made, make, name_of

EVERY = 20
"""Runs from one line of progress to the next."""
LATEST = 10.0
"""Seconds. A soak on a busy host would take too long if it waited for more."""


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        "python -m tests.soak", description=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000, metavar="N", help="how many runs (1000)")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="how many kills of a guest that writes (50)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="what random choices come from (the time)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="make this run of the seed only")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="runs at a time (2)")
    parser.add_argument("--here", action="store_true", help="on this host, not in a lab")
    return parser.parse_args(words)


def soak(options: argparse.Namespace) -> int:
    """Make the runs and kills on this host, and print the tables. Returns the exit status."""
    host.prepare()
    with tempfile.TemporaryDirectory(prefix="pyvmm-soak-") as directory:
        late = warm_up(Path(directory))
    before = host.held()
    with tempfile.TemporaryDirectory(prefix="pyvmm-soak-") as directory:
        wrong = runs(options, Path(directory), late) if options.runs else 0
        wrong += kills(options, Path(directory)) if options.kills else 0
    after = host.settled(before)
    more = host.more(after, before)
    print(f"\n{'the host':<40} {'before':>9} {'after':>9}")
    for what, number in before.items():
        left = "  left" if what in more else ""
        print(f"{what:<40} {number:>9} {after[what]:>9}{left}")
    for line in host.warnings()[before["kernel warnings"] :]:
        print(f"  {line}")
    return 1 if wrong or more else 0


def warm_up(directory: Path) -> float:
    """Make one run of each protection: a kernel's first ones leave a warning, caches and modules.

    Returns the seconds within which something is done to the runs that follow: in their start, or later.
    """
    begun = time.monotonic()
    for number, protection in enumerate(Protection):
        run = next(run for run in drawn(0) if run.protection is protection and run.ending.name == "power off")
        make(run, directory / str(number), 0)
    return min(time.monotonic() - begun, LATEST)


def runs(options: argparse.Namespace, directory: Path, late: float) -> int:
    """Make the runs, and print a table of how they ended. Returns how many went wrong."""
    start, total = (0, options.runs) if options.only is None else (options.only, 1)
    chosen = islice(drawn(options.seed), start, start + total)
    begun = time.monotonic()
    all_done: list[Done] = []
    for done in made(chosen, directory, options.at_once, late):
        all_done.append(done)
        if done.wrong:
            print(f"{done.run}: " + "\n  ".join(done.wrong), flush=True)
        if len(all_done) % EVERY == 0:
            print(f"{len(all_done)} of {total} runs in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    print(f"\nseed {options.seed}: {len(all_done)} runs in {time.monotonic() - begun:.0f} s\n")
    print(f"{'ended by':<24} {'none':>5} {'emul.':>6} {'pkvm':>5} {'wrong':>6}  statuses")
    for ending in dict.fromkeys(done.run.ending.name for done in all_done):
        these = [done for done in all_done if done.run.ending.name == ending]
        each = Counter(done.run.protection for done in these)
        none, emulated, pkvm = (each[protection] for protection in Protection)
        statuses = Counter(name_of(done.status) for done in these)
        told = ", ".join(f"{status} ({number})" for status, number in statuses.most_common())
        bad = sum(bool(done.wrong) for done in these)
        print(f"{ending:<24} {none:>5} {emulated:>6} {pkvm:>5} {bad:>6}  {told}")
    return sum(bool(done.wrong) for done in all_done)


def kills(options: argparse.Namespace, directory: Path) -> int:
    """Kill writers, and print what is durable. Returns 0; fails if anything is lost."""
    chance = random.Random(options.seed)
    disk = Disk(directory)
    disk.make()
    for number in range(options.kills):
        disk.kill_a_writer(chance.choice(list(Protection)), chance)
        if number % 2 or number == options.kills - 1:  # else the next guest plays the journal
            disk.verify()
    print(f"\n{options.kills} VMMs killed while their guests wrote: the file system is clean, and has all of the")
    print(f"{disk.told} numbers that the guests were told are durable")
    return 0


def in_lab(words: list[str]) -> int:
    """Do the same in a lab, whose host is new and has nothing else to do."""
    from pyvmm.lab import Lab, build_image
    from pyvmm.lab.peers import prepare

    shown = prepare(SHOWN)
    for name, why in shown.lacking.items():
        raise PyvmmError(f"the soak needs {name}: {why}")
    with Lab(image=build_image(), arguments=shown.paths) as lab:
        return lab.run(
            ["python3", "-m", "tests.soak", "--here", *words],
            stdout=lambda data: os.write(1, data),
            stderr=lambda data: os.write(2, data),
            env=shown.environment,
        )


def main() -> int:
    """Run the command line."""
    options = parsed()
    if options.here:
        return soak(options)
    words = sys.argv[1:]
    return in_lab(words if "--seed" in words else [*words, "--seed", str(options.seed)])


if __name__ == "__main__":
    sys.exit(main())
