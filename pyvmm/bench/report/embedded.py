# SPDX-License-Identifier: Apache-2.0
"""The results inside an HTML report: written so that they cannot execute anything, and read back as the same run.

They are the JSON lines of :mod:`pyvmm.bench.model`, in an element of the page: as text, or, if they are long,
deflated and in base64.
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from pathlib import Path
from typing import Any, Final

from pyvmm.bench import model
from pyvmm.bench.model import BenchError, Run
from pyvmm.reports.escaping import script_json
from pyvmm.syntax.foreign import load_json

PLAIN, DEFLATED = "plain", "deflate+base64"
_SHORT: Final = 1 << 20
"""Characters of results up to which they stand in the page as they are."""
_MOST: Final = 1 << 30
"""Characters of results that are read; a page is not trusted not to unpack to more than memory holds."""
_ELEMENT = re.compile(r'<script type="application/json" id="_data">(.*?)</script>', re.DOTALL)


def lines(run: Run) -> str:
    """Return a run as JSON lines, as it is stored."""
    end = "" if run.end is None else model.footer(run.end)
    return model.header(run.environment, run.asked) + "".join(map(model.line, run.series)) + end


def element(run: Run) -> str:
    """Return the element of a page with a run: it is ASCII, and its contents cannot end or open an element."""
    text = lines(run)
    data = {"encoding": PLAIN, "lines": text}
    if len(text) > _SHORT:
        packed = base64.b64encode(zlib.compress(text.encode())).decode()
        data = {"encoding": DEFLATED, "lines": packed}
    return f'<script type="application/json" id="_data">{script_json(data)}</script>'


def read_html(path: str | Path) -> Run:
    """Return the run inside an HTML report. Raises BenchError if it is missing or damaged."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise BenchError(f"{path} cannot be read: {reason}") from None
    found = _ELEMENT.search(text)
    if found is None:
        raise BenchError(f"{path} is not a benchmark report: it contains no results")
    try:
        said = _unpacked(load_json(found[1]))
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error, binascii.Error) as error:
        raise BenchError(f"{path}: the results in it are damaged: {error}") from None
    return model.parse(said.removesuffix("\n").split("\n"), str(path))


def _unpacked(data: dict[str, Any]) -> str:
    if data["encoding"] == PLAIN:
        return str(data["lines"])
    if data["encoding"] != DEFLATED:
        raise ValueError("they are packed in a way this pyvmm does not know")
    unpacking = zlib.decompressobj()
    said = unpacking.decompress(base64.b64decode(data["lines"], validate=True), _MOST)
    if not unpacking.eof:
        raise ValueError("they are cut off, or longer than can be")
    return said.decode()
