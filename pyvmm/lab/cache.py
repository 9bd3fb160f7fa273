"""The lab's cache: where images are, which one is current, whether it is whole, and who may write.

``$XDG_CACHE_HOME/pyvmm/lab`` holds ``apt/`` (package lists and files), ``images/KEY/`` (immutable once there, named by
content) and ``current`` (a link to one of them). Everything appears by rename; writers hold ``lock``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pyvmm.errors import PyvmmError

FILES = ("Image", "root.cpio")
GRACE_SECONDS = 600  # an older image stays so long: a lab may just be starting from it


def cache_directory() -> Path:
    """Give the directory of the lab's cache; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "pyvmm" / "lab"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file of an image must be: ``size`` in bytes, and its hash."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an image was made of. ``packages`` are (name, version, sha256); ``built`` is a UTC time, ISO 8601."""

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
        """Parse; LookupError, ValueError, TypeError or AttributeError where it is not a manifest."""
        data = json.loads(text)
        data["files"] = {name: FileRecord(**record) for name, record in data["files"].items()}
        data["packages"] = [(name, version, digest) for name, version, digest in data["packages"]]
        return cls(**data)


@dataclass(frozen=True, slots=True)
class Image:
    """A kernel and an initramfs that belong together."""

    directory: Path
    manifest: Manifest

    @property
    def kernel(self) -> Path:
        return self.directory / "Image"

    @property
    def root(self) -> Path:
        return self.directory / "root.cpio"

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(record.size for record in self.manifest.files.values())

    def damage(self, *, thorough: bool) -> str | None:
        """Say what is wrong with the image's files, if anything; ``thorough`` reads them whole."""
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
        self._current = self.directory / "current"

    def current(self) -> Image | None:
        """Give the image in use, None where there is none that can be understood. Its files are not checked."""
        try:
            directory = self._current.resolve(strict=True)
            return Image(directory, Manifest.from_json((directory / "manifest.json").read_text()))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # missing, or no manifest of ours
            return None

    @contextmanager
    def lock(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Be the only writer; ``waiting`` is called once if another process is."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = (self.directory / "lock").open("w")
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
    def scratch(self) -> Iterator[Path]:
        """Give an empty directory beside the images; it is removed whatever happens. The lock must be held."""
        path = self.directory / "partial"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def adopt(self, scratch: Path, manifest: Manifest) -> Image:
        """Make the files in ``scratch`` the current image, drop older ones. The lock must be held."""
        (scratch / "manifest.json").write_text(manifest.to_json())
        key = hashlib.sha256(json.dumps(asdict(manifest)["files"], sort_keys=True).encode()).hexdigest()[:16]
        images = self.directory / "images"
        images.mkdir(exist_ok=True)
        directory = images / key
        if directory.exists() and Image(directory, manifest).damage(thorough=True):
            shutil.rmtree(directory)
        if directory.exists():  # the same content again: labs may be starting from it, only the manifest is newer
            (scratch / "manifest.json").replace(directory / "manifest.json")
        else:
            scratch.rename(directory)
        link = self.directory / "current.new"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("images") / key)
        link.replace(self._current)
        for other in images.iterdir():
            if other != directory and time.time() - other.stat().st_mtime > GRACE_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
        return Image(directory, manifest)
