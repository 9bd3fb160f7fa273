# SPDX-License-Identifier: Apache-2.0
"""Build the payloads: firmware/payloads/NAME.c to pyvmm/payloads/NAME.bin, and the manifest beside them.

Run as ``python firmware/build.py``; the tests import it. Standard library only. The same compiler gives the same
bytes anywhere: no paths, dates or build ids get in. Each payload is linked at two addresses, and the two must be
equal: that is what position independent means.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "pyvmm" / "payloads"
MANIFEST = "manifest.json"

COMPILE = [
    "-std=gnu11", "-O2", "-march=armv8-a", "-mcmodel=small", "-mgeneral-regs-only", "-mno-outline-atomics",
    "-mstrict-align", "-mbranch-protection=none", "-ffreestanding", "-fno-builtin", "-fno-pic", "-fno-pie",
    "-fno-common", "-fno-stack-protector", "-fno-stack-clash-protection", "-fno-asynchronous-unwind-tables",
    "-fno-tree-loop-distribute-patterns", "-fno-tree-switch-conversion", "-ffunction-sections", "-fdata-sections",
    "-Wall", "-Wextra", "-Werror",
]  # fmt: skip
LINK = [
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,--gc-sections",
    "-Wl,--omagic",
    "-Wl,-z,noexecstack",
]
LINK_ADDRESSES = (0, 0x4_4000_1000)

HEADER = struct.Struct("<IIQ")  # a branch, the magic, the memory it occupies: start.S
MAGIC = 0x4D565950


class BuildError(Exception):
    """A payload cannot be built; the message says why and what to do."""


def names() -> list[str]:
    """List the payloads that have sources, sorted."""
    return sorted(path.stem for path in (HERE / "payloads").glob("*.c"))


def sources() -> list[Path]:
    """List every file that a payload's bytes depend on, sorted, including this one for its options."""
    patterns = ("*.S", "*.ld", "build.py", "lib/*.[ch]", "payloads/*.c")
    return sorted(path for pattern in patterns for path in HERE.glob(pattern))


def sources_hash() -> str:
    """Hash the sources: names and contents, in order."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(f"{path.relative_to(HERE).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def find_compiler() -> str:
    """Find a gcc that makes arm64 code: the cross compiler, or this machine's own if it is an arm64 one."""
    if cross := shutil.which("aarch64-linux-gnu-gcc"):
        return cross
    native = shutil.which("gcc")
    if native and _run(native, "-dumpmachine").startswith("aarch64"):
        return native
    raise BuildError("no compiler for arm64\n  hint: apt-get install gcc-aarch64-linux-gnu")


def compiler_version(compiler: str) -> str:
    """Return what identifies a compiler: the version line of gcc and of its linker."""
    first = [_run(program, "--version").splitlines()[0] for program in (compiler, _tool(compiler, "ld"))]
    return "; ".join(line[line.index("(") :] if "(" in line else line for line in first)


def build(name: str, compiler: str) -> bytes:
    """Compile and link one payload; return the flat binary. Raises BuildError."""
    inputs = [*sorted(HERE.glob("*.S")), *sorted((HERE / "lib").glob("*.c")), HERE / "payloads" / f"{name}.c"]
    with tempfile.TemporaryDirectory(prefix="pyvmm-firmware-") as scratch:
        objects = []
        for number, path in enumerate(inputs):
            objects.append(f"{scratch}/{number}.o")
            _run(compiler, *COMPILE, f"-ffile-prefix-map={HERE}=firmware", f"-I{HERE}", "-c", path, "-o", objects[-1])
        images = []
        for address in LINK_ADDRESSES:
            elf, flat = Path(scratch) / f"{name}.elf", Path(scratch) / f"{name}.bin"
            script = f"-Wl,--script={HERE}/link.ld,--defsym=IMAGE_BASE={address:#x}"
            _run(compiler, *LINK, script, "-o", elf, *objects)
            _run(_tool(compiler, "objcopy"), "-O", "binary", elf, flat)
            images.append(flat.read_bytes())
    if images[0] != images[1]:
        at = next(i for i, (a, b) in enumerate(zip(*images, strict=False)) if a != b)
        raise BuildError(f"{name}: not position independent: the byte at {at:#x} depends on the link address")
    if HEADER.unpack_from(images[0])[1] != MAGIC:
        raise BuildError(f"{name}: start.S is not at the first byte")
    return images[0]


def entry(image: bytes) -> dict[str, object]:
    """Describe a payload for the manifest: size of the file, memory it occupies once loaded, sha256."""
    memory = HEADER.unpack_from(image)[2]
    return {"size": len(image), "memory": memory, "sha256": hashlib.sha256(image).hexdigest()}


def build_all(out: Path, compiler: str) -> dict[str, object]:
    """Build every payload into a directory, with the manifest; return the manifest."""
    out.mkdir(parents=True, exist_ok=True)
    payloads = {}
    for name in names():
        image = build(name, compiler)
        (out / f"{name}.bin").write_bytes(image)
        payloads[name] = entry(image)
    manifest: dict[str, object] = {
        "sources": sources_hash(),
        "compiler": compiler_version(compiler),
        "payloads": payloads,
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return manifest


def _tool(compiler: str, name: str) -> str:
    return _run(compiler, f"-print-prog-name={name}").strip()


def _run(program: str, *arguments: str | Path) -> str:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{program} failed:\n{done.stderr.strip()}")
    return done.stdout


def main() -> int:
    """Build everything and print a line for each payload."""
    parser = argparse.ArgumentParser(description="Build the bare-metal arm64 payloads.")
    parser.add_argument("--out", type=Path, default=OUT, help="directory for NAME.bin and the manifest")
    parser.add_argument("--cc", help="an arm64 gcc; found if not said")
    options = parser.parse_args()
    try:
        manifest = build_all(options.out, options.cc or find_compiler())
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(manifest, indent=2, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
