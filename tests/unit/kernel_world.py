# SPDX-License-Identifier: Apache-2.0
"""A small world to build the project's own kernel in: a cache, an archive of sources, a make and a compiler."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from pyvmm.lab import ownkernel
from pyvmm.lab.apt import AptError, Package
from pyvmm.lab.cache import Cache, file_sha256
from pyvmm.lab.ownkernel import Variant

# A fake make for kernels: it records its calls, configures and compiles. If $HOME/fail exists, it runs that and fails.
MAKE = r"""
echo "$*" >> "$HOME/made"
env > "$HOME/environment"
for word in "$@"; do
    case "$word" in KCONFIG_ALLCONFIG=*) wanted=${word#*=};; O=*) out=${word#*=};; esac
done
source=$PWD/source
cd "$out"
case "$*" in
*allnoconfig)
    cat $wanted "$HOME/instead" 2>/dev/null | grep -v '=n$' > .config
    echo "# CONFIG_NOT_HERE is not set" >> .config;;
*Image)
    [ ! -e "$HOME/fail" ] || { . "$HOME/fail"; exit 2; }
    for i in 1 2 3 4 5; do echo "  CC      kernel/error$i.o"; done
    mkdir -p arch/arm64/boot include/config
    echo 9.9.1-pyvmm > include/config/kernel.release
    cat "$source" > arch/arm64/boot/Image;;
esac
"""

COMPILE_ERROR = """
echo "  CC      kernel/fork.o"
echo "kernel/fork.c:12:3: error: expected ';' before 'return'"
for i in 1 2 3 4 5 6; do echo "  CC      mm/$i.o"; done
echo "make[1]: *** [scripts/Makefile.build:9: kernel/fork.o] Error 1"
"""


def program(directory: Path, name: str, script: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


def source_package(directory: Path, version: str, files: dict[str, bytes | None]) -> Path:
    """Make a package with Linux sources: contents by path; None is a link to ``source``."""
    archive = directory / f"{version}.tree" / "usr" / "src" / f"linux-source-{version}.tar.xz"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:xz") as tar:
        for path, data in {"source": version.encode(), **files}.items():
            member = tarfile.TarInfo(f"linux-source-{version}/{path}")
            member.mode = 0o755 if path.endswith(".sh") else 0o644
            if data is None:
                member.type, member.linkname = tarfile.SYMTYPE, "source"
            member.size = len(data or b"")
            tar.addfile(member, io.BytesIO(data or b""))
    control = directory / f"{version}.tree" / "DEBIAN" / "control"
    control.parent.mkdir()
    fields = {"Package": f"linux-source-{version}", "Version": "1", "Architecture": "all", "Maintainer": "t"}
    control.write_text("".join(f"{name}: {value}\n" for name, value in {**fields, "Description": "t"}.items()))
    deb = directory / f"linux-source-{version}_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", control.parent.parent, deb], check=True, capture_output=True)
    return deb


class FakeApt:
    """A fake apt with one source package."""

    def __init__(self, deb: Path) -> None:
        self.deb = deb
        self.archives = deb.parent

    def resolve(self, name: str, suite: str) -> list[tuple[str, str]]:
        assert (name, suite) == ("linux-source", "trixie-backports")
        return [("bzip2", "1"), (self.deb.name.split("_")[0], "1"), ("linux-source", "1")]

    def locate(self, packages: list[tuple[str, str]]) -> list[Package]:
        (name, version) = packages[0]
        return [Package(name, version, self.deb.name, self.deb.stat().st_size, file_sha256(self.deb))]

    def download(self, _packages: list[Package], _progress: object) -> None:
        (self.archives / self.deb.name).write_bytes(self.deb.read_bytes())


class World:
    """A cache, an archive, a make and a compiler, all small."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory, self._monkeypatch = directory, monkeypatch
        self.home = directory / "home"
        self.home.mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        self.cache = Cache()
        self.bin = directory / "bin"
        self.steps: list[str] = []
        monkeypatch.setenv("PATH", f"{self.bin}:/usr/bin:/bin")
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.setenv("MAKEFLAGS", "--nonsense")
        monkeypatch.setenv("KCFLAGS", "-O0")
        monkeypatch.setattr(ownkernel, "DISK", 0)
        program(self.bin, "make", MAKE)
        self.compiler("12.2.0")
        self.fragment(
            'CONFIG_KVM=y  # host: why\nCONFIG_LOCALVERSION="-x"  # whose\n'
            "CONFIG_SLOW=n  # so\nCONFIG_SMALL=y  # guest: so\n"
        )
        self.source("7.3")

    def compiler(self, version: str) -> None:
        program(self.bin, f"{ownkernel.CROSS}gcc", f"echo gcc {version}; echo more")

    def fragment(self, text: str) -> None:
        path = self.directory / "fragment"
        path.write_text(text)
        self._monkeypatch.setattr(ownkernel, "FRAGMENT", path)

    def source(self, version: str, files: dict[str, bytes | None] | None = None) -> None:
        apt = FakeApt(source_package(self.directory, version, files or {}))
        self._monkeypatch.setattr(ownkernel, "updated_apt", lambda *_, **__: apt)

    def offline(self) -> None:
        def fail(*_: object, **__: object) -> None:
            raise AptError("apt-get update failed", offline=True)

        self._monkeypatch.setattr(ownkernel, "updated_apt", fail)

    def fail(self, script: str) -> None:
        (self.home / "fail").write_text(script)

    def build(self, *, refresh: bool = False) -> ownkernel.OwnKernel:
        """Build the missing kernels; return the host's."""
        return ownkernel.build_kernels(refresh=refresh, cache=self.cache, progress=self._progress)[Variant.HOST]

    def guest(self) -> ownkernel.OwnKernel:
        """Return the guest's kernel."""
        kernel = ownkernel.usable_kernel(self.cache, Variant.GUEST)
        assert kernel is not None
        return kernel

    def _progress(self, what: str, _share: float) -> None:
        self.steps.append(what)

    @property
    def made(self) -> list[str]:
        """Return the command lines of make so far."""
        path = self.home / "made"
        return path.read_text().splitlines() if path.exists() else []
