# SPDX-License-Identifier: Apache-2.0
"""Convert Debian's package files to the lab's kernel and initramfs. Reads packages, writes two files, runs nothing.

The recipe is here: the packages, what to leave out of them, and the modules. ``recipe_hash`` changes with the recipe
and with the programs that are copied into the image.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from pyvmm.cpio import CpioWriter
from pyvmm.errors import PyvmmError

# Debian's releases up to 13 have kernel and modules in linux-image-*. Later ones split them, in more than one way.
KERNEL_PARTS = re.compile(r"linux-(image|binary|modules)-[0-9]")
KERNEL_FILE = re.compile(r"(?:usr/)?lib/modules/([^/]+)/vmlinuz|boot/vmlinuz-(.+)")

BUSYBOX = "busybox-static"
ROOTS = (
    BUSYBOX,
    "libpython3-stdlib",
    "python3-cffi-backend",
    "python3-minimal",
    "python3-pyelftools",
    "python3-pytest",
    "python3-structlog",
    "python3-zstandard",
)

# Needed only to install packages, or by parts of Python's library that pyvmm does not use.
UNUSED_PACKAGES = frozenset(
    {
        "debconf",
        "dpkg",
        "gcc-14-base",
        "libacl1",
        "libdb5.3t64",
        "libmd0",
        "libncursesw6",
        "libpcre2-8-0",
        "libselinux1",
        "libsqlite3-0",
        "libssl3t64",
        "libuuid1",
        "media-types",
        "netbase",
        "openssl-provider-legacy",
        "python3",
        "python3-typing-extensions",
        "readline-common",
        "tar",
        "tzdata",
    }
)

UNUSED_PATHS = re.compile(
    r"usr/share/|etc/|var/|usr/lib/[^/]+/gconv/|usr/lib/valgrind|usr/lib/binfmt|"
    r"usr/lib/python3[^/]*/(ensurepip|idlelib|lib2to3|pydoc_data|sqlite3|test|tkinter|turtledemo|venv)/|"
    r"usr/lib/python3/dist-packages/[^/]+\.(dist|egg)-info/(?!entry_points)"
)

# Their dependencies are added. init loads 9p over virtio. The block device and taps are loaded on demand.
MODULES = ("9p", "9pnet_virtio", "tun", "zram")
GUEST_MODULES = (
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "ext4",
    "crc32c_generic",
)
"""What a guest of this kernel needs for its devices. ext4 of old kernels needs the checksum under another name."""
MODULE_FILE = re.compile(
    r"/kernel/(?:crypto|drivers/(?:block|char/hw_random|net(?=/[^/]+$)|virtio)|fs|lib|mm|net)/"
    r"(?:.*/)?([^/]+)\.ko(?:\.xz)?$"
)
XZ_MAGIC = b"\xfd7zXZ\0"

SIGNATURE = b"~Module signature appended~\n"

DIRECTORIES = ("dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "usr/bin", "usr/lib", "usr/sbin", "var/tmp")
MERGED = {"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib", "sbin": "usr/sbin"}
AGENT = "pyvmm/agent/pyvmm"
PROGRAMS = {
    "init": "init.sh",
    "usr/bin/pyvmm": "pyvmm.sh",
    f"{AGENT}/lab/agent.py": "agent.py",
    f"{AGENT}/lab/frames.py": "frames.py",
    f"{AGENT}/lab/warm.py": "warm.py",
}
FILES = {
    f"{AGENT}/__init__.py": b"",
    f"{AGENT}/lab/__init__.py": b"",
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": b"127.0.0.1 localhost\n",
    "etc/fstab": b"sysfs /sys sysfs\ntracefs /sys/kernel/tracing tracefs\ndevpts /dev/pts devpts ptmxmode=666\n"
    b"tmpfs /dev/shm tmpfs\ntmpfs /tmp tmpfs\ntmpfs /run tmpfs\n",
}


def recipe_hash() -> str:
    """Return a hash of everything besides the packages that shapes an image."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for name in sorted((Path(__file__).name, "../cpio.py", "firstboot.py", *PROGRAMS.values())):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()


@contextmanager
def open_package(package: Path) -> Iterator[tarfile.TarFile]:
    """Read the files of a .deb as a tar stream."""
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        stdout, stderr = process.stdout, process.stderr
        if stdout is None or stderr is None:
            raise RuntimeError("Popen made no pipes")
        try:
            with tarfile.open(fileobj=stdout, mode="r|") as tar:
                yield tar
            stdout.read()
            said = stderr.read().decode(errors="replace").strip()
            if process.wait() != 0:
                raise PyvmmError(f"{package.name} is not a readable package: {said}")
        except tarfile.TarError as error:
            raise PyvmmError(f"{package.name} is not a readable package: {error}") from error
        finally:
            process.kill()


@dataclass(frozen=True, slots=True)
class Module:
    """A module, uncompressed and unsigned. ``needs`` are the modules to load before it, in that order."""

    data: bytes
    needs: tuple[str, ...] = ()


