"""Builds the lab's image: Debian's newest arm64 kernel and a minimal root, resolved when it is built, then cached.

Nothing is pinned by version, because a mirror drops what is superseded; a manifest records what was taken. Everything
in the image is a signed Debian package, Python modules included: one mechanism, no second registry to be reached.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pyvmm.errors import PyvmmError
from pyvmm.lab import firstboot, rootfs
from pyvmm.lab.apt import BACKPORTS, CANONICAL_MIRROR, Apt, AptError, Package, Progress, machine_mirror
from pyvmm.lab.cache import FILES, Cache, FileRecord, Image, Manifest, file_sha256
from pyvmm.lab.qemu import require_qemu

LISTS_FRESH_SECONDS = 3600


def silent(_what: str, _share: float) -> None:
    """Report no progress."""


def build_image(*, refresh: bool = False, progress: Progress = silent, cache: Cache | None = None) -> Image:
    """Give the lab's image, building it where there is none, or where ``refresh`` asks for the archive's newest.

    An image whose recipe is not this version's is built again. Where that needs the network and there is none, an
    existing image is used and ``progress`` says so. PyvmmError where there is no image and none can be built.
    """
    cache = cache or Cache()
    if not refresh and (image := usable_image(cache)):
        return image
    with cache.lock(lambda: progress("waiting for another build", 0.0)):
        if not refresh and (image := usable_image(cache)):  # built by whom we waited for
            return image
        try:
            return _build(cache, refresh, progress)
        except AptError as error:
            old = cache.current()
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


def usable_image(cache: Cache | None = None, *, thorough: bool = False) -> Image | None:
    """Give the current image if this version made it and its files look whole; ``thorough`` reads them to be sure."""
    image = (cache or Cache()).current()
    if image is None or image.manifest.recipe != rootfs.recipe_hash() or image.damage(thorough=thorough):
        return None
    return image


def _build(cache: Cache, refresh: bool, progress: Progress) -> Image:
    require_qemu()
    apt = _updated_apt(cache, refresh, progress)
    progress("resolving packages", 0.0)
    kernel = [pair for pair in apt.resolve(rootfs.KERNEL, suite=BACKPORTS) if rootfs.KERNEL_PARTS.match(pair[0])]
    root = [pair for pair in apt.resolve(*rootfs.ROOTS) if pair[0] not in rootfs.UNUSED_PACKAGES]
    packages = apt.locate(kernel + root)
    apt.download(packages, progress)
    with cache.scratch() as scratch:
        progress("kernel", 0.0)
        with (scratch / "Image").open("wb") as out:
            release, modules = rootfs.write_kernel([apt.archives / p.file for p in packages[: len(kernel)]], out)
        progress("root", 0.0)
        with (scratch / "root.cpio").open("wb") as out:
            rootfs.write_root([apt.archives / p.file for p in packages[len(kernel) :]], release, modules, out)
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
        image = cache.adopt(scratch, manifest)
    _drop_superseded(apt.archives, packages)
    return image


def _updated_apt(cache: Cache, refresh: bool, progress: Progress) -> Apt:
    """Give an apt whose lists are recent, from this machine's mirror or else the canonical one."""
    mirrors = list(dict.fromkeys((machine_mirror(), CANONICAL_MIRROR)))
    for mirror in mirrors:
        apt = Apt(cache.apt, mirror)
        apt.prepare()
        age = apt.newest_age()
        if age is not None and age < LISTS_FRESH_SECONDS and not refresh:
            return apt
        try:
            apt.update(progress)
            return apt
        except AptError:
            if mirror == mirrors[-1]:
                raise
    raise RuntimeError("no mirror")  # mirrors is never empty


def _record(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, file_sha256(path))


def _drop_superseded(archives: Path, packages: list[Package]) -> None:
    kept = {package.file for package in packages}
    for path in archives.glob("*.deb"):
        if path.name not in kept:
            path.unlink()
