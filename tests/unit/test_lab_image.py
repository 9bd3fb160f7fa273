# SPDX-License-Identifier: Apache-2.0
"""How the lab's image is built and cached: packages become archives, and errors when that fails."""

from __future__ import annotations

import errno
import io
import json
import lzma
import random
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyvmm.cpio import CpioWriter
from pyvmm.errors import PyvmmError
from pyvmm.lab import apt, firstboot, image, rootfs
from pyvmm.lab.apt import AptError, Package
from pyvmm.lab.cache import Cache, FileRecord, Image, Manifest, file_sha256
from pyvmm.lab.rootfs import Module

# ---- archives


def read_cpio(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Read newc archives as the kernel does: mode and contents by path."""
    entries, at = {}, 0
    while at < len(data):
        numbers = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        assert data[at : at + 6] == b"070701"
        mode, size, name_size = numbers[1], numbers[6], numbers[11]
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        start = (at + 110 + name_size + 3) & ~3
        at = (start + size + 3) & ~3
        if name != "TRAILER!!!":
            entries[name] = (mode, data[start : start + size])
    return entries


def test_cpio_holds_the_files_with_parents_first() -> None:
    out = io.BytesIO()
    cpio = CpioWriter(out)
    cpio.file("/a/b/file", b"12345", mode=0o755)
    cpio.symlink("a/link", "b/file")
    cpio.character_device("dev/console", 5, 1)
    cpio.finish()
    entries = read_cpio(out.getvalue())
    assert list(entries) == ["a", "a/b", "a/b/file", "a/link", "dev", "dev/console"]
    assert entries["a/b/file"] == (stat.S_IFREG | 0o755, b"12345")
    assert entries["a/link"] == (stat.S_IFLNK | 0o777, b"b/file")
    assert stat.S_ISCHR(entries["dev/console"][0])


def test_cpio_is_the_same_for_the_same_input() -> None:
    def write() -> bytes:
        out = io.BytesIO()
        cpio = CpioWriter(out)
        cpio.file("x/y", b"z" * 1001)
        cpio.finish()
        return out.getvalue()

    assert write() == write()


@pytest.fixture
def make_deb(tmp_path: Path) -> Callable[[str, dict[str, bytes | Path]], Path]:
    """Return a function that makes a package of files by path. A value that is a Path is a link's target."""

    def make(name: str, files: dict[str, bytes | Path]) -> Path:
        tree = tmp_path / f"{name}.tree"
        control = tree / "DEBIAN" / "control"
        control.parent.mkdir(parents=True)
        control.write_text(f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: t\nDescription: t\n")
        for path, content in files.items():
            file = tree / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.symlink_to(content) if isinstance(content, Path) else file.write_bytes(content)
        deb = tmp_path / f"{name}_1_all.deb"
        subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, deb], check=True, capture_output=True)
        return deb

    return make


def test_root_follows_merged_usr_and_leaves_documentation_out(make_deb: Callable[..., Any]) -> None:
    deb = make_deb(
        "p",
        {
            "bin/tool": b"tool",
            "lib/aarch64-linux-gnu/libx.so.1": b"lib",
            "usr/lib/libx.so": Path("aarch64-linux-gnu/libx.so.1"),
            "usr/share/doc/p/copyright": b"words",
            "etc/p.conf": b"conf",
        },
    )
    out = io.BytesIO()
    modules = {"netfs": Module(b"N"), "9pnet": Module(b"T", ("netfs",)), "9p": Module(b"P", ("netfs", "9pnet"))}
    rootfs.write_root([deb], "9.9", modules | {"zram": Module(b"Z"), "ext4": Module(b"a guest's")}, out)
    entries = read_cpio(out.getvalue())
    assert entries["usr/bin/tool"][1] == b"tool"
    assert entries["usr/lib/aarch64-linux-gnu/libx.so.1"][1] == b"lib"
    assert stat.S_ISLNK(entries["usr/lib/libx.so"][0])
    assert entries["bin"] == (stat.S_IFLNK | 0o777, b"usr/bin")
    assert not any("share/doc" in path or path == "etc/p.conf" for path in entries)
    assert entries["usr/lib/modules/9.9/modules.dep"][1] == (
        b"netfs.ko: \n9pnet.ko: netfs.ko\n9p.ko: 9pnet.ko netfs.ko\nzram.ko: \n"
    )
    assert entries["init"][0] & 0o111


