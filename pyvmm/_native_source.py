"""Notice a native loop that is missing or older than its sources; owns nothing, any entry point may call it.

Only a checkout can go stale: an installed pyvmm has no ``native`` folder beside it and is what it was built as.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pyvmm.errors import PyvmmError

NATIVE = Path(__file__).resolve().parent.parent / "native"
_HINT = "python native/build.py"


def source_hash(folder: Path) -> str:
    """Return the hash of the C sources in ``folder``, as ``pv_source_hash()`` reports the one it was built from."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def require_fresh_native() -> None:
    """Raise PyvmmError unless the native loop can be imported and, in a checkout, was built from the sources there."""
    try:
        from pyvmm._native import ffi, lib
    except ImportError as error:
        raise PyvmmError(f"the native loop cannot be imported: {error}", hint=_HINT) from error
    if not (NATIVE / "cdef.h").exists():
        return
    built, wanted = bytes(ffi.string(lib.pv_source_hash())).decode(), source_hash(NATIVE)
    if built != wanted:
        message = f"the native loop was built from other sources ({built}) than native/ has ({wanted})"
        raise PyvmmError(message, hint=_HINT)
