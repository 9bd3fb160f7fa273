# SPDX-License-Identifier: Apache-2.0
"""The kernel of the lab's host: names and files, an image for each, and the suites that apt needs."""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyvmm.errors import PyvmmError, UsageError
from pyvmm.lab import Lab, LabOptions, cache, frames, image, kernels, qemu
from pyvmm.lab.cache import Cache, FileRecord, Image, Manifest, file_sha256
from pyvmm.lab.link import Link
from pyvmm.lab.rootfs import recipe_hash

RELEASE = "6.12.3-mine"

FRESH = LabOptions(boot="fresh")


def image_bytes(release: str = RELEASE, flags: int = 0xA) -> bytes:
    """Make the start of an arm64 Image, with the banner that every kernel has."""
    banner = b"Linux version " + release.encode() + b" (me@here) (gcc) #1\0"
    return struct.pack("<2I3Q24x4sI", 0x91005A4D, 0, 0, 1 << 16, flags, b"ARM\x64", 0) + bytes(4096) + banner


# ---- names and files


@pytest.mark.parametrize("pages", ["", "-16k"])
@pytest.mark.parametrize("name", ["stable", "backports", "unstable", "experimental"])
def test_debians_kernels_have_names(name: str, pages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name += pages
    (tmp_path / name).mkdir()
    assert kernels.find(name) == name
    assert kernels.SUITES[name][0] == kernels.SUITE
    assert kernels.package(name) == f"linux-image-arm64{pages}"


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(("flags", "page"), [(0, 0), (0xA, 4096), (0xC, 16384), (0xE, 65536)])
def test_an_images_header_tells_the_size_of_its_pages(
    pack: Callable[[bytes], bytes], flags: int, page: int, tmp_path: Path
) -> None:
    (tmp_path / "Image").write_bytes(pack(image_bytes(flags=flags)))
    assert kernels.page_of(tmp_path / "Image") == page


def test_other_files_have_no_pages(tmp_path: Path) -> None:
    (tmp_path / "Image").write_bytes(b"\xff" * 100)
    assert kernels.page_of(tmp_path / "Image") == kernels.page_of(tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("mode", "flags", "named", "cpu"),
    [
        ("protected", 0xC, None, "cortex-a35"),
        ("nvhe", 0xC, None, "cortex-a35"),
        ("vhe", 0xC, None, "neoverse-n1"),
        ("protected", 0xA, None, "cortex-a72"),
        ("protected", 0xE, None, "cortex-a72"),
        ("protected", 0xC, "max", "max"),
    ],
)
def test_the_lab_has_a_cpu_with_the_kernels_pages(
    mode: str, flags: int, named: str | None, cpu: str, tmp_path: Path
) -> None:
    (tmp_path / "Image").write_bytes(image_bytes(flags=flags))
    made = Image(tmp_path, Manifest("9.9", "2026-01-02T03:04:05+00:00", "http://m", "r", [], {}))
    line = qemu.command_line("qemu", "7.2.19", made, LabOptions(mode=mode, cpu=named), [], 0)
    assert line[line.index("-cpu") + 1] == cpu


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("form", ["Image", "./Image", "{}/Image"])
def test_the_release_is_read_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[..., Any] | type[bytes], form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Image").write_bytes(pack(image_bytes()))
    assert kernels.find(form.format(tmp_path)) == kernels.KernelFile(tmp_path / "Image", RELEASE)


def test_a_kernel_without_a_banner_is_of_unknown_release(tmp_path: Path) -> None:
    (tmp_path / "Image").write_bytes(image_bytes()[:4096])
    found = kernels.find(str(tmp_path / "Image"))
    assert isinstance(found, kernels.KernelFile)
    assert "unknown" in found.release


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"#!/bin/sh\n", "is a text file"),
        (b"MZ" + bytes(range(256)), "not an arm64 Linux Image"),
        (bytes(range(1, 256)), "no arm64 kernel: it has no Image header"),
        (b"", "is empty"),
        (b"MZ\0\0zimg" + struct.pack("<2I8x32s", 64, 0, b"lzo"), "zboot image compressed with 'lzo'"),
        (lzma.compress(image_bytes()), "compressed with xz or zstd, which QEMU does not start"),
        (gzip.compress(image_bytes())[:-20], "truncated gzip"),
    ],
)
def test_a_file_that_is_not_an_arm64_kernel_is_refused_with_its_kind(tmp_path: Path, data: bytes, what: str) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UsageError) as caught:
        kernels.find(str(tmp_path / "file"))
    assert f"{tmp_path}/file" in caught.value.message
    assert what in caught.value.message
    assert "arch/arm64/boot/Image" in (caught.value.hint or "")
    assert caught.value.message.startswith("the host's kernel")