def module(depends: str, signature: bytes = b"") -> bytes:
    return b"\x7fELF\0name=x\0depends=" + depends.encode() + b"\0rest" + signature


def test_only_wanted_modules_and_their_dependencies_are_taken_without_signatures(make_deb: Callable[..., Any]) -> None:
    base = "usr/lib/modules/9.9-arm64"
    deb = make_deb(
        "k",
        {
            f"{base}/vmlinuz": b"MZkernel",
            f"{base}/kernel/fs/9p/9p.ko.xz": lzma.compress(module("netfs,9pnet")),
            f"{base}/kernel/fs/netfs/netfs.ko.xz": lzma.compress(module("", rootfs.SIGNATURE)),
            f"{base}/kernel/net/9p/9pnet.ko": module("netfs"),
            f"{base}/kernel/net/9p/9pnet_virtio.ko.xz": lzma.compress(module("9pnet,built_in")),
            f"{base}/kernel/net/9p/9pnet_rdma.ko.xz": lzma.compress(module("9pnet")),
            f"{base}/kernel/drivers/block/zram/zram.ko.xz": lzma.compress(module("zsmalloc,lz4hc-compress")),
            f"{base}/kernel/lib/lz4/lz4hc_compress.ko.xz": lzma.compress(module("")),
            f"{base}/kernel/mm/zsmalloc.ko": module(""),
        },
    )
    kernel = io.BytesIO()
    release, modules = rootfs.write_kernel([deb], kernel)
    assert (release, kernel.getvalue()) == ("9.9-arm64", b"MZkernel")
    assert modules["netfs"] == Module(module(""))
    assert {name: found.needs for name, found in modules.items()} == {
        "netfs": (),
        "9pnet": ("netfs",),
        "9p": ("netfs", "9pnet"),
        "9pnet_virtio": ("netfs", "9pnet"),
        "zsmalloc": (),
        "lz4hc_compress": (),
        "zram": ("zsmalloc", "lz4hc_compress"),
    }


def test_a_guests_modules_are_a_separate_archive_that_modprobe_understands() -> None:
    modules = {
        "9p": Module(b"9P"),
        "failover": Module(b"F"),
        "net_failover": Module(b"NF", ("failover",)),
        "virtio_net": Module(b"VN", ("failover", "net_failover")),
        "virtio_rng": Module(b"VR"),
    }
    out = io.BytesIO()
    rootfs.write_guest_modules("9.9", modules, out)
    entries = read_cpio(out.getvalue())
    assert entries["lib/modules/9.9/modules.dep"][1] == (
        b"failover.ko: \nnet_failover.ko: failover.ko\nvirtio_net.ko: net_failover.ko failover.ko\nvirtio_rng.ko: \n"
    )
    assert entries["lib/modules/9.9/virtio_net.ko"][1] == b"VN"
    assert "lib/modules/9.9/9p.ko" not in entries


@pytest.mark.parametrize("path", ["kernel/drivers/virtio/virtio_mmio.ko", "kernel/drivers/net/tun.ko.xz"])
def test_the_pattern_matches_the_modules_that_guests_and_labs_need(path: str) -> None:
    assert rootfs.MODULE_FILE.search(f"usr/lib/modules/9.9/{path}")


def test_modules_of_other_network_cards_are_not_read() -> None:
    assert not rootfs.MODULE_FILE.search("usr/lib/modules/9.9/kernel/drivers/net/ethernet/intel/e1000.ko.xz")


def test_a_package_without_busybox_is_refused(make_deb: Callable[..., Any]) -> None:
    with pytest.raises(PyvmmError, match="no busybox"):
        rootfs.read_busybox([make_deb("busybox-static", {"usr/bin/sh": b""})])


def test_the_kernel_is_found_once_also_at_the_path_of_older_releases(make_deb: Callable[..., Any]) -> None:
    deb = make_deb(
        "k",
        {
            "boot/vmlinuz-6.1-arm64": b"MZkernel",
            "lib/modules/6.1-arm64/vmlinuz": Path("/boot/vmlinuz-6.1-arm64"),
            "lib/modules/6.1-arm64/kernel/fs/9p/9p.ko": module(""),
        },
    )
    kernel = io.BytesIO()
    release, modules = rootfs.write_kernel([deb], kernel)
    assert (release, kernel.getvalue(), list(modules)) == ("6.1-arm64", b"MZkernel", ["9p"])


