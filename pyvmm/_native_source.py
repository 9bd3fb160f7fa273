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
_BUILD = "python native/build.py"
_INSTALL = "install pyvmm again, from a wheel for this machine"


def in_checkout() -> bool:
    """Whether this pyvmm is a checkout, where the native loop can be built again, and not an installed wheel."""
    return os.path.exists(os.path.join(NATIVE, "loop", "cdef.h"))


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
        raise PyvmmError(
            f"the native loop cannot be imported: {error}", hint=_BUILD if in_checkout() else _INSTALL
        ) from error
    if os.environ.get(FRESH) == "1" or is_surely_fresh(str(native.__file__)):
        return
    folder = os.fspath(NATIVE)
    built, wanted = bytes(native.ffi.string(native.lib.pv_source_hash())).decode(), source_hash(folder)
    if built != wanted:
        message = f"the native loop is stale: built from sources {built}, but native/ has {wanted}"
        raise PyvmmError(message, hint=_BUILD)


def is_surely_fresh(built: str) -> bool:
    """Whether the sources in native/ need not be read: they cannot have changed since the loop was ``built``."""
    if not in_checkout():
        return True
    folder = os.fspath(NATIVE)
    paths = [*(os.path.join(folder, name) for name in _FOLDERS), *sources(folder)]
    newest = max(os.stat(path).st_mtime_ns for path in paths)
    return newest < os.stat(built).st_mtime_ns
