# SPDX-License-Identifier: Apache-2.0
"""The project's own kernel: its inputs, when it is rebuilt, and the errors of a failed build."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from pyvmm import cli, lab
from pyvmm.cli import lab as cli_lab
from pyvmm.errors import HostError, PyvmmError
from pyvmm.lab import image, kernels, needs, ownkernel, rootfs
from pyvmm.lab.apt import AptError, Package
from pyvmm.lab.cache import Cache, FileRecord, Image, file_sha256
from pyvmm.lab.cache import Manifest as ImageManifest
from pyvmm.lab.kbuild import KernelBuild, KernelBuildError, SourceTree
from pyvmm.lab.ownkernel import Variant
from pyvmm.lab.qemu import LabOptions
from pyvmm.labenv import IN_LAB

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


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


# ---- making it


def test_the_kernel_is_what_make_built_and_its_manifest_names_the_source(world: World) -> None:
    kernel = world.build()
    assert kernel.path.read_bytes() == b"7.3"
    assert kernel.release == "9.9.1-pyvmm"
    assert kernel.manifest.source[:2] == ("linux-source-7.3", "1")
    assert kernel.manifest.compiler == "gcc 12.2.0"
    assert "CONFIG_KVM=y" in (kernel.directory / "config").read_text()
    assert kernel.is_whole(thorough=True)
    assert {"unpacking the source", "configuring"} <= set(world.steps)
    assert any(step.startswith("compiling") for step in world.steps)


def test_make_gets_the_architecture_and_options_and_a_clean_environment(world: World) -> None:
    world.build()
    for command, variant in zip(world.made, [*Variant, *Variant], strict=True):
        assert re.match(r"-j\d+ ARCH=arm64 ", command)
        assert f"CROSS_COMPILE={ownkernel.CROSS} " in command
        assert re.search(rf" O=\S+/{variant} ", command)
    *configured, host, guest = world.made
    assert all(re.search(r"KCONFIG_ALLCONFIG=/\S+/wanted.config allnoconfig$", command) for command in configured)
    assert host.endswith(" Image")
    assert guest.endswith(" Image")
    environment = (world.home / "environment").read_text()
    assert "LC_ALL=C\n" in environment
    assert not re.search("MAKEFLAGS|KCFLAGS", environment)


def test_only_kernel_and_manifest_and_log_are_kept(world: World) -> None:
    kernel = world.build()
    home = world.cache.directory / "kernels"
    names = ["build.log", "current", "current-guest", kernel.directory.name, world.guest().directory.name]
    assert sorted(path.name for path in home.iterdir()) == sorted(names)
    assert sorted(path.name for path in kernel.directory.iterdir()) == ["Image", "config", "manifest.json"]
    assert not (world.cache.directory / "kernel-partial").exists()


def test_the_second_call_makes_no_request(world: World) -> None:
    kernel = world.build()
    world.offline()
    program(world.bin, "make", "exit 1")
    assert world.build() == kernel


def test_the_kernel_is_rebuilt_for_other_options_but_not_for_other_reasons(world: World) -> None:
    first = world.build()
    world.fragment(
        '# a title\nCONFIG_KVM=y  # host: said better\n\nCONFIG_LOCALVERSION="-x"  # whose\nCONFIG_SLOW=n  # so\n'
    )
    assert world.build() == first
    world.fragment("CONFIG_KVM=y  # why\n")
    second = world.build()
    assert second.directory != first.directory
    assert first.path.exists()  # a lab may be starting from it


def test_each_variant_has_the_common_options_and_its_own(world: World) -> None:
    host, guest = ((kernel.directory / "config").read_text() for kernel in (world.build(), world.guest()))
    for both in (host, guest):
        assert 'CONFIG_LOCALVERSION="-x"\n' in both
    assert ("CONFIG_KVM=y" in host, "CONFIG_SMALL=y" in host) == (True, False)
    assert ("CONFIG_KVM=y" in guest, "CONFIG_SMALL=y" in guest) == (False, True)


def test_a_missing_variant_is_built_and_the_other_is_kept(world: World) -> None:
    host, guest = world.build(), world.guest()
    (world.cache.directory / "kernels" / "current-guest").unlink()
    shutil.rmtree(guest.directory)
    made = len(world.made)
    assert world.build() == host
    assert world.guest().path.read_bytes() == b"7.3"
    assert all(re.search(r" O=\S+/guest ", command) for command in world.made[made:])


def test_a_long_build_still_has_its_source_at_its_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = world.build()
    monkeypatch.setattr(ownkernel, "GRACE_SECONDS", -1)
    world.compiler("14.1.0")
    new = world.build()
    assert (new.path.exists(), world.guest().path.exists(), old.path.exists()) == (True, True, False)
    assert not (world.cache.directory / "kernels" / "source").exists()


@pytest.mark.parametrize("variant", Variant)
def test_a_request_for_one_variant_does_not_wait_for_the_other(world: World, variant: Variant) -> None:
    built = ownkernel.build_kernels(wanted=[variant], cache=world.cache)
    assert list(built) == [variant]
    assert len(world.made) == 2
    assert all(re.search(rf" O=\S+/{variant} ", command) for command in world.made)
    assert ownkernel.build_kernels(wanted=[variant], cache=world.cache) == built
    assert len(world.made) == 2


def test_a_manifest_older_than_the_guests_kernel_is_understood(world: World) -> None:
    host = world.build()
    path = host.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["steps"]
    path.write_text(json.dumps(manifest))
    assert ownkernel.usable_kernel(world.cache) is not None


def test_progress_is_relative_to_the_last_build_of_all_variants(world: World) -> None:
    shares: list[float] = []
    world.build()
    assert world.guest().manifest.steps == 5
    world.source("7.4")

    def progress(what: str, share: float) -> None:
        if what == "compiling, about 10 files":
            shares.append(share)

    ownkernel.build_kernels(refresh=True, cache=world.cache, progress=progress)
    assert shares == pytest.approx([each / 10 for each in range(1, 10)] + [0.99])


def test_another_compiler_rebuilds_the_kernel_and_the_first_finds_its_kernel_again(world: World) -> None:
    first = world.build()
    world.compiler("14.1.0")
    assert world.build().manifest.compiler == "gcc 14.1.0"
    world.compiler("12.2.0")
    made = len(world.made)
    assert world.build() == first
    assert len(world.made) == made


def test_a_kernel_stays_usable_without_its_compiler(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = world.build()
    monkeypatch.setenv("PATH", str(world.home))
    with pytest.raises(HostError):
        ownkernel.compiler_version()
    assert world.build() == kernel


def test_refresh_builds_a_newer_source_and_does_not_rebuild_the_same(world: World) -> None:
    first = world.build()
    assert world.build(refresh=True) == first
    assert len(world.made) == 4
    world.source("7.4")
    assert world.build() == first
    assert world.build(refresh=True).path.read_bytes() == b"7.4"
    assert world.build().path.read_bytes() == b"7.4"


def test_the_existing_kernel_is_used_offline(world: World) -> None:
    first = world.build()
    world.offline()
    assert world.build(refresh=True) == first
    assert world.steps[-1] == f"offline: using the kernel of {first.manifest.built}"
    first.path.unlink()
    with pytest.raises(AptError):
        world.build(refresh=True)


@pytest.mark.parametrize("damage", [b"", b"7.X"])
def test_a_damaged_kernel_is_noticed_and_rebuilt(world: World, damage: bytes) -> None:
    kernel = world.build()
    kernel.path.write_bytes(damage)
    assert ownkernel.usable_kernel(world.cache, thorough=True) is None
    assert world.build(refresh=True).path.read_bytes() == b"7.3"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"source": 3}', '{"source": ["a", "b", "c"], "more": 1}'])
def test_an_invalid_manifest_means_no_kernel(world: World, text: str) -> None:
    (world.build().directory / "manifest.json").write_text(text)
    assert ownkernel.current_kernel(world.cache) is None


def test_images_can_be_built_while_a_kernel_is_built(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def take(*_: object) -> list[str]:
        with world.cache.lock(lambda: taken.append("waited")):
            taken.append("taken")
        return []

    monkeypatch.setattr(KernelBuild, "configure", take)
    monkeypatch.setattr(KernelBuild, "compile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        world.build()
    assert taken == ["taken", "taken"]


# ---- the source


def test_only_the_sources_of_an_arm64_kernel_are_unpacked(world: World) -> None:
    files: dict[str, bytes | None] = dict.fromkeys(
        (
            "kernel/fork.c",
            "arch/arm64/kvm/arm.c",
            "drivers/net/virtio_net.c",
            "scripts/run.sh",
            "arch/x86/entry/syscalls/syscall_32.tbl",
            "arch/x86/Kconfig",
            "drivers/gpu/drm/Kconfig.debug",
            "drivers/gpu/Makefile",
            "arch/x86/kernel/setup.c",
            "drivers/gpu/drm/drm.c",
            "drivers/net/ethernet/e.c",
            "Documentation/x.rst",
            "tools/testing/t.c",
        ),
        b"x",
    )
    world.source("7.5", {**files, "include/link": None})
    log = world.directory / "log"
    tree = SourceTree(world.directory / "tree", log, {})
    shares = []
    tree.unpack(world.directory / "linux-source-7.5_1_all.deb", lambda _what, share: shares.append(share))
    found = {str(path.relative_to(tree.directory)) for path in tree.directory.rglob("*") if not path.is_dir()}
    assert found == {"source", "include/link", *list(files)[:8]}
    assert (tree.directory / "include/link").readlink() == Path("source")
    assert (tree.directory / "scripts/run.sh").stat().st_mode & 0o111
    assert not (tree.directory / "kernel/fork.c").stat().st_mode & 0o111


def test_a_source_with_paths_outside_its_directory_is_refused(world: World) -> None:
    world.source("7.5", {"a/../../../escaped": b"x"})
    with pytest.raises(PyvmmError, match="outside of its directory"):
        world.build(refresh=True)
    assert not list(world.directory.rglob("escaped"))


def test_a_truncated_package_is_refused_by_name(world: World) -> None:
    deb = world.directory / "linux-source-7.3_1_all.deb"
    deb.write_bytes(deb.read_bytes()[:-200])
    with pytest.raises(PyvmmError, match=r"linux-source-7.3_1_all\.deb is not a readable package"):
        world.build()


# ---- failed builds


def test_the_error_of_a_failed_build_has_the_compilers_output_and_the_logs_path(world: World) -> None:
    world.fail(COMPILE_ERROR)
    with pytest.raises(KernelBuildError) as caught:
        world.build()
    assert "make Image ended with status 2" in caught.value.message
    assert "kernel/fork.c:12:3: error: expected ';' before 'return'" in caught.value.message
    assert "| make[1]: *** [scripts/Makefile.build:9: kernel/fork.o] Error 1" in caught.value.message
    assert "mm/1.o" not in caught.value.message
    assert str(caught.value.log) in caught.value.message
    log = caught.value.log.read_text()
    assert log.startswith("linux-source-7.3 1, gcc 12.2.0\n$ make -j")
    assert "  CC      mm/1.o\n" in log


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("fatal error: error writing to /tmp/x.s: No space left on device", "XDG_CACHE_HOME"),
        ("gcc: fatal error: Killed signal terminated program cc1", "out of memory"),
    ],
)
def test_the_hint_names_what_the_machine_lacks(world: World, said: str, hint: str) -> None:
    world.fail(f"echo '{said}'")
    with pytest.raises(KernelBuildError) as caught:
        world.build()
    assert hint in (caught.value.hint or "")


def test_a_failed_build_leaves_the_source_and_no_partial_kernel(world: World) -> None:
    world.fail("exit 2")
    with pytest.raises(KernelBuildError):
        world.build()
    home = world.cache.directory / "kernels"
    assert sorted(path.name for path in home.iterdir()) == ["build.log", "source"]
    assert not (world.cache.directory / "kernel-partial").exists()
    (world.home / "fail").unlink()
    assert world.build().path.read_bytes() == b"7.3"
    assert not (home / "source").exists()


def test_an_interrupted_build_ends_its_processes_and_leaves_nothing(world: World) -> None:
    world.fail('echo $$ > "$HOME/pid"; echo "  CC      x.o"; sleep 100 & echo $! >> "$HOME/pid"; wait')

    def interrupt(what: str, _share: float) -> None:
        if what.startswith("compiling"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ownkernel.build_kernels(cache=world.cache, progress=interrupt)
    assert not (world.cache.directory / "kernel-partial").exists()
    assert ownkernel.current_kernel(world.cache) is None
    deadline = time.monotonic() + 5
    for pid in (world.home / "pid").read_text().split():
        while Path(f"/proc/{pid}/stat").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text():
            assert time.monotonic() < deadline, pid
            time.sleep(0.02)


def test_too_little_disk_space_is_refused_before_anything_is_fetched(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownkernel, "DISK", 1 << 60)
    with pytest.raises(PyvmmError, match=r"no space in .* MB are free") as caught:
        world.build()
    assert "XDG_CACHE_HOME" in (caught.value.hint or "")
    assert not (world.cache.directory / "kernels" / "source").exists()


def test_a_full_disk_is_reported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SourceTree, "unpack", full)
    with pytest.raises(PyvmmError, match="the disk is full"):
        world.build()


def test_options_unknown_to_the_source_are_reported_and_do_not_stop_the_build(world: World) -> None:
    world.fragment("CONFIG_KVM=y  # a\nCONFIG_NOT_HERE=y  # b\nCONFIG_QUITE_GONE=n  # c\nCONFIG_STUBBORN=n  # d\n")
    program(world.bin, "make", MAKE.replace("cat $wanted", "sed /NOT_HERE/d $wanted"))
    (world.home / "instead").write_text("CONFIG_STUBBORN=y\n")
    kernel = world.build()
    assert kernel.manifest.refused == ["CONFIG_NOT_HERE=y", "CONFIG_STUBBORN=n"]
    assert "not as asked in this source: CONFIG_NOT_HERE=y CONFIG_STUBBORN=n" in world.steps


def test_the_error_for_a_missing_compiler_names_the_package(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(world.home))
    with pytest.raises(HostError) as caught:
        world.build()
    assert caught.value.hint == f"apt install {ownkernel.COMPILER}"


def test_the_error_names_every_build_dependency_at_once_and_the_lab_needs_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(needs, "STDIO", tmp_path / "stdio.h")
    (tmp_path / "apt-get").touch(mode=0o755)
    with pytest.raises(HostError) as caught:
        needs.require_for_kernel()
    wanted = f"{ownkernel.COMPILER} gcc libc6-dev make bc bison flex" if ownkernel.CROSS else "gcc libc6-dev make bc"
    assert f"dpkg {wanted}" in (caught.value.hint or "").replace("debian-archive-keyring ", "")
    assert "there is no bison" in caught.value.message
    with pytest.raises(HostError) as caught:
        needs.require(building=True)
    assert "bison" not in str(caught.value)


# ---- the options


def test_every_option_has_a_reason_and_appears_once() -> None:
    lines = [line for line in ownkernel.FRAGMENT.read_text().splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r'CONFIG_[A-Z0-9_]+=([yn]|\d+|"[^"#]+")  # \S.+', line), line
        assert len(line) <= 120
    for variant in Variant:
        names = [line.partition("=")[0] for line in ownkernel.options(variant)]
        assert sorted(set(names)) == sorted(names)
    taken = {line for variant in Variant for line in ownkernel.options(variant)}
    assert taken == {line.partition("  #")[0] for line in lines}


@pytest.mark.parametrize(
    "option",
    [
        "KVM",
        "NVHE_EL2_DEBUG",
        "FTRACE",
        "ARM_PKVM_GUEST",
        "DMA_RESTRICTED_POOL",
        "9P_FS",
        "NET_9P_VIRTIO",
        "VIRTIO_BLK",
        "VIRTIO_CONSOLE",
        "USERFAULTFD",
        "MEMORY_FAILURE",
        "ZRAM",
        "KSM",
    ],
)
def test_the_options_include_pkvm_and_tracing(option: str) -> None:
    assert f"CONFIG_{option}=y" in ownkernel.options(Variant.HOST)


@pytest.mark.parametrize(
    "option",
    ["ARM_PKVM_GUEST", "DMA_RESTRICTED_POOL", "VIRTIO_MMIO", "VIRTIO_BLK", "VIRTIO_CONSOLE", "EXT4_FS", "FUTEX"],
)
def test_the_guests_options_include_what_a_guest_needs(option: str) -> None:
    assert f"CONFIG_{option}=y" in ownkernel.options(Variant.GUEST)


def test_the_guests_kernel_has_neither_kvm_nor_tracing() -> None:
    wanted = "\n".join(ownkernel.options(Variant.GUEST))
    assert not re.search("CONFIG_(KVM|FTRACE|ENABLE_DEFAULT_TRACERS|NVHE_EL2_DEBUG|DEBUG_FS|PCI|VIRTIO_PCI)=", wanted)


# ---- as the lab's host


@pytest.fixture
def debians(world: World, monkeypatch: pytest.MonkeyPatch) -> Image:
    """Put an image with Debian's kernel into the cache."""
    monkeypatch.setattr(rootfs, "recipe_hash", lambda: "r")
    with world.cache.lock(lambda: None), world.cache.scratch() as scratch:
        files = {}
        for name in ("Image", "root.cpio"):
            (scratch / name).write_bytes(b"debian")
            files[name] = FileRecord(6, file_sha256(scratch / name))
        manifest = ImageManifest("9.9-arm64", "2026-01-02T03:04:05+00:00", "http://m", "r", [], files)
        return world.cache.adopt(scratch, manifest)