def test_packages_without_a_kernel_are_refused(make_deb: Callable[..., Any]) -> None:
    with pytest.raises(PyvmmError, match="hold no kernel"):
        rootfs.write_kernel([make_deb("k", {"usr/x": b""})], io.BytesIO())


@pytest.mark.parametrize("share", [0, 10, 50, 90, 99])
def test_a_truncated_package_is_refused_by_name(make_deb: Callable[..., Any], share: int) -> None:
    deb = make_deb("p", {"usr/bin/tool": random.Random(1).randbytes(100000)})
    whole = deb.read_bytes()
    deb.write_bytes(whole[: len(whole) * share // 100])
    with pytest.raises(PyvmmError, match=r"p_1_all\.deb is not a readable package"):
        rootfs.write_root([deb], "9.9", {}, io.BytesIO())


# ---- the cache


def manifest_of(directory: Path, recipe: str | None = None) -> Manifest:
    files = {n: FileRecord((directory / n).stat().st_size, file_sha256(directory / n)) for n in ("Image", "root.cpio")}
    recipe = rootfs.recipe_hash() if recipe is None else recipe
    return Manifest("9.9", "2026-01-02T03:04:05+00:00", "http://m", recipe, [("p", "1", "00")], files)


def fill(cache: Cache, contents: bytes = b"one", recipe: str | None = None) -> Image:
    with cache.lock(lambda: None), cache.scratch() as scratch:
        (scratch / "Image").write_bytes(contents)
        (scratch / "root.cpio").write_bytes(contents * 2)
        return cache.adopt(scratch, manifest_of(scratch, recipe))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_an_adopted_image_is_current_and_complete(cache: Cache) -> None:
    made = fill(cache)
    assert cache.current() == made
    assert made.damage(thorough=True) is None
    assert image.usable_image(cache) == made


def test_a_newer_image_becomes_current_and_the_older_one_stays_for_starting_labs(cache: Cache) -> None:
    old, new = fill(cache, b"one"), fill(cache, b"two")
    assert cache.current() == new
    assert old.kernel.read_bytes() == b"one"


def test_a_truncated_image_is_not_used(cache: Cache) -> None:
    made = fill(cache)
    made.root.write_bytes(b"")
    assert image.usable_image(cache) is None


def test_the_thorough_check_finds_a_corrupt_image(cache: Cache) -> None:
    made = fill(cache)
    made.root.write_bytes(b"oneonX")
    assert "corrupt" in (made.damage(thorough=True) or "")
    assert image.usable_image(cache, thorough=True) is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"files": 3}'])
def test_an_invalid_manifest_means_no_image(cache: Cache, text: str) -> None:
    (fill(cache).directory / "manifest.json").write_text(text)
    assert cache.current() is None


def test_an_image_of_another_recipe_is_not_used(cache: Cache) -> None:
    fill(cache, recipe="of another version")
    assert image.usable_image(cache) is None


def test_the_second_writer_waits_for_the_first_and_says_so(cache: Cache) -> None:
    waits = []

    def wait() -> None:
        waits.append(1)
        first.__exit__(None, None, None)

    first = cache.lock(lambda: None)
    first.__enter__()
    with cache.lock(wait):
        assert waits == [1]


def test_the_error_for_an_unwritable_cache_has_the_path_and_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PyvmmError) as caught, Cache(tmp_path / "file" / "cache").lock(lambda: None):
        pass
    assert "XDG_CACHE_HOME" in (caught.value.hint or "")


# ---- building


class FakeApt:
    """A fake apt with one package, and a kernel in each suite."""

    mirror = "http://m"

    def __init__(self, pool: Path) -> None:
        self.archives = pool / "archives"
        self._pool = pool

    def resolve(self, *_names: str, suite: str = "") -> list[tuple[str, str]]:
        if suite:
            return [("systemd", "1"), (f"linux-binary-9.9-{suite}", "1")]
        return [("p", "1"), ("busybox-static", "1"), ("dpkg", "1")]

    def locate(self, packages: list[tuple[str, str]]) -> list[Package]:
        return [Package(name, version, f"{name}_{version}_all.deb", 1, "00") for name, version in packages]

    def download(self, packages: list[Package], progress: apt.Progress) -> None:
        for package in packages:
            self.archives.mkdir(exist_ok=True)
            shutil.copy(self._pool / package.file, self.archives)
        progress("packages", 1.0)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_deb: Callable[..., Any]) -> None:
    """Make builds use two tiny packages, and no lab."""
    make_deb("p", {"usr/bin/tool": b"tool"})
    make_deb("busybox-static", {"usr/bin/busybox": b"busybox"})
    for suite in ("trixie", "trixie-backports"):
        make_deb(f"linux-binary-9.9-{suite}", {f"boot/vmlinuz-9.9-{suite}": f"MZ{suite}".encode()})
    monkeypatch.setattr(image, "require_qemu", lambda: "qemu")
    monkeypatch.setattr(image, "updated_apt", lambda *_, **__: FakeApt(tmp_path))
    monkeypatch.setattr(firstboot, "write_additions", lambda _i, _p, _c, out: out.write(b"additions"))


