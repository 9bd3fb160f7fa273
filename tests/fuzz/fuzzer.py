# SPDX-License-Identifier: Apache-2.0
"""Builds and runs the fuzz targets in C: the native loop under sanitizers, with gcc's coverage and a small engine.

A target is ``target_NAME.c``; its corpus is ``corpus/NAME``. Inputs are what a hostile guest may do, byte by byte.
Those in Python are :mod:`tests.fuzz.devices`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from native import build

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve().parent
TARGETS = tuple(sorted(path.stem.removeprefix("target_") for path in HERE.glob("target_*.c")))
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover")
# The loops under test would sleep in ppoll(): each target says instead when they are to leave. Some distributions' gcc
# checks buffers unless told not to (_FORTIFY_SOURCE), and a checked ppoll() would be the C library's again.
REPLACED = ("-Dppoll=fuzz_ppoll", "-U_FORTIFY_SOURCE")
#: Faults are the guarded copies' to handle.
OPTIONS = {"ASAN_OPTIONS": "handle_segv=0:handle_sigbus=0:detect_leaks=0"}


class Unavailable(Exception):
    """There is no compiler here with the needed features."""


class Failed(Exception):
    """An invariant failed: ``input`` is what the guest did, ``said`` describes the failure."""

    def __init__(self, target: str, said: str, data: bytes) -> None:
        self.input = data
        path = Path(tempfile.gettempdir()) / f"pyvmm-fuzz-{target}-{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(packed(data))
        super().__init__(
            f"{target}: {said}\ninput: {data.hex()}\nkept at {path}; again: python -m tests.fuzz {target} {path}"
        )


@dataclass(frozen=True)
class Result:
    """Counts: inputs tried, inputs in the corpus, new inputs that reached more, and edges reached by all."""

    runs: int
    corpus: int
    found: int
    edges: int


def corpus(target: str) -> Path:
    return HERE / "corpus" / target


@functools.cache
def _built() -> tuple[list[str], tempfile.TemporaryDirectory[str]]:
    """Compile the sources that all targets share, once. Returns the compiler with its flags, and the objects folder."""
    cc = build.compiler(platform.machine())
    if cc is None:
        raise Unavailable("no C compiler")
    common = [*cc, "-g", "-std=gnu11", "-fno-strict-aliasing", *build.STRICT, f"-I{build.NATIVE}", f"-I{HERE}"]
    watched = [*common, "-O1", *SANITIZE, "-fsanitize-coverage=trace-pc", '-DPV_SOURCE_HASH="fuzz"']
    folder = tempfile.TemporaryDirectory(prefix="pyvmm-fuzz-")
    for source in build.c_files():
        _run([*watched, *REPLACED, "-c", str(source), "-o", f"{folder.name}/{source.stem}.o"])
    _run([*watched, "-c", str(HERE / "guest.c"), "-o", f"{folder.name}/guest-of-fuzz.o"])
    _run([*common, "-O2", "-c", str(HERE / "engine.c"), "-o", f"{folder.name}/engine.o"])
    return watched, folder


def make(target: str, folder: Path) -> Path:
    """Build a target's executable in ``folder``. Raises Unavailable."""
    watched, objects = _built()
    program = folder / target
    source = str(HERE / f"target_{target}.c")
    _run([*watched, "-o", str(program), source, *map(str, sorted(Path(objects.name).glob("*.o")))])
    return program


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and any(word in done.stderr for word in ("asan", "ubsan", "unrecognized")):
        raise Unavailable(f"no sanitizers: {done.stderr.strip().splitlines()[-1]}")
    assert not done.returncode, done.stderr


def run(target: str, inputs: Path, seconds: float, seed: int, keep: Path | None = None) -> Result:
    """Try ``inputs``, and new ones for ``seconds``. The shortest inputs for each reached edge go to ``keep``.

    Raises Failed.
    """
    with tempfile.TemporaryDirectory(prefix="pyvmm-fuzz-") as name:
        folder = Path(name)
        program = make(target, folder)
        current, found = folder / "current", folder / "found"
        arguments = [str(inputs), str(seconds), str(seed), str(current), *([str(found)] if keep else [])]
        done = subprocess.run(
            [str(program), *arguments], env=os.environ | OPTIONS, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raw = current.read_bytes() if current.exists() else b"\0\0"
            data = raw[2 : 2 + int.from_bytes(raw[:2], "little")]
            raise Failed(target, f"status {done.returncode}\n{done.stderr[-4000:]}", data)
        if keep:
            keep.parent.mkdir(exist_ok=True)
            keep.write_bytes(found.read_bytes())
        return Result(**json.loads(done.stdout))


def packed(data: bytes) -> bytes:
    """Return an input as a corpus holds it."""
    return len(data).to_bytes(2, "little") + data
