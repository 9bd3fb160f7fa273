# SPDX-License-Identifier: Apache-2.0
"""The lab's cache: locate images by kernel name, check them, and lock the cache for writing.

``$XDG_CACHE_HOME/pyvmm/lab`` holds ``apt/`` (package lists and files), ``images/KEY/`` (immutable once there, named by
content) and a link to one of them for each host kernel: ``current`` for the default one, ``current-KERNEL`` for the
others. Everything appears by rename; writers hold ``lock``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pyvmm.errors import HostError, PyvmmError
from pyvmm.lab import kernels
from pyvmm.syntax.foreign import load_json

FILES = ("Image", "root.cpio", "modules.cpio", "busybox")
"""What an image is: the two that the lab boots, and two of which guests' initramfs are made (see guests)."""
GRACE_SECONDS = 600  # an older image is kept this long: a lab may be starting from it


def cache_directory() -> Path:
    """Return the directory of the lab's cache, which need not exist. Raises HostError if its place is unknown.

    XDG Base Directory Specification 0.8: a variable that is empty or names a relative path counts as not set.
    """
    base = _absolute("XDG_CACHE_HOME")
    if base is None:
        home = _absolute("HOME")
        if home is None:
            import pwd  # few users have no HOME

            try:
                home = pwd.getpwuid(os.getuid()).pw_dir
            except KeyError:
                home = ""
        if not home.startswith("/"):
            raise HostError(
                "there is no place for the lab's cache: this user has no home directory",
                hint="set XDG_CACHE_HOME to the absolute path of a directory of yours",
            )
        base = os.path.join(home, ".cache")
    return Path(base) / "pyvmm" / "lab"


def _absolute(variable: str) -> str | None:
    path = os.environ.get(variable, "")
    return path if path.startswith("/") else None


@dataclass(frozen=True, slots=True)
class FileRecord:
    """The expected ``size`` in bytes and hash of an image's file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The inputs of an image. ``packages`` are (name, version, sha256); ``built`` is a UTC time, ISO 8601."""

    release: str
    built: str
    mirror: str
    recipe: str
    packages: list[tuple[str, str, str]]
    files: dict[str, FileRecord]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse a manifest. Raises LookupError, ValueError, TypeError or AttributeError for anything else."""
        data = load_json(text)
        data["files"] = {name: FileRecord(**record) for name, record in data["files"].items()}
        data["packages"] = [(name, version, digest) for name, version, digest in data["packages"]]
        return cls(**data)


@dataclass(frozen=True, slots=True)
class Image:
    """A kernel and an initramfs that belong together; or that initramfs with a kernel from a ``file``."""

    directory: Path
    manifest: Manifest
    file: kernels.KernelFile | None = None

    @property
    def kernel(self) -> Path:
        return self.directory / "Image" if self.file is None else self.file.path

    @property
    def release(self) -> str:
        """The kernel's release, as ``uname -r`` will say it."""
        return self.manifest.release if self.file is None else self.file.release

    @property
    def has_modules(self) -> bool:
        """Return whether the modules in the root are this kernel's."""
        return self.release == self.manifest.release

    @property
    def cache_tag(self) -> str:
        """The tag of the root's Python in the names of byte code, such as ``cpython-313``."""
        names = " ".join(name for name, _, _ in self.manifest.packages)
        found = re.search(r"\bpython3\.(\d+)-minimal\b", names)
        return f"cpython-3{found[1]}" if found else "unknown"

    @property
    def root(self) -> Path:
        return self.directory / "root.cpio"

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(record.size for record in self.manifest.files.values())

    def damage(self, *, thorough: bool) -> str | None:
        """Return a fault of the image's files, if any. ``thorough`` reads the whole files."""
        for name, record in self.manifest.files.items():
            path = self.directory / name
            try:
                size = path.stat().st_size
                if size != record.size:
                    return f"{path} has {size} bytes, not {record.size}"
                if thorough and file_sha256(path) != record.sha256:
                    return f"{path} is corrupt (its sha256 is not the manifest's)"
            except OSError as error:
                return f"{path}: {error.strerror}"
        return None


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Cache:
    """The cache below ``directory``."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or cache_directory()
        self.apt = self.directory / "apt"

    def current(self, kernel: str = kernels.DEFAULT) -> Image | None:
        """Return the kernel's image, or None without a readable one. Its files are not checked."""
        try:
            directory = self._link(kernel).resolve(strict=True)
            return Image(directory, Manifest.from_json((directory / "manifest.json").read_text()))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # missing, or not a manifest
            return None

    def all_current(self) -> dict[str, Image]:
        """Return all images by their kernels' names."""
        return {kernel: image for kernel in kernels.SUITES if (image := self.current(kernel))}

    def _link(self, kernel: str) -> Path:
        return self.directory / ("current" if kernel == kernels.DEFAULT else f"current-{kernel}")

    @contextmanager
    def lock(self, waiting: Callable[[], None], name: str = "lock") -> Iterator[None]:
        """Hold the lock exclusively. Calls ``waiting`` once if another process holds it."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = (self.directory / name).open("w")
        except OSError as error:
            raise PyvmmError(
                f"the cache {self.directory} cannot be written: {error.strerror}",
                hint="set XDG_CACHE_HOME to a directory of yours",
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def scratch(self, name: str = "partial") -> Iterator[Path]:
        """Yield an empty directory beside the images; it is always removed. The lock must be held."""
        path = self.directory / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def adopt(self, scratch: Path, manifest: Manifest, kernel: str = kernels.DEFAULT) -> Image:
        """Make the files in ``scratch`` the kernel's image; remove images that no kernel uses. Needs the lock."""
        (scratch / "manifest.json").write_text(manifest.to_json())
        key = hashlib.sha256(json.dumps(asdict(manifest)["files"], sort_keys=True).encode()).hexdigest()[:16]
        images = self.directory / "images"
        images.mkdir(exist_ok=True)
        directory = images / key
        if directory.exists() and Image(directory, manifest).damage(thorough=True):
            shutil.rmtree(directory)
        if directory.exists():  # the same content again: labs may be starting from it, so replace only the manifest
            (scratch / "manifest.json").replace(directory / "manifest.json")
        else:
            scratch.rename(directory)
        link = self.directory / "link.new"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("images") / key)
        link.replace(self._link(kernel))
        used = {self._link(name).resolve().name for name in kernels.SUITES}
        for other in images.iterdir():
            if other.name not in used and time.time() - other.stat().st_mtime > GRACE_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
        return Image(directory, manifest)