def write_kernel(packages: list[Path], image: BinaryIO) -> tuple[str, dict[str, Module]]:
    """Write the kernel. Return its release, and MODULES and GUEST_MODULES with their dependencies."""
    release = ""
    available: dict[str, bytes] = {}
    for package in packages:
        with open_package(package) as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if not member.isfile():
                    continue
                if not release and (found := KERNEL_FILE.fullmatch(name)):
                    release = found[1] or found[2]
                    image.write(_contents(tar, member))
                elif found := MODULE_FILE.search(name):
                    available[found[1].replace("-", "_")] = _contents(tar, member)
    if not release:
        raise PyvmmError("the kernel packages hold no kernel", hint="the archive has changed: please report this")
    return release, _module_closure(available)


def _module_closure(available: dict[str, bytes]) -> dict[str, Module]:
    """Return modules and their dependencies, dependencies first. A module that is missing is built in."""
    ordered: dict[str, Module] = {}

    def visit(name: str) -> tuple[str, ...]:
        """Visit the module. Return it and its dependencies, for the module that needs it."""
        if name not in available:
            return ()
        if name in ordered:
            return (*ordered[name].needs, name)
        data = available[name]
        if data.startswith(XZ_MAGIC):
            data = lzma.decompress(data)
        found = re.search(rb"\0depends=([^\0]*)\0", data)
        depends = found[1].decode().replace("-", "_").split(",") if found else []
        needs = tuple(dict.fromkeys(chain.from_iterable(map(visit, depends))))
        # Unsigned modules load a second faster under emulation. They taint the kernel, as KVM does too.
        ordered[name] = Module(data[: data.rfind(SIGNATURE)] if data.endswith(SIGNATURE) else data, needs)
        return (*needs, name)

    for name in (*MODULES, *GUEST_MODULES):
        visit(name)
    return ordered


def write_guest_modules(release: str, modules: dict[str, Module], out: BinaryIO) -> None:
    """Write an archive of GUEST_MODULES that may follow a guest's initramfs."""
    cpio = CpioWriter(out)
    _write_modules(cpio, "lib/modules", release, modules, GUEST_MODULES)
    cpio.finish()


def _write_modules(
    cpio: CpioWriter, home: str, release: str, modules: dict[str, Module], names: tuple[str, ...]
) -> None:
    """Write the modules of these names that exist, and their dependencies, where modprobe looks for them."""
    wanted = dict.fromkeys(chain.from_iterable((*modules[name].needs, name) for name in names if name in modules))
    lines = []
    for name in wanted:
        cpio.file(f"{home}/{release}/{name}.ko", modules[name].data)
        lines.append(f"{name}.ko: {' '.join(f'{need}.ko' for need in reversed(modules[name].needs))}\n")
    cpio.file(f"{home}/{release}/modules.dep", "".join(lines).encode())


def read_busybox(packages: list[Path]) -> bytes:
    """Return the statically linked program from the packages."""
    for package in packages:
        if not package.name.startswith(BUSYBOX + "_"):
            continue
        with open_package(package) as tar:
            for member in tar:
                if member.isfile() and re.fullmatch(r"(?:\./)?(?:usr/)?bin/busybox", member.name):
                    return _contents(tar, member)
    raise PyvmmError(f"there is no busybox in {BUSYBOX}", hint="the archive has changed: please report this")


def write_root(packages: list[Path], release: str, modules: dict[str, Module], out: BinaryIO) -> None:
    """Write the initramfs: the packages' files, the modules, and our programs."""
    cpio = CpioWriter(out)
    for path in DIRECTORIES:
        cpio.directory(path)
    for path, target in MERGED.items():
        cpio.symlink(path, target)
    cpio.character_device("dev/console", 5, 1)
    cpio.character_device("dev/null", 1, 3, mode=0o666)
    here = Path(__file__).parent
    for path, source in PROGRAMS.items():
        cpio.file(path, (here / source).read_bytes(), mode=0o755)
    for path, data in FILES.items():
        cpio.file(path, data)
    _write_modules(cpio, "usr/lib/modules", release, modules, MODULES)
    for package in packages:
        with open_package(package) as tar:
            for member in tar:
                _copy(tar, member, cpio)
    cpio.finish()


def _copy(tar: tarfile.TarFile, member: tarfile.TarInfo, cpio: CpioWriter) -> None:
    path = member.name.removeprefix("./").strip("/")
    head, slash, tail = path.partition("/")
    if head in MERGED:
        path = MERGED[head] + slash + tail
    if not path or path in MERGED.values() or UNUSED_PATHS.match(path + "/"):
        return
    if member.isdir():
        cpio.directory(path)
    elif member.issym():
        cpio.symlink(path, member.linkname)
    elif member.islnk():
        cpio.symlink(path, "/" + member.linkname.removeprefix("./"))
    elif member.isfile():
        cpio.file(path, _contents(tar, member), mode=member.mode & 0o777)


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise PyvmmError(f"{member.name} is not a file")
    return file.read()
