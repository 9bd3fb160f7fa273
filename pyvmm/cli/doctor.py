# SPDX-License-Identifier: Apache-2.0
"""``pyvmm doctor``: report what this machine can do, what is missing, and the next step as a command.

Exit status 0 when protected guests run here, directly or in the lab; 5 otherwise.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import textwrap

from pyvmm import __version__, probes
from pyvmm.cli.common import add_common
from pyvmm.errors import HostError
from pyvmm.probes import FAIL, INFO, OK, WARN, Finding
from pyvmm.terminal import clean

_TITLES = {"host": "This host", "kvm": "KVM", "python": "Python", "lab": "The lab"}
_MARKS = {OK: "ok", INFO: "--", WARN: "!!", FAIL: "NO"}
_COLOURS = {OK: "32", INFO: "2", WARN: "33", FAIL: "31"}
_WIDTH = 100

_NO_LAB = Finding("lab", "the lab", INFO, "not needed: this host runs protected guests itself")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Define the verb's options."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine can do and what is missing",
        allow_abbrev=False,
        description="What this machine can do, what is missing, and the next step as a command. Exit status 0 when "
        "protected guests run here, directly or in the lab; 5 otherwise.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Examine this machine, print the report, and return the exit status."""
    diagnosis = Diagnosis.make()
    if args.json:
        print(diagnosis.to_json())
    else:
        print("\n".join(diagnosis.lines(colours=sys.stdout.isatty())))
    return 0 if diagnosis.direct or diagnosis.in_lab else HostError.exit_status


class Diagnosis:
    """All findings and the conclusions from them."""

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = findings
        #: Guests run on this very kernel: plain and emulated ones at least.
        self.plain = platform.machine() == probes.ARM64 and not self._failed("host", "kvm", "python")
        #: Protected guests do as well.
        self.direct = self.plain and not any(f.name == probes.PROTECTED_VMS and f.status != OK for f in findings)
        #: Protected guests run in the lab.
        self.in_lab = not self.direct and not self._failed("python", "lab")

    @classmethod
    def make(cls) -> Diagnosis:
        """Examine this machine."""
        here = [*probes.host(), *probes.confinement(), *probes.kvm(), *probes.python()]
        return cls([*here, _NO_LAB] if cls(here).direct else [*here, *probes.lab()])

    def _failed(self, *sections: str) -> bool:
        return any(finding.status == FAIL and finding.section in sections for finding in self.findings)

    @property
    def verdict(self) -> str:
        """Say in one sentence whether protected guests run here."""
        if self.direct:
            return "This machine runs protected guests directly."
        if self.in_lab:
            plain = ", and plain and emulated guests directly" if self.plain else ""
            return f"This machine runs protected guests in the lab{plain}."
        return "This machine cannot run protected guests yet."

    @property
    def next_step(self) -> str:
        """Return the next step: a command, or an instruction where no command helps."""
        if self.direct or self.in_lab:
            return "pyvmm demo"
        # A problem of the lab is easier to fix than a host without pKVM.
        order = ["python", "lab", "kvm", "host"]
        failed = sorted((f for f in self.findings if f.status == FAIL), key=lambda f: order.index(f.section))
        return next((finding.hint for finding in failed if finding.hint), "see the lines marked NO")

    def to_json(self) -> str:
        """Return everything as one JSON object."""
        findings = [vars(finding) for finding in self.findings]
        return json.dumps(
            {
                "pyvmm": __version__,
                "direct": self.direct,
                "lab": self.in_lab,
                "next": self.next_step,
                "findings": findings,
            }
        )

    def lines(self, *, colours: bool = False) -> list[str]:
        """Return everything as a table."""
        lines: list[str] = []
        section = ""
        for finding in self.findings:
            if finding.section != section:
                section = finding.section
                lines += ["", _paint(_TITLES[section], "1", colours)]
            mark = _paint(_MARKS[finding.status], _COLOURS[finding.status], colours)
            first, *more = textwrap.wrap(clean(finding.value), _WIDTH - 24, break_long_words=False) or [""]
            lines.append(f"  {mark}  {finding.name:<17} {first}")
            lines += [f"{'':24}{line}" for line in more]
            if finding.hint and finding.status in (WARN, FAIL):
                hint = textwrap.wrap(
                    clean(f"-> {finding.hint}"), _WIDTH - 24, break_long_words=False, subsequent_indent="   "
                )
                lines += [f"{'':24}{line}" for line in hint]
        return [*lines[1:], "", _paint(self.verdict, "1", colours), f"Next: {clean(self.next_step)}"]


def _paint(text: str, code: str, colours: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colours else text
