# SPDX-License-Identifier: Apache-2.0
"""Which guests run on which hosts: each cell of the table is made by running two payloads in a lab.

    python -m tests.matrix                     print the whole table
    python -m tests.matrix 'no gic' own/pkvm   some hosts or cells of it
    python -m tests.matrix --write             put the whole table into pyvmm/docs/hosts.md

A cell says that the guests ran, or why not, in pyvmm's words. Builds the images of hosts that it has not met.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyvmm
from pyvmm.errors import PyvmmError, UsageError, did_you_mean
from pyvmm.lab import Lab, LabOptions, build_image
from pyvmm.lab.kernels import DEFAULT
from pyvmm.protection import PROTECTIONS

PAGE: Final = Path(pyvmm.__file__).parent / "docs" / "hosts.md"
BEGIN: Final = "<!-- python -m tests.matrix --write -->\n"
END: Final = "<!-- end of the matrix -->\n"
RUNS: Final = "runs"
NO: Final = "no: "
"""Before the number of a reason."""
NOT_TRIED: Final = "not tried"
PAYLOADS: Final = ("hello", "echo")
"""The first needs nothing but a vCPU. The second shares memory with its host, and takes it back."""
DEADLINE: Final = 600
"""Seconds of one payload: far more than it takes, since only a guest that hangs gets there."""


@dataclass(frozen=True, slots=True)
class Host:
    """A row: the kernel of the lab's host, and the lab's options."""

    kernel: str = DEFAULT
    options: dict[str, Any] = field(default_factory=dict)


HOSTS: Final[dict[str, Host]] = {
    **{name: Host(name) for name in ("stable", DEFAULT, "unstable", "experimental", "own", f"{DEFAULT}-16k")},
    "nvhe": Host(options={"mode": "nvhe"}),
    "vhe": Host(options={"mode": "vhe"}),
    "hvhe": Host(options={"cpu": "neoverse-n1"}),
    "no its": Host(options={"its": False}),
    "gicv2": Host(options={"mode": "nvhe", "gic": 2}),
    "gicv2 protected": Host(options={"gic": 2}),
    "no gic": Host(options={"mode": "nvhe", "gic": 0}),
    "no gic protected": Host(options={"gic": 0}),
    "no el2": Host(options={"mode": "no-el2"}),
}
ROWS: Final = {
    "hvhe": "`--lab-cpu neoverse-n1`",
    "no its": "`--lab-gic no-its`",
    "gicv2": "`--lab-gic 2 --lab-mode nvhe`",
    "gicv2 protected": "`--lab-gic 2`",
    "no gic": "`--lab-gic none --lab-mode nvhe`",
    "no gic protected": "`--lab-gic none`",
    "no el2": "`--lab-mode no-el2`",
    **{mode: f"`--lab-mode {mode}`" for mode in ("nvhe", "vhe")},
}
"""How a host is asked for, where it is not by ``--host-kernel``."""


@dataclass(frozen=True, slots=True)
class Row:
    """What was seen on a host: its kernel's release, and a cell for each protection that was tried."""

    release: str
    cells: dict[str, str]


def seen(host: Host, protections: Sequence[str]) -> Row:
    """Try ``protections`` on a host. A host that does not come up says so in each cell."""
    try:
        image = build_image(host.kernel)
        with Lab(LabOptions(**host.options), image=image) as lab:
            return Row(image.manifest.release, {each: _cell(lab, each) for each in protections})
    except PyvmmError as error:
        return Row("none", dict.fromkeys(protections, _sentence(error.message)))


def _cell(lab: Lab, protection: str) -> str:
    try:
        return _tried(lab, protection)
    except PyvmmError as error:  # the guest held up its lab, or ended it: the other cells have their own answers
        return _sentence(error.message)


