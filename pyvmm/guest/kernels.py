# SPDX-License-Identifier: Apache-2.0
"""Resolve named guest kernels and initramfs: the files of ``debian:``, ``own:`` and ``shell:``, here or in a lab.

    debian:         Debian's arm64 kernel that the lab boots by default; debian:stable and others, those it can boot
    own:            the project's, built by pyvmm lab kernel
    shell:          as initramfs: a shell on the kernel's console, with the named kernel's modules (see initramfs)

One directory holds a kernel, its initramfs and busybox. pyvmm.lab.guests makes it, and a lab sees it. Owns nothing.
"""

from __future__ import annotations

import os

from pyvmm.errors import HostError
from pyvmm.labenv import given_tree, in_lab

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from typing import Final

DEBIAN: Final = "debian:"
OWN: Final = "own:"
SHELL: Final = "shell:"

IMAGE: Final = "Image"
INITRAMFS: Final = "shell.cpio"
BUSYBOX: Final = "busybox"
MEMORY: Final = 256 << 20
"""Default memory of a guest with one of these kernels, in bytes."""


def is_kernel(text: str) -> bool:
    """Whether this is a kernel's name, not a file's path."""
    return text == OWN or text.startswith(DEBIAN)


def directory_name(text: str) -> str:
    """Return the directory name of this kernel, or of ``shell:`` without one."""
    return "guest-" + text.rstrip(":").replace(":", "-")


def named(words: Iterable[str], others: Collection[str] = ()) -> list[str]:
    """Return the names in a command line that a lab must see: kernels, and ``others``, each once.

    A name may be a whole word, or a part between its ``=`` and commas.
    """
    parts = [part for word in words for part in word.replace("=", ",").split(",")]
    kernels = list(filter(is_kernel, parts)) or [SHELL] * (SHELL in parts)
    return list(dict.fromkeys([*kernels, *(part for part in parts if part in others)]))


def resolve(kernel: str, initrd: str | None, make: Callable[[str], str] | None = None) -> tuple[str, str | None]:
    """Return the files of a kernel and an initramfs. Paths stay unchanged.

    Outside of a lab, ``make`` takes a name and returns its directory. Raises HostError if the directory is missing, and
    the errors of ``make``.
    """
    name = kernel if is_kernel(kernel) else SHELL
    if name == SHELL and initrd != SHELL:
        return kernel, initrd
    where = directory(name, make)
    return (
        kernel if name == SHELL else os.path.join(where, IMAGE),
        os.path.join(where, INITRAMFS) if initrd == SHELL else initrd,
    )


def directory(name: str, make: Callable[[str], str] | None) -> str:
    """Return the directory of a named kernel's files, or of ``shell:`` without one, as :func:`resolve` does."""
    found = given_tree(directory_name(name))
    if found is None and make is not None and not in_lab():
        found = make(name)
    if found is None:
        raise HostError(
            f"{name} is missing: this lab does not see it" if in_lab() else f"{name} is not made here",
            hint=f"pyvmm --lab VERB adds names in its command line; else use pyvmm lab exec --with {name} -- COMMAND",
        )
    return found
