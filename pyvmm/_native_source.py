# SPDX-License-Identifier: Apache-2.0
"""Detect a native loop that is missing or older than its sources. Owns nothing. Any entry point may call it.

Only a checkout can be stale: an installed pyvmm has no ``native`` folder beside it.
"""

from __future__ import annotations

import os
from importlib import import_module

from pyvmm.errors import PyvmmError
from pyvmm.labenv import FRESH

NATIVE = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "native")
_FOLDERS = ("loop", "virtio")
_HINT = "python native/build.py"


def sources(folder: str) -> list[str]:
    """Return the C sources in the subfolders of ``folder``, by name."""
    places = [os.path.join(folder, name) for name in _FOLDERS]
    return sorted(entry.path for place in places for entry in os.scandir(place) if entry.name.endswith((".c", ".h")))


def source_hash(folder: str | os.PathLike[str]) -> str:
    """Return the hash of the C sources in ``folder``, comparable with ``pv_source_hash()``."""
    import hashlib

    digest = hashlib.sha256()
    for path in sources(os.fspath(folder)):
        with open(path, "rb") as file:
            digest.update(os.path.relpath(path, folder).encode() + b"\0" + file.read() + b"\0")
    return digest.hexdigest()[:16]


def require_fresh_native() -> None:
    """Raise PyvmmError unless the native loop can be imported and, in a checkout, was built from the sources there."""
    try:
        native = import_module("pyvmm._native")
    except ImportError as error:
        raise PyvmmError(f"the native loop cannot be imported: {error}", hint=_HINT) from error
    if os.environ.get(FRESH) == "1" or is_surely_fresh(str(native.__file__)):
        return
    folder = os.fspath(NATIVE)
    built, wanted = bytes(native.ffi.string(native.lib.pv_source_hash())).decode(), source_hash(folder)
    if built != wanted:
        message = f"the native loop is stale: built from sources {built}, but native/ has {wanted}"
        raise PyvmmError(message, hint=_HINT)


def is_surely_fresh(built: str) -> bool:
    """Whether the sources in native/ need not be read: they cannot have changed since the loop was ``built``."""
    folder = os.fspath(NATIVE)
    if not os.path.exists(os.path.join(folder, "loop", "cdef.h")):
        return True
    paths = [*(os.path.join(folder, name) for name in _FOLDERS), *sources(folder)]
    newest = max(os.stat(path).st_mtime_ns for path in paths)
    return newest < os.stat(built).st_mtime_ns
