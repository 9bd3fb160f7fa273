# SPDX-License-Identifier: Apache-2.0
"""Parse option values: sizes, counts, seconds. Each function raises argparse.ArgumentTypeError."""

from __future__ import annotations

import argparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_UNITS: Final = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}


def parse_size(text: str) -> int:
    """Return bytes: a number with a unit of BKMGTP (powers of 1024), MiB without one."""
    # No regular expression: compiling one costs more than parsing all other values of a command line.
    unit = text[-1:].upper()
    number, unit = (text[:-1], unit) if unit in _UNITS else (text, "M")
    if not (number.isascii() and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; use 512, 512M or 1G")
    return int(number) * _UNITS[unit]


def parse_memory(text: str) -> tuple[int, int | None]:
    """Return (bytes, gpa or None) of ``SIZE[@ADDRESS]``."""
    size, at, where = text.partition("@")
    if not at:
        return parse_size(size), None
    try:
        return parse_size(size), int(where, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{where!r} is not an address; use 0x80000000") from None


def parse_count(text: str) -> int:
    """Return the whole number ``text``, 1 or more. Raises argparse.ArgumentTypeError for anything else."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count; use a whole number from 1")
    return number


def parse_seconds(text: str) -> float:
    """Return a finite number of seconds above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; use seconds above 0, like 10 or 0.5")
    return seconds
