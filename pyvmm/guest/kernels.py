# SPDX-License-Identifier: Apache-2.0
"""Guests' kernels and initramfs by name: which file ``debian:``, ``own:`` and ``shell:`` are, here or in a lab.

    debian:         Debian's arm64 kernel that the lab boots by default; debian:stable and others, those it can boot
    own:            the project's, built by pyvmm lab kernel
    shell:          as initramfs: a shell on the kernel's console, with the named kernel's modules (see initramfs)

A kernel, its initramfs and the busybox in that are in one directory, which pyvmm.lab.guests makes and a lab is shown.
Owns nothing.
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
"""Bytes for a guest with one of these kernels, unless it is said how many."""


def is_kernel(text: str) -> bool:
    """Whether this names a kernel instead of being a file's path."""
    return text == OWN or text.startswith(DEBIAN)


def directory_name(text: str) -> str:
    """Return what the directory of this kernel, or of ``shell:`` without one, goes by."""
    return "guest-" + text.rstrip(":").replace(":", "-")


def named(words: Iterable[str], others: Collection[str] = ()) -> list[str]:
    """Return what must be shown to a lab for a command line of these words: kernels, and ``others``, each once.

    A word may have a name as a whole, or between its ``=`` and commas.
    """
    parts = [part for word in words for part in word.replace("=", ",").split(",")]
    kernels = list(filter(is_kernel, parts)) or [SHELL] * (SHELL in parts)
    return list(dict.fromkeys([*kernels, *(part for part in parts if part in others)]))


def resolve(kernel: str, initrd: str | None, make: Callable[[str], str] | None = None) -> tuple[str, str | None]:
    """Return the files of a kernel and an initramfs; what is no name stays as it is.

    Elsewhere than in a lab ``make`` is called with a name and gives its directory. Raises HostError where there is
    none, and what ``make`` raises.
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
    """Return where a named kernel's files are, or those of ``shell:`` without one; as :func:`resolve` does."""
    found = given_tree(directory_name(name))
    if found is None and make is not None and not in_lab():
        found = make(name)
    if found is None:
        raise HostError(
            f"{name} is not to be found here: this lab was not shown it" if in_lab() else f"{name} is not made here",
            hint=f"pyvmm --lab VERB shows what its command line names; else: pyvmm lab exec --with {name} -- COMMAND",
        )
    return found
