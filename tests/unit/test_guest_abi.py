# SPDX-License-Identifier: Apache-2.0
"""The numbers in Python equal those of the C header."""

from __future__ import annotations

import re
from pathlib import Path

from pyvmm import abi

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "firmware" / "lib" / "abi.h"


def _defines() -> tuple[dict[str, int], dict[str, str]]:
    values: dict[str, int] = {}
    functions: dict[str, str] = {}
    for line in HEADER.read_text().splitlines():
        if found := re.match(r"#define (\w+)\((\w)\)\s+\((.*?)\)\s*(?:/\*|$)", line):
            functions[found[1]] = found[3].replace(f"({found[2]})", found[2])
        elif found := re.match(r"#define (\w+)\s+(0x[0-9a-fA-F]+|\d+)\b", line):
            values[found[1]] = int(found[2], 0)
    return values, functions


def test_python_has_every_number_of_the_header_and_no_other() -> None:
    values, _ = _defines()
    mirrored = {name: value for name, value in vars(abi).items() if name.isupper() and type(value) is int}
    assert len(values) > 40
    assert mirrored == values


def test_the_native_sources_use_the_headers_hypercalls_and_doorbell() -> None:
    values, _ = _defines()
    sources = "\n".join(path.read_text() for path in (ROOT / "native").rglob("*.[ch]"))
    said = re.findall(r"\b(HVC_[A-Z]+) (0x[0-9a-fA-F]+)u?$|\b(BELL_[A-Z]+) = (\d+)", sources, re.MULTILINE)
    found = {call or bell: int(number or word, 0) for call, number, bell, word in said}
    assert set(found) == {"HVC_FEATURES", "HVC_MEMINFO", "HVC_SHARE", "HVC_UNSHARE", "BELL_SHARE", "BELL_UNSHARE"}
    assert found == {name: values[name] for name in found}


def test_every_register_file_of_the_mailbox_is_at_the_headers_offset() -> None:
    _, functions = _defines()
    assert set(functions) == {"MAILBOX_ARG", "MAILBOX_RESULT", "MAILBOX_TRAP", "MAILBOX_NOTE"}
    for name, expression in functions.items():
        for n in range(8):
            assert getattr(abi, name)(n) == eval(expression, {}, {"n": n}), name


def test_mailbox_registers_do_not_overlap() -> None:
    rows = {"ARG": 7, "RESULT": 7, "TRAP": 8, "NOTE": 4}
    offsets = [getattr(abi, f"MAILBOX_{name}")(n) for name, count in rows.items() for n in range(count)]
    offsets += [abi.MAILBOX_OP, abi.MAILBOX_DONE, abi.MAILBOX_TRAP_BELL]
    assert len(offsets) == len(set(offsets))
    assert all(offset % 8 == 0 and offset < 4096 for offset in offsets)
