# SPDX-License-Identifier: Apache-2.0
"""Build the programs that tests run in guests: ``python tests/guest/build.py`` makes NAME of each NAME.c here.

Static arm64 binaries without a C library, a few KiB, kept beside their source: where the tests run there need not be a
compiler. Each names the hash of its source, so that one that is not of it is found out.
"""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
OPTIONS = (
    "-std=gnu11", "-Os", "-march=armv8-a", "-ffreestanding", "-fno-stack-protector", "-fno-pic", "-fno-pie",
    "-fno-asynchronous-unwind-tables", "-mno-outline-atomics", "-mbranch-protection=none", "-nostdlib", "-static",
    "-no-pie", "-s", "-Wall", "-Wextra", "-Werror", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,norelro",
    "-Wl,-z,max-page-size=4096",
)  # fmt: skip


def names() -> list[str]:
    """List the programs there are sources for, sorted."""
    return sorted(path.stem for path in HERE.glob("*.c"))


def source_hash(name: str) -> str:
    """Hash a program's source."""
    return hashlib.sha256((HERE / f"{name}.c").read_bytes()).hexdigest()


def build(name: str, out: Path) -> None:
    """Compile one program; CalledProcessError where that fails."""
    define = f'-DSOURCE="{source_hash(name)}"'
    subprocess.run(["aarch64-linux-gnu-gcc", *OPTIONS, define, "-o", out, HERE / f"{name}.c"], check=True)


if __name__ == "__main__":
    for each in names():
        build(each, HERE / each)