def test_an_efi_zboot_image_is_refused_though_guests_can_use_it(tmp_path: Path) -> None:
    packed = gzip.compress(image_bytes())
    header = b"MZ\0\0zimg" + struct.pack("<2I8x32s", 64, len(packed), b"gzip")
    (tmp_path / "vmlinuz").write_bytes(header.ljust(64, b"\0") + packed)
    with pytest.raises(UsageError, match="zboot image, which QEMU does not start"):
        kernels.find(str(tmp_path / "vmlinuz"))


@pytest.mark.parametrize(("text", "nearest"), [("stabel", "stable"), ("back-ports", "backports"), ("sid", "unstable")])
def test_the_error_for_an_unknown_name_lists_the_known_ones_nearest_first(text: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"no host kernel is called '{text}', and no file") as caught:
        kernels.find(text)
    hint = caught.value.hint or ""
    assert hint.startswith(nearest)
    assert all(name in hint for name in kernels.SUITES)
    assert "or a file" in hint


# ---- an image for each


def fill(cache: Cache, kernel: str, release: str = "9.9", recipe: str | None = None) -> Image:
    with cache.lock(lambda: None), cache.scratch() as scratch:
        for name in ("Image", "root.cpio"):
            (scratch / name).write_bytes(f"{kernel} {release} {name}".encode())
        records = {path.name: FileRecord(path.stat().st_size, file_sha256(path)) for path in scratch.iterdir()}
        made = Manifest(release, "2026-01-02T03:04:05+00:00", "http://m", recipe or recipe_hash(), [], records)
        return cache.adopt(scratch, made, kernel)


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_images_of_several_kernels_exist_side_by_side(store: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "GRACE_SECONDS", -1)
    made = {name: fill(store, name) for name in kernels.SUITES}
    assert {name: image.usable_image(store, kernel=name) for name in kernels.SUITES} == made
    assert store.all_current() == made
    newer = fill(store, "stable", "10.0")
    assert store.all_current() == made | {"stable": newer}
    assert not made["stable"].directory.exists()


def test_the_default_kernels_image_keeps_its_path(store: Cache) -> None:
    fill(store, kernels.DEFAULT)
    fill(store, "stable")
    assert {path.name for path in store.directory.iterdir()} >= {"current", "current-stable"}
    assert image.usable_image(store) == image.usable_image(store, kernel=kernels.DEFAULT)


def test_an_image_of_two_names_is_stored_once_and_kept_while_one_needs_it(
    store: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "GRACE_SECONDS", -1)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", lambda path, _data: path.write_text("same"))
        shared = fill(store, "unstable")
        assert fill(store, "experimental") == shared
    fill(store, "experimental", "10.0")
    assert image.usable_image(store, kernel="unstable") == shared


def test_a_kernel_file_boots_with_the_root_that_has_its_modules(store: Cache, tmp_path: Path) -> None:
    (tmp_path / "Image").write_bytes(image_bytes())
    file = str(tmp_path / "Image")
    assert image.usable_image(store, kernel=file) is None
    default = fill(store, kernels.DEFAULT, "7.3.4")
    found = image.build_image(file, cache=store)
    kernel = kernels.find(file)
    assert isinstance(kernel, kernels.KernelFile)
    assert found == image.usable_image(store, kernel=file) == replace(default, file=kernel)
    assert (found.kernel, found.root) == (tmp_path / "Image", default.root)
    assert (found.release, found.has_modules, default.has_modules) == (RELEASE, False, True)
    stable = fill(store, "stable", RELEASE)
    found = image.build_image(file, cache=store)
    assert (found.kernel, found.root, found.has_modules) == (tmp_path / "Image", stable.root, True)


