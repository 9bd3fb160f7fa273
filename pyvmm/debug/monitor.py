# SPDX-License-Identifier: Apache-2.0
"""The debugger's `monitor` commands: queries without a command in GDB."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from pyvmm.debug.errors import Refused
from pyvmm.errors import hex_

if TYPE_CHECKING:
    from pyvmm.debug.target import GuestTarget

HELP = """\
monitor help          this
monitor info          protection, the guest's time, pages by state, breakpoint registers, why the last request failed
monitor info ADDRESS  an address's gpa, and the state of its page
monitor phys on|off   use guest physical addresses, or translate by the guest's tables (default)
"""


def answer(target: GuestTarget, thread: int, command: str) -> str:
    """Run ``command`` and return its output."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        return f"{error}\n"
    match words:
        case ["phys", "on" | "off" as which]:
            target.physical = which == "on"
            return f"addresses are {'guest physical' if target.physical else 'virtual'}\n"
        case ["phys"]:
            return f"addresses are {'guest physical' if target.physical else 'virtual'}\n"
        case ["info"]:
            return _about(target)
        case ["info", text]:
            return _about_address(target, thread, text)
        case [] | ["help"]:
            return HELP
        case _:
            return f"{command!r} is not known\n{HELP}"


def _about(target: GuestTarget) -> str:
    machine = target.machine
    counts = ", ".join(
        f"{count} {state.name.lower()}" for state, count in machine.memory.ledger.counts().items() if count
    )
    lines = [
        f"protection {machine.config.protection.value}, {len(machine.vcpus)} vCPUs",
        _about_time(target.clock.goes_on),
        f"pages: {counts}",
        f"{target.points.breaks} breakpoint and {target.points.watches} watchpoint registers",
    ]
    if target.last_refusal is not None:
        lines.append(f"last request that failed: {target.last_refusal}")
    return "\n".join(lines) + "\n"


def _about_time(goes_on: str | None) -> str:
    if goes_on is None:
        return "the guest's time stands while all of its vCPUs are stopped"
    return f"the guest's time goes on while it is stopped: {goes_on}"


def _about_address(target: GuestTarget, thread: int, text: str) -> str:
    try:
        address = int(text, 0)
        gpa = address if target.physical else target.translate(thread, address).gpa
    except ValueError:
        return f"{text!r} is not an address\n"
    except Refused as refused:
        return f"{refused.why}\n"
    where = "" if target.physical else f"{hex_(address)} is "
    return f"{where}gpa {hex_(gpa)}: {target.machine.memory.describe(gpa)}\n"
