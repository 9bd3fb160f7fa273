# SPDX-License-Identifier: Apache-2.0
"""The host memory of a VMM itself: its proportional set size without the guest's memory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Any, Final

from pyvmm.bench import linux
from pyvmm.bench.case import case
from pyvmm.bench.history import SPARE
from pyvmm.bench.measure import Bench
from pyvmm.bench.model import REPEATS
from pyvmm.errors import PyvmmError
from pyvmm.guest.kernels import OWN
from pyvmm.memory.address import MIB
from pyvmm.protection import PROTECTIONS

PAGES: Final = 256
KIB: Final = 1024
GUEST: Final = "/memfd:pyvmm-guest"
"""The names of guest memory mappings in smaps."""
INIT: Final = b"#!/bin/busybox sh\necho " + linux.WORD + b"\nexec /bin/busybox sleep 1000000\n"
REPEATS_WITHIN: Final = 0.01
TAP: Final = "tap=pvbench1,host=10.219.80.5/30"


@case(
    says="PSS of a process of its own that runs a guest (smaps), less that of the guest's memory, once the guest has"
    " touched 1 MiB of it, or is a Linux with every device that its protection allows, at its init; PSS shares what"
    " several processes map among them",
    axes={"protection": PROTECTIONS, "cpus": (1, 4), "memory": (16, 256), "kernel": ("payload:puppet", OWN)},
    nonsense=lambda point: (
        "a Linux does not fit 16 MiB" if point["kernel"] == OWN and point["memory"] != linux.MEMORY else ""
    ),
    extra=({"kernel": OWN, "memory": linux.MEMORY}, {"kernel": OWN, "memory": linux.MEMORY, "cpus": 4}),
)
def footprint(bench: Bench) -> None:
    """Measure a new process, because a forked one would share our memory; once, because the value is reproducible."""
    took = _linux(bench) if bench["kernel"] == OWN else _payload(bench)
    notes: dict[str, Any] = {REPEATS: REPEATS_WITHIN}
    bench.keep("PSS less guest memory", [[float(took)]], clock="memory", unit="bytes", per="VM", **notes)


def _payload(bench: Bench) -> int:
    """Run this module in a fresh interpreter."""
    words = [bench["protection"], str(bench["cpus"]), str(bench["memory"])]
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__, *words], capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode:
        bench.cannot(f"the process to be measured failed: {done.stderr.strip()[-500:]}")
    return int(done.stdout)


def _linux(bench: Bench) -> int:
    """Run pyvmm with all devices, until its guest's init has spoken."""
    subprocess.run(["modprobe", "-q", "tun"], check=False)
    with linux.files(OWN, INIT) as guest, tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        with open(f"{folder}/disk", "wb") as disk:
            disk.truncate(16 * MIB)
        devices = [
            "--disk",
            disk.name,
            "--net",
            TAP,
            "--vsock",
            f"uds={folder}/vsock,cid=3",
            "--rng",
            "--console",
            f"file={folder}/console",
        ]
        if bench["protection"] == "none":
            devices += ["--balloon", "0"]
        # A memfd is distinguishable from the VMM's own memory.
        argv = linux.pyvmm(guest, bench["protection"], bench["cpus"], "--backing", "memfd", *devices)
        with linux.booted(argv, bench.seconds) as pid:
            return pss(pid)


def measure(protection: str, cpus: int, memory: int) -> int:
    """Return the bytes that this process takes while a guest of ``memory`` MiB runs in it."""
    from pyvmm.experiment import Experiment
    from pyvmm.guest.orders import Access
    from pyvmm.protection import Protection

    with Experiment(Protection(protection), memory=memory + SPARE // MIB, cpus=cpus) as x:
        x.guest.touch(x.page(PAGES), PAGES, access=Access.WRITE)
        x.others()
        return pss("self")


def pss(process: int | str) -> int:
    """Add up the PSS of all mappings of a process except guest memory, in bytes."""
    total, ours = 0, True
    with open(f"/proc/{process}/smaps") as lines:
        for line in lines:
            words = line.split()
            if not words[0].endswith(":"):
                ours = words[5:6] != [GUEST]
            elif words[0] == "Pss:" and ours:
                total += int(words[1]) * KIB
    if not total:
        raise PyvmmError(f"/proc/{process}/smaps has no Pss: this kernel lacks CONFIG_PROC_PAGE_MONITOR")
    return total


if __name__ == "__main__":
    print(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
