# SPDX-License-Identifier: Apache-2.0
"""Kernels and initramfs by name: their files, the files a lab mounts for them, and the errors if one is missing."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyvmm.cli import main, make_parser
from pyvmm.cpio import CpioWriter
from pyvmm.errors import HostError, UsageError
from pyvmm.guest import initramfs
from pyvmm.guest.kernels import directory_name, named, resolve
from pyvmm.lab import guests, rootfs
from pyvmm.lab.cache import FILES, Cache, FileRecord, Manifest, file_sha256
from pyvmm.lab.ownkernel import OwnKernel, Variant
from pyvmm.lab.peers import ALL
from pyvmm.lab.trees import find_tree, made_tree, usable_tree
from pyvmm.labenv import IN_LAB, TREES
from pyvmm.machine.config import MachineConfig
from pyvmm.options.machine import machine_config, with_files
from pyvmm.protection import Protection
from pyvmm.session.watch import _title
from tests.unit.test_lab_image import read_cpio

# -- names


def never(name: str) -> str:
    raise AssertionError(name)


@pytest.mark.parametrize("kernel", ["Image", "payload:hello", "./own:", "debian", "shell:"])
def test_a_path_that_is_not_a_name_is_unchanged(kernel: str) -> None:
    assert resolve(kernel, None, never) == (kernel, None)
    assert resolve(kernel, "root.cpio", never) == (kernel, "root.cpio")


@pytest.mark.parametrize("kernel", ["own:", "debian:stable"])
def test_reports_call_a_named_kernel_by_its_name(kernel: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(guests, "made", lambda _name: str(tmp_path))
    monkeypatch.delenv(IN_LAB, raising=False)
    config = with_files(MachineConfig(kernel, Protection.PKVM))
    assert (config.kernel, config.title) == (str(tmp_path / "Image"), kernel)
    machine = SimpleNamespace(config=config)
    assert _title(machine).startswith(f"{kernel}: protection pkvm, 1 vCPU, ")  # type: ignore[arg-type]


def test_reports_call_a_file_by_its_path() -> None:
    config = with_files(MachineConfig("some/Image"))
    assert (config.kernel, config.title) == ("some/Image", "some/Image")


def test_a_shell_has_the_named_kernels_modules_or_no_modules() -> None:
    asked: list[str] = []

    def make(name: str) -> str:
        asked.append(name)
        return "/made"

    assert resolve("debian:stable", "shell:", make) == ("/made/Image", "/made/shell.cpio")
    assert resolve("own:", None, make) == ("/made/Image", None)
    assert resolve("own:", "mine", make) == ("/made/Image", "mine")
    assert resolve("Image", "shell:", make) == ("Image", "/made/shell.cpio")
    assert asked == ["debian:stable", "own:", "own:", "shell:"]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("run -i shell: debian:", ["debian:"]),
        ("run --kernel=own: --initrd=shell:", ["own:"]),
        ("bench boot --axis kernel=own:,debian:stable,own:", ["own:", "debian:stable"]),
        ("run -i shell: Image", ["shell:"]),
        ("run payload:hello -i root.cpio", []),
        ("run debian own", []),
    ],
)
def test_a_lab_mounts_only_the_files_that_a_command_line_names(words: str, shown: list[str]) -> None:
    assert named(words.split()) == shown
    assert set(shown) <= set(ALL)


def test_a_lab_finds_its_mounted_files_and_reports_missing_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setenv(IN_LAB, "1")
    monkeypatch.setenv(TREES, f"other=/x:{directory_name('own:')}={tmp_path}")
    assert resolve("own:", "shell:", never) == (f"{tmp_path}/Image", f"{tmp_path}/shell.cpio")
    with pytest.raises(HostError, match="this lab does not see it") as caught:
        resolve("debian:", None, never)
    assert "--with debian:" in (caught.value.hint or "")


def test_a_lab_also_mounts_other_named_trees() -> None:
    words = ["run", "--net", "passt,fwd=8080:80", "debian:", "passt-1"]
    assert named(words, ("passt", "gdb")) == ["debian:", "passt"]


# -- their contents


def entry(path: str, data: bytes) -> bytes:
    out = io.BytesIO()
    cpio = CpioWriter(out)
    cpio.file(path, data)
    cpio.finish()
    return out.getvalue()


MODULES = entry("lib/modules/9.9/virtio_mmio.ko", b"M")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Make a lab's cache with an image of the default kernel only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(IN_LAB, raising=False)
    cache = Cache()
    with cache.lock(lambda: None), cache.scratch() as scratch:
        for name, data in zip(FILES, (b"kernel", b"root", MODULES, b"busybox"), strict=True):
            (scratch / name).write_bytes(data)
        files = {name: FileRecord((scratch / name).stat().st_size, file_sha256(scratch / name)) for name in FILES}
        manifest = Manifest("9.9", "2026-01-02T03:04:05+00:00", "http://m", rootfs.recipe_hash(), [], files)
        cache.adopt(scratch, manifest)
    return cache


def test_debians_kernel_comes_with_its_modules_and_is_not_copied(cache: Cache) -> None:
    directory = made_tree(guests.recipe("debian:"))
    assert sorted(path.name for path in directory.iterdir()) == ["Image", "busybox", "manifest.json", "shell.cpio"]
    current = cache.current()
    assert current is not None
    assert (directory / "Image").samefile(current.kernel)
    archive = (directory / "shell.cpio").read_bytes()
    assert archive == initramfs.write(b"busybox") + MODULES
    assert find_tree(directory_name("debian:")) == directory
    assert guests.made("debian:") == str(directory)


@pytest.mark.usefixtures("cache")
def test_a_shell_for_other_kernels_has_no_modules() -> None:
    directory = made_tree(guests.recipe("shell:"))
    assert (directory / "shell.cpio").read_bytes() == initramfs.write(b"busybox")
    assert not (directory / "Image").exists()
    assert usable_tree(guests.recipe("debian:")) is None


def test_the_projects_kernel_is_the_one_built_for_guests(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    built = cache.directory / "kernels" / "one"
    built.mkdir(parents=True)
    (built / "Image").write_bytes(b"own")
    kernels = {Variant.GUEST: OwnKernel(built, None)}  # type: ignore[arg-type]
    monkeypatch.setattr(guests, "usable_kernel", lambda _cache, variant: kernels.get(variant))
    directory = made_tree(guests.recipe("own:"))
    assert (directory / "Image").read_bytes() == b"own"
    assert (directory / "shell.cpio").read_bytes() == initramfs.write(b"busybox")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("debian:stable", "pyvmm lab build --host-kernel stable"),
        ("own:", "pyvmm lab kernel"),
    ],
)
def test_the_error_for_a_missing_kernel_has_the_command_that_gets_it(name: str, hint: str) -> None:
    with pytest.raises(HostError, match="not") as caught:
        guests.recipe(name)
    assert hint in (caught.value.hint or "")


def test_a_shell_cannot_be_made_without_an_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(HostError, match="busybox") as caught:
        guests.recipe("shell:")
    assert "pyvmm lab build fetches it" in (caught.value.hint or "")


@pytest.mark.usefixtures("cache")
def test_the_error_for_an_unknown_debian_kernel_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="debian:sid") as caught:
        guests.recipe("debian:sid")
    assert "debian:unstable" in (caught.value.hint or "")


def test_a_lab_does_not_boot_for_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lab", "run", "debian:sid"]) == 2
    said = capsys.readouterr().err
    assert "'debian:sid'" in said
    assert "debian:unstable" in said


# -- the initramfs


def test_the_same_input_gives_the_same_bytes() -> None:
    assert initramfs.write(b"busybox") == initramfs.write(b"busybox")
    assert initramfs.digest() == initramfs.digest()


def test_the_initramfs_has_init_and_the_programs_that_scripts_use() -> None:
    entries = read_cpio(initramfs.write(b"busybox"))
    assert entries["bin/busybox"][1] == b"busybox"
    assert entries["init"][1].startswith(b"#!/bin/busybox sh\n")
    assert entries["init"][0] & 0o111
    assert entries["bin/sh"][1] == b"busybox"
    assert entries["sbin/modprobe"][1] == b"../bin/busybox"
    assert sum(len(data) for path, (_, data) in entries.items() if path != "bin/busybox") < 8192


def test_the_scripts_of_the_initramfs_are_valid_shell() -> None:
    for script in (initramfs.INIT.read_bytes(), initramfs.UDHCPC):
        subprocess.run(["/bin/sh", "-n"], input=script, check=True)


COMMANDS = [
    ("quiet console=ttyAMA0", ""),
    ("quiet -- uname -a; echo 'a  b' | wc -c", "uname -a; echo 'a  b' | wc -c"),
    ("-- true", "true"),
    ('pyvmm.run="echo a; exit 3" quiet', "echo a; exit 3"),
    ("quiet pyvmm.run=poweroff ro", "poweroff"),
]


@pytest.mark.parametrize(("line", "command"), COMMANDS)
def test_init_reads_its_command_from_the_kernels_command_line(line: str, command: str, tmp_path: Path) -> None:
    (tmp_path / "cmdline").write_text(line + "\n")
    init = initramfs.INIT.read_text()
    part = init[init.index("read -r line") : init.index('if [ -n "$command" ]')]
    script = part.replace("/proc/cmdline", str(tmp_path / "cmdline")) + 'printf %s "$command"'
    assert subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True).stdout == command


def test_the_exit_status_is_read_from_the_console() -> None:
    assert initramfs.exit_status(b"x\r\npyvmm: exit status 3\r\n[    1.0] reboot: Power down\r\n") == 3
    assert initramfs.exit_status(b"pyvmm: exit status 0\n") == 0
    assert initramfs.exit_status(b"echo pyvmm: exit status 3\r\n") is None


# -- roots


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("debian:", "debian: needs an initramfs"),
        ("debian:stable -p root=/dev/vda", "debian:stable needs an initramfs"),
        ("own:", "own: needs a root file system"),
        ("own: -p console=ttyAMA0 -p noroot=1", "own: needs a root file system"),
    ],
)
def test_a_named_kernel_without_a_root_is_refused(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dry-run", *line.split()]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"pyvmm: {said}")
    assert "-i shell:" in told


@pytest.mark.parametrize(
    "line",
    [
        "debian: -i shell:",
        "debian: -i x.cpio",
        "own: -p 'quiet' -p root=/dev/vda",
        "own: --dtb x.dtb",
        "Image",
        "payload:hello",
    ],
)
def test_a_kernel_that_may_find_its_root_is_accepted(line: str) -> None:
    words = ["run", *line.replace("'", "").split()]
    machine_config(make_parser(words).parse_args(words))
