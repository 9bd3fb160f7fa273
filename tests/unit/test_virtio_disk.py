# SPDX-License-Identifier: Apache-2.0
"""Media of virtual disks: errors and their messages, sharing, and discarding parts."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyvmm.devices.kinds.disk import PARTS, Disk
from pyvmm.devices.kinds.rng import Rng
from pyvmm.devices.virtio.disk import SECTOR, DiskFile
from pyvmm.errors import UsageError
from pyvmm.kvm import libc
from pyvmm.machine.config import MachineConfig
from pyvmm.options.devices import DEVICE_OPTIONS, device_specs
from pyvmm.options.table import Table


def make(path: Path, size: int = 1 << 20, fill: bytes = b"\xa5") -> str:
    path.write_bytes(fill * size)
    return str(path)


def refusal(path: object, *, read_only: bool = False) -> str:
    with pytest.raises(UsageError) as caught:
        DiskFile(str(path), read_only=read_only).close()
    return str(caught.value)


def test_a_file_that_cannot_be_a_disk_is_refused_with_a_hint(tmp_path: Path) -> None:
    assert "No such file" in (missing := refusal(tmp_path / "none"))
    assert f"truncate -s 1G {tmp_path}/none" in missing
    assert "is a directory" in (folder := refusal(tmp_path))
    assert f"mke2fs -t ext4 -d {tmp_path}" in folder
    assert "neither a file nor a block device" in refusal("/dev/null")
    os.mkfifo(tmp_path / "fifo")
    assert "neither a file nor a block device" in refusal(tmp_path / "fifo")
    assert "is empty" in refusal(make(tmp_path / "empty", 0))
    odd = refusal(make(tmp_path / "odd", 1000))
    assert "1000 bytes, not whole sectors of 512" in odd
    assert f"truncate -s %512 {tmp_path}/odd" in odd
    assert "embedded null" in refusal("a\0b")


def test_a_guest_gets_the_blocks_that_were_asked_for(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", 3 * 4096 + 512)
    with DiskFile(path, block=512) as disk:
        assert (disk.block_size, disk.physical_size) == (512, 4096)
    with pytest.raises(UsageError, match="has 12800 bytes, not whole blocks of 4096 bytes") as refused:
        DiskFile(path, block=4096)
    assert f"truncate -s %4096 {path}" in str(refused.value.hint)
    os.truncate(path, 3 * 4096)
    with DiskFile(path, block=4096) as disk:
        assert (disk.block_size, disk.physical_size, disk.sectors) == (4096, 4096, 24)


def test_blocks_smaller_than_the_hosts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiskFile, "_own_blocks", lambda _disk: (4096, 8192))
    path = make(tmp_path / "disk", 1 << 16)
    with DiskFile(path) as disk:
        assert (disk.block_size, disk.physical_size) == (4096, 8192)
    with pytest.raises(UsageError, match="has blocks of 4096 bytes, so a guest's cannot have 512"):
        DiskFile(path, block=512)


@pytest.mark.parametrize(("begins", "name"), [(b"QFI\xfb\0\0\0\3", "qcow2"), (b"KDMV", "VMDK"), (b"raw", None)])
def test_an_image_of_another_format_is_served_raw_with_a_warning(
    tmp_path: Path, events: Callable[[], list[dict[str, Any]]], begins: bytes, name: str | None
) -> None:
    path = make(tmp_path / "image")
    with open(path, "r+b") as file:
        file.write(begins)
    with DiskFile(path) as disk:
        assert disk.size == 1 << 20
    said = [(event["event"], event["path"], event["looks_like"]) for event in events()]
    assert said == ([("disk_served_raw", path, name)] if name else [])


def test_the_error_for_a_disk_that_is_not_writable_says_how_to_use_it(tmp_path: Path) -> None:
    # A running program can be read but not written, even by root.
    running = tmp_path / "running"
    shutil.copy(os.path.realpath(sys.executable), running)
    os.truncate(running, (running.stat().st_size + SECTOR - 1) // SECTOR * SECTOR)
    with subprocess.Popen([running, "-c", "input()"], stdin=subprocess.PIPE) as process:
        try:
            assert f"--disk {running},ro" in refusal(running)
            with DiskFile(str(running), read_only=True) as disk:
                assert not disk.can_discard
        finally:
            process.communicate(b"\n")


def test_a_writer_excludes_all_others_and_readers_share(tmp_path: Path) -> None:
    path = make(tmp_path / "disk")
    with DiskFile(path):
        assert "in use" in refusal(path)
        assert "writes to it" in refusal(path, read_only=True)
    with DiskFile(path, read_only=True), DiskFile(path, read_only=True):
        assert "has it open" in refusal(path)
    with DiskFile(path) as disk:
        assert disk.sectors == (1 << 20) // SECTOR
        DiskFile(path, lock=False).close()
    disk.close()


def test_the_lock_holds_against_another_process_and_ends_with_its_owner(tmp_path: Path) -> None:
    path = make(tmp_path / "disk")
    script = "import sys; from pyvmm.devices.virtio.disk import DiskFile as D; d = D(sys.argv[1]); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert "in use" in refusal(path)
        process.kill()
    DiskFile(path).close()


def test_a_discarded_part_is_deallocated_and_its_neighbours_stay(tmp_path: Path) -> None:
    path = make(tmp_path / "disk")
    with DiskFile(path) as disk:
        assert disk.can_discard
        before = os.stat(path).st_blocks
        disk.discard(1 << 18, 1 << 18)
        os.fsync(disk.fd)
        assert os.stat(path).st_blocks <= before - (1 << 18) // SECTOR
        assert os.stat(path).st_size == 1 << 20
        assert os.pread(disk.fd, 1, (1 << 18) - 1) == os.pread(disk.fd, 1, 1 << 19) == b"\xa5"


@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize("supported", [True, False])
def test_a_zeroed_part_reads_as_zeros_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unmap: bool, supported: bool
) -> None:
    path = make(tmp_path / "disk", 3 << 20)
    with DiskFile(path) as disk:
        if not supported:
            monkeypatch.setattr(libc, "fallocate", lambda *_: errno.EOPNOTSUPP)
        disk.write_zeroes(SECTOR, (2 << 20) + SECTOR, unmap=unmap)
    data = Path(path).read_bytes()
    assert data == b"\xa5" * SECTOR + bytes((2 << 20) + SECTOR) + b"\xa5" * ((1 << 20) - 2 * SECTOR)


def test_a_failed_discard_raises_and_is_not_replaced_by_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DiskFile(make(tmp_path / "disk")) as disk:
        monkeypatch.setattr(libc, "fallocate", lambda *_: errno.ENOSPC)
        for drop in (disk.discard, lambda at, n: disk.write_zeroes(at, n, unmap=True)):
            with pytest.raises(OSError, match="No space left"):
                drop(0, SECTOR)


def test_the_option_has_the_path_and_the_kind_of_disk() -> None:
    parser = argparse.ArgumentParser()
    Table(DEVICE_OPTIONS, lambda _parser: None).add_to(parser)
    words = ["-d", "a.img", "--disk", "b=c.img,ro,queues=4,serial=root"]
    with pytest.raises(SystemExit):  # b is not a key
        parser.parse_args(words)
    specs = device_specs(parser.parse_args(["-d", "a.img", "--disk", "path=b=c.img,ro,queues=4,serial=root"]))
    assert specs == (Disk("a.img"), Disk("b=c.img", read_only=True, queues=4, serial="root"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "names no file"),
        ("ro", "names no file"),
        ("a,r0", "'r0' in 'a,r0' is not known; known are path=, ro, queues=, serial=, block="),
        ("a,ro,ro", "ro is twice"),
        ("a,queues=0", "'0' is not a count"),
        ("a,ro=no", "ro takes no value"),
    ],
)
def test_the_error_for_an_invalid_option_names_the_part(text: str, complaint: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=complaint):
        PARTS(text)


def test_the_number_of_queues_and_the_size_are_bounded() -> None:
    with pytest.raises(UsageError, match="17 queues: it can have 1 to 16"):
        Disk("a", queues=17)
    with pytest.raises(UsageError, match="more than 20 bytes"):
        Disk("a", serial="x" * 21)


def test_a_file_can_be_two_disks_only_if_both_are_read_only(tmp_path: Path) -> None:
    path = make(tmp_path / "image")
    os.symlink(path, tmp_path / "link")
    other = str(tmp_path / "link")
    MachineConfig("k", devices=(Disk(path, read_only=True), Disk(other, read_only=True))).check()
    for devices in ((Disk(path), Disk(other)), (Disk(path, read_only=True), Disk(other))):
        with pytest.raises(UsageError, match="is given 2 times, but the guest may write to it"):
            MachineConfig("k", devices=devices).check()


def test_files_of_many_disks_are_looked_up_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    resolve = os.path.realpath

    def look_up(path: str) -> str:
        seen.append(path)
        return resolve(path)

    monkeypatch.setattr(os.path, "realpath", look_up)
    paths = [f"/nonexistent/{number}" for number in range(64)]
    MachineConfig("k", devices=(Rng(), *map(Disk, paths))).check()
    assert seen == paths


@pytest.mark.parametrize("size", [1, 511, 3000, 8192])
def test_a_block_size_that_guests_do_not_take_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"with blocks of {size} bytes: they can have 512, 1024, 2048, 4096"):
        Disk("a", block=size)


def test_the_command_line_gives_a_disk_its_blocks() -> None:
    parser = argparse.ArgumentParser()
    Table(DEVICE_OPTIONS, lambda _: None).add_to(parser)
    args = parser.parse_args(["--console", "none", "-d", "a.img,block=4096"])
    assert device_specs(args) == (Disk("a.img", block=4096),)
