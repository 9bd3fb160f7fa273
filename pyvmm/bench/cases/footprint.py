"""What a VMM itself takes of the host's memory: its proportional set size, less the guest's memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

from pyvmm.bench.case import PROTECTIONS, case
from pyvmm.bench.measure import MIB, SPARE, Bench
from pyvmm.errors import PyvmmError

PAGES: Final = 256
KIB: Final = 1024


@case(
    says="PSS of a process of its own that runs a guest (smaps), less that of the guest's memory, once the guest has"
    " touched 1 MiB of it; PSS shares what several processes map among them",
    axes={"protection": PROTECTIONS, "cpus": (1, 4), "memory": (16, 256)},
)
def footprint(bench: Bench) -> None:
    """Run this module in a fresh interpreter, for a forked one would share its memory with us; once, for it repeats."""
    words = [bench["protection"], str(bench["cpus"]), str(bench["memory"])]
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__, *words], capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode:
        bench.cannot(f"the process to be measured failed: {done.stderr.strip()[-500:]}")
    bench.keep("PSS less guest memory", [[float(done.stdout)]], clock="memory", unit="bytes", per="VM")


def measure(protection: str, cpus: int, memory: int) -> int:
    """Return the bytes that this process takes while a guest of ``memory`` MiB runs in it."""
    from pyvmm.atlas.experiment import Experiment
    from pyvmm.guest.puppet import Access
    from pyvmm.protection import Protection

    with Experiment(Protection(protection), memory=memory + SPARE // MIB, cpus=cpus) as x:
        x.guest.touch(x.page(PAGES), PAGES, access=Access.WRITE)
        x.others()
        return _pss(x.memory.slots[0].backing.fd)


def _pss(guest_memory: int) -> int:
    """Add up the PSS of every mapping but those of the guest's file."""
    import os

    file = os.fstat(guest_memory)
    theirs = [f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}", str(file.st_ino)]
    total, ours = 0, True
    with open("/proc/self/smaps") as lines:
        for line in lines:
            words = line.split()
            if not words[0].endswith(":"):
                ours = words[3:5] != theirs
            elif words[0] == "Pss:" and ours:
                total += int(words[1]) * KIB
    if not total:
        raise PyvmmError("/proc/self/smaps tells no Pss: this kernel keeps none (CONFIG_PROC_PAGE_MONITOR)")
    return total


if __name__ == "__main__":
    print(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
