# SPDX-License-Identifier: Apache-2.0
"""Parts of a sweep for its tests: fake cases, and a process that pretends to measure."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from pyvmm.bench.case import Case
from pyvmm.bench.model import Point
from pyvmm.bench.sweep import plan as plans
from pyvmm.bench.sweep.plan import Plan
from pyvmm.bench.sweep.work import Answer

ENVIRONMENT = {"kernel": "6.99", "machine": "aarch64"}
SERIES = {
    "case": "fault",
    "point": {},
    "metric": "first touch",
    "clock": "guest",
    "unit": "ns",
    "per": "page",
    "values": [1.0, 2.0],
}


def _nonsense(point: Point) -> str:
    mixed = (point["backing"], point["protection"]) == ("private", "none")
    return "private memory needs pkvm" if mixed else ""


CASES = {
    "fault": Case(
        "fault", "", {"protection": ("none", "pkvm"), "pages": (256, 1024), "backing": ("memfd", "private")},
        lambda _bench: None, (), (), _nonsense,
    ),
    "exit": Case(
        "exit", "", {"protection": ("none", "pkvm"), "kind": ("hvc", "mmio")},
        lambda _bench: None, (), (), lambda _point: "",
    ),
}  # fmt: skip

FOUR = """
case = "fault"
[axes]
protection = ["none", "pkvm"]
pages = [256, 1024]
"""


def plan(text: str = FOUR) -> Plan:
    return plans.parse(text, "sweep.toml", CASES)


def answer(value: float = 1.0, **environment: str) -> Answer:
    return Answer({**ENVIRONMENT, **environment}, ({**SERIES, "values": [value]},), "somebody", 10.0, 12.0)


def pretend(directory: Path, what: str) -> tuple[str, ...]:
    """Return a command that replaces the measuring process. It first runs ``what`` with the request ``asked``.

    Each process leaves ``protection-pages.PID`` in ``directory``, with its parent's pid.
    """
    script = directory / "pretend.py"
    script.write_text(
        "import json, os, pathlib, sys, time\n"
        "from pyvmm.bench.model import Series\n"
        "from pyvmm.bench.sweep import inside\n"
        "asked = json.loads(sys.argv[1])\n"
        "assert inside.ends_with(asked['parent'])\n"
        "point = asked['point']\n"
        "name = f\"{point['protection']}-{point['pages']}\"\n"
        f"here = pathlib.Path({str(directory)!r})\n"
        "note = here / f'.{os.getpid()}'\n"
        "note.write_text(str(os.getppid()))\n"
        "note.rename(here / f'{name}.{os.getpid()}')\n"
        "tries = len(list(here.glob(f'{name}.*')))\n"
        + textwrap.dedent(what)
        + "\ndef measure(case, point, deadline):\n"
        "    return [Series(case, point, 'first touch', 'guest', 'ns', 'page', (1.0, 2.0))]\n"
        f"sys.exit(inside.tell(asked, lambda: {ENVIRONMENT!r}, measure))\n"
    )
    return (sys.executable, "-P", str(script))