def test_the_root_of_an_image_of_another_recipe_is_not_used(store: Cache, tmp_path: Path) -> None:
    (tmp_path / "Image").write_bytes(image_bytes())
    default = fill(store, kernels.DEFAULT)
    fill(store, "stable", RELEASE, recipe="of another version")
    assert image.build_image(str(tmp_path / "Image"), cache=store).root == default.root


def test_the_error_of_a_failed_share_names_a_kernel_without_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = kernels.KernelFile(tmp_path / "Image", RELEASE)
    manifest = Manifest("7.3.4", "2026-01-02T03:04:05+00:00", "http://m", "r", [], {})
    script = '[ "$1" = --version ] && echo QEMU emulator version 9.0.0 && exit; exec sleep 100'
    (tmp_path / qemu.PROGRAM).write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / qemu.PROGRAM).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    answers = [(frames.READY, b""), (frames.DONE, b"mount: No such device")]
    monkeypatch.setattr(Link, "_wait", lambda *_: answers.pop(0))
    with (
        pytest.raises(PyvmmError, match="cannot be made visible") as caught,
        Lab(FRESH, image=Image(tmp_path, manifest, file), cwd=tmp_path),
    ):
        pass
    for word in (str(file.path), RELEASE, "7.3.4", "CONFIG_NET_9P_VIRTIO"):
        assert word in (caught.value.hint or "")


def test_the_error_for_a_kernel_that_does_not_boot_lists_its_requirements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / qemu.PROGRAM).write_text("#!/bin/sh\necho QEMU emulator version 9.0.0; echo panic\n")
    (tmp_path / qemu.PROGRAM).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    manifest = Manifest("7.3.4", "2026-01-02T03:04:05+00:00", "http://m", "r", [], {})
    mine = Image(tmp_path, manifest, kernels.KernelFile(tmp_path / "Image", RELEASE))
    with pytest.raises(PyvmmError, match=f"-kernel {tmp_path}/Image") as caught, Lab(FRESH, image=mine, bare=True):
        pass
    assert "virtio-console" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("release", "than", "older"),
    [
        ("7.2.9-arm64", "7.3.4+deb13-arm64", True),
        ("7.3.4-arm64", "7.3.4+deb13-arm64", False),
        ("7.4-rc1-arm64", "7.3.4+deb13-arm64", False),
        ("7.3-rc7-arm64", "7.3.0-arm64", True),
        ("7.10.1-arm64", "7.9.9-arm64", False),
        ("of unknown release", "7.3.4+deb13-arm64", False),
    ],
)
def test_a_kernels_age_is_told_by_its_version(release: str, than: str, older: bool) -> None:
    assert kernels.is_older(release, than) is older


@pytest.mark.parametrize("kernel", ["unstable", "experimental", "unstable-16k"])
def test_a_kernel_is_said_to_be_older_than_the_default_only_when_it_is(store: Cache, kernel: str) -> None:
    made = fill(store, kernel, "7.2.9-arm64")
    assert image.age_note(kernel, made, store) is None  # there is nothing to compare it with
    fill(store, kernels.DEFAULT, "7.3.4+deb13-arm64")
    assert (
        image.age_note(kernel, made, store)
        == f"{kernel} is 7.2.9-arm64, older than backports, which is 7.3.4+deb13-arm64"
    )
    assert image.age_note(kernel, fill(store, kernel, "7.4-rc1-arm64"), store) is None


def test_nothing_is_said_of_a_kernel_that_everyone_knows_to_be_older(store: Cache) -> None:
    fill(store, kernels.DEFAULT, "7.3.4+deb13-arm64")
    assert image.age_note("stable", fill(store, "stable", "6.12.117+deb13-arm64"), store) is None
