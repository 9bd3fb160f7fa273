# SPDX-License-Identifier: Apache-2.0
"""How long a Linux guest takes from the exec of its VMM to its init, and where that time goes."""

from __future__ import annotations

from pyvmm.bench import linux
from pyvmm.bench.case import case
from pyvmm.bench.measure import Bench
from pyvmm.protection import PROTECTIONS

PHASES = {
    "exec to first KVM_RUN": ("executed", "entered"),
    "first KVM_RUN to init": ("entered", "init"),
    "exec to init": ("executed", "init"),
    "init to the end": ("init", "ended"),
}


@case(
    says="pyvmm run of a Linux with an initramfs whose init says a word and powers off, each in a process of its own:"
    " exec, the first KVM_RUN, the word, the process's end, by the host's clock",
    axes={"protection": PROTECTIONS, "kernel": ("own:", "debian:"), "cpus": (1, 4)},
    quick=None,
    nonsense=lambda point: (
        "Debian's kernel shares no memory, so nothing is emulated for it"
        if point["kernel"] == "debian:" and point["protection"] == "emulated"
        else ""
    ),
    seconds=300.0,
)
def boot(bench: Bench) -> None:
    """Boot once a round."""
    with linux.files(bench["kernel"]) as guest:
        argv = linux.pyvmm(guest, bench["protection"], bench["cpus"])
        boots = [linux.boot(argv, bench.seconds) for _ in range(bench.rounds)]
    for name, (begin, end) in PHASES.items():
        took = [[float(getattr(each, end) - getattr(each, begin))] for each in boots]
        bench.keep(name, took, clock="host", per="boot")
