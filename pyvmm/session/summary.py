# SPDX-License-Identifier: Apache-2.0
"""Print the end of a run on stderr: how it ended, and always one line of exit statistics, last."""

from __future__ import annotations

import sys

from pyvmm.vcpu.outcome import Ending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.vcpu.counters import Counters
    from pyvmm.vcpu.outcome import Outcome


def print_summary(outcome: Outcome, counters: Counters, *, table: bool) -> None:
    """Print the summary as text. ``table`` adds the cost of each kind of exit."""
    lines = table_lines(counters) if table else []
    if outcome.ending is not Ending.POWEROFF:
        from pyvmm.terminal import clean

        lines.append(clean(f"pyvmm: {outcome.ending.value}: {outcome.reason}"))
        if outcome.hint is not None:
            lines.append(clean(f"  hint: {outcome.hint}"))
    lines.append(f"pyvmm: {counters.line()}")
    print("\n".join(lines), file=sys.stderr)


def print_summary_json(outcome: Outcome, counters: Counters, *, table: bool) -> None:
    """Print the summary as one line of JSON. ``table`` adds nanoseconds to the counts."""
    values: dict[str, object] = {
        "event": "run_ended",
        "ending": outcome.ending.name.lower(),
        "reason": outcome.reason,
        "hint": outcome.hint,
        "vcpu": outcome.vcpu,
        "started_ns": counters.started_ns,
        "elapsed_ns": counters.elapsed_ns,
        "exits": {exit_.name: exit_.count for exit_ in counters.exits if exit_.count},
        "kicks": counters.kicks,
        "shares": counters.shares,
        "unshares": counters.unshares,
        "refused": counters.refused,
    }
    if table:
        values["guest_ns"] = {exit_.name: exit_.guest_ns for exit_ in counters.exits if exit_.count}
        values["vmm_ns"] = {exit_.name: exit_.vmm_ns for exit_ in counters.exits if exit_.count}
    import json

    print(json.dumps(values), file=sys.stderr)


def table_lines(counters: Counters) -> list[str]:
    """Return a table of exits, the most frequent first: how many, and mean microseconds in the guest and in the VMM."""
    lines = [f"  {'exit':<16}{'count':>12}{'guest us/exit':>15}{'vmm us/exit':>13}"]
    for exit_ in sorted(counters.exits, key=lambda exit_: -exit_.count):
        if exit_.count:
            guest, vmm = (ns / exit_.count / 1000 for ns in (exit_.guest_ns, exit_.vmm_ns))
            lines.append(f"  {exit_.name:<16}{exit_.count:>12}{guest:>15.1f}{vmm:>13.1f}")
    return lines
