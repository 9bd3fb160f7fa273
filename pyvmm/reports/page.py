# SPDX-License-Identifier: Apache-2.0
"""The frame of every HTML report: one file that needs nothing else and runs no script but its own. Pure functions."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Iterable

from pyvmm.reports.escaping import escaped


def page(title: str, style: str, script: str, body: Iterable[str]) -> str:
    """Return the page whose body is made of the HTML ``body``, piece by piece.

    A policy in the page lets nothing be loaded and no script run but ``script``. The text is ASCII, so that it is the
    same file in whatever encoding it is written.
    """
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; "
        f"img-src data:; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    parts = (
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escaped(title)}</title>",
        '<link rel="icon" href="data:,">',
        f"<style>{style}</style></head><body>",
        *body,
        f"<script>{script}</script>",
        "</body></html>\n",
    )
    return "\n".join(parts).encode("ascii", "xmlcharrefreplace").decode()


def facts(listed: Iterable[tuple[str, str]]) -> str:
    """Return a list of (what, value) as HTML."""
    return "".join(f"<dt>{escaped(what)}</dt><dd>{escaped(value)}</dd>" for what, value in listed)


def file_name(report: str, kernel: object, suffix: str) -> str:
    """Return the name under which a page hands its data out: the report's, and the kernel's release if it is known."""
    release = re.sub(r"[^\w.+-]+", "-", str(kernel or "")).strip("-.")
    return f"{report}-{release}{suffix}" if release else f"{report}{suffix}"
