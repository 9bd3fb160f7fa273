# SPDX-License-Identifier: Apache-2.0
"""A program in a fork of a warm interpreter behaves like a fresh Python. Also: the byte code sent to the lab."""

from __future__ import annotations

import importlib.util
import marshal
import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.lab import bytecode, frames, warm

ROOT = Path(__file__).resolve().parents[2]
TAG = str(sys.implementation.cache_tag)

AGENT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pyvmm.lab import warm
warm.prepare()
warm.pieces += [open(path, "rb").read() for path in sys.argv[3:]]
argv, env = [b"program", b"one", b"two"], {b"PYTHONPATH": os.fsencode(sys.argv[2]), b"COLOR": b"red"}
assert warm.is_ready(env)
open("/dev/null")  # a descriptor of the agent's
try:
    raise warm.Become(argv, env)
except warm.Become as become:
    program = become
program.run()
"""
SAYS = """
import json, os, pyvmm, random, sys
print(json.dumps({
    "argv": sys.argv[1:], "path": sys.path[0], "color": os.environ.get("COLOR"), "home": os.environ.get("HOME"),
    "name": __name__, "file": os.path.basename(__file__), "safe": sys.flags.safe_path,
    "fds": sorted(os.listdir("/proc/self/fd")), "pyvmm": pyvmm.__file__,
    "streams": [(s.encoding, s.errors, s.line_buffering) for s in (sys.stdin, sys.stdout, sys.stderr)],
}))
"""


def cold(directory: Path) -> subprocess.CompletedProcess[str]:
    """Run the program in a fresh Python."""
    return started([sys.executable, "-P", "-m", "program", "one", "two"], directory)


def started(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(directory), "COLOR": "red", "LANG": "C.UTF-8"}
    return subprocess.run(command, env=environment, input="typed\n", capture_output=True, text=True, check=False)


def forked(directory: Path, pieces: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the program as the agent does."""
    return started([sys.executable, "-P", "-c", AGENT, str(ROOT), str(directory), *map(str, pieces)], directory)


@pytest.mark.parametrize(
    "program",
    [
        SAYS,
        "import sys; sys.exit(7)",
        "import sys; sys.exit('a word on stderr')",
        "print(input())",
        "raise ValueError('of mine')",
        "import atexit; atexit.register(print, 'last'); print('first', end='')",
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
        "import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import sys; print(len(sys.argv)); sys.stdout.close()",
    ],
)
def test_a_fork_prints_and_ends_as_a_fresh_python_does(program: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "pyvmm").mkdir()
    (tmp_path / "pyvmm" / "__init__.py").touch()
    fresh, fork = cold(tmp_path), forked(tmp_path)
    assert (fork.returncode, fork.stdout) == (fresh.returncode, fresh.stdout)
    # The calls that lead to the program differ, and are part of a traceback.
    assert fork.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]
    assert fresh.stdout + fresh.stderr or fresh.returncode


def test_an_environment_variable_for_python_forces_a_fresh_start() -> None:
    assert not warm.is_ready({b"PYTHONPATH": b"/x"})  # nothing is prepared here
    script = (
        "from pyvmm.lab import warm; warm.prepare(); "
        "print(warm.is_ready({b'PYTHONPATH': b'/x'}), warm.is_ready({b'PYTHONHASHSEED': b'0'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


# ---- byte code


def package(directory: Path, **modules: str) -> Path:
    """Write a package with compiled modules; a name may have folders, which are packages too."""
    top = directory / "parcel"
    for name, text in {"__init__": "", **modules}.items():
        path = top / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        py_compile.compile(str(path), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)
    return top


def names(top: Path) -> list[set[str]]:
    return [set(marshal.loads(piece)) for piece in bytecode.pieces(top, TAG)]


def test_a_piece_has_every_module_whose_byte_code_matches_its_source(tmp_path: Path) -> None:
    top = package(tmp_path, a="x = 1", b="x = 2", **{"c/__init__": "", "c/d": ""})
    assert names(top) == [{"parcel", "parcel.a", "parcel.b", "parcel.c", "parcel.c.d"}]
    (top / "a.py").write_text("x = 12")
    os.utime(top / "b.py", (1, 1))
    assert names(top) == [{"parcel", "parcel.c", "parcel.c.d"}]
    assert list(bytecode.pieces(top, "cpython-30")) == []


def test_pieces_fit_frames(tmp_path: Path) -> None:
    text = f"x = {'y' * 300_000!r}"
    found = list(bytecode.pieces(package(tmp_path, a=text, b=text, c=text, d=text), TAG))
    assert len(found) == 2
    assert max(map(len, found)) <= frames.MAX_PAYLOAD


def test_a_fork_imports_from_pieces_and_knows_the_file_of_a_module(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import inspect, parcel.c.d, parcel.plain\n"
        "print(parcel.c.d.x, parcel.plain.x, parcel.c.__path__, parcel.c.d.__file__, inspect.getsource(parcel.c.d))"
    )
    top = package(tmp_path, **{"c/__init__": "", "c/d": "x = 'compiled'", "plain": "x = 1"})
    (top / "plain.py").write_text("x = 'not in a piece'")
    (piece,) = bytecode.pieces(top, TAG)
    source = (top / "c" / "d.py").stat()
    (top / "c" / "d.py").write_text("x = 'changed!'")  # with the same size
    os.utime(top / "c" / "d.py", ns=(source.st_atime_ns, source.st_mtime_ns + 5_000_000_000))
    (tmp_path / "piece").write_bytes(piece)
    done = forked(tmp_path, (tmp_path / "piece",))
    assert done.stderr == ""
    place = f"{[str(top / 'c')]} {top / 'c' / 'd.py'}"
    assert done.stdout == f"compiled not in a piece {place} x = 'changed!'\n\n"


def test_byte_code_of_another_python_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import parcel.a; print(parcel.a.x)")
    top = package(tmp_path, a="x = 'mine'")
    (piece,) = bytecode.pieces(top, TAG)
    strange = {
        name: (path, is_package, b"\0\0\r\n" + code[4:])
        for name, (path, is_package, code) in marshal.loads(piece).items()
    }
    (tmp_path / "piece").write_bytes(marshal.dumps(strange, bytecode.MARSHAL))
    assert importlib.util.MAGIC_NUMBER != b"\0\0\r\n"
    assert forked(tmp_path, (tmp_path / "piece",)).stdout == "mine\n"