@pytest.mark.usefixtures("archive")
def test_a_build_fetches_only_the_kernel_and_the_root(cache: Cache) -> None:
    steps = []
    made = image.build_image(cache=cache, progress=lambda what, _share: steps.append(what))
    assert made.kernel.read_bytes() == b"MZtrixie-backports"
    assert made.root.read_bytes().endswith(b"additions")
    assert [name for name, _, _ in made.manifest.packages] == [
        "linux-binary-9.9-trixie-backports",
        "p",
        "busybox-static",
    ]
    assert (made.directory / "busybox").read_bytes() == b"busybox"
    assert {"packages", "kernel", "root"} <= set(steps)
    assert image.build_image(cache=cache) == made


@pytest.mark.usefixtures("archive")
def test_a_build_of_another_kernel_keeps_the_first_one_and_the_packages_of_both(cache: Cache, tmp_path: Path) -> None:
    first = image.build_image(cache=cache)
    (tmp_path / "archives" / "superseded_1_all.deb").touch()
    other = image.build_image("stable", cache=cache)
    assert other.kernel.read_bytes() == b"MZtrixie"
    assert image.usable_image(cache, thorough=True) == first
    names = {path.name for path in (tmp_path / "archives").iterdir()}
    assert names == {
        f"{name}_1_all.deb"
        for name in ("linux-binary-9.9-trixie-backports", "linux-binary-9.9-trixie", "p", "busybox-static")
    }


@pytest.mark.usefixtures("archive")
def test_a_full_disk_fails_the_build_with_a_clear_error_and_leaves_nothing(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rootfs, "write_root", full)
    with pytest.raises(PyvmmError, match="no space left") as caught:
        image.build_image(cache=cache)
    assert "600 MB" in (caught.value.hint or "")
    assert [path.name for path in cache.directory.iterdir()] == ["lock"]


@pytest.mark.usefixtures("archive")
def test_an_interrupted_build_leaves_nothing_and_the_next_one_works(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(rootfs, "write_root", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            image.build_image(cache=cache)
    assert cache.current() is None
    assert not (cache.directory / "partial").exists()
    assert image.build_image(cache=cache).damage(thorough=True) is None


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AptError("apt-get update failed:\n  E: Could not resolve", offline=True, hint="once")

    monkeypatch.setattr(image, "require_qemu", lambda: "qemu")
    monkeypatch.setattr(image, "updated_apt", fail)


@pytest.mark.usefixtures("offline")
def test_the_error_without_network_and_cache_is_apts(cache: Cache) -> None:
    with pytest.raises(AptError, match="Could not resolve"):
        image.build_image(cache=cache)


@pytest.mark.usefixtures("offline")
def test_an_image_is_used_offline_without_a_request(cache: Cache) -> None:
    made = fill(cache)
    assert image.build_image(cache=cache) == made


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("refresh", [True, False])
def test_an_older_image_is_used_offline_and_its_age_is_logged(cache: Cache, refresh: bool) -> None:
    made = fill(cache, recipe="of another version")
    steps = []
    assert image.build_image(cache=cache, refresh=refresh, progress=lambda what, _: steps.append(what)) == made
    assert steps[-1] == "offline: using the image of 2026-01-02T03:04:05+00:00"


@pytest.mark.usefixtures("offline")
def test_a_damaged_image_is_not_used_offline(cache: Cache) -> None:
    fill(cache, recipe="of another version").root.write_bytes(b"")
    with pytest.raises(AptError):
        image.build_image(cache=cache)


def test_a_manifest_reads_back_from_json(cache: Cache) -> None:
    made = fill(cache).manifest
    assert Manifest.from_json(made.to_json()) == made
    assert json.loads(made.to_json())["release"] == "9.9"
