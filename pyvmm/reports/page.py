# SPDX-License-Identifier: Apache-2.0
"""The frame of every HTML report: one self-contained file that runs only its own script. Pure functions."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Iterable

from pyvmm.reports.escaping import escaped


def page(title: str, style: str, script: str, body: Iterable[str]) -> str:
    """Return the page with the pieces of HTML ``body`` as its body.

    A policy in the page allows no loading, and no script except ``script``. The text is ASCII, so it is the same file
    in every encoding.
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
    """Return the file name for a page's data: the report's name, and the kernel's release if known."""
    release = re.sub(r"[^\w.+-]+", "-", str(kernel or "")).strip("-.")
    return f"{report}-{release}{suffix}" if release else f"{report}{suffix}"
