# SPDX-License-Identifier: Apache-2.0
"""A build of the project's own kernel that fails: a bad source, a compiler's error, a lack of tools or disk space."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pyvmm.errors import HostError, PyvmmError
from pyvmm.lab import needs, ownkernel
from pyvmm.lab.kbuild import KernelBuildError, SourceTree
from tests.unit.kernel_world import COMPILE_ERROR, MAKE, World, program


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


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
