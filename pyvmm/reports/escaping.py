# SPDX-License-Identifier: Apache-2.0
"""Escape untrusted text and data for HTML. Pure functions."""

from __future__ import annotations

import json
import re
from html import escape

from pyvmm.terminal import clean

_URL = re.compile(r"https?://[^\s<>\"'`\\]+[^\s<>\"'`\\.,;:!?)\]}]")
_SOURCE = re.compile(
    r"\b(?:arch|virt|mm|fs|kernel|include|drivers|lib|tools|Documentation)/[\w./+-]+\.(?:[chS]|rst)\b(?::\d+)?"
)


def escaped(text: str) -> str:
    """Return ``text`` escaped for HTML, also for attributes."""
    return escape(clean(text), quote=True)


def escaped_prose(text: str) -> str:
    """Return ``text`` as HTML, with URLs as links and names of source files as code."""
    parts, end = [], 0
    text = clean(text)
    for match in _URL.finditer(text):
        url = escape(match[0], quote=True)
        parts += [_with_code(text[end : match.start()]), f'<a href="{url}" rel="noopener noreferrer">{url}</a>']
        end = match.end()
    return "".join([*parts, _with_code(text[end:])])


def _with_code(text: str) -> str:
    parts, end = [], 0
    for match in _SOURCE.finditer(text):
        parts += [escape(text[end : match.start()]), f"<code>{escape(match[0])}</code>"]
        end = match.end()
    return "".join([*parts, escape(text[end:])])


def script_json(data: object) -> str:
    """Return data as JSON for a script element: it cannot end or open an element."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
