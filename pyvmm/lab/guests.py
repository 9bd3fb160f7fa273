# SPDX-License-Identifier: Apache-2.0
"""Make trees of guests' kernels and initramfs from the lab's images and the project's own kernel.

Nothing is fetched: if an image or kernel is missing, the error names the command that makes it. The kernel in a tree is
a link.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from pyvmm.errors import HostError, UsageError
from pyvmm.guest import initramfs
from pyvmm.guest.kernels import BUSYBOX, DEBIAN, IMAGE, INITRAMFS, OWN, SHELL, directory_name, is_kernel
from pyvmm.lab import kernels
from pyvmm.lab.apt import Progress
from pyvmm.lab.cache import Cache, Image
from pyvmm.lab.image import usable_image
from pyvmm.lab.ownkernel import Variant, usable_kernel
from pyvmm.lab.trees import Recipe, Scratch, digest_of, made_tree


def recipe(text: str, cache: Cache | None = None) -> Recipe:
    """Return the recipe for the directory of a kernel, or of ``shell:`` alone.

    Raises UsageError for an unknown Debian kernel, HostError if it is not built yet.
    """
    cache = cache or Cache()
    suite = suite_of(text)
    kernel = None
    if text == OWN:
        if (own := usable_kernel(cache, Variant.GUEST)) is None:
            raise HostError("the project's own kernel is not built here", hint="pyvmm lab kernel builds it")
        kernel = own.path
    image = _image(text, suite, cache)
    if text.startswith(DEBIAN):
        kernel = image.kernel
    modules = image.directory / "modules.cpio" if text.startswith(DEBIAN) else None
    parts = [str(kernel), str(image.directory), initramfs.digest(), BUSYBOX]
    return Recipe(directory_name(text), digest_of(*parts), partial(_make, image.directory / "busybox", kernel, modules))


def suite_of(text: str) -> str:
    """Return the name of the image with a guest's kernel or its busybox. Raises UsageError if there cannot be one."""
    suite = text.removeprefix(DEBIAN) if text.startswith(DEBIAN) else ""
    if suite and suite not in kernels.SUITES:
        known = ", ".join(DEBIAN + name for name in kernels.SUITES)
        raise UsageError(f"no kernel of Debian's is called {text!r}", hint=f"there are {DEBIAN} and {known}")
    return suite or kernels.DEFAULT


def _image(text: str, suite: str, cache: Cache) -> Image:
    if (image := usable_image(cache, kernel=suite)) is not None:
        return image
    command = "pyvmm lab build" + (f" --host-kernel {suite}" if suite != kernels.DEFAULT else "")
    what = "this kernel of Debian's" if is_kernel(text) and text != OWN else "busybox, which shell: is made of,"
    raise HostError(f"{text}: {what} is not here", hint=f"{command} fetches it, on any machine with apt and QEMU")


def _make(busybox: Path, kernel: Path | None, modules: Path | None, scratch: Scratch, _progress: Progress) -> str:
    archive = initramfs.write(busybox.read_bytes())
    (scratch.tree / INITRAMFS).write_bytes(archive + (modules.read_bytes() if modules else b""))
    for name, file in {BUSYBOX: busybox, IMAGE: kernel}.items():
        if file is None:
            continue
        try:
            os.link(file, scratch.tree / name)
        except OSError:
            shutil.copyfile(file, scratch.tree / name)
    return str(kernel or busybox)


def made(text: str) -> str:
    """Return the directory of a kernel, or of ``shell:`` alone. Make it from the lab's files if it is missing."""
    return str(made_tree(recipe(text)))


RECIPES: Final[Mapping[str, Callable[[], Recipe]]] = {
    name: partial(recipe, name) for name in (DEBIAN, *(DEBIAN + suite for suite in kernels.SUITES), OWN, SHELL)
}
