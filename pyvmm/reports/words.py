# SPDX-License-Identifier: Apache-2.0
"""Shared text functions of reports: put text on one line, shorten it, and name a host.

Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping

from pyvmm.terminal import clean


def one_line(text: str) -> str:
    """Return ``text`` made harmless, on one line."""
    return " ".join(clean(text).split())


def shortened(text: str, width: int) -> str:
    """Return ``text`` on one line of at most ``width`` characters, with an ellipsis for a cut part."""
    text = one_line(text)
    return text if len(text) <= width else text[: max(width - 1, 0)].rstrip() + "…"


def headline(host: Mapping[str, object]) -> str:
    """Name a host in a few words: kernel, mode, and whether QEMU's TCG runs it."""
    words = [one_line(str(host[field])) for field in ("kernel", "mode") if host.get(field)]
    return " ".join([*(words or ["an unnamed host"]), *(["(qemu tcg)"] if host.get("tcg") is True else [])])
