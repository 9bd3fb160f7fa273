# SPDX-License-Identifier: Apache-2.0
"""The guests of a soak: every payload, and Linux. Each can end by itself, or go on until it is ended, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pyvmm.vcpu.outcome import Ending
from tests.pkvm.required import kernel_directory

LINUX: Final = "Linux"
CONSOLE: Final = "console=ttyAMA0 quiet panic=-1 audit=0 mitigations=off --"


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest, and the parameters with which it ends by itself or ``lasts``; None: it does not.

    ``status`` is that of a run in which it ends by itself, ``says`` whether it prints before.
    """

    name: str
    ends: str | None = ""
    lasts: str | None = None
    status: int = Ending.POWEROFF.status
    says: bool = True

    def words(self, params: str) -> list[str]:
        """Return the command line's words for it."""
        if self.name != LINUX:
            return [f"payload:{self.name}", *(["-p", params] if params else [])]
        files = kernel_directory("own:")
        return ["-m", "128M", "-i", str(files / "shell.cpio"), "-p", f"{CONSOLE} {params}", str(files / "Image")]


GUESTS: Final = (
    Guest("hello"),
    Guest("echo"),
    Guest("touch"),
    Guest("smp", lasts="rounds=1000000000000"),
    Guest("exits", ends="count=100", lasts="rounds=1000000000"),
    Guest("crash", ends="way=undefined", lasts="way=loop", status=Ending.CRASH.status),
    Guest("puppet", ends=None, lasts="", says=False),
    Guest(LINUX, ends="true", lasts="while :; do cat /proc/stat >/dev/null; done"),
)
