# SPDX-License-Identifier: Apache-2.0
"""The members of a C structure, from the compiler's debugging information.

Offsets and sizes alone do not show a missing field where the compiler would pad.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from elftools.elf.elffile import ELFFile

from tests.abi import abi_facts, abi_headers

STRUCT, UNION = "DW_TAG_structure_type", "DW_TAG_union_type"
Members = dict[str, str | None]


@lru_cache
def members(machine: str) -> dict[str, Members]:
    """Return every member by structure and path, with the union member that it belongs to, if any.

    One of the members ``a|b`` of a nameless union must exist. Flexible arrays, and names that start with an underscore,
    may be missing.
    """
    compiler, _ = abi_facts.tools(machine)
    with TemporaryDirectory(prefix="pyvmm-abi-") as folder:
        c, o = Path(folder, "abi.c"), Path(folder, "abi.o")
        c.write_text(abi_facts.PRELUDE)
        flags = ["-std=gnu11", "-w", "-g", "-fno-eliminate-unused-debug-types", *abi_headers.include_flags(machine)]
        subprocess.run([compiler, *flags, "-c", c, "-o", o], check=True)
        with o.open("rb") as file:
            (unit,) = ELFFile(file).get_dwarf_info().iter_CUs()
            kinds = [die for die in unit.get_top_DIE().iter_children() if die.tag == STRUCT and _name(die)]
            return {_name(die): dict(_walk(die, "", None)) for die in kinds if die.has_children}


def missing(kind: Any, machine: str) -> list[str]:
    """Return the members of C's structure that ``kind`` lacks."""
    ours = {path for path, *_ in abi_facts.fields(kind)}
    return [
        path
        for path, alternative in members(machine)[kind.__name__].items()
        if ours.isdisjoint(path.split("|")) and (alternative is None or alternative in ours)
    ]


def _walk(kind: Any, prefix: str, alternative: str | None) -> Iterator[tuple[str, str | None]]:
    for member in kind.iter_children():
        if member.tag != "DW_TAG_member":
            continue
        name, inner = _name(member), _bare(member)
        if name.startswith("_") or _flexible(inner):
            continue
        path = prefix + name
        if kind.tag == STRUCT and name:
            yield path, alternative
        choices = [prefix + _name(choice) for choice in inner.iter_children() if _name(choice)]
        if inner.tag == UNION and kind.tag == STRUCT and not name and choices:
            yield "|".join(choices), alternative
        if inner.tag in (STRUCT, UNION) and not _name(inner):
            below = alternative if kind.tag == STRUCT else path if name else None
            if kind.tag == STRUCT or name:
                yield from _walk(inner, f"{path}." if name else prefix, below)


def _name(die: Any) -> str:
    return die.attributes["DW_AT_name"].value.decode() if "DW_AT_name" in die.attributes else ""


def _bare(die: Any) -> Any:
    while "DW_AT_type" in die.attributes and die.tag in ("DW_TAG_member", "DW_TAG_typedef", "DW_TAG_const_type"):
        die = die.get_DIE_from_attribute("DW_AT_type")
    return die


def _flexible(kind: Any) -> bool:
    bounds = ("DW_AT_upper_bound", "DW_AT_count")
    return kind.tag == "DW_TAG_array_type" and any(
        not any(bound in dimension.attributes for bound in bounds) for dimension in kind.iter_children()
    )
