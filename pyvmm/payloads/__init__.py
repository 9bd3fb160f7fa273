# SPDX-License-Identifier: Apache-2.0
"""The payloads that ship with pyvmm: flat arm64 binaries by name, built from firmware/payloads by firmware/build.py.

Owns nothing but its directory. Anyone may call it; files are read when asked for.
"""

from __future__ import annotations

import os

from pyvmm.errors import PyvmmError, UsageError, did_you_mean
from pyvmm.typed import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

DIRECTORY: Final = os.path.dirname(__file__)
MANIFEST: Final = os.path.join(DIRECTORY, "manifest.json")
"""What firmware/build.py says of them."""

_MEMORY: Final = slice(8, 16)
"""Where a binary says how much memory it occupies: its header is in firmware/start.S."""


class Usage(NamedTuple):
    """What a payload does, and its parameters (``-p KEY=VALUE``, joined by spaces in the boot arguments)."""

    what: str
    params: dict[str, str] = {}  # noqa: RUF012 (a NamedTuple's default; never changed)


#: Every payload; a test compares the names with the binaries.
USAGE: Final = {
    "hello": Usage("greets, says what it sees of the machine, powers off"),
    "puppet": Usage("takes orders from Python: see pyvmm.guest.puppet"),
    "echo": Usage(
        "shares a page with a device, is answered through it, takes it back; on every vCPU",
        {"rounds": "requests a vCPU (3)"},
    ),
    "touch": Usage(
        "touches fresh pages and times each access",
        {
            "order": "sequential, random or strided (sequential)",
            "access": "read, write or execute (read)",
            "pages": "pages touched a pass (256)",
            "stride": "pages from one to the next when strided (16)",
            "offset": "pages skipped first (0)",
            "repeat": "passes; those after the first show the overhead (2)",
            "seed": "of the random order (1)",
        },
    ),
    "exits": Usage(
        "makes exits on any VMM that has a PL011, and times them",
        {"count": "exits a round (1000)", "rounds": "rounds of each kind (5)"},
    ),
    "smp": Usage("starts every vCPU by PSCI, counts with atomics, stops them", {"rounds": "additions a vCPU (1000)"}),
    "crash": Usage(
        "misbehaves in one way",
        {
            "way": "undefined, unmapped, jump, loop, wait, noslot, sea, share-twice, share-outside, bell-private, "
            "bell-misaligned, bell-huge, flood, reset, status (undefined)",
            "bytes": "how many flood writes (65536)",
            "code": "the exit code of status (1)",
        },
    ),
}


def names() -> list[str]:
    """List the payloads, sorted."""
    return sorted(USAGE)


def payload(name: str) -> bytes:
    """Return a payload's flat binary: position independent, entered at its first byte with x0 = device tree.

    Raises UsageError for an unknown name; PyvmmError when the installation has lost the file.
    """
    if name not in USAGE:
        raise UsageError(
            f"there is no payload {name!r}; there are: {', '.join(names())}",
            hint=did_you_mean(name, names(), "payload:"),
        )
    path = path_of(name)
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise PyvmmError(
            f"payload {name} cannot be read: {path}: {error.strerror}",
            hint="python firmware/build.py makes it anew, in a source tree",
        ) from None


def path_of(name: str) -> str:
    """Say where a payload's binary is."""
    return os.path.join(DIRECTORY, f"{name}.bin")


def memory_of(image: bytes) -> int:
    """Return the bytes that a payload's binary occupies once loaded: itself, its zeroed data and its stacks."""
    return int.from_bytes(image[_MEMORY], "little")
