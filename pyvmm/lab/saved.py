# SPDX-License-Identifier: Apache-2.0
"""Saved boots: store a lab's state on disk once its agent is ready, so that the next lab starts from there.

``$XDG_CACHE_HOME/pyvmm/lab/boots/KEY/`` holds ``ram``, the machine's memory, which every restored lab maps privately,
``state``, the rest of the machine as QEMU writes it, and ``about.json``. All are their user's alone. The key covers
everything that shapes the machine. If all together are too large, the least recently used ones are removed.

A boot is saved with nothing mounted, since QEMU does not save a machine with a 9p mount. A restored lab first gets the
time and fresh randomness. Two labs of one saved boot still share the addresses in the kernel and in the agent's
interpreter, and its seed of ``hash``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyvmm import log
from pyvmm.errors import PyvmmError
from pyvmm.lab import frames
from pyvmm.lab.cache import Image, cache_directory, file_sha256
from pyvmm.lab.link import Link
from pyvmm.lab.qemu import OLDEST, RIGHT_HVHE, LabOptions, Qemu, Ram, command_line, qemu_version
from pyvmm.syntax.foreign import load_json

FORMAT: Final = 1
LIMIT: Final = 2 << 30
"""Bytes of disk that all saved boots together may take; one of 2 GiB takes some 250 MB, as its file has holes."""
ROOM: Final = 1 << 30
"""Bytes that must be free on the disk for a boot to be saved."""
RANDOM_BYTES: Final = 256

_log = log.get_logger("lab")


@dataclass(frozen=True, slots=True)
class SavedBoot:
    """A saved boot, held open: ``ram`` and ``state`` are what QEMU starts from, ``version`` is QEMU's."""

    directory: Path
    ram: Ram
    state: bytes
    version: str

    def close(self) -> None:
        """Close the file; a running machine has it open itself."""
        os.close(self.ram.file)

    def drop(self) -> None:
        """Remove it from the disk: it is unusable."""
        shutil.rmtree(self.directory, ignore_errors=True)


def may_be_saved(options: LabOptions) -> bool:
    """Return whether a lab with these options may start from a saved boot.

    A lab with icount always boots, because equal counts were not shown for a restored one. A lab with a visible console
    also boots, to show its boot messages.
    """
    return options.boot == "saved" and not options.icount and not options.verbose


def find_or_save(program: str, image: Image, options: LabOptions) -> SavedBoot | None:
    """Return the saved boot of ``image`` under QEMU ``program``. If there is none yet, boot and save one.

    Returns None if that fails, and logs the reason. Raises LabError if the lab does not boot.
    """
    home = _home()
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory = home / _key(program, image, options)
        if (found := _open(directory)) is not None:
            return found
        with _alone(home) as is_alone:
            if not is_alone:
                raise _NotSavedError("another process saves one")
            _save(directory, program, image, options)
            _keep_to_limit(home, directory)
        return _open(directory)
    except (OSError, _NotSavedError) as error:
        _log.info("no saved boot", reason=str(error))
        return None


def renewal() -> bytes:
    """Give the frame that sets a restored lab's clock and gives it fresh randomness."""
    return frames.pack(frames.RENEW, time.time_ns().to_bytes(8, "little") + os.urandom(RANDOM_BYTES))


def disk_use() -> tuple[int, int]:
    """Give how many saved boots there are, and the bytes they take."""
    sizes = [_size(directory) for directory in _all(_home())]
    return len(sizes), sum(sizes)


class _NotSavedError(PyvmmError):
    """A lab that has booted could not be saved."""


def _home() -> Path:
    return cache_directory() / "boots"


def _key(program: str, image: Image, options: LabOptions) -> str:
    """Name a boot by everything that shapes the machine, including the contents of files and QEMU itself."""
    seen = os.stat(program)
    ram = Ram(0, restored=False, empty=Path())
    # What follows QEMU's version. To ask for that would cost the start of a program.
    lines = [command_line("", f"{a}.{b}", image, options, [], 0, ram) for a, b in (OLDEST, RIGHT_HVHE)]
    files = {name: record.sha256 for name, record in image.manifest.files.items()}
    if image.file is not None:
        files["Image"] = file_sha256(image.file.path)
    shape = [FORMAT, os.path.realpath(program), seen.st_size, seen.st_mtime_ns, lines, files]
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:24]


def _open(directory: Path) -> SavedBoot | None:
    """Open a saved boot, and mark it as used now. None if it is missing."""
    try:
        version = str(load_json((directory / "about.json").read_bytes())["qemu"])
        state = (directory / "state").read_bytes()
        file = os.open(directory / "ram", os.O_RDWR | os.O_CLOEXEC)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    with suppress(OSError):
        os.utime(directory)
    return SavedBoot(directory, Ram(file, restored=True, empty=_empty(directory.parent)), state, version)


def _empty(home: Path) -> Path:
    path = home / "empty"
    path.mkdir(exist_ok=True)
    return path


def _save(directory: Path, program: str, image: Image, options: LabOptions) -> None:
    """Boot a lab and save it as ``directory``. Raises _NotSavedError if it boots but cannot be saved."""
    home = directory.parent
    if (free := shutil.disk_usage(home).free) < ROOM + (options.memory << 20):
        raise _NotSavedError(f"{home} has {free >> 20} MiB free, too few for a saved boot")
    scratch = home / "new"  # one at a time: this process holds the lock
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(mode=0o700)
    version = qemu_version(program)
    file = os.open(scratch / "ram", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(file, options.memory << 20)
        state = _boot(Qemu(program, version, image, options, ram=Ram(file, False, _empty(home))), image, options)
        os.fsync(file)
        _write(scratch / "state", state)
        _write(scratch / "about.json", json.dumps({"format": FORMAT, "qemu": version}).encode())
        shutil.rmtree(directory, ignore_errors=True)  # remove a saved boot that lacks a file
        scratch.rename(directory)
    finally:
        os.close(file)
        shutil.rmtree(scratch, ignore_errors=True)


def _boot(qemu: Qemu, image: Image, options: LabOptions) -> bytes:
    """Boot ``qemu``, end it, and return its state."""
    try:
        link = Link(qemu, image, options.boot_timeout)
        link.wait_for_boot()
        try:
            if (why := link.ask(frames.PREPARE)) is not None:
                raise _NotSavedError(why)
            return qemu.monitor.save()
        except PyvmmError as error:
            raise _NotSavedError(str(error)) from error
    finally:
        qemu.stop()


def _write(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _alone(home: Path) -> Iterator[bool]:
    """Lock the saving of a boot. If another process saves it, do not wait: booting is as fast."""
    with (home / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _all(home: Path) -> list[Path]:
    """Return all saved boots, the most recently used first."""
    used = {path.parent: path.parent.stat().st_mtime for path in home.glob("*/about.json")}
    return sorted(used, key=used.__getitem__, reverse=True)


def _size(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


def _keep_to_limit(home: Path, newest: Path) -> None:
    """Remove the least recently used boots until the rest fits. A running lab keeps its boot until it ends."""
    total = 0
    for directory in _all(home):
        total += _size(directory)
        if total > LIMIT and directory != newest:
            shutil.rmtree(directory, ignore_errors=True)
