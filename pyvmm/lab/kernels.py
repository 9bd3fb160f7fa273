# SPDX-License-Identifier: Apache-2.0
"""Choose the kernel of the lab's host: one of Debian's, the project's own, or a file. Reads the file; owns nothing.

The root always has the packages of one release. Only its modules belong to a kernel.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyvmm.errors import UsageError
from pyvmm.pages import IMAGE_PAGES

SUITE: Final = "trixie"
BACKPORTS: Final = "trixie-backports"

DEFAULT: Final = "backports"
LARGE: Final = "-16k"
"""The end of the names of kernels with pages of 16 KiB."""
_SMALL: Final = {
    "stable": (SUITE,),
    DEFAULT: (SUITE, BACKPORTS),
    "unstable": (SUITE, "sid"),
    "experimental": (SUITE, "sid", "experimental"),  # its packages may depend on some from sid
}
SUITES: Final = _SMALL | {name + LARGE: suites for name, suites in _SMALL.items()}
"""Debian's kernels by name: the suites that apt must know, the kernel's last."""

MAY_BE_OLDER: Final = ("unstable", "experimental")
"""Kernels that one expects to be newer than the default one, which they are not always."""

OWN: Final = "own"
"""The project's kernel, built from Debian's source: see ownkernel."""

# Linux Documentation/arch/arm64/booting.rst
_FLAGS_AT: Final = 0x18
_MAGIC_AT: Final = 0x38
_HEADER: Final = _MAGIC_AT + 4

_BANNER: Final = re.compile(rb"Linux version ([^ \0\n%]{1,128}) \(")
_UNKNOWN: Final = "of unknown release"
_WANTED: Final = "an arm64 Image, plain or gzip, such as a kernel build's arch/arm64/boot/Image"


@dataclass(frozen=True, slots=True)
class KernelFile:
    """An arm64 Image, plain or gzip, and the release in its banner."""

    path: Path
    release: str


def package(name: str) -> str:
    """Return the package of Debian that depends on the newest kernel ``name``."""
    return "linux-image-arm64" + (LARGE if name.endswith(LARGE) else "")


def page_of(path: Path) -> int:
    """Return the bytes of a kernel's pages, as the header of an arm64 Image says them, or 0 without such a header."""
    try:
        with path.open("rb") as file:
            start = file.read(_HEADER)
            if start.startswith(b"\x1f\x8b"):
                import gzip  # the exception

                file.seek(0)
                with gzip.open(file) as unpacked:
                    start = unpacked.read(_HEADER)
    except OSError:  # QEMU will say why
        return 0
    return IMAGE_PAGES[start[_FLAGS_AT] >> 1 & 3] if start[_MAGIC_AT:] == b"ARM\x64" else 0


def find(text: str) -> str | KernelFile:
    """Return the kernel name or the file ``text``; names come first. Raises UsageError for anything else."""
    if text in SUITES or text == OWN:
        return text
    if "/" in text or os.path.lexists(text):
        return _read(text)
    meanings = {name: f"Debian's {_place(name)}" for name in SUITES} | {OWN: "the project's, built here"}
    names = sorted(meanings, key=lambda name: _likeness(text, name), reverse=True)
    known = ", ".join(f"{name} ({meanings[name]})" for name in names)
    raise UsageError(f"no host kernel is called {text!r}, and no file", hint=f"{known}, or a file: {_WANTED}")


def _place(name: str) -> str:
    return SUITES[name][-1] + (", of 16 KiB pages" if name.endswith(LARGE) else "")


def _likeness(text: str, name: str) -> float:
    return max(difflib.SequenceMatcher(None, text, word).ratio() for word in (name, *SUITES.get(name, ())[-1:]))


def _read(text: str) -> KernelFile:
    from pyvmm.machine import boot, packed  # a file is the exception

    try:
        image = boot.read(text)
        data = packed.whole(image.segments[0].data)
        image.close()
    except UsageError as error:
        raise UsageError(f"the host's {error.message}", hint=f"name {_WANTED}") from None
    path = Path(os.path.abspath(text))
    with path.open("rb") as file:
        start = file.read(8)
    wrong = None
    if image.kind != "Image":
        wrong = "an ELF file" if image.kind == "ELF" else "no arm64 kernel: it has no Image header"
    elif start.startswith((b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")):
        wrong = "compressed with xz or zstd, which QEMU does not start"
    elif start == b"MZ\0\0zimg":
        wrong = "an EFI zboot image, which QEMU does not start"
    if wrong is not None:
        raise UsageError(f"the host's kernel {text} is {wrong}", hint=f"name {_WANTED}")
    found = _BANNER.search(data)
    return KernelFile(path, found[1].decode(errors="replace") if found else _UNKNOWN)


def is_older(release: str, than: str) -> bool:
    """Return whether a kernel's release, such as ``7.3.4+deb13-arm64`` or ``7.4-rc1-arm64``, comes before another.

    Only versions of the kernel count, not those of packages. Returns False if either is unknown.
    """
    one, other = _version(release), _version(than)
    return one is not None and other is not None and one < other


def _version(release: str) -> tuple[int, int, int, float] | None:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?:[-~]rc(\d+))?", release)
    if found is None:
        return None
    major, minor, patch, candidate = found.groups()
    return int(major), int(minor), int(patch or 0), float(candidate or "inf")
