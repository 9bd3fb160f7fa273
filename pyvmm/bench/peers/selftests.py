# SPDX-License-Identifier: Apache-2.0
"""The kernel's own KVM selftests: where they are, how they are run, and the figures in what they print.

What they need of the host they say themselves; only in the lab, where the host is ours, is it given to them.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Final

from pyvmm.bench.model import Series
from pyvmm.bench.peers import PATIENCE, TURNS, kept, patience
from pyvmm.errors import HostError, PyvmmError
from pyvmm.lab.trees import find_tree
from pyvmm.labenv import in_lab

SKIPPED: Final = 4
"""A selftest's exit status where the host lacks what it needs."""
HINT: Final = "pyvmm --lab bench --peers builds it"
PAGES: Final = 4096
LRU_GEN: Final = Path("/sys/kernel/mm/lru_gen/enabled")
CGROUPS: Final = Path("/sys/fs/cgroup")
DEBUG: Final = Path("/sys/kernel/debug")
CONTROLLERS: Final = CGROUPS / "cgroup.subtree_control"

_MODE = re.compile(r"^\s+(\d+):\s+(PA-bits:\S+).*\b4K pages \(supported\)", re.MULTILINE)
_STEP = re.compile(r"^(\S.*?)\s*: (\d+\.\d{9})s$", re.MULTILINE)
_VCPU = re.compile(r"^vCPU \d+ execution time: (\d+\.\d{9})s$", re.MULTILINE)


class SelftestError(PyvmmError):
    """A selftest that failed, with the last of what it said."""


def program(name: str) -> Path:
    """Return where a selftest is. HostError where it has not been built."""
    tree = find_tree("selftests")
    path = tree / name if tree else None
    if path is None or not path.is_file():
        raise HostError(f"the kernel's selftest {name} is not here", hint=HINT)
    return path


def run(name: str, *arguments: str) -> str:
    """Run a selftest; return what it printed. HostError where it skips itself, SelftestError where it fails."""
    command = [str(program(name)), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience(), check=False)
    except subprocess.TimeoutExpired:
        raise SelftestError(f"{' '.join(command)} did not end within {PATIENCE:.0f} s") from None
    if done.returncode == SKIPPED:
        raise HostError(f"{name} skips itself: {_last(done.stdout).partition('# SKIP - ')[2] or _last(done.stdout)}")
    if done.returncode:
        said = _last(done.stdout + done.stderr)
        raise SelftestError(f"{' '.join(command)} ended with status {done.returncode}: {said}")
    return done.stdout


def _last(said: str) -> str:
    return " | ".join(line.strip() for line in said.strip().splitlines()[-3:])


def guest_mode(usage: str) -> str:
    """Return the number of a guest mode with 4 KiB pages out of a test's ``-h``; of pyvmm's guests' IPA size if it can.

    Without one, a test runs in every mode that the host supports. HostError where it supports none.
    """
    modes: dict[str, str] = {bits: number for number, bits in _MODE.findall(usage)}
    if not modes:
        raise HostError("the kernel's selftests support no guest with pages of 4 KiB on this host")
    return modes.get("PA-bits:40,") or next(iter(modes.values()))


@cache
def mode_of(name: str) -> str:
    """Return the guest mode that a test is to run in here."""
    return guest_mode(run(name, "-h"))


def steps(said: str) -> dict[str, float]:
    """Return what access_tracking_perf_test says its steps took, in ns; of those that repeat, the last."""
    return {what: float(seconds) * 1e9 for what, seconds in _STEP.findall(said)}


def longest(said: str) -> float:
    """Return what demand_paging_test says its slowest vCPU took, in ns. SelftestError where it does not say."""
    found = _VCPU.findall(said)
    if not found:
        raise SelftestError(f"demand_paging_test does not say what a vCPU took: {_last(said)}")
    return max(map(float, found)) * 1e9


def access_tracking() -> list[Series]:
    """Ask what touching pages costs that are mapped, and that the host has marked idle to learn who touches them."""
    name = "access_tracking_perf_test"
    if len(os.sched_getaffinity(0)) < 2:
        raise HostError(f"a thread of {name} spins while its guest runs: on one CPU they would share it")
    seen: dict[str, list[list[float]]] = {}
    with _tracking():
        for _ in range(TURNS):
            said = run(name, "-m", mode_of(name), "-s", "shmem", "-b", f"{PAGES * 4096}")
            for what, ns in steps(said).items():
                seen.setdefault(what, []).append([ns / PAGES])
    return [
        kept({"peer": name, "what": what, "backing": "memfd"}, "access", turns, clock="host", per="page", pages=PAGES)
        for what, turns in seen.items()
    ]


@contextlib.contextmanager
def _tracking() -> Iterator[None]:
    """Let the lab's kernel age pages the way that the test looks at; nothing is changed elsewhere."""
    with contextlib.ExitStack() as undo:
        if in_lab():
            for kind, at, there in (("debugfs", DEBUG, DEBUG / "lru_gen"), ("cgroup2", CGROUPS, CONTROLLERS)):
                if not there.exists() and not subprocess.run(["mount", "-t", kind, "none", at], check=False).returncode:
                    undo.callback(_unmount, at)
            for path, value, before in ((LRU_GEN, "7", "0"), (CONTROLLERS, "+memory", "-memory")):
                with contextlib.suppress(OSError):  # the test will say what it lacks
                    before = path.read_text().strip() if path is LRU_GEN else before
                    path.write_text(value)
                    undo.callback(path.write_text, before)
        yield


def _unmount(at: Path) -> None:
    subprocess.run(["umount", at], check=False)


def guest_memfd() -> list[Series]:
    """Run the kernel's own test of guest_memfd, whole: what it costs matters less than that it passes here."""
    name = "guest_memfd_test"
    turns = []
    for _ in range(TURNS):
        before = _spent()
        run(name)
        turns.append([_spent() - before])
    return [kept({"peer": name}, "CPU time of the whole test", turns, clock="host", per="run", passed=True)]


def _spent() -> float:
    """Return the ns of CPU time of processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) * 1e9


PEERS: Final[Mapping[str, Callable[[], list[Series]]]] = {
    "access_tracking_perf_test": access_tracking,
    "guest_memfd_test": guest_memfd,
}
