# SPDX-License-Identifier: Apache-2.0
"""Shared text functions of reports: make text harmless, shorten it, and name a host.

Pure functions.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping


def clean(text: str) -> str:
    """Return ``text`` with every control character written out, such as ``\\x1b``.

    Line ends and tabs stay. Other control characters, direction marks and lone surrogates are replaced.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_written(each) if _acts(each) else each for each in text)


def one_line(text: str) -> str:
    """Return ``text`` made harmless, on one line."""
    return " ".join(clean(text).split())


def shortened(text: str, width: int) -> str:
    """Return ``text`` on one line of at most ``width`` characters, with an ellipsis for a cut part."""
    text = one_line(text)
    return text if len(text) <= width else text[: max(width - 1, 0)].rstrip() + "…"


def _acts(char: str) -> bool:
    return not (char.isprintable() or char in "\n\t" or unicodedata.category(char) == "Zs")


def _written(char: str) -> str:
    return char.encode("unicode_escape").decode()


def headline(host: Mapping[str, object]) -> str:
    """Name a host in a few words: kernel, mode, and whether QEMU's TCG runs it."""
    words = [one_line(str(host[field])) for field in ("kernel", "mode") if host.get(field)]
    return " ".join([*(words or ["an unnamed host"]), *(["(qemu tcg)"] if host.get("tcg") is True else [])])