def test_own_builds_the_kernel_and_boots_it_with_the_root_of_debians_image(world: World, debians: Image) -> None:
    assert kernels.find("own") == kernels.OWN
    assert image.usable_image(world.cache, kernel="own") is None
    made = image.build_image("own", cache=world.cache)
    assert (made.root, made.release) == (debians.root, "9.9.1-pyvmm")
    assert made.kernel.read_bytes() == b"7.3"
    assert not made.has_modules
    assert image.usable_image(world.cache, kernel="own", thorough=True) == made


# ---- the command


@pytest.fixture
def no_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for check in ("require", "require_for_kernel"):
        monkeypatch.setattr(needs, check, lambda **_: None)


@pytest.mark.usefixtures("no_needs")
def test_lab_kernel_prints_the_expected_cost_and_then_the_kernel_and_its_path(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["lab", "kernel"]) == 0
    said = capsys.readouterr()
    kernel = ownkernel.current_kernel(world.cache)
    assert kernel is not None
    of = "9.9.1-pyvmm, of linux-source-7.3 1"
    assert said.out == f"host: {of}: {kernel.path}\nguest: {of}: {world.guest().path}\n"
    assert "kernel for host and guest from Debian's source" in said.err
    assert cli_lab.COST in said.err
    assert "pyvmm: lab: unpacking the source\n" in said.err
    assert cli.main(["lab", "kernel"]) == 0
    assert capsys.readouterr() == (said.out, "")


