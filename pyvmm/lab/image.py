# SPDX-License-Identifier: Apache-2.0
"""Builds the lab's images: one of Debian's arm64 kernels and a minimal root, resolved when it is built, then cached.

No version is pinned, because mirrors drop superseded packages. A manifest records the packages used. Everything
in the image is a signed Debian package, Python modules included, so a build needs no second registry.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pyvmm.errors import PyvmmError
from pyvmm.lab import kernels, rootfs
from pyvmm.lab.apt import AptError, Progress, package_file, silent, updated_apt
from pyvmm.lab.cache import FILES, Cache, FileRecord, Image, Manifest, file_sha256
from pyvmm.lab.qemu import require_qemu


def build_image(
    kernel: str = kernels.DEFAULT,
    *,
    refresh: bool = False,
    progress: Progress = silent,
    cache: Cache | None = None,
) -> Image:
    """Return the image of a host kernel. Build it if it is missing, or from the newest packages for ``refresh``.

    ``kernel`` is a name that ``kernels`` knows, or a file: that boots with the root of an image, one with the file's
    modules if there is one. The project's own is built as well if need be, which takes minutes. An image whose recipe
    is not this version's is built again. ``cache`` is where images are kept, by default the user's. Where that needs
    the network and there is none, an existing image is used and ``progress`` says so. UsageError for a kernel that is
    none, PyvmmError where there is no image and none can be built.
    """
    cache = cache or Cache()
    found = kernels.find(kernel)
    if found == kernels.OWN:
        from pyvmm.lab.ownkernel import Variant, build_kernels

        own = build_kernels(refresh=refresh, wanted=[Variant.HOST], progress=progress, cache=cache)[Variant.HOST]
        found = kernels.KernelFile(own.path, own.release)
    if isinstance(found, kernels.KernelFile):
        root = build_image(_root_for(found, cache), refresh=refresh, progress=progress, cache=cache)
        return replace(root, file=found)
    if not refresh and (image := _usable(cache, found)):
        return image
    with cache.lock(lambda: progress("waiting for another build", 0.0)):
        if not refresh and (image := _usable(cache, found)):  # built by the process that held the lock
            return image
        try:
            return _build(cache, found, refresh, progress)
        except AptError as error:
            old = cache.current(found)
            if not error.offline or old is None or old.damage(thorough=True):
                raise
            progress(f"offline: using the image of {old.manifest.built}", 1.0)
            return old
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise PyvmmError(
                f"no space left in {cache.directory} for the lab's image",
                hint="free about 600 MB there, or set XDG_CACHE_HOME to a larger place",
            ) from error


def usable_image(cache: Cache | None = None, *, kernel: str = kernels.DEFAULT, thorough: bool = False) -> Image | None:
    """Return a kernel's image if this version made it and its files look complete; ``thorough`` reads them."""
    cache = cache or Cache()
    found = kernels.find(kernel)
    if found == kernels.OWN:
        from pyvmm.lab.ownkernel import usable_kernel

        if (own := usable_kernel(cache, thorough=thorough)) is None:
            return None
        found = kernels.KernelFile(own.path, own.release)
    if isinstance(found, str):
        return _usable(cache, found, thorough=thorough)
    root = _usable(cache, _root_for(found, cache), thorough=thorough)
    return None if root is None else replace(root, file=found)


def age_note(kernel: str, image: Image, cache: Cache | None = None) -> str | None:
    """Return a remark if ``image``, of the named kernel, is older than the default one and its name promises more."""
    newest = (cache or Cache()).current() if kernel.removesuffix(kernels.LARGE) in kernels.MAY_BE_OLDER else None
    if newest is None or not kernels.is_older(image.release, newest.release):
        return None
    return f"{kernel} is {image.release}, older than {kernels.DEFAULT}, which is {newest.release}"


def _root_for(file: kernels.KernelFile, cache: Cache) -> str:
    """Return the name of the kernel whose image has this one's modules, by default the default kernel's."""
    images = {name: _usable(cache, name) for name in kernels.SUITES}
    matching = [name for name, image in images.items() if image and image.manifest.release == file.release]
    return matching[0] if matching else kernels.DEFAULT


def _usable(cache: Cache, kernel: str, *, thorough: bool = False) -> Image | None:
    image = cache.current(kernel)
    if image is None or image.manifest.recipe != rootfs.recipe_hash() or image.damage(thorough=thorough):
        return None
    return image


def _build(cache: Cache, name: str, refresh: bool, progress: Progress) -> Image:
    from pyvmm.lab import firstboot  # an image is built once

    require_qemu()
    suites = kernels.SUITES[name]
    apt = updated_apt(cache.apt, suites, refresh=refresh, progress=progress)
    progress("resolving packages", 0.0)
    kernel = [
        pair for pair in apt.resolve(kernels.package(name), suite=suites[-1]) if rootfs.KERNEL_PARTS.match(pair[0])
    ]
    root = [pair for pair in apt.resolve(*rootfs.ROOTS) if pair[0] not in rootfs.UNUSED_PACKAGES]
    packages = apt.locate(kernel + root)
    apt.download(packages, progress)
    with cache.scratch() as scratch:
        progress("kernel", 0.0)
        with (scratch / "Image").open("wb") as out:
            release, modules = rootfs.write_kernel([apt.archives / p.file for p in packages[: len(kernel)]], out)
        progress("root", 0.0)
        files = [apt.archives / p.file for p in packages[len(kernel) :]]
        with (scratch / "root.cpio").open("wb") as out:
            rootfs.write_root(files, release, modules, out)
        with (scratch / "modules.cpio").open("wb") as out:
            rootfs.write_guest_modules(release, modules, out)
        (scratch / "busybox").write_bytes(rootfs.read_busybox(files))
        manifest = Manifest(
            release=release,
            built=datetime.now(UTC).isoformat(timespec="seconds"),
            mirror=apt.mirror,
            recipe=rootfs.recipe_hash(),
            packages=[(package.name, package.version, package.sha256) for package in packages],
            files={name: _record(scratch / name) for name in FILES},
        )
        progress("first boot", 0.0)
        with (scratch / "additions").open("wb") as out:
            firstboot.write_additions(Image(scratch, manifest), packages[len(kernel) :], cache.directory, out)
        with (scratch / "root.cpio").open("ab") as out:
            out.write((scratch / "additions").read_bytes())
        (scratch / "additions").unlink()
        manifest = replace(manifest, files={name: _record(scratch / name) for name in FILES})
        image = cache.adopt(scratch, manifest, name)
    _drop_superseded(apt.archives, cache)
    return image


def _record(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, file_sha256(path))


def _drop_superseded(archives: Path, cache: Cache) -> None:
    """Keep the package files of every kernel's image: a build with another recipe needs only these."""
    images = cache.all_current().values()
    kept = {package_file(name, version) for image in images for name, version, _ in image.manifest.packages}
    for path in archives.glob("*.deb"):
        if path.name.rpartition("_")[0] not in kept:
            path.unlink()
