# SPDX-License-Identifier: Apache-2.0
"""Create the parts of an image that need a running lab: the names of busybox's programs, and Python byte code.

A new image is booted once to make them, which also tests the image. Without byte code, Python would compile every
module that it imports, under emulation: structlog takes nine seconds instead of two. The byte code of packages takes a
minute. It is kept as long as the packages stay the same. The agent's own takes a second.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import BinaryIO

from pyvmm.cpio import CpioWriter
from pyvmm.errors import PyvmmError
from pyvmm.lab.apt import Package
from pyvmm.lab.cache import Image
from pyvmm.lab.lab import Lab
from pyvmm.lab.qemu import LabOptions

SCRIPT = """
import compileall, glob, os, py_compile, re, sys, tarfile
skipped = re.compile(
    "encodings/(big5|cp|euc|gb|hp|hz|iso|johab|koi|kz|mac|palm|ptcp|shift|tis|undefined)|_pydatetime|_pydecimal|"
    "/(curses|dbm|http|multiprocessing|wsgiref|xml|xmlrpc|_pyrepl)/|(doctest|imaplib|mailbox|pickletools|pstats|pydoc|"
    "smtplib|tabnanny|trace|turtle|zipapp).py|/(ftp|img|nntp|pop)[^/]*.py"
)
mode = py_compile.PycInvalidationMode.UNCHECKED_HASH  # the files of an initramfs get a new time at every boot
directories = glob.glob(sys.argv[1])
for directory in directories:
    compileall.compile_dir(directory, quiet=2, rx=skipped, workers=2, invalidation_mode=mode)
with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
    for directory in directories:
        for path in glob.iglob(directory + "/**/__pycache__/*.pyc", recursive=True, include_hidden=True):
            tar.add(path)
"""
TIMEOUT = 900.0


def write_additions(image: Image, packages: list[Package], cache: Path, out: BinaryIO) -> None:
    """Boot ``image``, and write these parts as archives that follow its root.

    ``packages`` are those of the root. Their byte code is taken from ``cache``, or made and left there.
    """
    kept = cache / f"bytecode-{_key(packages)}.cpio"
    with Lab(LabOptions(boot="fresh"), image=image, bare=True) as lab:
        _link_busybox(lab, out)
        _compile(lab, "/pyvmm/agent", out)
        if not kept.exists():
            fresh = image.directory / kept.name
            with fresh.open("wb") as file:
                _compile(lab, "/usr/lib/python3*", file)
            for old in cache.glob("bytecode-*.cpio"):
                old.unlink()
            fresh.rename(kept)
    out.write(kept.read_bytes())


def _link_busybox(lab: Lab, out: BinaryIO) -> None:
    """Make busybox's commands, such as ``ls``, available as programs."""
    listed = lab.capture(["/bin/busybox", "--list-full"])
    cpio = CpioWriter(out)
    for path in sorted(set(listed.stdout.decode().split()) - {"bin/busybox"}):
        cpio.symlink(f"usr/{path.removeprefix('usr/')}", "/usr/bin/busybox")
    cpio.finish()


def _key(packages: list[Package]) -> str:
    identity = SCRIPT + repr([(package.name, package.sha256) for package in packages])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _compile(lab: Lab, pattern: str, out: BinaryIO) -> None:
    done = lab.capture(["python3", "-c", SCRIPT, pattern], timeout=TIMEOUT)
    if done.status != 0:
        said = done.stderr[-500:].decode(errors="replace")
        raise PyvmmError(f"the lab's Python modules could not be compiled: {said}")
    cpio = CpioWriter(out)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        for member in tar:
            if file := tar.extractfile(member):
                cpio.file(member.name, file.read())
    cpio.finish()
