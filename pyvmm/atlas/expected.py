# SPDX-License-Identifier: Apache-2.0
"""The expected verdicts of claims on known kernels. Reports compare results with them.

``expected.toml`` has a table for each kernel series, mode of KVM, and size of pages. A claim's entry is one verdict for
all places, or places by verdict. A table that is ``like`` another one has only what differs. Where its host ``lacks`` a
protection or a backing, nothing can be told. Expected verdicts do not influence verdicts. Unknown kernels have none.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyvmm.atlas.claim import Claim
from pyvmm.atlas.model import Result
from pyvmm.experiment.record import Value, Verdict

FILE = Path(__file__).with_name("expected.toml")

Key = tuple[str, str, str]


def table_name(host: Mapping[str, Value]) -> str:
    """Name the table for a host: the kernel's series and KVM's mode, such as ``7.3 protected``.

    Larger pages than 4 KiB are named too: ``7.3 protected 16k``.
    """
    series = re.match(r"\d+\.\d+", str(host.get("kernel", "")))
    page = int(str(host.get("page size", 0))) >> 10
    return f"{series[0] if series else 'unknown'} {host.get('mode', 'unknown')}" + (f" {page}k" if page > 4 else "")


def expected(host: Mapping[str, Value], claims: Iterable[Claim]) -> dict[Key, Verdict]:
    """Return the expected verdict of each (claim id, protection, backing) on ``host``; empty for an unknown host."""
    return _verdicts(tomllib.loads(FILE.read_text()), table_name(host), list(claims))


def _verdicts(tables: Mapping[str, Any], name: str, claims: Sequence[Claim]) -> dict[Key, Verdict]:
    table = tables.get(name, {})
    found = _verdicts(tables, table["like"], claims) if "like" in table else {}
    lacks = set(table.get("lacks", ()))
    found = {key: Verdict.UNTOLD if lacks.intersection(key[1:]) else verdict for key, verdict in found.items()}
    for claim in claims:
        entry = table.get(claim.id)
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