@pytest.mark.usefixtures("no_needs", "debians")
def test_the_lab_builds_own_at_the_first_request_and_boots_it(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    booted = []

    class FakeLab:
        def __init__(self, _options: LabOptions, *, image: Image, **_: Any) -> None:
            booted.append(image)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def run(self, *_: list[str], **__: Any) -> int:
            return 42

    monkeypatch.setattr(lab, "Lab", FakeLab)
    monkeypatch.delenv(IN_LAB, raising=False)
    assert cli.main(["lab", "exec", "--host-kernel", "own", "true"]) == 42
    kernel = ownkernel.current_kernel(world.cache)
    assert kernel is not None
    assert booted[0].kernel == kernel.path
    assert "building the project's own kernel for host from" in capsys.readouterr().err
    assert ownkernel.current_kernel(world.cache, Variant.GUEST) is None


@pytest.mark.usefixtures("no_needs")
def test_status_shows_the_kernel(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(needs, "needs", list)
    cli.main(["lab", "status"])
    said = capsys.readouterr().out
    for name in ("own", "own:"):
        assert re.search(rf"^{name} +none yet \(pyvmm lab kernel\)$", said, re.MULTILINE)
    host = world.build()
    kernels = {"own": ("kernel", host), "own:": ("guest_kernel", world.guest())}
    cli.main(["lab", "status"])
    said = capsys.readouterr().out
    for name, (_, kernel) in kernels.items():
        assert re.search(rf"^{name} +9.9.1-pyvmm, .*{kernel.path}$", said, re.MULTILINE)
    cli.main(["lab", "status", "--json"])
    told = json.loads(capsys.readouterr().out)
    for key, kernel in kernels.values():
        assert told[key]["path"] == str(kernel.path)
    world.compiler("14.1.0")
    cli.main(["lab", "status"])
    said = capsys.readouterr().out
    for name in kernels:
        assert re.search(rf"^{name} +to be built again: .*another compiler", said, re.MULTILINE)
