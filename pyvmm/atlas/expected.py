# SPDX-License-Identifier: Apache-2.0
"""The expected verdicts of claims on known kernels. Reports compare results with them.

``expected.toml`` has a table for each kernel series and mode of KVM. A claim's entry is one verdict for all places, or
places by verdict. They do not influence verdicts. Unknown kernels have no expected verdicts.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from pyvmm.atlas.claim import Claim
from pyvmm.atlas.model import Result
from pyvmm.experiment.record import Value, Verdict

FILE = Path(__file__).with_name("expected.toml")

Key = tuple[str, str, str]


def table_name(host: Mapping[str, Value]) -> str:
    """Name the table for a host: the kernel's series and KVM's mode, such as ``7.3 protected``."""
    series = re.match(r"\d+\.\d+", str(host.get("kernel", "")))
    return f"{series[0] if series else 'unknown'} {host.get('mode', 'unknown')}"


def expected(host: Mapping[str, Value], claims: Iterable[Claim]) -> dict[Key, Verdict]:
    """Return the expected verdict of each (claim id, protection, backing) on ``host``; empty for an unknown host."""
    entries = tomllib.loads(FILE.read_text()).get(table_name(host), {})
    found: dict[Key, Verdict] = {}
    for claim in claims:
        entry = entries.get(claim.id)
        if isinstance(entry, str):
            found |= {(claim.id, p.protection.value, p.backing): Verdict(entry) for p in claim.places}
        elif entry is not None:
            for verdict, places in entry.items():
                for place in places:
                    protection, _, backing = place.partition("/")
                    found[claim.id, protection, backing] = Verdict(verdict)
    return found


def written(host: Mapping[str, Value], results: Iterable[Result]) -> str:
    """Return the table of ``expected.toml`` for these results. Review it before adding it."""
    by_claim: dict[str, dict[str, list[str]]] = {}
    for result in results:
        places = by_claim.setdefault(result.id, {}).setdefault(result.verdict.value, [])
        places.append(f"{result.protection}/{result.backing}")
    lines = [f'["{table_name(host)}"]']
    for id, verdicts in by_claim.items():
        if len(verdicts) == 1:
            lines.append(f'"{id}" = "{next(iter(verdicts))}"')
            continue
        parts = (
            f'"{verdict}" = [{", ".join(f"{chr(34)}{each}{chr(34)}" for each in places)}]'
            for verdict, places in verdicts.items()
        )
        lines.append(f'"{id}" = {{ {", ".join(parts)} }}')
    return "\n".join(lines) + "\n"
