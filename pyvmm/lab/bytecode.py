# SPDX-License-Identifier: Apache-2.0
"""Read the byte code of a package's modules, and send it to the lab in few pieces.

Over 9p, each module that the lab imports takes some ten requests to the workstation, and under load each waits for
QEMU. A piece holds byte code that the lab's Python has left in ``__pycache__``, if it is up to date. The lab imports
other modules as usual.
"""

from __future__ import annotations

import marshal
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

HEADER: Final = 16
"""Bytes before a module's code: magic number, flags, and the time and size of its source (PEP 552)."""
MARSHAL: Final = 4
"""The version of marshal's format that every Python reads that pyvmm runs on."""
PIECE: Final = 768 * 1024
"""Bytes of code after which a piece is closed: it must fit a frame."""

_CACHE: Final = "__pycache__"
_LOW_32: Final = 0xFFFF_FFFF


def pieces(package: Path, tag: str) -> Iterator[bytes]:
    """Return the byte code of ``package``'s modules for Python ``tag`` (``cpython-313``).

    Each piece is a marshalled dictionary: a module's name, then its source's path, whether it is a package, and its
    file of byte code.
    """
    modules: dict[str, tuple[str, bool, bytes]] = {}
    size = 0
    for name, source, is_package in _modules(package):
        code = _current(source, tag)
        if code is None:
            continue
        if size + len(code) > PIECE and modules:
            yield marshal.dumps(modules, MARSHAL)
            modules, size = {}, 0
        modules[name] = (str(source), is_package, code)
        size += len(code)
    if modules:
        yield marshal.dumps(modules, MARSHAL)


def _modules(package: Path) -> Iterator[tuple[str, Path, bool]]:
    """Return name, source and whether it is a package, for every module in ``package``."""
    for directory, folders, files in os.walk(package):
        folders[:] = [folder for folder in folders if folder != _CACHE]
        place = Path(directory)
        dotted = ".".join((package.name, *place.relative_to(package).parts))
        for file in files:
            stem, dot, ending = file.rpartition(".")
            if dot and ending == "py":
                is_package = stem == "__init__"
                yield dotted if is_package else f"{dotted}.{stem}", place / file, is_package


def _current(source: Path, tag: str) -> bytes | None:
    """Read a module's byte code, or None if it is missing or out of date."""
    try:
        code = (source.parent / _CACHE / f"{source.stem}.{tag}.pyc").read_bytes()
        seen = source.stat()
    except OSError:
        return None
    flags, written, size = (int.from_bytes(code[at : at + 4], "little") for at in (4, 8, 12))
    is_current = (flags, written, size) == (0, int(seen.st_mtime) & _LOW_32, seen.st_size & _LOW_32)
    return code if is_current and len(code) > HEADER else None