def _tried(lab: Lab, protection: str) -> str:
    for payload in PAYLOADS:
        words = ["run", "--deadline", str(DEADLINE), "--protection", protection, f"payload:{payload}"]
        done = lab.capture(["python3", "-P", "-m", "pyvmm", *words], timeout=2 * DEADLINE)
        said = done.stderr.decode(errors="replace")
        if done.status:
            return _sentence(said.removeprefix("pyvmm: ") or f"{payload} ended with status {done.status}")
        if payload == "echo" and ", 0 refused" not in said:
            return _sentence(said)
    return RUNS


def _sentence(text: str) -> str:
    """Return the first line, without the arguments of a call: the number of a descriptor is nobody's answer."""
    first = (text.strip() or "it ended without a word").splitlines()[0]
    return re.sub(r"\b(KVM_\w+)\([^)]*\)", r"\1", first)


def wanted(words: Sequence[str]) -> dict[str, list[str]]:
    """Return the hosts and protections that ``words`` name, by default all. Raises UsageError for others."""
    cells: dict[str, list[str]] = {}
    for word in words or HOSTS:
        name, _, protection = word.partition("/")
        if name not in HOSTS:
            raise UsageError(f"no host {name!r}", hint=did_you_mean(name, HOSTS) or ", ".join(HOSTS))
        if protection and protection not in PROTECTIONS:
            raise UsageError(f"no protection {protection!r}", hint=", ".join(PROTECTIONS))
        cells.setdefault(name, []).extend([protection] if protection else PROTECTIONS)
    return cells


def title(name: str) -> str:
    """Return how the table calls a host: by the options that ask for it."""
    return ROWS.get(name, f"`--host-kernel {name}`")


def table(rows: dict[str, Row]) -> str:
    """Return Markdown of what was seen: a table whose cells may name reasons, and the list of reasons."""
    reasons: list[str] = []

    def cell(text: str) -> str:
        if text in (RUNS, NOT_TRIED):
            return text
        if text not in reasons:
            reasons.append(text)
        return f"{NO}{reasons.index(text) + 1}"

    lines = [f"| host | its kernel | {' | '.join(f'`{each}`' for each in PROTECTIONS)} |"]
    lines += ["|" + "---|" * (2 + len(PROTECTIONS))]
    for name, row in rows.items():
        cells = " | ".join(cell(row.cells.get(each, NOT_TRIED)) for each in PROTECTIONS)
        lines.append(f"| {title(name)} | {row.release} | {cells} |")
    if reasons:
        lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    return "".join(f"{line}\n" for line in lines)


def written() -> dict[str, dict[str, str]]:
    """Return the table of the page: by a row's title, each protection's cell, with its reason."""
    text = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    lines = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("|")]
    reasons = [line.partition(". ")[2] for line in text.splitlines() if line[:1].isdigit()]
    return {
        title: {
            each: reasons[int(cell.removeprefix(NO)) - 1] if cell.startswith(NO) else cell
            for each, cell in zip(PROTECTIONS, cells, strict=True)
        }
        for title, _release, *cells in lines[2:]
    }


def write(text: str) -> None:
    """Put ``text`` into the page."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    PAGE.write_text(before + begin + text + end + after)


def main(words: Sequence[str]) -> int:
    """Print or write the table. Status 2 for words that name nothing."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description="Which guests run on which hosts.")
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"HOST or HOST/PROTECTION: {', '.join(HOSTS)}")
    parser.add_argument("--write", action="store_true", help=f"put the whole table into {PAGE.name}")
    args = parser.parse_args(words)
    if args.write and args.cells:
        parser.error("--write is for the whole table")
    try:
        cells = wanted(args.cells)
    except UsageError as error:
        parser.error(f"{error.message}; {error.hint}")
    rows = {}
    for name, protections in cells.items():
        rows[name] = seen(HOSTS[name], protections)
        sys.stdout.write(f"{name}: {rows[name].release}: {rows[name].cells}\n")
        sys.stdout.flush()
    text = table(rows)
    sys.stdout.write(f"\n{text}")
    if args.write:
        write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
