# SPDX-License-Identifier: Apache-2.0
"""Build the native loop: cffi writes the glue, one C compiler makes a stable-ABI extension of it; no setuptools.

``python native/build.py`` rebuilds in place what this checkout uses; the hatch hook calls the same functions.
The extension for the lab's arm64 guest kernel is cross-compiled against this host's Python headers: both are
little-endian LP64, and the stable ABI depends on nothing else in pyconfig.h.
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from native.stubs import write_stub  # noqa: E402
from pyvmm._native_source import source_hash, sources  # noqa: E402

NATIVE = ROOT / "native"
EXTENSION = "_native.abi3.so"
IN_PLACE = ROOT / "pyvmm" / EXTENSION
STUB = ROOT / "pyvmm" / "_native.pyi"
FOR_LAB = ROOT / "pyvmm" / "lab" / "aarch64" / EXTENSION
MACHINES = ("x86_64", "aarch64")
WITHOUT_LAB = "no aarch64-linux-gnu-gcc: the lab's extension was not built (Debian: apt install gcc-aarch64-linux-gnu)"
CDEFS = ("loop/cdef.h", "virtio/cdef.h")
"""The declarations for Python. Later files use earlier ones."""

COMMON = ["-O2", "-std=gnu11", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden"]
STRICT = ["-Wall", "-Wextra", "-Werror"]


class BuildError(Exception):
    """The extension cannot be built here. The message names the package to install."""


def c_files() -> list[Path]:
    """Return all C files. Their names are unique, and so are those of their objects."""
    return [Path(path) for path in sources(os.fspath(NATIVE)) if path.endswith(".c")]


def declarations() -> str:
    """Return the declarations of the loop and the devices for cffi."""
    return "".join((NATIVE / name).read_text() for name in CDEFS)


def compiler(machine: str) -> list[str] | None:
    """Return the command of a C compiler for ``machine``, or None. For this host, CC overrides it."""
    if machine == platform.machine():
        wanted = shlex.split(os.environ.get("CC", "")) or ["gcc"]
        candidates = [wanted, ["cc"], ["clang"]]
    else:
        candidates = [[f"{machine}-linux-gnu-gcc"]]
    return next((command for command in candidates if shutil.which(command[0])), None)


def build(
    machine: str,
    destination: Path,
    *,
    module: str = "pyvmm._native",
    cdef: str = "",
    more: Sequence[Path] = (),
    flags: Sequence[str] = (),
) -> None:
    """Build the extension for ``machine`` at ``destination``. The other arguments let tests add their own C.

    Raises BuildError with the package to install, or with the compiler's output.
    """
    cc = compiler(machine)
    if cc is None:
        package = "gcc" if machine == platform.machine() else f"gcc-{machine.replace('_', '-')}-linux-gnu"
        raise BuildError(f"no C compiler for {machine}: install {package} (Debian: apt install {package})")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise BuildError("a free-threaded Python has no stable ABI: build with a standard Python")
    with tempfile.TemporaryDirectory(prefix="pyvmm-build-") as name:
        work = Path(name)
        include = python_include(work)
        glue = write_glue(work, module, cdef)
        files = [*c_files(), *more]
        own = [*cc, *COMMON, f"-I{NATIVE}", f'-DPV_SOURCE_HASH="{source_hash(NATIVE)}"', *flags]
        run([*own, *STRICT, "-c", *map(str, files)], work)
        run([*own, "-DPy_LIMITED_API=0x030b0000", *include, "-c", str(glue)], work)
        run([*cc, "-shared", "-o", "built.so", *map(str, sorted(work.glob("*.o")))], work)
        destination.parent.mkdir(parents=True, exist_ok=True)
        # A new inode, so that a process keeps its mapping of the old file.
        temporary = destination.with_suffix(f".{os.getpid()}")
        shutil.copy(work / "built.so", temporary)
        temporary.replace(destination)


def run(command: list[str], work: Path) -> None:
    """Run a compiler in ``work``. Raises BuildError with its output."""
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        hint = "\n(Debian: apt install libc6-dev linux-libc-dev)" if "No such file or directory" in done.stderr else ""
        raise BuildError(f"{shlex.join(command)}\n{done.stderr}{hint}")


def write_glue(work: Path, module: str, cdef: str) -> Path:
    """Let cffi write the C code between Python and the loop, and return its path."""
    try:
        from cffi import FFI
    except ImportError as error:
        raise BuildError("cffi is missing: pip install cffi") from error
    ffi = FFI()
    ffi.cdef(declarations() + cdef)
    headers = ["<stddef.h>", "<stdint.h>", *(f'"{name}"' for name in CDEFS)]
    ffi.set_source(module, "".join(f"#include {header}\n" for header in headers) + cdef)
    path = work / "glue.c"
    with contextlib.redirect_stdout(io.StringIO()):
        ffi.emit_c_code(str(path))
    return path


def python_include(work: Path) -> list[str]:
    """Return the flags that find Python.h, also for a compiler of another machine."""
    folder = Path(sysconfig.get_path("include"))
    if not (folder / "Python.h").exists():
        raise BuildError(f"{folder}/Python.h is missing (Debian: apt install python3-dev)")
    # Debian's pyconfig.h only includes <TRIPLET/pythonX.Y/pyconfig.h> of the compiler's machine. The host only has its
    # own, so another machine's compiler gets that one.
    own = folder.parent / f"{platform.machine()}-linux-gnu" / folder.name / "pyconfig.h"
    config = own if own.exists() else Path(sysconfig.get_config_h_filename())
    for machine in MACHINES:
        stand_in = work / "include" / f"{machine}-linux-gnu" / folder.name / "pyconfig.h"
        stand_in.parent.mkdir(parents=True)
        shutil.copy(config, stand_in)
    return [f"-I{folder}", f"-I{config.parent}", f"-I{work / 'include'}"]


def build_in_place() -> list[Path]:
    """Build this host's extension, and the lab's if its compiler is installed. Returns the built files."""
    host = platform.machine()
    build(host, IN_PLACE)
    if host == "aarch64" or compiler("aarch64") is None:
        return [IN_PLACE]
    build("aarch64", FOR_LAB)
    return [IN_PLACE, FOR_LAB]


def platform_tag(extension: Path, machine: str) -> str:
    """Return the platform that a wheel with ``extension`` runs on: every Linux with the C library it needs (PEP 600).

    That is the newest version of a symbol of the GNU C library that it refers to, as ``auditwheel show`` has it.
    """
    versions = re.findall(rb"\bGLIBC_2\.(\d+)", extension.read_bytes())
    return f"manylinux_2_{max(map(int, versions))}_{machine}"


def main() -> int:
    """Build in place, with the typing stub, and print the built files."""
    try:
        built = build_in_place()
        write_stub(declarations(), STUB)
    except BuildError as error:
        print(f"native/build.py: {error}", file=sys.stderr)
        return 1
    for path in built:
        print(path.relative_to(ROOT))
    if FOR_LAB not in built and platform.machine() != "aarch64":
        print(WITHOUT_LAB)
    return 0


if __name__ == "__main__":
    sys.exit(main())
